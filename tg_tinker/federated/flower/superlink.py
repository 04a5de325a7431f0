"""The coordinator's side of Flower: its SuperLink, and runs whose ServerApp is this process."""

from __future__ import annotations

import http.client
import logging
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.federated.flower.apps import server_app
from tg_tinker.federated.flower.entry import LARGEST_BODY, NODE_KEY
from tg_tinker.federated.flower.executor import serve_run
from tg_tinker.federated.flower.internals import Control, Endpoint, check_node_key
from tg_tinker.federated.flower.program import Program, is_free, task_secret
from tg_tinker.federated.flower_settings import FlowerCoordinator, split_address
from tg_tinker.federated.link import CoordinatorLink

_log = logging.getLogger("tg_tinker")
_T = TypeVar("_T")
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what to call oneself then
_LOOK_S = 0.1
_RUN_S = 60.0


class SuperLink:
    """A SuperLink in a ``with`` block, over TLS, for registered nodes only.

    Its state lives in memory: what must last is the coordinator's own, and SQLite under load locks (Flower answers
    500 and its SuperNodes end).

    Args:
        settings: paths must be absolute or relative to the working folder.
        timeout_s: how long it may take to answer first.

    Raises:
        InvalidRequestError: a file is missing, or the certificate is not valid for this computer.
        ServerError: it does not start; the message has its reason.
    """

    def __init__(self, settings: FlowerCoordinator, *, timeout_s: float = 60.0) -> None:
        for path, what in ((settings.ca, "ca"), (settings.certificate, "certificate"), (settings.key, "key")):
            if not path.is_file():
                raise InvalidRequestError(f"flower.{what}: there is no file {path}", field=f"flower.{what}")
        self._settings = settings
        self._timeout_s = timeout_s
        host, port = split_address(settings.address)
        own = _EVERYWHERE.get(host, host)
        self._own, self._port = own, port
        self.address = f"[{own}]:{port}" if ":" in own else f"{own}:{port}"
        for site, path in settings.node_keys.items():
            node_key(site, path)
        folder = settings.state_dir.absolute()
        secret_file = folder / "tasks.secret"
        self._endpoint = Endpoint(
            address=self.address, secret=task_secret(secret_file), root_certificates=settings.ca.read_bytes()
        )
        self.program = Program(
            "superlink",
            [
                *("--host", host, "--port", str(port)),
                *("--ssl-ca-certfile", str(settings.ca.absolute())),
                *("--ssl-certfile", str(settings.certificate.absolute())),
                *("--ssl-keyfile", str(settings.key.absolute())),
                *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
                *("--isolation", "process"),
                *("--superexec-auth-secret-file", str(secret_file)),
                *(part for path in settings.node_keys.values() for part in (NODE_KEY, str(path.absolute()))),
                *(LARGEST_BODY, str(settings.largest_body)),
            ],
            folder,
        )

    def __enter__(self) -> SuperLink:
        if not is_free(*split_address(self._settings.address)):
            raise ServerError(
                f"{self._settings.address} cannot be listened on: another program does (an earlier coordinator?), or "
                "it is no address of this computer"
            )
        try:
            self.program.start()
            self._wait_ready()
            self._register()
        except BaseException:
            self.program.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.program.stop()

    def ended(self) -> str:
        """Why the program has ended; "" while it runs."""
        if self.program.running:
            return ""
        return f"flower-superlink ended: {self.program.reason()}; its log is {self.program.log}"

    def run(self, run: Callable[[CoordinatorLink], _T], *, roster: Mapping[str, str], key: Ed25519PrivateKey) -> _T:
        """Start a run and be its ServerApp: call ``run`` with a link to the sites of ``roster``; its value.

        Raises:
            ServerError: the SuperLink gives out no run, or ended; besides whatever ``run`` raises.
        """
        value: list[_T] = []
        control = Control(self.address, self._settings.ca.read_bytes())
        try:
            control.start_run()
        finally:
            control.close()
        app = server_app(lambda link: value.append(run(link)), roster=roster, key=key, ended=self.ended)
        serve_run(self._endpoint, app, timeout_s=_RUN_S)
        return value[0]

    def _register(self) -> None:
        control = Control(self.address, self._settings.ca.read_bytes())
        try:
            for site, path in self._settings.node_keys.items():
                control.register(site, node_key(site, path))
        finally:
            control.close()

    def _wait_ready(self) -> None:
        context = ssl.create_default_context(cafile=str(self._settings.ca))
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            if why := self.ended():
                raise ServerError(why)
            connection = http.client.HTTPSConnection(self._own, self._port, timeout=5, context=context)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except ssl.SSLCertVerificationError as e:
                raise InvalidRequestError(
                    f"{self._settings.ca} does not vouch for {self._settings.certificate} as {self._own} "
                    f"({e.verify_message}). The coordinator itself reaches its SuperLink by that name, sites by "
                    "theirs: all must stand in it",
                    field="flower.certificate",
                ) from e
            except (OSError, http.client.HTTPException):
                time.sleep(_LOOK_S)
            finally:
                connection.close()
        raise ServerError(
            f"flower-superlink did not answer within {self._timeout_s:g} s; its log is {self.program.log}"
        )


def node_key(site: str, path: Path) -> bytes:
    """The public key of a site's node, in OpenSSH form.

    Raises:
        InvalidRequestError: the file cannot be read or holds no such key.
    """
    try:
        text = path.read_bytes()
    except OSError as e:
        raise InvalidRequestError(
            f"flower.node_keys: cannot read the node key of {site!r}, {path}: {e.strerror}", field="flower.node_keys"
        ) from e
    check_node_key(site, text)
    return text
