"""The root key in HashiCorp Vault: its transit engine wraps and unwraps, and the key never comes here.

URI: ``vault:https://HOST:8200/MOUNT/keys/NAME``, MOUNT usually ``transit``. The token comes from VAULT_TOKEN, else
from the file that VAULT_TOKEN_FILE names (an agent keeps it fresh; it is read for every call), else from
~/.vault-token. VAULT_CACERT and VAULT_NAMESPACE mean what they mean to Vault's own tools.

A wrapped key is bound to its row twice: as the transit ``context``, which counts where the transit key is a derived
one, and by a digest sealed beside the key, which counts always.

Source: https://developer.hashicorp.com/vault/api-docs/secret/transit
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker_server.crypto.aead import KEY_BYTES, DecryptionError, associated_data

SCHEME = "vault"
TIMEOUT_S = 10
_URL = re.compile(
    r"(?P<base>(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?)"
    r"/(?P<mount>[A-Za-z0-9._/-]+)/keys/(?P<name>[A-Za-z0-9._-]+)",
    re.ASCII,
)


class TransitKeyProvider:
    """A root key inside Vault. Every wrap and unwrap is one call; tenants' keys are cached by the keyring."""

    __slots__ = ("_environ", "_mount", "_name", "_session", "_url")

    def __init__(self, where: str, environ: Mapping[str, str] = os.environ) -> None:
        """Parse the part of the URI after ``vault:``; nothing is sent.

        Raises:
            InvalidRequestError: not such a URL, plaintext off this machine, or hvac is not installed.
        """
        match = _URL.fullmatch(where)
        if match is None:
            raise _refused("the root key's URI is not vault:https://HOST:PORT/MOUNT/keys/NAME", "a transit key's URL")
        if match["scheme"] == "http" and not _is_loopback(match["host"]):
            raise _refused("Vault would be reached unencrypted: write vault:https://...", "https")
        self._url, self._mount, self._name = match["base"], match["mount"], match["name"]
        self._environ = environ
        self._session = _hvac()

    def wrap(self, key: bytes, aad: bytes) -> bytes:
        """Encrypt a key, bound to ``aad``.

        Raises:
            ServerError: Vault cannot be reached or refuses.
        """
        bound = base64.b64encode(key + hashlib.sha256(aad).digest()).decode()
        reply = self._call("encrypt_data", plaintext=bound, context=_context(aad))
        text = reply.get("ciphertext")
        if not isinstance(text, str) or not text.startswith("vault:v"):
            raise ServerError("Vault answered an encryption with something else; is the URI that of a transit key?")
        return text.encode()

    def unwrap(self, wrapped: bytes, aad: bytes) -> bytes:
        """Undo `wrap`.

        Raises:
            DecryptionError: wrapped by another key or for another ``aad``, or changed since.
            ServerError: Vault cannot be reached or denies access.
        """
        try:
            text = wrapped.decode("ascii")
        except UnicodeDecodeError:
            raise DecryptionError from None
        reply = self._call("decrypt_data", ciphertext=text, context=_context(aad))
        try:
            plain = base64.b64decode(str(reply.get("plaintext")), validate=True)
        except (binascii.Error, ValueError):
            raise DecryptionError from None
        key, digest = plain[:KEY_BYTES], plain[KEY_BYTES:]
        if len(key) != KEY_BYTES or not hmac.compare_digest(digest, hashlib.sha256(aad).digest()):
            raise DecryptionError
        return key

    def _call(self, operation: str, **arguments: str) -> dict[str, Any]:
        from hvac import exceptions  # type: ignore[import-untyped]

        client = self._session(
            url=self._url,
            token=_token(self._environ),
            namespace=self._environ.get("VAULT_NAMESPACE"),
            verify=self._environ.get("VAULT_CACERT") or True,
            timeout=TIMEOUT_S,
        )
        try:
            call = getattr(client.secrets.transit, operation)
            reply = call(name=self._name, mount_point=self._mount, **arguments)
            return dict(reply["data"])
        except exceptions.InvalidRequest as e:
            if operation == "decrypt_data":
                raise DecryptionError from None
            raise ServerError(f"Vault refuses the transit key {self._name}: {e}") from e
        except (exceptions.Forbidden, exceptions.Unauthorized) as e:
            raise ServerError(
                f"Vault denies access to the transit key {self._name}; the token needs update on "
                f"{self._mount}/encrypt/{self._name} and {self._mount}/decrypt/{self._name}"
            ) from e
        except exceptions.InvalidPath as e:
            raise ServerError(f"Vault has no transit key {self._name} at {self._mount}; create it there") from e
        except (exceptions.VaultError, OSError, KeyError, TypeError, ValueError) as e:
            raise ServerError(
                f"Vault at {self._url} does not answer ({type(e).__name__}); without it nothing can be read",
                details={"retry": True},
            ) from e
        finally:
            client.adapter.close()

    def __repr__(self) -> str:
        return f"TransitKeyProvider({self._url}/{self._mount}/keys/{self._name})"


def _token(environ: Mapping[str, str]) -> str:
    if token := environ.get("VAULT_TOKEN", "").strip():
        return token
    path = Path(environ.get("VAULT_TOKEN_FILE") or Path.home() / ".vault-token")
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise _refused(f"there is no Vault token: set VAULT_TOKEN, or put one in {path}", "a token") from e


def _context(aad: bytes) -> str:
    return base64.b64encode(associated_data("tg-tinker/vault-context/v1", aad)).decode()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _hvac() -> Callable[..., Any]:
    try:
        import hvac
    except ModuleNotFoundError as e:
        raise _refused("a root key in Vault needs the package hvac: pip install 'tg-tinker[vault]'", "hvac") from e
    client: Callable[..., Any] = hvac.Client
    return client


def _refused(message: str, constraint: str) -> InvalidRequestError:
    return InvalidRequestError(message, field="root_key", constraint=constraint)
