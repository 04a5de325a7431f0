"""What we use from inside of Flower, apart from its Message API and Grid: all of it is here.

Flower's own executors unpack the bundle that a run brings and import the app from it: code of the coordinator at
every site. Ours ask for tasks in the same way and run the app that is installed; bundles are carried, never opened.
That needs Flower's Runtime and Control APIs, which may change with any minor release: a new release is let in by
``pyproject.toml`` after the tests over real processes have passed with it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import Context, Message
from flwr.cli.build import build_fab_from_files
from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message

from tg_tinker.errors import InvalidRequestError, ServerError

_HEARTBEAT_S = 10.0
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_BUNDLE = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "tg-tinker-federation"
version = "{version}"
description = "Holds no code: every party runs the tg-tinker that it installed itself."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "tg-tinker"

[tool.flwr.app.components]
serverapp = "tg_tinker.federated.flower.apps:coordinator_app"
clientapp = "tg_tinker.federated.flower.apps:site_app"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where tasks are given out: a SuperNode's or a SuperLink's Runtime API.

    Attributes:
        address: host:port.
        secret: shared with that program, so that no other local user takes our tasks.
        root_certificates: PEM; ``None`` for a SuperNode's, which is reached over loopback without TLS.
    """

    address: str
    secret: bytes
    root_certificates: bytes | None = None

    def client(self, *, token: str = "") -> RuntimeHttpClient:
        """A client that takes tasks, or, with a token, works on one. It tries everything once."""
        own = (
            RuntimeTokenHttpInterceptor(token)
            if token
            else SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods=(_ACQUIRE,))
        )
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=self.root_certificates is None,
            root_certificates=self.root_certificates,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), own],
        )


class Tasks:
    """Asks for tasks of one kind."""

    def __init__(self, endpoint: Endpoint, kind: TaskType) -> None:
        self._client = endpoint.client()
        self._request = AcquireTaskRequest(supported_task_types=[kind])

    def next(self) -> str:
        """The token of a task that is now ours, or "" if there is none.

        Raises:
            ServerError: the program cannot be reached, or does not accept the secret.
        """
        try:
            taken = self._client.AcquireTask(self._request)
        except httpx.HTTPError as e:
            raise ServerError(f"Flower gives out no tasks: {words(e)}") from e
        return taken.token if taken.HasField("task") else ""

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


@contextmanager
def site_task(endpoint: Endpoint, token: str) -> Iterator[tuple[Message, Context, RuntimeHttpClient]]:
    """Work on a message: the block gets it and may `answer`; how the block ends is how the task ends."""
    client = endpoint.client(token=token)
    try:
        with _heartbeat(client), _outcome(client) as kept:
            message, context, _, _ = pull_task_input(client)  # the last is the coordinator's bundle: never opened
            kept.append(context)
            yield message, context, client
    finally:
        client.close()


def answer(client: RuntimeHttpClient, reply: Message, context: Context) -> None:
    """Send a reply to the message of `site_task`."""
    push_message(client, reply, context)


@contextmanager
def coordinator_task(endpoint: Endpoint, token: str) -> Iterator[tuple[Grid, Context]]:
    """Work as a run's ServerApp: the block gets its Grid; how the block ends is how the run ends."""
    client = endpoint.client(token=token)
    grid = HttpGrid(endpoint.address, False, endpoint.root_certificates, token=token)
    try:
        with _heartbeat(client), _outcome(client) as kept:
            task = client.PullTaskInput(PullTaskInputRequest())
            TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
            TaskIdentity.node_id = task.context.node_id
            context = context_from_proto(task.context)
            kept.append(context)
            grid.set_run(run_from_proto(task.run))
            yield grid, context
    finally:
        grid.close()
        client.close()


@contextmanager
def _outcome(client: RuntimeHttpClient) -> Iterator[list[Context]]:
    """Tell Flower how a task ended; the kind of an error, never its text."""
    context: list[Context] = []
    status, details = SubStatus.FAILED, "the app was stopped"
    try:
        yield context
        status, details = SubStatus.COMPLETED, ""
    except Exception as e:
        details = type(e).__name__
        raise
    finally:
        held = context_to_proto(context[0]) if context else None
        with suppress(httpx.HTTPError):  # Flower notices by the missing heartbeat
            client.PushTaskOutput(PushTaskOutputRequest(context=held, sub_status=status, details=details))


@contextmanager
def _heartbeat(client: RuntimeHttpClient) -> Iterator[None]:
    """Keep a task ours. Flower's own sender ends the whole process when a task is lost."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(_HEARTBEAT_S):
            try:
                client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            except httpx.HTTPError:
                continue

    thread = threading.Thread(target=beat, daemon=True, name="flower-heartbeat")
    thread.start()
    try:
        yield
    finally:
        over.set()


def check_node_key(site: str, public_key: bytes) -> EllipticCurvePublicKey:
    """The key in a text in OpenSSH form.

    Raises:
        InvalidRequestError: it is no elliptic-curve key.
    """
    try:
        key = load_ssh_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePublicKey):
        raise InvalidRequestError(
            f"the node key of {site!r} is no public EC key in OpenSSH form; the site sends its node_key's .pub",
            field="node_keys",
        )
    return key


class Control:
    """A SuperLink's Control API: registers nodes, starts runs."""

    def __init__(self, address: str, root_certificates: bytes) -> None:
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=root_certificates,
            interceptors=[CliClientHttpInterceptor(), RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def register(self, site: str, public_key: bytes) -> None:
        """Let a SuperNode in.

        Args:
            public_key: in OpenSSH form.

        Raises:
            InvalidRequestError: it is no elliptic-curve key.
            ServerError: the SuperLink refused.
        """
        key = check_node_key(site, public_key)
        try:
            self._client.RegisterNode(RegisterNodeRequest(public_key=public_key_to_bytes(key), name=site))
        except httpx.HTTPError as e:
            raise ServerError(f"the SuperLink does not register the node of {site!r}: {words(e)}") from e

    def start_run(self) -> int:
        """Start a run whose bundle holds no code; its number.

        Raises:
            ServerError: the SuperLink refused.
        """
        text = _BUNDLE.format(version=version("tg-tinker"))
        bundle, _ = build_fab_from_files({"pyproject.toml": text.encode()})
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        try:
            return self._client.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id
        except httpx.HTTPError as e:
            raise ServerError(f"the SuperLink does not start a run: {words(e)}") from e

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def words(error: httpx.HTTPError) -> str:
    """What went wrong, on one line."""
    if isinstance(error, httpx.HTTPStatusError):
        flower = FlowerError.from_json(error.response.text)
        return flower.message if flower else f"HTTP status {error.response.status_code}"
    return f"{type(error).__name__}: {error}"
