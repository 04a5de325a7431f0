"""Samples that are being made or wait to be fetched. They live in memory only: a client sends them again."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from dataclasses import dataclass, field

from tg_tinker.errors import InvalidRequestError, ServerError, TGTinkerError
from tg_tinker.types.tokens import SampleQuery, SampleResponse
from tg_tinker_server.gateway import names
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.samplers import SamplerService

CLONE = 1_000_000_000  # sequence numbers of the n-th copy of a client begin at n times this
MOST_KEPT = 20_000
KEPT_BYTES = 256 * 2**20
KEPT_S = 600.0  # after the first delivery: an answer can be lost on its way


@dataclass(eq=False, slots=True)
class Kept:
    """One sample.

    Attributes:
        delivered: when it was first given out, on the monotonic clock.
        size: of the answer, bytes; about.
    """

    tenant: str
    request_id: str
    target: tuple[str, str, int]
    digest: bytes
    task: asyncio.Task[SampleResponse]
    delivered: float | None = None
    size: int = 0


@dataclass(slots=True)
class _Feed:
    """What ended, of one copy of a client, in order; ``base`` is how many were forgotten."""

    base: int = 0
    ended: list[Kept] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Samples:
    """All samples of this process."""

    samplers: SamplerService
    _kept: dict[tuple[str, str], Kept] = field(default_factory=dict)
    _feeds: dict[tuple[str, str, int], _Feed] = field(default_factory=dict)
    _bytes: int = 0

    async def submit(self, caller: Caller, sampler_id: str, seq: int, query: SampleQuery, body: bytes) -> str:
        """Begin to sample, unless this request has begun already; returns its id.

        Raises:
            RateLimitedError: too many are under way.
            InvalidRequestError: the number was used by another request.
        """
        request_id = names.sample_request(sampler_id, seq)
        digest = hashlib.sha256(body).digest()
        kept = self._kept.get((caller.tenant, request_id))
        if kept is not None:
            if kept.digest != digest:
                raise InvalidRequestError(
                    f"sequence number {seq} of {sampler_id} was used by a different request",
                    field="seq_id",
                    constraint="one request per sequence number",
                )
            return request_id
        self._tidy()
        task = asyncio.create_task(self.samplers.sample(caller, sampler_id, query), name=f"sample-{seq}")
        kept = Kept(caller.tenant, request_id, (caller.tenant, sampler_id, seq // CLONE), digest, task)
        self._kept[(caller.tenant, request_id)] = kept
        await asyncio.sleep(0)  # a full queue refuses at once, and so do we
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            del self._kept[(caller.tenant, request_id)]
            raise error
        task.add_done_callback(lambda _: self._ended(kept))
        return request_id

    def get(self, caller: Caller, request_id: str) -> Kept | None:
        """A sample of this tenant, if this process knows it."""
        return self._kept.get((caller.tenant, request_id))

    def cancel(self, caller: Caller, request_id: str) -> None:
        """Stop what nobody waits for any more."""
        kept = self._kept.get((caller.tenant, request_id))
        if kept is not None:
            kept.task.cancel()

    async def ended_after(
        self, caller: Caller, target: tuple[str, int], cursor: int, wait_s: float
    ) -> tuple[list[Kept], int]:
        """What ended after a cursor, and the next cursor; waits until there is something."""
        feed = self._feeds.setdefault((caller.tenant, *target), _Feed())
        if cursor > feed.base:  # what was seen is not told again
            seen = min(cursor - feed.base, len(feed.ended))
            del feed.ended[:seen]
            feed.base += seen
        if not feed.ended and wait_s > 0:
            feed.news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(feed.news.wait(), wait_s)
        return list(feed.ended), feed.base + len(feed.ended)

    def forget(self, caller: Caller, request_ids: list[str]) -> None:
        """Free what was fetched."""
        for request_id in request_ids:
            kept = self._kept.get((caller.tenant, request_id))
            if kept is not None and kept.task.done():
                self._drop(kept)

    def forget_session(self, tenant: str, session_id: str) -> None:
        """A session is over: nobody fetches its samples."""
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

    def _ended(self, kept: Kept) -> None:
        if not kept.task.cancelled() and kept.task.exception() is None:
            kept.size = size_of(kept.task.result())
            self._bytes += kept.size
        feed = self._feeds.setdefault(kept.target, _Feed())
        feed.ended.append(kept)
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
            self._drop(oldest)

    def _drop(self, kept: Kept) -> None:
        if self._kept.pop((kept.tenant, kept.request_id), None) is not None:
            self._bytes -= kept.size


def error_of(kept: Kept) -> TGTinkerError | None:
    """Why an ended sample has no result; ``None``: it has one."""
    if kept.task.cancelled():
        return InvalidRequestError("the sample was cancelled", field="request_id", constraint="not cancelled")
    error = kept.task.exception()
    if error is None or isinstance(error, TGTinkerError):
        return error
    return ServerError("sampling failed inside the server; tell its operator")


def size_of(response: SampleResponse) -> int:
    """About how many bytes a response takes."""
    sequences = sum(8 * len(s.tokens) + 64 for s in response.sequences)
    figures = [s.topk_logprobs for s in response.sequences]
    figures += [response.topk_prompt_logprobs, response.prompt_alt_tokens]
    arrays = sum(f.logprobs.nbytes * 2 for f in figures if f is not None)
    return sequences + arrays + 4 * len(response.prompt_logprobs or ())
