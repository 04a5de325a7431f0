"""A site's side of Flower: its SuperNode, restarted when it ends, and our executor that handles its messages."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable

from flwr.clientapp import ClientApp

from tg_tinker.errors import FederationRefusedError, InvalidRequestError, ServerError, TGTinkerError
from tg_tinker.federated.flower.executor import serve_site
from tg_tinker.federated.flower.internals import Endpoint
from tg_tinker.federated.flower.program import Program, free_port, task_secret
from tg_tinker.federated.flower_settings import FlowerSite
from tg_tinker.federated.keys import read_secret

_log = logging.getLogger("tg_tinker")

_CONNECTED = re.compile(r"SuperNode ID: (\d+)")
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_STEADY_S = 60.0
"""A SuperNode that held out this long is restarted without delay."""
_WATCH_S = 0.2
_LAST_WORDS_S = 5.0
_SILENCE_S = 15.0
"""So long without a connection is told to the operator: the SuperNode itself tries for ever and says nothing."""


class SuperNode:
    """A SuperNode that carries messages and runs nothing: its ClientApps are our executor's business.

    Args:
        settings: paths must be absolute or relative to the working folder.
    """

    def __init__(self, settings: FlowerSite) -> None:
        for path, what in (
            (settings.root_certificates, "root_certificates"),
            (settings.node_key, "node_key"),
        ):
            if not path.is_file():
                raise InvalidRequestError(f"flower.{what}: there is no file {path}", field=f"flower.{what}")
        self._settings = settings
        folder = settings.state_dir.absolute()
        secret_file = folder / "tasks.secret"
        port = free_port()
        self.endpoint = Endpoint(address=f"127.0.0.1:{port}", secret=task_secret(secret_file))
        self.program = Program(
            "supernode",
            [
                *("--superlink", settings.superlink),
                *("--root-certificates", str(settings.root_certificates.absolute())),
                *("--auth-supernode-private-key", str(settings.node_key.absolute())),
                *("--isolation", "process"),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--superexec-auth-secret-file", str(secret_file)),
            ],
            folder,
        )

    @property
    def number(self) -> int | None:
        """Flower's number of this node, once the SuperLink let it in."""
        found = _CONNECTED.search(self.program.said())
        return int(found.group(1)) if found else None

    def wait_connected(self, timeout_s: float) -> int:
        """Wait until the SuperLink let it in; its number.

        Raises:
            FederationRefusedError: "unknown_site": the SuperLink does not know the node's key.
            InvalidRequestError: the SuperLink's certificate is not one of ``root_certificates``.
            ServerError: the program ended for another reason, or the SuperLink did not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if (number := self.number) is not None:
                return number
            if not self.program.running:
                raise self.failure()
            time.sleep(_WATCH_S)
        raise self.unanswered(timeout_s)

    def unanswered(self, waited_s: float) -> ServerError:
        """That nobody let it in so far."""
        return ServerError(
            f"the SuperLink at {self._settings.superlink} did not answer within {waited_s:g} s; is the coordinator "
            f"running, and can this computer reach it? The SuperNode's log is {self.program.log}"
        )

    def failure(self) -> TGTinkerError:
        """Why the program ended."""
        said, superlink = self.program.said(), self._settings.superlink
        if re.search(r"certificate verify failed|CERTIFICATE_VERIFY_FAILED|SSL/TLS handshake error", said):
            return InvalidRequestError(
                f"the SuperLink at {superlink} shows a certificate that {self._settings.root_certificates} does not "
                "vouch for: compare the file with the coordinator's ca, and the address with the names in the "
                "certificate. Nothing was sent",
                field="flower.root_certificates",
                constraint="the coordinator's certificate authority",
            )
        if "Failed to activate SuperNode" in said or "Invalid SuperNode authentication" in said:
            return FederationRefusedError(
                f"the SuperLink at {superlink} does not let this node in. Either it does not know the key: the "
                f"coordinator must list {self._settings.node_key.name}.pub under flower.node_keys and start again. "
                "Or it has not noticed yet that this node was cut off, which takes a minute. Or the clocks of the "
                "two computers differ",
                reason="unknown_site",
            )
        return ServerError(f"flower-supernode ended: {self.program.reason()}; its log is {self.program.log}")


def serve(
    settings: FlowerSite,
    app: ClientApp,
    *,
    stop: threading.Event | None = None,
    tell: Callable[[str], None] = lambda text: _log.warning("%s", text),
) -> None:
    """Be a site until ``stop`` is set: keep a SuperNode running, hand its messages to ``app`` in another thread.

    A message that is at work when ``stop`` is set has 5 s to be done with; then the caller is expected to end the
    process, which a site's handler must bear at any moment anyway. A SuperNode ends when its SuperLink falters or
    does not know it yet; it is started again after 1 to 30 s. One that somebody else runs (``settings.supernode``) is
    waited for.

    Args:
        tell: gets news for the site's operator, one line each.

    Raises:
        InvalidRequestError: the SuperLink's certificate is not one of ``root_certificates``, or a file is missing.
    """
    over = stop or threading.Event()
    if settings.supernode is not None and settings.tasks_secret is not None:
        _serve_aside(Endpoint(address=settings.supernode, secret=read_secret(settings.tasks_secret)), app, over)
        return
    node = SuperNode(settings)
    trouble: list[TGTinkerError] = []
    watcher = threading.Thread(target=_watch, args=(node, over, tell, trouble), daemon=True, name="supernode-watch")
    try:
        node.program.start()
        watcher.start()
        _serve_aside(node.endpoint, app, over)
    finally:
        over.set()
        if watcher.ident is not None:
            watcher.join()
        node.program.stop()
    if trouble:
        raise trouble[0]


def _serve_aside(endpoint: Endpoint, app: ClientApp, over: threading.Event) -> None:
    """Serve in a thread, so that nothing which a message takes long at keeps this one from stopping."""
    failed: list[Exception] = []

    def work() -> None:
        try:
            serve_site(endpoint, app, over)
        except Exception as e:  # noqa: BLE001 - raised again below
            failed.append(e)
            over.set()

    worker = threading.Thread(target=work, daemon=True, name="site-executor")
    worker.start()
    over.wait()
    worker.join(_LAST_WORDS_S)
    if failed:
        raise failed[0]


def _watch(node: SuperNode, over: threading.Event, tell: Callable[[str], None], trouble: list[TGTinkerError]) -> None:
    pause, started, known, last = _FIRST_PAUSE_S, time.monotonic(), False, ""
    silent_since: float | None = started
    while not over.wait(_WATCH_S):
        if node.program.running:
            if not known and node.number is not None:
                known, last, silent_since = True, "", None
                tell(f"connected to the SuperLink as node {node.number}")
            elif not known and silent_since is not None and time.monotonic() - silent_since > _SILENCE_S:
                silent_since = None
                tell(f"{node.unanswered(_SILENCE_S).message}; trying on until it does")
            continue
        failure = node.failure()
        if isinstance(failure, InvalidRequestError):
            trouble.append(failure)
            over.set()
            return
        if failure.message != last:
            last = failure.message
            tell(f"{failure.message}; trying again until it works")
        if time.monotonic() - started > _STEADY_S:
            pause = _FIRST_PAUSE_S
        over.wait(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_S)
        if not over.is_set():
            started, known = time.monotonic(), False
            silent_since = started if not last else None  # why is told already
            try:
                node.program.start()
            except ServerError as e:
                trouble.append(e)
                over.set()
