"""Stands between service and engine and writes down what went in and what came out of every step.

It changes nothing but the gradients of planted canaries. The release is read from the weights, as whoever receives
the model would: what the engine says about its own noise is not asked.

Shape suffixes: P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tg_tinker.types import TrainingConfig
from tg_tinker.types.info import ModelInfo
from tg_tinker_server.empirical.planting import Planted, planted_pass
from tg_tinker_server.engine.backend import (
    Backend,
    Contribution,
    EngineState,
    Pass,
    PassResult,
    Request,
    Session,
    StepRequest,
    StepResult,
)
from tg_tinker_server.engine.gradients import GradientContribution
from tg_tinker_server.engine.requests import tokens_of
from tg_tinker_server.engine.sampling.seam import SampledWeights
from tg_tinker_server.engine.state import WEIGHTS

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WatchedStep:
    """One step, in gradient units: multiples of the divisor are taken out.

    Attributes:
        clipped_P: the sum of what the calls of the logical batch contributed, before noise.
        released_P: the sum that the weights moved by; with noise, if there was any.
        units: whose records were trained on, where the service named them.
    """

    clipped_P: Floats  # noqa: N815 - shape suffix
    released_P: Floats  # noqa: N815
    units: tuple[str, ...]

    @property
    def noise_P(self) -> Floats:  # noqa: N802 - shape suffix
        """What was added to the clipped sum."""
        return self.released_P - self.clipped_P


@dataclass(slots=True)
class Watch:
    """What is planted, by the tokens of the record, and what was seen. One run trains at a time."""

    planted: dict[tuple[int, ...], Planted] = field(default_factory=dict)
    steps: list[WatchedStep] = field(default_factory=list)

    def plant(self, record: Sequence[int], gradient: Planted) -> None:
        """From now on this record has this gradient."""
        self.planted[tuple(record)] = gradient

    def forget(self) -> None:
        """Plant nothing, and drop what was seen."""
        self.planted.clear()
        self.steps.clear()


class WatchedBackend:
    """A ``Backend`` whose sessions are watched."""

    def __init__(self, inner: Backend, watch: Watch) -> None:
        self._inner = inner
        self._watch = watch

    def models(self) -> list[ModelInfo]:
        """See ``backend.Backend``."""
        return self._inner.models()

    def open(self, *, run_id: str, config: TrainingConfig) -> WatchedSession:
        """See ``backend.Backend``."""
        return WatchedSession(self._inner.open(run_id=run_id, config=config), self._watch, config)


class WatchedSession:
    """A ``Session`` that passes every call on. Steps are plain SGD, so that weights tell the released sum."""

    def __init__(self, inner: Session, watch: Watch, config: TrainingConfig) -> None:
        self._inner = inner
        self._watch = watch
        self._divisor = config.expected_batch_size
        self._clipped_P = np.zeros(inner.trainable_parameters)
        self._units: list[str] = []

    @property
    def trainable_parameters(self) -> int:
        """See ``backend.Session``."""
        return self._inner.trainable_parameters

    @property
    def base_dtype(self) -> str:
        """See ``backend.Session``."""
        return self._inner.base_dtype

    @property
    def vocab_size(self) -> int:
        """See ``backend.Session``."""
        return self._inner.vocab_size

    @property
    def max_positions(self) -> int:
        """See ``backend.Session``."""
        return self._inner.max_positions

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """See ``backend.Session``."""
        return self._inner.eos_token_ids

    @property
    def pending_calls(self) -> int:
        """See ``backend.Session``."""
        return self._inner.pending_calls

    @property
    def pending_units(self) -> tuple[str, ...]:
        """See ``backend.Session``."""
        return self._inner.pending_units

    def check(self, request: Request) -> None:
        """See ``backend.Session``."""
        self._inner.check(request)

    def start(self, request: Request) -> Pass:
        """See ``backend.Session``."""
        if request.train and request.units is not None:
            self._units += request.units
        if not self._watch.planted:
            return self._inner.start(request)
        rows = [self._watch.planted.get(tuple(tokens.tolist())) for tokens in tokens_of(request)]
        return planted_pass(self._inner, request, rows) if any(rows) else self._inner.start(request)

    def forward_backward(self, request: Request) -> PassResult:
        """See ``backend.Session``."""
        work = self.start(request)
        while not work.finished:
            work.advance()
        return work.result()

    def contribute(self, vectors_UP: npt.NDArray[np.float32], units: tuple[str, ...]) -> PassResult:
        """See ``backend.Session``."""
        self._units += units
        return self._inner.contribute(vectors_UP, units)

    def accumulate(self, contribution: Contribution) -> None:
        """See ``backend.Session``."""
        self._inner.accumulate(contribution)
        assert isinstance(contribution, GradientContribution)
        self._clipped_P = self._clipped_P + contribution.sum_P

    def discard_pending(self) -> None:
        """See ``backend.Session``."""
        self._inner.discard_pending()
        self._start_anew()

    def step(self, request: StepRequest) -> StepResult:
        """See ``backend.Session``."""
        before_P = self._weights()
        result = self._inner.step(request)
        moved_P = before_P - self._weights()
        self._watch.steps.append(
            WatchedStep(
                clipped_P=self._clipped_P,
                released_P=moved_P * (self._divisor / request.learning_rate),
                units=tuple(dict.fromkeys(self._units)),
            )
        )
        self._start_anew()
        return result

    def live_weights(self) -> SampledWeights:
        """See ``backend.Session``."""
        return self._inner.live_weights()

    def export_state(self, *, optimizer: bool) -> EngineState:
        """See ``backend.Session``."""
        return self._inner.export_state(optimizer=optimizer)

    def import_state(self, state: EngineState, *, optimizer: bool) -> None:
        """See ``backend.Session``."""
        self._inner.import_state(state, optimizer=optimizer)
        self._start_anew()

    def encode(self, text: str) -> list[int]:
        """See ``backend.Session``."""
        return self._inner.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``backend.Session``."""
        return self._inner.decode(ids)

    def close(self) -> None:
        """See ``backend.Session``."""
        self._inner.close()

    def _start_anew(self) -> None:
        self._clipped_P = np.zeros(self.trainable_parameters)
        self._units = []

    def _weights(self) -> Floats:
        tensors = self._inner.export_state(optimizer=False).tensors
        names = sorted(name for name in tensors if name.startswith(WEIGHTS))
        return np.concatenate([tensors[name].astype(np.float64).reshape(-1) for name in names])
