"""Requests and sequences under way, as the sampler keeps them."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.tokens import SampleEvent, SampleQuery
from tg_tinker_server.engine.sampling.choosing import Chooser
from tg_tinker_server.engine.sampling.penalties import penalties_of
from tg_tinker_server.engine.sampling.prompt_scores import PromptScores
from tg_tinker_server.engine.sampling.rows import Memory
from tg_tinker_server.engine.sampling.seam import SampledWeights, Ticket
from tg_tinker_server.engine.sampling.telling import Teller, TextTeller, TokenTeller
from tg_tinker_server.engine.sampling.text_query import TextQuery


def check_query(weights: SampledWeights, query: SampleQuery) -> None:
    """Refuse what does not fit the model.

    Raises:
        InvalidRequestError: naming the field.
    """
    size, room, targets = weights.vocab_size, weights.max_positions, query.target_prompt_logprobs
    if not query.prompt:
        raise InvalidRequestError(
            "the prompt is empty; begin with the model's start token, or any other",
            field="prompt",
            constraint="at least one token",
        )
    if min(query.prompt) < 0 or max(query.prompt) >= size:
        raise InvalidRequestError(
            f"the prompt holds token ids outside the model's vocabulary of {size}",
            field="prompt",
            constraint=f"0 <= id < {size}",
        )
    if len(query.prompt) > room:
        raise InvalidRequestError(
            f"the prompt has {len(query.prompt)} tokens; this model takes {room} in all",
            field="prompt",
            constraint=f"at most {room} tokens",
        )
    if targets is not None and targets.size and (targets.min() < -1 or targets.max() >= size):
        raise InvalidRequestError(
            f"target_prompt_logprobs hold token ids outside the model's vocabulary of {size}",
            field="target_prompt_logprobs",
            constraint=f"-1 <= id < {size}",
        )


class Request(Ticket):
    """One request under way.

    Attributes:
        memory: what was read of the prompt so far.
        logits: those of its end, once all of it is read.
        ready: sequences that wait for a place in a batch: parked ones first, then those not begun.
        unfinished: sequences without an end.
        hits: tokens of the prompt that were known when its reading began; ``None``: it has not.
        remembered: whether what was read may serve others; not where the weights changed meanwhile.
        over: nothing may come of it any more.
        awake: whether its weights may go through the model now.
    """

    __slots__ = (
        "awake",
        "events",
        "group",
        "hits",
        "logits",
        "memory",
        "over",
        "prompt",
        "query",
        "ready",
        "remembered",
        "scores",
        "unfinished",
        "weights",
    )

    def __init__(self, weights: SampledWeights, query: SampleQuery, group: Hashable) -> None:
        check_query(weights, query)
        seed = secrets.randbits(63) if query.params.seed is None else query.params.seed
        self.weights, self.query, self.group = weights, query, group
        self.prompt = np.array(query.prompt, dtype=np.int64)
        self.scores = PromptScores(query, seed)
        self.memory: Memory | None = None
        self.logits: npt.NDArray[Any] | None = None
        self.hits: int | None = None
        self.ready = deque(Sampling(self, index, seed) for index in range(query.num_samples))
        self.unfinished = query.num_samples
        self.events: list[SampleEvent] = []
        self.over = False
        self.awake = self.remembered = True

    def weights_changed(self) -> None:
        """Forget what was found, and keep what was read, for this request alone."""
        if self.hits is None:
            self.memory = None
        else:
            self.remembered = False

    @property
    def reusable(self) -> int:
        """Most tokens of the prompt that need not be read: the logits before its first wanted position are needed."""
        return min(self.prompt.size, self.scores.first) - 1


class Sampling:
    """One sequence under way.

    Attributes:
        memory: of its beginning, while it waits; ``None``: not begun, or running.
        pending: its last token, which the model has not read yet.
        since: tokens since it joined a batch.
    """

    __slots__ = ("chooser", "left", "memory", "pending", "request", "since", "teller", "tokens")

    def __init__(self, request: Request, index: int, seed: int) -> None:
        query, weights, stream = request.query, request.weights, index
        params = query.params
        # The last token is never read, so it may lie behind the model's last position.
        room = weights.max_positions - len(query.prompt) + 1
        self.request = request
        self.left = room if params.max_tokens is None else min(room, params.max_tokens)
        self.teller: Teller
        penalties = None
        if isinstance(query, TextQuery):
            self.teller, stream = TextTeller(weights, query, index), query.first + index
            penalties = penalties_of(query.options, prompt=query.prompt, vocab_size=weights.vocab_size)
        else:
            self.teller = TokenTeller(weights, query, index)
        self.chooser = Chooser(params, (seed, stream), topk=query.topk_sample_logprobs, penalties=penalties)
        self.tokens: list[int] = []
        self.memory: Memory | None = None
        self.pending = 0
        self.since = 0

    def take(self, logits_V: npt.NDArray[Any]) -> bool:
        """Choose the next token and report it; says whether the sequence has ended.

        Raises:
            InvalidRequestError: the logits are not finite.
        """
        choice = self.chooser.choose(logits_V)
        self.pending = choice.token
        self.tokens.append(choice.token)
        self.left -= 1
        self.since += 1
        event = self.teller.tell(choice, last=self.left == 0)
        self.request.events.append(event)
        return event.stop_reason is not None
