"""Requests of many callers over the models of one backend: prompts in pieces, sequences in batches that change with
every token.

A slice is one run through the model: a piece of the waiting prompts, or one token of every sequence of a batch. They
alternate while there is work of both kinds. Fairness:

* a prompt that needs several pieces goes to the back after each, so that short ones pass it;
* places in batches are given to requests in turn, one sequence each;
* a sequence that has run for a while makes room for one that waits, and keeps what the model knew of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable

from tg_tinker.errors import ServerError
from tg_tinker.types.tokens import SampleQuery
from tg_tinker_server.engine.sampling.batches import Batch, joined, requests_of
from tg_tinker_server.engine.sampling.prefix_cache import PrefixCache, Tokens
from tg_tinker_server.engine.sampling.prompts import WaitingPrompts, key_of
from tg_tinker_server.engine.sampling.rows import Memory, ModelRows
from tg_tinker_server.engine.sampling.seam import Progress, SampledWeights, Ticket
from tg_tinker_server.engine.sampling.sequences import Request, Sampling

PREFILL_TOKENS = 512
"""Most tokens of prompts, padding included, in one slice: how long training waits for a turn."""
TURN_TOKENS = 32
"""A sequence makes room after that many tokens, if others wait."""


class BatchedSampler:
    """See ``seam.TokenSampler``.

    Args:
        model: what the backend's models can do.
        most_rows: sequences in all batches together.
        prefix_bytes: memory for what was read before.
        prefill_tokens: most tokens of prompts in one slice.
    """

    def __init__(
        self, model: ModelRows, *, most_rows: int, prefix_bytes: int, prefill_tokens: int = PREFILL_TOKENS
    ) -> None:
        self._model, self._most_rows = model, most_rows
        self._cache = PrefixCache(prefix_bytes)
        self._unread = WaitingPrompts(model, self._cache, most_rows=most_rows, prefill_tokens=prefill_tokens)
        self._ready: deque[Request] = deque()
        self._batches: dict[Hashable, Batch] = {}
        self._read_last = False
        self._versions: dict[SampledWeights, int] = {}
        self._asleep: set[SampledWeights] = set()

    @property
    def idle(self) -> bool:
        """See ``seam.TokenSampler``."""
        return not (self._unread.requests or self._ready or self._batches)

    def submit(self, weights: SampledWeights, query: SampleQuery, *, group: Hashable) -> Ticket:
        """See ``seam.TokenSampler``."""
        request = Request(weights, query, group)
        self._versions.setdefault(weights, weights.version)
        weights.when_closed(self._let_go)
        self._unread.requests.append(request)
        return request

    def step(self, resting: Collection[SampledWeights] = ()) -> list[Progress]:
        """See ``seam.TokenSampler``."""
        touched = self._look_at_weights()
        self._let_rest(resting)
        unread = any(r.awake for r in self._unread.requests)
        ready = any(r.awake for r in self._ready)
        if unread and not (self._read_last and (ready or self._batches)):
            self._read_last = True
            touched += self._read()
        else:
            self._read_last = False
            touched += self._fill_batches()
            touched += self._advance()
        return joined(touched)

    def cancel(self, ticket: Ticket) -> None:
        """See ``seam.TokenSampler``."""
        if isinstance(ticket, Request) and not ticket.over:
            self._drop([ticket])

    def close(self) -> None:
        """See ``seam.TokenSampler``."""
        self._drop(self._requests())

    # Weights.

    def _look_at_weights(self) -> list[Progress]:
        """Forget what was read with weights that changed since; fail requests for those that are gone."""
        progress: list[Progress] = []
        for handle, version in list(self._versions.items()):
            if not handle.closed and handle.version == version:
                continue
            self._cache.forget(handle)
            mine = [r for r in self._requests() if r.weights is handle]
            if handle.closed:
                del self._versions[handle]
                progress += self._fail(mine, ServerError("the session is closed; open the run again"))
            else:
                self._versions[handle] = handle.version
                for request in mine:
                    request.weights_changed()
        return progress

    def _let_go(self, handle: SampledWeights) -> None:
        """Keep nothing of weights that were closed; who still uses them hears of it in the next slice."""
        self._cache.forget(handle)
        if not any(r.weights is handle for r in self._requests()):
            self._versions.pop(handle, None)

    def _let_rest(self, resting: Collection[SampledWeights]) -> None:
        """Take sequences whose weights rest out of their batches, to the front of those that wait."""
        if not resting and not self._asleep:
            return
        self._asleep = set(resting)
        for request in self._requests():
            request.awake = request.weights not in self._asleep
        if self._asleep:
            self._set_aside([s for b in self._batches.values() for s in b.sequences if not s.request.awake])

    def _requests(self) -> list[Request]:
        """All of them, each once."""
        running = requests_of(s for b in self._batches.values() for s in b.sequences)
        return list({id(r): r for r in (*self._unread.requests, *self._ready, *running)}.values())

    # Prompts.

    def _read(self) -> list[Progress]:
        requests = self._unread.next()
        readings = [self._unread.reading(r, requests) for r in requests]
        try:
            results = self._model.read(readings)
        except Exception as e:  # noqa: BLE001 - told to whoever asked
            return self._fail(requests, e)
        progress: list[Progress] = []
        for request, reading, (memory, logits_NV) in zip(requests, readings, results, strict=True):
            request.memory = memory
            request.hits = memory.length - len(reading.tokens) if request.hits is None else request.hits
            try:
                request.scores.add(memory.length - len(logits_NV), logits_NV)
            except Exception as e:  # noqa: BLE001 - told to whoever asked
                progress += self._fail([request], e)
                continue
            self._unread.requests.remove(request)
            if memory.length < request.prompt.size:
                self._unread.requests.append(request)
                continue
            request.logits = logits_NV[-1]
            if request.remembered:
                self._remember(request.weights, request.prompt, memory)
            self._ready.append(request)
        return progress

    # Sequences.

    def _fill_batches(self) -> list[Progress]:
        """Give places to those that wait, in turn; take them from those that had theirs for long."""
        running = sum(len(batch.sequences) for batch in self._batches.values())
        asleep = [r for r in self._ready if not r.awake]
        self._ready = deque(r for r in self._ready if r.awake)
        waiting = sum(len(r.ready) for r in self._ready)
        running -= self._park(min(waiting, running + waiting - self._most_rows))
        joining: dict[Hashable, list[Sampling]] = {}
        progress: list[Progress] = []
        while self._ready and running < self._most_rows:
            request = self._ready.popleft()
            sequence = request.ready.popleft()
            if request.ready:
                self._ready.append(request)
            if sequence.memory is None:
                assert request.logits is not None
                try:
                    ended = sequence.take(request.logits)
                except Exception as e:  # noqa: BLE001 - told to whoever asked
                    progress += self._fail([request], e)
                    for others in joining.values():
                        others[:] = [s for s in others if s.request is not request]
                    continue
                if ended:
                    progress += self._end(sequence)
                    continue
                progress += self._news(request)
                sequence.memory = request.memory
            joining.setdefault(self._place(sequence), []).append(sequence)
            running += 1
        self._ready.extendleft(reversed(asleep))
        for place, sequences in joining.items():
            if not sequences:
                continue
            if place not in self._batches:
                self._batches[place] = Batch(self._model.rows(sequences[0].request.weights))
            batch = self._batches[place]
            try:
                batch.arrange([*batch.sequences, *sequences])
            except Exception as e:  # noqa: BLE001 - told to whoever asked
                del self._batches[place]
                progress += self._fail(requests_of([*batch.sequences, *sequences]), e)
        return joined(progress)

    def _park(self, count: int) -> int:
        """Take up to so many sequences that had their turn out of their batches."""
        if count <= 0:
            return 0
        old = [s for b in self._batches.values() for s in b.sequences if s.since >= TURN_TOKENS]
        return self._set_aside(sorted(old, key=lambda s: -s.since)[:count])

    def _set_aside(self, old: list[Sampling]) -> int:
        """Take sequences out of their batches, to the front of those of their requests that wait."""
        for sequence in old:
            batch = self._batches[self._place(sequence)]
            sequence.memory = batch.rows.take(batch.sequences.index(sequence))
        for place, batch in list(self._batches.items() if old else ()):
            self._keep(place, [s for s in batch.sequences if s not in old])
        for sequence in old:
            request = sequence.request
            if not request.ready:
                self._ready.append(request)
            request.ready.appendleft(sequence)
        return len(old)

    def _advance(self) -> list[Progress]:
        """One token of each sequence of the batch whose turn it is."""
        if not self._batches:
            return []
        place, batch = next(iter(self._batches.items()))
        self._batches[place] = self._batches.pop(place)
        try:
            logits_BV = batch.rows.advance([s.pending for s in batch.sequences])
        except Exception as e:  # noqa: BLE001 - told to whoever asked
            del self._batches[place]
            return self._fail(requests_of(batch.sequences), e)
        progress: list[Progress] = []
        ended: list[Sampling] = []
        for row, (sequence, logits_V) in enumerate(zip(list(batch.sequences), logits_BV, strict=True)):
            request = sequence.request
            if request.over:
                continue
            try:
                over = sequence.take(logits_V)
            except Exception as e:  # noqa: BLE001 - told to whoever asked
                progress += self._fail([request], e, but=place)
                continue
            if over:
                if request.remembered and request.query.num_samples == 1:  # a conversation may go on from here
                    tokens = [*request.query.prompt, *sequence.tokens[:-1]]
                    self._remember(request.weights, tokens, batch.rows.take(row))
                ended.append(sequence)
                progress += self._end(sequence)
            else:
                progress += self._news(request)
        self._keep(place, [s for s in batch.sequences if not s.request.over and s not in ended])
        return joined(progress)

    def _place(self, sequence: Sampling) -> Hashable:
        """Which batch a sequence belongs to."""
        return key_of(self._model, sequence.request) or sequence

    def _remember(self, weights: SampledWeights, tokens: Tokens, memory: Memory) -> None:
        if self._model.key(weights) is not None:
            self._cache.put(weights, tokens, memory)

    def _keep(self, place: Hashable, sequences: list[Sampling]) -> None:
        """Leave only these in a batch, and no batch without any."""
        if sequences:
            self._batches[place].arrange(sequences)
        else:
            self._batches.pop(place, None)

    # Ends.

    def _news(self, request: Request) -> list[Progress]:
        events, request.events = tuple(request.events), []
        return [Progress(ticket=request, events=events)] if events else []

    def _end(self, sequence: Sampling) -> list[Progress]:
        request = sequence.request
        request.unfinished -= 1
        if not request.unfinished:
            request.over = True
            request.memory = request.logits = None
            request.events.append(request.scores.figures(hits=request.hits or 0))
        return self._news(request)

    def _fail(self, requests: list[Request], error: Exception, *, but: Hashable = None) -> list[Progress]:
        self._drop(requests, but=but)
        return [Progress(ticket=r, error=error) for r in requests]

    def _drop(self, requests: list[Request], *, but: Hashable = None) -> None:
        """Forget requests and free their rows; in the batch ``but`` its own slice does it."""
        for request in requests:
            request.over = True
            request.memory = request.logits = None
            request.ready.clear()
        self._unread.requests = deque(r for r in self._unread.requests if not r.over)
        self._ready = deque(r for r in self._ready if not r.over)
        for place, batch in list(self._batches.items()):
            if place != but and any(s.request.over for s in batch.sequences):
                self._keep(place, [s for s in batch.sequences if not s.request.over])
