"""API keys: ``tgk_<key id>_<secret><CRC32>``, made once, shown once, and stored only as a MAC.

The key id is 16 hex digits and public, the secret 64 (256 bits), the check 8: CRC-32 (zlib's) of all text
before it. It tells a mistyped key from a wrong one without asking a server, and lets secret scanners be sure.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from dataclasses import dataclass, field

from tg_tinker.errors import AuthenticationError
from tg_tinker_server.crypto.aead import associated_data

SHAPE = re.compile(r"tgk_([0-9a-f]{16})_([0-9a-f]{64})([0-9a-f]{8})", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One API key in full. Its repr shows the id only."""

    key_id: str
    secret: bytes = field(repr=False)

    @property
    def text(self) -> str:
        """What the user keeps."""
        body = f"tgk_{self.key_id}_{self.secret.hex()}"
        return f"{body}{_check(body)}"


def mint() -> ApiKey:
    """A new key from the operating system's generator."""
    return ApiKey(key_id=secrets.token_hex(8), secret=secrets.token_bytes(32))


def parse(text: str) -> ApiKey:
    """Read a key as a user sends it.

    Raises:
        AuthenticationError: not shaped like a key, or mistyped; the message never repeats it.
    """
    found = SHAPE.fullmatch(text.strip())
    if found is None:
        raise AuthenticationError(
            "this is not a TG-Tinker API key; a key looks like tgk_<16 hex digits>_<72 hex digits>, copy all of it"
        )
    key_id, secret, check = found.groups()
    if not hmac.compare_digest(check, _check(f"tgk_{key_id}_{secret}")):
        raise AuthenticationError("the API key is mistyped: its last 8 digits do not fit the rest; copy it again")
    return ApiKey(key_id=key_id, secret=bytes.fromhex(secret))


def mac(key: ApiKey, pepper: bytes) -> bytes:
    """What the server stores: HMAC-SHA256 under a pepper that does not lie in the same database.

    A copy of the table without the pepper is useless for guessing and for making keys.
    """
    if len(pepper) < 32:
        raise ValueError(f"a pepper has at least 32 bytes, not {len(pepper)}")
    return hmac.digest(pepper, associated_data("tg-tinker/api-key/v1", key.key_id, key.secret), hashlib.sha256)


def matches(key: ApiKey, pepper: bytes, stored_mac: bytes) -> bool:
    """Whether this is the key whose MAC was stored; takes the same time whatever the difference."""
    return hmac.compare_digest(mac(key, pepper), stored_mac)


def _check(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"
