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
from collections.abc import Hashable

from tg_tinker.types.tokens import SampleQuery
from tg_tinker_server.engine.sampling.batches import Batch, joined, requests_of
from tg_tinker_server.engine.sampling.prefix_cache import PrefixCache, Tokens, common_prefix
from tg_tinker_server.engine.sampling.rows import Memory, ModelRows, Reading
from tg_tinker_server.engine.sampling.seam import FrozenWeights, Progress, Ticket
from tg_tinker_server.engine.sampling.sequences import Request, Sampling

PREFILL_TOKENS = 512
"""Most tokens of prompts, padding included, in one slice: how long training waits for a turn."""
SCORED_NUMBERS = 2**24
"""Most logits of prompts' positions in one slice."""
TURN_TOKENS = 32
"""A sequence makes room after that many tokens, if others wait."""
WORTH_WAITING = 16
"""A prompt waits for another that is being read if they share that many tokens more than are known."""
LOOK_AHEAD = 256
"""Waiting prompts that are looked at for company."""


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
        self._model, self._most_rows, self._prefill_tokens = model, most_rows, prefill_tokens
        self._cache = PrefixCache(prefix_bytes)
        self._unread: deque[Request] = deque()
        self._ready: deque[Request] = deque()
        self._batches: dict[Hashable, Batch] = {}
        self._read_last = False
        self._handles: list[FrozenWeights] = []

    @property
    def idle(self) -> bool:
        """See ``seam.TokenSampler``."""
        return not (self._unread or self._ready or self._batches)

    def submit(self, weights: FrozenWeights, query: SampleQuery, *, group: Hashable) -> Ticket:
        """See ``seam.TokenSampler``."""
        request = Request(weights, query, group)
        for handle in [h for h in self._handles if h.closed]:
            self._cache.forget(handle)
            self._handles.remove(handle)
        if not any(handle is weights for handle in self._handles):
            self._handles.append(weights)
        self._unread.append(request)
        return request

    def step(self) -> list[Progress]:
        """See ``seam.TokenSampler``."""
        touched: list[Progress] = []
        if self._unread and not (self._read_last and (self._ready or self._batches)):
            self._read_last = True
            touched += self._read()
        else:
            self._read_last = False
            touched += self._fill_batches()
            touched += self._advance()
        return touched

    def cancel(self, ticket: Ticket) -> None:
        """See ``seam.TokenSampler``."""
        if isinstance(ticket, Request) and not ticket.over:
            self._drop([ticket])

    # Prompts.

    def _read(self) -> list[Progress]:
        requests = self._next_to_read()
        readings = [self._reading(r, self._needs(r, requests)) for r in requests]
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
            self._unread.remove(request)
            if memory.length < request.prompt.size:
                self._unread.append(request)
                continue
            request.logits = logits_NV[-1]
            self._remember(request.weights, request.prompt, memory)
            self._ready.append(request)
        return progress

    def _next_to_read(self) -> list[Request]:
        """The head, and those behind it that fit into its slice."""
        head = self._unread[0]
        self._recall(head)
        key = self._key(head)
        known = _known(head)
        if key is None or head.scores.wanted or head.prompt.size - known > self._prefill_tokens:
            return [head]
        group, widest = [head], head.prompt.size - known
        for other in list(self._unread)[1:LOOK_AHEAD]:
            if len(group) >= self._most_rows:
                break
            if other.scores.wanted or self._key(other) != key:
                continue
            self._recall(other)
            need = other.prompt.size - _known(other)
            width = max(widest, need)
            if (len(group) + 1) * width > self._prefill_tokens or width > 2 * need + WORTH_WAITING:
                continue
            if width > 2 * widest + WORTH_WAITING:
                continue
            if any(
                member.weights is other.weights
                and common_prefix(member.prompt, other.prompt) >= _known(other) + WORTH_WAITING
                for member in group
            ):
                continue  # in a moment it need not be read
            group.append(other)
            widest = width
        return group

    def _recall(self, request: Request) -> None:
        """Look up what is known of a prompt, as long as none of it was read."""
        if request.hits is None and self._model.key(request.weights) is not None:
            request.memory = self._cache.find(request.weights, request.prompt[: max(0, request.reusable)])

    def _needs(self, request: Request, group: list[Request]) -> int:
        """How many tokens of a prompt to read now. Rows with memory read equally many: some of them again."""
        need = request.prompt.size - _known(request)
        if len(group) > 1:
            return min(int(request.prompt.size), max(r.prompt.size - _known(r) for r in group))
        most = self._prefill_tokens
        if request.scores.wanted:
            most = max(1, min(most, SCORED_NUMBERS // request.weights.vocab_size))
        return min(need, most)

    def _reading(self, request: Request, count: int) -> Reading:
        known = _known(request)
        start = min(known, int(request.prompt.size) - count)
        end = start + count
        memory = request.memory if start == known else request.memory.cut(start) if request.memory else None
        return Reading(
            weights=request.weights,
            memory=memory if start else None,
            tokens=request.prompt[start:end].tolist(),
            logits=max(1, end - max(start, request.scores.first - 1)) if request.scores.wanted else 1,
        )

    # Sequences.

    def _fill_batches(self) -> list[Progress]:
        """Give places to those that wait, in turn; take them from those that had theirs for long."""
        running = sum(len(batch.sequences) for batch in self._batches.values())
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
        """Take up to so many sequences that had their turn out of their batches, to the front of those that wait."""
        if count <= 0:
            return 0
        old = [s for b in self._batches.values() for s in b.sequences if s.since >= TURN_TOKENS]
        old = sorted(old, key=lambda s: -s.since)[:count]
        for sequence in old:
            batch = self._batches[self._place(sequence)]
            sequence.memory = batch.rows.take(batch.sequences.index(sequence))
        for place, batch in list(self._batches.items()):
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
                if request.query.num_samples == 1:  # a conversation may go on from here
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
        return self._key(sequence.request) or sequence

    def _key(self, request: Request) -> Hashable | None:
        key = self._model.key(request.weights)
        return None if key is None else (key, request.group)

    def _remember(self, weights: FrozenWeights, tokens: Tokens, memory: Memory) -> None:
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
        self._unread = deque(r for r in self._unread if not r.over)
        self._ready = deque(r for r in self._ready if not r.over)
        for place, batch in list(self._batches.items()):
            if place != but and any(s.request.over for s in batch.sequences):
                self._keep(place, [s for s in batch.sequences if not s.request.over])


def _known(request: Request) -> int:
    return request.memory.length if request.memory is not None else 0
