"""The seam between the service and what samples: weights, and a sampler that many requests share.

Every call comes from the compute thread. A request leaves all others as they were, whatever happens to it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tg_tinker.types import TrainingConfig
from tg_tinker.types.tokens import SampleEvent, SampleQuery
from tg_tinker_server.engine.backend import EngineState


class SampledWeights(Protocol):
    """A handle on weights: those of a base model or of a run's saved state, which nothing trains any more, or those
    of a run as they are now. Compared by identity.
    """

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 to this, exclusive."""
        ...

    @property
    def max_positions(self) -> int:
        """Longest prompt and completion together, in tokens."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        ...

    @property
    def start_token_id(self) -> int | None:
        """What an empty text begins with; ``None``: this model has no such token."""
        ...

    @property
    def version(self) -> int:
        """Counts changes of the weights: what was read with older ones is not remembered."""
        ...

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called, or the run was closed."""
        ...

    def when_closed(self, tell: Callable[[Any], None]) -> None:
        """Call this with the handle when it is closed, on the compute thread; never twice for equal ones."""
        ...

    @property
    def size_bytes(self) -> int:
        """Memory that ``close`` gives back."""
        ...

    def encode(self, text: str) -> list[int]:
        """Text to token ids, as the model's tokenizer does by default."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text, special tokens left out."""
        ...

    def close(self) -> None:
        """Give the memory back. Requests that still use them fail; closing twice is no error."""
        ...


class Ticket:
    """One request in a sampler; compared by identity."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Progress:
    """What one slice did for one request.

    Attributes:
        events: in their order; the last of a request is ``PromptFigures``.
        error: why the request failed; nothing follows it.
    """

    ticket: Ticket
    events: tuple[SampleEvent, ...] = ()
    error: Exception | None = None


class TokenSampler(Protocol):
    """Requests under way. Sequences of one model go through it together, and join and leave at every token."""

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        ...

    def submit(self, weights: SampledWeights, query: SampleQuery, *, group: Hashable) -> Ticket:
        """Take a request. No model work yet.

        Args:
            weights: of the backend whose sampler this is.
            query: what is asked.
            group: who may be in one run through the model: requests with equal groups.

        Raises:
            InvalidRequestError: an unknown token id, an empty prompt, or one longer than the model's context.
        """
        ...

    def step(self, resting: Collection[SampledWeights] = ()) -> list[Progress]:
        """One slice: a piece of the waiting prompts, or one token of each running sequence of one group.

        Weights that are ``resting`` go through no model in this slice; their requests keep what they have.

        A request that fails is reported, and fails alone. Log-probabilities and choices do not depend on who else is
        there, up to float rounding.
        """
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Drop a request and free its rows now. One that ended already is left alone."""
        ...

    def close(self) -> None:
        """Drop every request, and end what was started outside of this process. Nothing may follow."""
        ...


@runtime_checkable
class SamplingBackend(Protocol):
    """A backend that can also sample from frozen weights."""

    def open_weights(self, config: TrainingConfig, state: EngineState | None) -> SampledWeights:
        """Make frozen weights, in the precision that training has under this configuration.

        Args:
            config: of the run whose state it is; without a state only its model and precision count.
            state: what a run saved; ``None``: the base model as it is.

        Raises:
            InvalidRequestError: unknown model, or the state does not fit the configuration.
        """
        ...

    def token_sampler(self) -> TokenSampler:
        """A new sampler, for weights of this backend."""
        ...
