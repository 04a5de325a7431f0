"""Samples that are being made or wait to be fetched. They live in memory only: a client sends them again."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from tg_tinker.errors import InvalidRequestError, ServerError, TGTinkerError
from tg_tinker.types.tokens import SampleQuery, SampleResponse
from tg_tinker_server.gateway import names
from tg_tinker_server.gateway.errors import bare
from tg_tinker_server.gateway.tensors import Layout
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.samplers import SamplerService

CLONE = 1_000_000_000  # sequence numbers of the n-th copy of a client begin at n times this
MOST_KEPT = 20_000
KEPT_BYTES = 256 * 2**20
SILENT_S = 900.0  # without a sign of life a client is gone; its heartbeat comes every ten seconds
KEPT_S = 600.0  # after the first delivery: an answer can be lost on its way


@dataclass(eq=False, slots=True)
class Kept:
    """One sample.

    Attributes:
        key_id: of the key that asked for it.
        task: the sampling; of what was refused, the refusal.
        number: its cursor, once it ended.
        delivered: when it was first given out, on the monotonic clock.
        size: of the answer, bytes; about.
        unwanted: its client has given it up.
        layout: of the ids it asks for at the prompt's positions, if sparse.
    """

    tenant: str
    key_id: str
    request_id: str
    target: tuple[str, str, int]
    digest: bytes
    task: asyncio.Future[SampleResponse]
    number: int = 0
    delivered: float | None = None
    size: int = 0
    unwanted: bool = False
    layout: Layout | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """That a sample ended, without what came of it."""

    request_id: str
    failed: bool
    size: int


@dataclass(slots=True)
class _Feed:
    """What ended, of one copy of a client, by cursor."""

    ended: dict[int, Ended] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: int = 0


def _first_cursor() -> int:
    """Cursors grow from one process to the next, so one of an earlier process is known as such."""
    return int(time.time()) << 20


@dataclass(slots=True)
class Samples:
    """All samples of this process."""

    samplers: SamplerService
    _kept: dict[tuple[str, str], Kept] = field(default_factory=dict)
    _feeds: dict[tuple[str, str, int], _Feed] = field(default_factory=dict)
    _seen: dict[tuple[str, str], float] = field(default_factory=dict)
    _bytes: int = 0
    _first: int = field(default_factory=_first_cursor)
    _last: int = 0

    def __post_init__(self) -> None:
        self._last = self._first

    async def submit(
        self,
        caller: Caller,
        sampler_id: str,
        seq: int,
        query: SampleQuery,
        body: bytes,
        layout: Layout | None = None,
    ) -> str:
        """Begin to sample, unless this request has begun already; returns its id.

        Raises:
            RateLimitedError: too many are under way.
            InvalidRequestError: the number was used by another request.
        """
        digest = hashlib.sha256(body).digest()
        known = self._known(caller, sampler_id, seq, digest)
        if known is not None:
            return known.request_id
        self._tidy()
        task = asyncio.create_task(self.samplers.sample(caller, sampler_id, query), name=f"sample-{seq}")
        kept = self._keep(caller, sampler_id, seq, digest, task)
        kept.layout = layout
        await asyncio.sleep(0)  # a full queue refuses at once, and so do we
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            self._drop(kept)
            raise error
        task.add_done_callback(lambda _: self._ended(kept))
        return kept.request_id

    def refuse(self, caller: Caller, sampler_id: str, seq: int, error: TGTinkerError, body: bytes) -> str:
        """Keep a refusal under the id that the sample would have had: its client looks for it there.

        Raises:
            TGTinkerError: the error itself, where another request has that number.
        """
        digest = hashlib.sha256(body).digest()
        kept = self._kept.get((caller.tenant, names.sample_request(sampler_id, seq)))
        if kept is not None:
            if kept.digest != digest:
                raise error
            return kept.request_id
        self._tidy()
        refused: asyncio.Future[SampleResponse] = asyncio.get_running_loop().create_future()
        refused.set_exception(bare(error))
        kept = self._keep(caller, sampler_id, seq, digest, refused)
        self._ended(kept)
        return kept.request_id

    def get(self, caller: Caller, request_id: str) -> Kept | None:
        """A sample that this caller may see, if this process knows it."""
        kept = self._kept.get((caller.tenant, request_id))
        if kept is not None:
            self.seen(caller.tenant, names.session_of(kept.target[1]))
        # A key with a policy is one party's: what another key of the tenant drew is not for it.
        return None if kept is None or (caller.policy is not None and kept.key_id != caller.key_id) else kept

    def cancel(self, caller: Caller, request_id: str) -> None:
        """Stop what nobody waits for any more."""
        kept = self.get(caller, request_id)
        if kept is not None:
            kept.unwanted = True
            kept.task.cancel()

    async def ended_after(
        self, caller: Caller, target: tuple[str, int], cursor: int, wait_s: float
    ) -> tuple[list[Ended], int]:
        """What ended after a cursor, and the next cursor; waits until there is something.

        The sampler must be one of the caller's.

        Raises:
            InvalidRequestError: the cursor is an earlier process's. What was under way then is gone, and who only
                waits for it here would wait for ever.
        """
        if 0 < cursor < self._first:
            raise InvalidRequestError(
                "the server was restarted since; make a new sampling client, and sample again what has not come",
                field="prev_cursor",
                constraint="0, or as this server last said",
            )
        key = (caller.tenant, *target)
        self.seen(caller.tenant, names.session_of(target[0]))
        feed = self._feeds.setdefault(key, _Feed())
        for number in [n for n in feed.ended if n <= cursor]:  # what was seen is not told again
            del feed.ended[number]
        if not feed.ended and wait_s > 0:
            feed.news.clear()
            feed.waiting += 1
            try:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(feed.news.wait(), wait_s)
            finally:
                feed.waiting -= 1
        self._free(key)
        return list(feed.ended.values()), max(feed.ended, default=max(cursor, self._first))

    def forget(self, caller: Caller, request_ids: Iterable[str]) -> None:
        """Free what was fetched."""
        for request_id in request_ids:
            kept = self.get(caller, request_id)
            if kept is not None and kept.task.done():
                self._drop(kept)

    def seen(self, tenant: str, session_id: str) -> None:
        """A session's client is there."""
        self._seen[(tenant, session_id)] = time.monotonic()

    def forget_silent(self) -> None:
        """Stop and free what clients asked for that are gone. Their models stay, as durable as they were."""
        now = time.monotonic()
        for key in [k for k, when in self._seen.items() if now - when > SILENT_S]:
            self.forget_session(*key)

    def forget_session(self, tenant: str, session_id: str) -> None:
        """A session is over: nobody fetches its samples."""
        self._seen.pop((tenant, session_id), None)
        mine = [k for k in self._kept.values() if k.tenant == tenant and k.request_id.startswith(session_id + ":")]
        for kept in mine:
            kept.task.cancel()
            self._drop(kept)
        for key in [k for k in self._feeds if k[0] == tenant and k[1].startswith(session_id + ":")]:
            del self._feeds[key]

    async def close(self) -> None:
        """Stop everything."""
        tasks = [k.task for k in self._kept.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _known(self, caller: Caller, sampler_id: str, seq: int, digest: bytes) -> Kept | None:
        kept = self._kept.get((caller.tenant, names.sample_request(sampler_id, seq)))
        if kept is not None and kept.digest != digest:
            raise InvalidRequestError(
                f"sequence number {seq} of {sampler_id} was used by a different request",
                field="seq_id",
                constraint="one request per sequence number",
            )
        return kept

    def _keep(
        self, caller: Caller, sampler_id: str, seq: int, digest: bytes, task: asyncio.Future[SampleResponse]
    ) -> Kept:
        request_id = names.sample_request(sampler_id, seq)
        target = (caller.tenant, sampler_id, seq // CLONE)
        kept = Kept(caller.tenant, caller.key_id, request_id, target, digest, task)
        self._kept[(caller.tenant, request_id)] = kept
        self.seen(caller.tenant, names.session_of(sampler_id))
        return kept

    def _ended(self, kept: Kept) -> None:
        error = error_of(kept)
        if (kept.tenant, kept.request_id) not in self._kept:
            return  # its session is over
        if error is None:
            kept.size = size_of(kept.task.result())
            self._bytes += kept.size
        self._last += 1
        kept.number = self._last
        feed = self._feeds.setdefault(kept.target, _Feed())
        feed.ended[kept.number] = Ended(kept.request_id, error is not None, kept.size)
        while len(feed.ended) > MOST_KEPT:
            del feed.ended[next(iter(feed.ended))]
        feed.news.set()

    def _tidy(self) -> None:
        """Forget what was delivered a while ago; where memory is short also the oldest that ended."""
        now = time.monotonic()
        old = [k for k in self._kept.values() if k.delivered is not None and now - k.delivered > KEPT_S]
        for kept in old:
            self._drop(kept)
        while self._kept and (len(self._kept) > MOST_KEPT or self._bytes > KEPT_BYTES):
            oldest = next((k for k in self._kept.values() if k.task.done()), None)
            if oldest is None:
                return
            self._drop(oldest, heard=oldest.delivered is not None)

    def _drop(self, kept: Kept, *, heard: bool = True) -> None:
        """Free a sample; that it ended stays told to a client that has not heard it, who then samples again."""
        if self._kept.pop((kept.tenant, kept.request_id), None) is None:
            return
        self._bytes -= kept.size
        feed = self._feeds.get(kept.target)
        if feed is not None and heard:
            feed.ended.pop(kept.number, None)
            self._free(kept.target)

    def _free(self, key: tuple[str, str, int]) -> None:
        feed = self._feeds.get(key)
        if feed is not None and not feed.ended and not feed.waiting:
            del self._feeds[key]


def error_of(kept: Kept) -> TGTinkerError | None:
    """Why an ended sample has no result; ``None``: it has one."""
    if kept.task.cancelled() and not kept.unwanted:
        return ServerError("the server is stopping; send the request to the next one", details={"retry": True})
    if kept.task.cancelled():
        return InvalidRequestError("the sample was cancelled", field="request_id", constraint="not cancelled")
    error = kept.task.exception()
    if error is None or isinstance(error, TGTinkerError):
        return error and bare(error)
    return ServerError("sampling failed inside the server; tell its operator")


def size_of(response: SampleResponse) -> int:
    """About how many bytes a response takes."""
    sequences = sum(8 * len(s.tokens) + 64 for s in response.sequences)
    figures = [s.topk_logprobs for s in response.sequences]
    figures += [response.topk_prompt_logprobs, response.prompt_alt_tokens]
    arrays = sum(f.logprobs.nbytes * 2 for f in figures if f is not None)
    return sequences + arrays + 4 * len(response.prompt_logprobs or ())
