"""Flower in one process: a Grid in memory that runs the unchanged apps, and fails on demand.

No SuperLink, no SuperNodes, no Ray. As with real nodes, each handles one message at a time, an exception in an app
becomes an error reply, and nobody shares memory that can be written: messages are copied both ways.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from tg_tinker.federated.flower.link import APP_FAILED, NODE_UNAVAILABLE

_COORDINATOR_NODE = 1
_RUN = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong with one message.

    Attributes:
        drop: it never arrives.
        delay_s: the reply is found this much later.
        copies: how often the reply is found.
        error: the reply is this Flower error instead.
        unreadable: fetching the reply raises, as a reply does that Flower cannot decode.
    """

    drop: bool = False
    delay_s: float = 0.0
    copies: int = 1
    error: int | None = None
    unreadable: bool = False


Disturb = Callable[[str, Message], Fault | None]


@dataclass(slots=True)
class _Node:
    name: str
    app: ClientApp
    context: Context
    busy: threading.Lock = field(default_factory=threading.Lock)
    life: int = 0
    alive: bool = True


@dataclass(slots=True)
class _Flight:
    """A message that was sent."""

    request: Message
    node: int
    life: int
    fault: Fault
    replies: list[tuple[float, Message]] = field(default_factory=list)


class InProcessGrid(Grid):
    """A Grid over ClientApps in this process; use it in a ``with`` block.

    Args:
        apps: by any name, which the hooks below use; the coordinator sees numbers only.
        workers: messages handled at the same time.
        disturb: asked about each message before it is handed over.
    """

    def __init__(self, apps: Mapping[str, ClientApp], *, workers: int = 4, disturb: Disturb | None = None) -> None:
        self._nodes = {
            number: _Node(name, app, Context(_RUN, number, {}, RecordDict(), {}))
            for number, (name, app) in enumerate(apps.items(), start=_COORDINATOR_NODE + 1)
        }
        self._disturb = disturb
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="in-process-node")
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight] = {}
        self._ids = itertools.count(1)
        self._run = Run.create_empty(_RUN)
        # A message takes its sender from here; a real ServerApp's process sets it when it starts.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN, _COORDINATOR_NODE, 1

    def __enter__(self) -> InProcessGrid:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Take no more messages; wait for the apps that are at work."""
        self._pool.shutdown(cancel_futures=True)

    def serve(self, app: ServerApp) -> None:
        """Run a coordinator's app to its end."""
        app(grid=self, context=Context(_RUN, _COORDINATOR_NODE, {}, RecordDict(), {}))

    def kill(self, name: str) -> None:
        """The node is gone, and what it was at; its messages are answered with an error."""
        self._node(name).alive = False

    def revive(self, name: str) -> None:
        """The node is back under its number. It knows nothing of messages from before."""
        node = self._node(name)
        node.life += 1
        node.alive = True

    def number(self, name: str) -> int:
        """The node's number."""
        return next(number for number, node in self._nodes.items() if node.name == name)

    def _node(self, name: str) -> _Node:
        return self._nodes[self.number(name)]

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message (Flower's old way to make one)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Numbers of the nodes that live."""
        return [number for number, node in self._nodes.items() if node.alive]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to their nodes; an id of each."""
        ids = []
        for original in messages:
            message = deepcopy(original)
            message_id = f"message-{next(self._ids)}"
            message.metadata.__dict__["_message_id"] = message_id
            number = message.metadata.dst_node_id
            node = self._nodes[number]
            fault = (self._disturb(node.name, message) if self._disturb else None) or Fault()
            with self._lock:
                self._flights[message_id] = flight = _Flight(message, number, node.life, fault)
            if node.alive and not fault.drop:
                self._pool.submit(self._handle, flight)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there by now, each found once."""
        found: list[Message] = []
        now = time.monotonic()
        with self._lock:
            for message_id in message_ids:
                flight = self._flights.get(message_id)
                if flight is None:
                    continue
                node = self._nodes[flight.node]
                if not flight.replies and (not node.alive or node.life != flight.life):
                    flight.replies.append((now, Message(Error(NODE_UNAVAILABLE), reply_to=flight.request)))
                ready = [entry for entry in flight.replies if entry[0] <= now]
                flight.replies = [entry for entry in flight.replies if entry[0] > now]
                if ready and flight.fault.unreadable:
                    raise TypeError("Invalid arguments for Array")
                found += [deepcopy(reply) for _, reply in ready]
                if ready and not flight.replies:
                    del self._flights[message_id]
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then pull until all are there or the time is over."""
        missing = set(self.push_messages(messages))
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while missing and time.monotonic() < deadline:
            replies += self.pull_messages(missing)
            missing -= {reply.metadata.reply_to_message_id for reply in replies}
            time.sleep(0.001)
        return replies

    def _handle(self, flight: _Flight) -> None:
        node = self._nodes[flight.node]
        with node.busy:
            if not node.alive or node.life != flight.life:
                return
            if flight.fault.error is not None:
                reply = Message(Error(flight.fault.error), reply_to=flight.request)
            else:
                try:
                    reply = deepcopy(node.app(message=deepcopy(flight.request), context=node.context))
                except Exception as e:  # noqa: BLE001 - whatever an app raises
                    reply = Message(Error(APP_FAILED, type(e).__name__), reply_to=flight.request)
            if not node.alive or node.life != flight.life:
                return
            with self._lock:
                flight.replies += [(time.monotonic() + flight.fault.delay_s, reply)] * flight.fault.copies
