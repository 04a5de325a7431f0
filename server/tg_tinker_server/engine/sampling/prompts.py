"""Prompts that wait to be read: which of them next, and how much of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from itertools import islice

from tg_tinker_server.engine.sampling.prefix_cache import PrefixCache, common_prefix
from tg_tinker_server.engine.sampling.rows import ModelRows, Reading
from tg_tinker_server.engine.sampling.sequences import Request

SCORED_NUMBERS = 2**24
"""Most logits of prompts' positions in one slice."""
WORTH_WAITING = 16
"""A prompt waits for another that is being read if they share that many tokens more than are known."""
LOOK_AHEAD = 256
"""Waiting prompts that are looked at for company."""


class WaitingPrompts:
    """Prompts in their order. One that needs several pieces goes to the back after each, so that short ones pass it.

    Args:
        model: what will read them.
        cache: what was read before.
        most_rows: prompts in one slice.
        prefill_tokens: their tokens in one slice, padding included.
    """

    def __init__(self, model: ModelRows, cache: PrefixCache, *, most_rows: int, prefill_tokens: int) -> None:
        self._model, self._cache, self._most_rows, self._prefill_tokens = model, cache, most_rows, prefill_tokens
        self.requests: deque[Request] = deque()

    def next(self) -> list[Request]:
        """The first that is awake, and those behind it that fit into its slice.

        Raises:
            IndexError: none is awake.
        """
        waiting = list(islice((r for r in self.requests if r.awake), LOOK_AHEAD))
        head = waiting[0]
        self._recall(head)
        key = key_of(self._model, head)
        known = known_of(head)
        if key is None or head.scores.wanted or head.prompt.size - known > self._prefill_tokens:
            return [head]
        group, widest = [head], head.prompt.size - known
        for other in waiting[1:]:
            if len(group) >= self._most_rows:
                break
            if other.scores.wanted or key_of(self._model, other) != key:
                continue
            self._recall(other)
            need = other.prompt.size - known_of(other)
            width = max(widest, need)
            if (len(group) + 1) * width > self._prefill_tokens or width > 2 * need + WORTH_WAITING:
                continue
            if width > 2 * widest + WORTH_WAITING:
                continue
            if any(
                member.weights is other.weights
                and common_prefix(member.prompt, other.prompt) >= known_of(other) + WORTH_WAITING
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
        need = request.prompt.size - known_of(request)
        if len(group) > 1:
            return min(int(request.prompt.size), max(r.prompt.size - known_of(r) for r in group))
        most = self._prefill_tokens
        if request.scores.wanted:
            most = max(1, min(most, SCORED_NUMBERS // request.weights.vocab_size))
        return min(need, most)

    def reading(self, request: Request, group: list[Request]) -> Reading:
        """The piece of a prompt that is read now, as one of this group."""
        count = self._needs(request, group)
        known = known_of(request)
        start = min(known, int(request.prompt.size) - count)
        end = start + count
        memory = request.memory if start == known else request.memory.cut(start) if request.memory else None
        return Reading(
            weights=request.weights,
            memory=memory if start else None,
            tokens=request.prompt[start:end].tolist(),
            logits=max(1, end - max(start, request.scores.first - 1)) if request.scores.wanted else 1,
        )


def key_of(model: ModelRows, request: Request) -> Hashable | None:
    """Requests of equal keys may go through the model together; ``None``: each of its sequences goes alone."""
    key = model.key(request.weights)
    return None if key is None else (key, request.group)


def known_of(request: Request) -> int:
    """How many tokens of a prompt need not be read any more."""
    return request.memory.length if request.memory is not None else 0
