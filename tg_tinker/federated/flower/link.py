"""`CoordinatorLink` over Flower's Grid: finds which node is which site, sends requests, collects replies.

Only Flower's Message API and Grid are used. Nothing that arrives is trusted: replies that cannot be read, answer
another request or come twice are dropped; signatures are checked by whoever uses the link.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message
from flwr.serverapp import Grid

from tg_tinker.errors import FederationRefusedError, ServerError
from tg_tinker.federated import hello
from tg_tinker.federated.flower.records import MESSAGE_TYPE, Shared, from_content, to_content
from tg_tinker.federated.link import Outcome
from tg_tinker.federated.messages import Envelope

_log = logging.getLogger("tg_tinker")

APP_FAILED = 2
NODE_UNAVAILABLE = 5
FAILURES = {
    1: "its app could not be loaded",
    APP_FAILED: "its app failed",
    3: "the request was lost before the site took it",
    4: "the reply was lost at the SuperLink",
    NODE_UNAVAILABLE: "its SuperNode is gone",
    6: "its SuperNode refused the request",
    7: "its SuperNode refused the app bundle",
    8: "its app crashed",
}
"""Flower's error codes in plain words."""
_FIRST_POLL_S = 0.01
_ENDED_S = 1.0
_ASK_AGAIN_S = 60.0
"""A node that was no site of the job may be set right and restarted under its number."""
_LONGEST_REASON = 300
_T = TypeVar("_T")


class _LinkError(Exception):
    """A call to the Grid failed or took too long. ``final``: asking again would fail again."""

    def __init__(self, words: str, *, final: bool) -> None:
        super().__init__(words)
        self.final = final


class _NoReply(Exception):
    """Flower answered for the site: why, in plain words."""


@dataclass(frozen=True, slots=True)
class _Question:
    node: int
    request: Envelope
    expires: float


class FlowerLink:
    """A link over a Grid.

    Args:
        grid: of the ServerApp, or `in_process.InProcessGrid`.
        roster: each site's public key (`Job.roster`). A node that proves to be none of them is ignored.
        key: the coordinator's; it signs the question who is there.
        hello_timeout_s: how long to wait for a new node to say its name. A SuperNode handles one message at a time,
            so one that still trains for an earlier request answers later.
        poll_s: the longest pause between two looks for replies.
        ended: why there is no SuperLink any more, "" while there is: saves waiting for it.

    Attributes:
        ignored: why a node, by its number, is no site of the job.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        roster: Mapping[str, str],
        key: Ed25519PrivateKey,
        hello_timeout_s: float = 30.0,
        poll_s: float = 0.5,
        ended: Callable[[], str] = lambda: "",
    ) -> None:
        self.ignored: dict[int, str] = {}
        self._grid = grid
        self._roster = dict(roster)
        self._key = key
        self._hello_timeout_s = hello_timeout_s
        self._poll_s = poll_s
        self._ended = ended
        self._nodes: dict[str, int] = {}
        self._asked: dict[str, _Question] = {}
        self._ask_again: dict[int, float] = {}
        self._one_by_one = False

    def sites(self) -> Sequence[str]:
        """Names of the sites that are connected and have proved who they are, sorted.

        Asks nodes that are new; waits for their answers once, for at most ``hello_timeout_s``.

        Raises:
            ServerError: the SuperLink does not answer, or ended the run.
        """
        try:
            self._look(self._roster, time.monotonic() + self._hello_timeout_s)
        except _LinkError as e:
            raise ServerError(f"the SuperLink cannot be asked which sites are connected: {e}; is it running?") from e
        return sorted(self._nodes)

    def exchange(self, requests: Sequence[Envelope], *, timeout_s: float) -> list[Outcome]:
        """Send all, wait for all or for the deadline; one outcome for each request, in its order.

        A request dies with its deadline: a site that connects later never sees it. A later reply is dropped.

        Raises:
            FederationRefusedError: "bad_update": a request is too large or of a type that is not sent.
            ServerError: the SuperLink ended the run.
        """
        deadline = time.monotonic() + timeout_s
        outcomes: dict[int, Outcome] = {}
        waiting: dict[str, int] = {}
        try:
            self._look({r.site for r in requests}, min(deadline, time.monotonic() + self._hello_timeout_s))
            waiting = self._send(requests, deadline)
            for message_id, reply in self._replies(waiting, deadline):
                index = waiting[message_id]
                outcomes[index] = _outcome(requests[index], reply)
        except _LinkError as e:
            late = f"the SuperLink cannot be reached: {e}"
        else:
            late = f"no answer within {timeout_s:g} s"
        sent = set(waiting.values())
        for index, request in enumerate(requests):
            if index not in outcomes:
                away = index not in sent and request.site not in self._nodes
                failure = f"no node that is connected proved to be {request.site!r}" if away else late
                outcomes[index] = Outcome(site=request.site, reply=None, failure=failure)
        return [outcomes[index] for index in range(len(requests))]

    def _send(self, requests: Sequence[Envelope], deadline: float) -> dict[str, int]:
        """Push the requests of sites that are known; the place of each by the id of its message."""
        ttl = max(deadline - time.monotonic(), 0.001)
        shared: Shared = {}
        places, messages = [], []
        for index, request in enumerate(requests):
            node = self._nodes.get(request.site)
            if node is not None:
                places.append(index)
                messages.append(self._message(request, node, ttl, shared))
        return dict(zip(self._push(messages, deadline), places, strict=True)) if messages else {}

    def _message(self, request: Envelope, node: int, ttl: float, shared: Shared | None = None) -> Message:
        content = to_content(request, shared=shared)
        return Message(content, node, MESSAGE_TYPE, ttl=ttl, group_id=str(request.round))

    def _push(self, messages: list[Message], deadline: float) -> list[str]:
        ids = self._within(deadline, lambda: list(self._grid.push_messages(messages)))
        if len(ids) != len(messages) or not all(ids):
            raise _LinkError("it did not take the requests; its log says why", final=True)
        return ids

    def _replies(self, ids: Collection[str], deadline: float) -> Iterator[tuple[str, Message | str]]:
        """The first reply to each message, or why there is none, as they come, until the deadline."""
        missing = set(ids)
        pause = _FIRST_POLL_S
        while missing and time.monotonic() < deadline:
            for message_id, reply in self._pull(missing, deadline):
                if message_id in missing:
                    missing.discard(message_id)
                    yield message_id, reply
            if missing:
                time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
            pause = min(pause * 1.5, self._poll_s)

    def _pull(self, ids: Collection[str], deadline: float) -> Iterable[tuple[str, Message | str]]:
        """What has arrived. A reply that Flower cannot decode spoils the pull it is in, so after the first such one
        each is pulled by itself: only its sender is lost."""
        if not self._one_by_one:
            try:
                return self._within(deadline, partial(self._fetch, list(ids)))
            except _LinkError as e:
                if not e.final:
                    return []
                _log.warning("a reply cannot be read (%s); from now on each is fetched by itself", e)
                self._one_by_one = True
        found: list[tuple[str, Message | str]] = []
        for message_id in list(ids):
            try:
                found += self._within(deadline, partial(self._fetch, [message_id]))
            except _LinkError as e:
                if e.final:
                    found.append((message_id, f"its reply cannot be read ({e})"))
        return found

    def _fetch(self, ids: list[str]) -> list[tuple[str, Message | str]]:
        return [(m.metadata.reply_to_message_id, m) for m in self._grid.pull_messages(ids)]

    def _look(self, wanted: Collection[str], deadline: float) -> None:
        """Learn which node is which site, as far as ``wanted`` has names that are not known yet."""
        online = set(self._within(deadline, lambda: list(self._grid.get_node_ids())))
        self._nodes = {site: node for site, node in self._nodes.items() if node in online}
        now = time.monotonic()
        self.ignored = {n: why for n, why in self.ignored.items() if n in online and self._ask_again[n] > now}
        self._asked = {i: q for i, q in self._asked.items() if q.node in online and q.expires > now}
        if set(wanted) <= set(self._nodes):
            return
        silent = {q.node for q in self._asked.values()}
        new = sorted(online - set(self._nodes.values()) - set(self.ignored) - silent)
        if new:
            requests = [hello.ask(self._key) for _ in new]
            ttl = self._hello_timeout_s * 4  # a busy site may answer later; its answer is found by the next look
            ids = self._push([self._message(r, n, ttl) for r, n in zip(requests, new, strict=True)], deadline)
            questions = (_Question(n, r, now + ttl) for r, n in zip(requests, new, strict=True))
            self._asked.update(zip(ids, questions, strict=True))
        wait = deadline if new else now + _FIRST_POLL_S
        for message_id, reply in self._replies(list(self._asked), wait):
            question = self._asked.pop(message_id)
            self._introduce(question, reply)
            if set(wanted) <= set(self._nodes):
                return

    def _introduce(self, question: _Question, reply: Message | str) -> None:
        try:
            site = hello.recognise(_read(reply), question.request, roster=self._roster)
        except FederationRefusedError as e:
            self.ignored[question.node] = e.message
            self._ask_again[question.node] = time.monotonic() + _ASK_AGAIN_S
            _log.warning("node %d is ignored: %s", question.node, e.message)
            return
        except _NoReply as e:
            _log.warning("node %d did not say which site it is: %s", question.node, e)
            return
        if site in self._nodes:
            _log.warning("site %s is now node %d; it was node %d", site, question.node, self._nodes[site])
        self._nodes[site] = question.node

    def _within(self, deadline: float, call: Callable[[], _T]) -> _T:
        """The call's value, or an error at the deadline: Flower itself would try to reach a SuperLink for ever."""
        done: list[_T] = []
        failed: list[BaseException] = []

        def work() -> None:
            try:
                done.append(call())
            except BaseException as e:  # noqa: BLE001 - Flower stops a run with exceptions of its own kinds
                failed.append(e)

        thread = threading.Thread(target=work, daemon=True, name="flower-link")
        thread.start()
        while True:
            left = deadline - time.monotonic()
            thread.join(max(min(left, _ENDED_S), _FIRST_POLL_S))
            if not thread.is_alive():
                break
            if why := self._ended():
                raise ServerError(f"{why}; start the coordinator again, it resumes")
            if left <= _ENDED_S:
                break
        if done:
            return done[0]
        if not failed:
            raise _LinkError("it did not answer in time", final=False)
        error = failed[0]
        words = f"{type(error).__name__}: {_plain(str(error))}"
        if not isinstance(error, Exception):
            raise ServerError(f"Flower ended the run ({words}); start the coordinator again, it resumes") from error
        # What the HTTP client raises may pass; anything else comes from decoding what was received.
        raise _LinkError(words, final=not type(error).__module__.startswith("httpx")) from error


def _outcome(request: Envelope, reply: Message | str) -> Outcome:
    try:
        answer = _read(reply)
    except (FederationRefusedError, _NoReply) as e:
        return Outcome(site=request.site, reply=None, failure=str(e))
    if answer.direction != "reply" or _place(answer) != _place(request):
        return Outcome(site=request.site, reply=None, failure="its reply answers another request")
    return Outcome(site=request.site, reply=answer)


def _place(message: Envelope) -> tuple[Any, ...]:
    return message.kind, message.job, message.site, message.round, message.attempt


def _read(reply: Message | str) -> Envelope:
    """The envelope in a reply."""
    if isinstance(reply, str):
        raise FederationRefusedError(reply, reason="bad_update")
    if reply.has_error():
        words = FAILURES.get(reply.error.code, f"Flower answered with error {reply.error.code}")
        reason = _plain(reply.error.reason or "")
        raise _NoReply(f"{words} ({reason})" if reason else words)
    try:
        return from_content(reply.content)
    except FederationRefusedError:
        raise
    except Exception as e:  # whatever a node sends, the other nodes' replies are read
        raise FederationRefusedError(f"the message cannot be read ({type(e).__name__})", reason="bad_update") from e


def _plain(text: str) -> str:
    """One short printable line: this comes from elsewhere."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)[:_LONGEST_REASON]
