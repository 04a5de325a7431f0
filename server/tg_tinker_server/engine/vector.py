"""Runs on one plain vector, whose gradients come from elsewhere: ``model_ref="vector:<P>"``.

The vector starts at zero. A run hands in one row per privacy unit (an update of a site, a statistic of a user), and
has it clipped, summed, noised and charged like any gradient. There are no tokens: batches and prompts are refused.

Shape suffixes: U units or rows, P parameters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import OptimizerConfig, TrainingConfig
from tg_tinker.types.info import ModelInfo
from tg_tinker_server.dp.clipping import clip_and_sum
from tg_tinker_server.engine import numpy_optimizers
from tg_tinker_server.engine.backend import (
    Backend,
    EngineState,
    Pass,
    PassResult,
    Request,
    Session,
)
from tg_tinker_server.engine.gradients import Floats, GradientContribution, ParamLayout
from tg_tinker_server.engine.sampling.seam import SampledWeights
from tg_tinker_server.engine.session_core import SessionCore, ensure_finite, ensure_finite_pass
from tg_tinker_server.engine.state import OPTIMIZER, WEIGHTS, checked_optimizer, checked_weights

PREFIX = "vector:"
MAX_SIZE = 100_000_000
_VECTOR = "vector"
_NUMBERS_AT_ONCE = 1 << 22  # 32 MiB of float64
_SIZE = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)


class WithVectors:
    """A backend that also opens runs on vectors, beside the models of ``inner``.

    They are not among ``models()``: there is one for every size.
    """

    def __init__(self, inner: Backend) -> None:
        self._inner = inner

    def models(self) -> list[ModelInfo]:
        """See ``backend.Backend``."""
        return self._inner.models()

    def open(self, *, run_id: str, config: TrainingConfig) -> Session:
        """See ``backend.Backend``."""
        if config.model_ref.startswith(PREFIX):
            return VectorSession(config)
        return self._inner.open(run_id=run_id, config=config)


class VectorSession(SessionCore):
    """See ``backend.Session``.

    Raises:
        InvalidRequestError: the size is not possible, or the configuration asks for an adapter.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self._size = size_of(config.model_ref)
        if config.lora_config is not None:
            raise InvalidRequestError(
                f"{config.model_ref} has no layers that an adapter could lie on; leave lora_config out",
                field="lora_config",
                constraint="none for vector:<size>",
            )
        super().__init__(
            config=config,
            layout=ParamLayout({_VECTOR: (self._size,)}),
            tokenizer=_NoTokenizer(),
            vocab_size=0,
            model_positions=0,
            base_dtype="float32",
        )
        self._vector_P: npt.NDArray[np.float32] = np.zeros(self._size, dtype=np.float32)
        self._optimizer_state: dict[str, npt.NDArray[np.float32]] = {}

    def check(self, request: Request) -> None:  # noqa: ARG002 - part of the seam
        """See ``backend.Session``. No batch fits."""
        raise _no_tokens("batch")

    def start(self, request: Request) -> Pass:
        """See ``backend.Session``. No batch fits."""
        self.ensure_open()
        self.check(request)
        raise AssertionError("unreachable")

    def contribute(self, vectors_UP: npt.NDArray[np.float32], units: tuple[str, ...]) -> PassResult:
        """See ``backend.Session``."""
        self.ensure_open()
        self._check_rows(vectors_UP, units)
        contribution = self._private(vectors_UP, units) if self._config.private else self._plain(vectors_UP)
        return PassResult(
            loss=0.0,
            loss_sum=0.0,
            num_targets=0,
            num_tokens=0,
            num_records=len(vectors_UP),
            contribution=contribution,
        )

    def _check_rows(self, vectors_UP: npt.NDArray[np.float32], units: tuple[str, ...]) -> None:
        wanted = f"float32 [rows, {self._size}]"
        if vectors_UP.dtype != np.float32 or vectors_UP.ndim != 2 or vectors_UP.shape[1] != self._size:
            raise InvalidRequestError(
                f"vectors are {vectors_UP.dtype} {list(vectors_UP.shape)}; this run takes {wanted}",
                field="vectors",
                constraint=wanted,
            )
        dp = self._config.dp_config
        if not len(vectors_UP) and not (self._config.private and dp is not None and dp.sampling == "poisson"):
            raise InvalidRequestError("there is no row in vectors", field="vectors", constraint="at least one row")
        if len(units) != len(vectors_UP):
            raise InvalidRequestError(
                f"{len(units)} privacy unit ids for {len(vectors_UP)} rows",
                field="privacy_unit_ids",
                constraint="one id per row",
            )

    def _plain(self, vectors_UP: npt.NDArray[np.float32]) -> GradientContribution:
        with np.errstate(invalid="ignore"):
            sum_P: Floats = np.add.reduce(vectors_UP, axis=0, dtype=np.float64)
        ensure_finite_pass(0.0, sum_P)
        return GradientContribution(layout=self._layout, num_records=len(vectors_UP), sum_P=sum_P, private=False)

    def _private(self, vectors_UP: npt.NDArray[np.float32], units: tuple[str, ...]) -> GradientContribution:
        """Sum the rows of each unit, clip, add up. A chunk of units at a time is in float64."""
        dp = self._config.dp_config
        assert dp is not None
        rows_of: dict[str, list[int]] = {}
        for row, unit in enumerate(units):
            rows_of.setdefault(unit, []).append(row)
        names = tuple(rows_of)
        sum_P, norms = np.zeros(self._size), [np.zeros(0)]
        kept_UP = np.zeros((len(names) if dp.merge_units else 0, self._size), dtype=np.float32)
        at_once = max(1, _NUMBERS_AT_ONCE // self._size)
        for start in range(0, len(names), at_once):
            chunk = names[start : start + at_once]
            grads_UP = np.zeros((len(chunk), self._size))
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is left out below
                for i, unit in enumerate(chunk):
                    for row in rows_of[unit]:
                        grads_UP[i] += vectors_UP[row]
                if dp.merge_units:
                    kept_UP[start : start + len(chunk)] = grads_UP
            clipped = clip_and_sum(grads_UP, max_grad_norm=dp.max_grad_norm)
            sum_P += clipped.sum_P
            norms.append(clipped.norms_U)
        return GradientContribution(
            layout=self._layout,
            units=names,
            num_records=len(vectors_UP),
            sum_P=sum_P,
            norms_U=np.concatenate(norms),
            grads_UP=kept_UP if dp.merge_units else None,
            private=True,
        )

    def live_weights(self) -> SampledWeights:
        """See ``backend.Session``. A vector says nothing."""
        self.ensure_open()
        raise _no_tokens("prompts")

    def export_state(self, *, optimizer: bool) -> EngineState:
        """See ``backend.Session``."""
        self.ensure_open()
        tensors = {WEIGHTS + _VECTOR: self._vector_P.copy()}
        if optimizer:
            tensors |= {f"{OPTIMIZER}{_VECTOR}/{k}": v.copy() for k, v in self._optimizer_state.items()}
            tensors |= self._anchor_tensors()
        name = self._config.optimizer.name if optimizer else None
        return EngineState(tensors=tensors, scalars={"model": self._config.model_ref, "optimizer": name})

    def import_state(self, state: EngineState, *, optimizer: bool) -> None:
        """See ``backend.Session``."""
        self.ensure_open()
        weights = checked_weights(state, self._layout)
        name = self._config.optimizer.name
        saved = checked_optimizer(state, self._layout, optimizer=name) if optimizer else {}
        self._anchor_P = self._anchor_of(state) if optimizer else None
        self._vector_P = weights[_VECTOR].copy()
        self._optimizer_state = {k: v.copy() for k, v in saved.get(_VECTOR, {}).items()}
        self.discard_pending()

    def close(self) -> None:
        """See ``backend.Session``."""
        self._closed = True
        self.discard_pending()

    def _apply(self, grad_P: npt.NDArray[np.float32], learning_rate: float, optimizer: OptimizerConfig) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            vector_P, state = numpy_optimizers.update(
                optimizer, self._vector_P, grad_P, self._optimizer_state, learning_rate=learning_rate
            )
        ensure_finite([vector_P])
        self._vector_P, self._optimizer_state = vector_P, state

    def _weights_P(self) -> npt.NDArray[np.float32]:  # noqa: N802 - shape suffix
        return self._vector_P


def size_of(model_ref: str) -> int:
    """P of a ``model_ref`` "vector:<P>".

    Raises:
        InvalidRequestError: it is no whole number from 1 to 100,000,000.
    """
    digits = model_ref.removeprefix(PREFIX)
    if not _SIZE.fullmatch(digits) or int(digits) > MAX_SIZE:
        raise InvalidRequestError(
            f"model_ref {model_ref!r} names no size of a vector; write vector:<size>, as in vector:4096",
            field="model_ref",
            constraint=f"vector: and a whole number from 1 to {MAX_SIZE}",
        )
    return int(digits)


def _no_tokens(field: str) -> InvalidRequestError:
    return InvalidRequestError(
        "this run trains a vector, which takes no tokens: it has neither forward passes nor generation; hand in "
        "rows with add_updates",
        field=field,
        constraint="a run on a language model",
    )


class _NoTokenizer:
    """Refuses text."""

    eos_token_ids: tuple[int, ...] = ()
    start_token_id: int | None = None

    def encode(self, text: str) -> list[int]:  # noqa: ARG002 - part of the interface
        raise _no_tokens("prompt")

    def decode(self, ids: Sequence[int]) -> str:  # noqa: ARG002
        raise _no_tokens("ids")
