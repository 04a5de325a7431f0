"""What a session is before it has a model: request checks, the pending batch, the shape of a step."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import DPUnsupportedError, InvalidRequestError, ServerError
from tg_tinker.types import OptimizerConfig, TrainingConfig
from tg_tinker_server.engine.backend import (
    Contribution,
    EngineState,
    LossRequest,
    Pass,
    PassResult,
    Request,
    StepRequest,
    StepResult,
)
from tg_tinker_server.engine.gradients import ParamLayout
from tg_tinker_server.engine.loss_fns.checks import check_datums
from tg_tinker_server.engine.pending import PendingBatch
from tg_tinker_server.engine.requests import check_request
from tg_tinker_server.engine.sampling.seam import SampledWeights
from tg_tinker_server.engine.state import ANCHOR, checked_anchor
from tg_tinker_server.engine.tokenizers import Tokenizer


class SessionCore(ABC):
    """The half of ``backend.Session`` that all backends share."""

    def __init__(
        self,
        *,
        config: TrainingConfig,
        layout: ParamLayout,
        tokenizer: Tokenizer,
        vocab_size: int,
        model_positions: int,
        base_dtype: str,
    ) -> None:
        if config.private and config.loss_scale == "dynamic":
            raise DPUnsupportedError(
                "loss_scale='dynamic' skips steps depending on the data, which differential privacy cannot account "
                "for; use a static loss_scale, or bf16, which needs none",
                feature="loss_scale",
                reason="whether a step is taken would depend on raw gradients",
                alternative="loss_scale=128.0",
            )
        self._config = config
        self._layout = layout
        self._tokenizer = tokenizer
        self._pending = PendingBatch(layout, config)
        # What the proximal term pulls back to; None is the weights as they are, until a step moves them.
        self._anchor_P: npt.NDArray[np.float32] | None = None
        self._closed = False
        self.trainable_parameters = layout.size
        self.base_dtype = base_dtype
        self.vocab_size = vocab_size
        self.max_positions = min(model_positions, config.max_sequence_length)
        self.eos_token_ids = tokenizer.eos_token_ids

    @property
    def pending_calls(self) -> int:
        """See ``backend.Session``."""
        return self._pending.calls

    @property
    def pending_units(self) -> tuple[str, ...]:
        """See ``backend.Session``."""
        return self._pending.units

    def check(self, request: Request) -> None:
        """See ``backend.Session``."""
        sizes = {"vocab_size": self.vocab_size, "max_positions": self.max_positions}
        if isinstance(request, LossRequest):
            check_datums(request, self._config, **sizes)
        else:
            check_request(request, self._config, **sizes)

    @abstractmethod
    def start(self, request: Request) -> Pass:
        """See ``backend.Session``."""

    def forward_backward(self, request: Request) -> PassResult:
        """See ``backend.Session``."""
        work = self.start(request)
        while not work.finished:
            work.advance()
        return work.result()

    def contribute(self, vectors_UP: npt.NDArray[np.float32], units: tuple[str, ...]) -> PassResult:  # noqa: ARG002
        """See ``backend.Session``. A run on a language model computes its gradients itself."""
        raise InvalidRequestError(
            f"this run trains {self._config.model_ref}, which computes gradients from records; send records, or make "
            'a run with model_ref="vector:<size>" for vectors',
            field="model_ref",
            constraint="vector:<size>",
        )

    def accumulate(self, contribution: Contribution) -> None:
        """See ``backend.Session``."""
        self.ensure_open()
        self._pending.add(contribution)

    def discard_pending(self) -> None:
        """See ``backend.Session``."""
        self._pending.clear()

    def step(self, request: StepRequest) -> StepResult:
        """See ``backend.Session``."""
        self.ensure_open()
        if not 0 <= request.learning_rate <= float(np.finfo(np.float32).max):
            raise InvalidRequestError(
                f"learning_rate {request.learning_rate} is not possible",
                field="learning_rate",
                constraint="0 or more, and within float32",
            )
        optimizer = self._optimizer_of(request)
        release = self._pending.release(request)
        grad_P = self._with_proximal_term(release.grad_P)
        if not np.isfinite(grad_P).all():
            raise diverged("the mean gradient is not finite")
        self._apply(grad_P, request.learning_rate, optimizer)
        self._pending.clear()
        return release.result

    def _optimizer_of(self, request: StepRequest) -> OptimizerConfig:
        """The run's, or as the step wants it: AdamW, whose decay is decoupled, on the same moments as ever."""
        config, adam = self._config.optimizer, request.adam
        if adam is None:
            return config
        if config.name not in ("adam", "adamw"):
            raise InvalidRequestError(
                f"this run's optimizer is {config.name}, which has no betas and no eps; leave adam_params out, or "
                'make a run with OptimizerConfig(name="adamw")',
                field="adam_params",
                constraint="a run with the optimizer adamw or adam",
            )
        changes = {
            "name": "adamw",
            "betas": (adam.beta1, adam.beta2),
            "eps": adam.eps,
            "weight_decay": adam.weight_decay,
        }
        return config.model_copy(update=changes)

    def _with_proximal_term(self, grad_P: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The gradient of F(w) + mu/2 |w - anchor|^2 [P] (Li et al. 2020). Only released weights enter: free."""
        mu = self._config.optimizer.proximal_mu
        if mu == 0:
            return grad_P
        weights_P = self._weights_P()
        if self._anchor_P is None:
            self._anchor_P = weights_P
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused by the caller
            return grad_P + np.float32(mu) * (weights_P - self._anchor_P)

    def _anchor_tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """The anchor as part of an exported state."""
        if self._anchor_P is None:
            return {}
        return {ANCHOR + name: part.copy() for name, part in self._layout.split(self._anchor_P).items()}

    def _anchor_of(self, state: EngineState) -> npt.NDArray[np.float32] | None:
        """The anchor after importing a state with its optimizer."""
        return checked_anchor(state, self._layout) if self._config.optimizer.proximal_mu else None

    @abstractmethod
    def live_weights(self) -> SampledWeights:
        """See ``backend.Session``."""

    def encode(self, text: str) -> list[int]:
        """See ``backend.Session``."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``backend.Session``."""
        return self._tokenizer.decode(ids)

    @abstractmethod
    def _apply(self, grad_P: npt.NDArray[np.float32], learning_rate: float, optimizer: OptimizerConfig) -> None:
        """Step the optimizer with this gradient [P] and these settings, all or nothing.

        Raises:
            InvalidRequestError: the new weights would not be finite.
        """

    @abstractmethod
    def _weights_P(self) -> npt.NDArray[np.float32]:  # noqa: N802 - shape suffix
        """Trained weights, flat in the layout's order [P]; steps to come leave it as it is."""

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def ensure_open(self) -> None:
        if self._closed:
            raise ServerError("the session is closed; open the run again")


def diverged(what: str) -> InvalidRequestError:
    """The error of a step that would leave the finite numbers."""
    return InvalidRequestError(
        f"{what}; nothing was changed. Lower the learning rate, or load an earlier checkpoint",
        field="weights",
        constraint="finite",
    )


def ensure_finite(weights: Sequence[npt.NDArray[np.float32]]) -> None:
    """Raise InvalidRequestError unless all weights are finite."""
    if not all(np.isfinite(w).all() for w in weights):
        raise diverged("the step would make weights infinite or NaN")


def ensure_finite_pass(loss: float, gradient: npt.NDArray[np.float64] | None) -> None:
    """Raise InvalidRequestError unless loss and gradient of a pass are finite."""
    if not np.isfinite(loss) or (gradient is not None and not np.isfinite(gradient).all()):
        raise InvalidRequestError(
            "loss or gradient of this batch is not finite; nothing was accumulated. If the inputs of the loss are "
            "finite, the weights have probably diverged: load an earlier checkpoint and lower the learning rate",
            field="batch",
            constraint="finite loss and gradient",
        )


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from a domain tag and the parts, by SHA-256."""
    text = "\x00".join(["tg-tinker/seed/v1", *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
