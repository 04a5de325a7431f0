"""The seam between the service and a model: what a backend offers, and the values that cross it.

Three implementations live here: ``bigram.BigramBackend`` (NumPy), ``torch_backend.TorchBackend`` and, beside either,
``vector.WithVectors`` for runs on one vector. One behavioural suite runs against all. Every call of every session
comes from one compute thread; a session must leave all others bit for bit as they were, whatever happens to it.

Shape suffixes: B records, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from tg_tinker.types import IGNORE_INDEX, BatchData, TrainingConfig
from tg_tinker.types.info import ModelInfo
from tg_tinker.types.losses import Loss
from tg_tinker.types.optim import AdamParams
from tg_tinker_server.dp.mechanism import GaussianMechanism

if TYPE_CHECKING:
    from tg_tinker_server.engine.sampling.seam import SampledWeights

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PassRequest:
    """One batch for one forward (and backward) pass.

    Attributes:
        input_ids_BT: token ids.
        attention_mask_BT: 1 for real tokens, 0 for padding.
        labels_BT: aligned with ``input_ids_BT``; shifted inside; ``IGNORE_INDEX`` is no target.
        units: privacy unit of each record; ``None`` makes each record its own unit, known by its content in
            other calls of the logical batch.
        train: compute gradients, with dropout; otherwise loss only.
        seed: governs dropout, together with the run's seed, and nothing else.
    """

    input_ids_BT: Ints  # noqa: N815 - shape suffix
    attention_mask_BT: Ints  # noqa: N815 - shape suffix
    labels_BT: Ints  # noqa: N815 - shape suffix
    units: tuple[str, ...] | None = None
    train: bool = True
    seed: int = 0

    @classmethod
    def of_batch(
        cls, batch: BatchData, *, units: Sequence[str] | None = None, train: bool = True, seed: int = 0
    ) -> PassRequest:
        """Fill in what a batch may omit: a mask of ones, and every real token as a target."""
        ids = batch.input_ids
        mask = np.ones_like(ids) if batch.attention_mask is None else batch.attention_mask
        labels = np.where(mask == 1, ids, IGNORE_INDEX) if batch.labels is None else batch.labels
        return cls(
            input_ids_BT=ids,
            attention_mask_BT=mask,
            labels_BT=labels,
            units=None if units is None else tuple(units),
            train=train,
            seed=seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossRequest:
    """Datums for one forward (and backward) pass. Nothing is shifted: position i predicts row i of the targets.

    Gradients are those of the SUM of the loss over all positions and datums.

    Attributes:
        tokens: of each datum, int64 [N].
        inputs: of each datum, by name: target_tokens int64 [N] or [N, K], others float32 of the same shape. Checked
            against the loss.
        loss: which, with its settings.
        graph: of a custom loss, as JSON.
        units, train, seed: as in ``PassRequest``.
    """

    tokens: tuple[Ints, ...]
    inputs: tuple[Mapping[str, npt.NDArray[Any]], ...]
    loss: Loss
    graph: str = ""
    units: tuple[str, ...] | None = None
    train: bool = True
    seed: int = 0


Request = PassRequest | LossRequest


class Contribution(Protocol):
    """The gradient of one call, not yet part of anything. Dropping it leaves no trace."""

    @property
    def units(self) -> tuple[str, ...]:
        """The privacy units in it, each once."""
        ...

    def digest(self) -> bytes:
        """SHA-256 over sorted parameter names and float32 little-endian bytes of this call's gradient.

        Without privacy it is the gradient of ``PassResult.loss``; with it, the clipped sum over units before
        noise, so the digest must be keyed before anyone but the engine sees it.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """What one pass computed. Losses are in nats.

    Attributes:
        loss: mean over records of each record's mean over its own targets; a record without targets counts
            as zero, and so does a batch without records. Of datums: the sum over all of them.
        loss_sum: sum over all targets of all records.
        num_targets: how many targets that is.
        num_tokens: sum of the attention mask.
        num_records: records in the batch.
        contribution: ``None`` unless the request was for training.
        logprobs: for datums: of each its targets' log-probabilities, float32 in the shape of target_tokens.
        metrics: further figures, named ``name:reducer``.
    """

    loss: float
    loss_sum: float
    num_targets: int
    num_tokens: int
    num_records: int
    contribution: Contribution | None
    logprobs: tuple[npt.NDArray[np.float32], ...] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Pass(Protocol):
    """One ``forward_backward`` under way, in slices small enough that other work gets its turn in between.

    Between ``start`` and the last slice the session may be sampled, and nothing else that needs its weights to stay.
    """

    @property
    def finished(self) -> bool:
        """Whether nothing is left to compute."""
        ...

    def advance(self, others: Sequence[Pass] = ()) -> list[Pass]:
        """Compute one slice and, in the same run through the model, a slice of others that fit beside it.

        Args:
            others: unfinished passes of other sessions, in the order in which they should be taken along. Which of
                them can be (same model in memory, room left) is decided here; the results are those of a pass alone,
                up to float rounding, and a record that is not finite touches nobody else's.

        Returns:
            Those of ``others`` that moved.

        Raises:
            InvalidRequestError: this pass failed, as in ``Session.forward_backward``. All others are as before.
        """
        ...

    def result(self) -> PassResult:
        """What it computed, once it is finished.

        Raises:
            InvalidRequestError: without privacy, loss or gradient is not finite.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRequest:
    """One optimizer step.

    Attributes:
        learning_rate: of this step; the schedule has already been applied.
        mechanism: the paid-for noise; ``None`` adds none.
        global_clip: L2 bound on the (noised) mean gradient, or ``None``.
        adam: betas, eps and weight decay of this step, instead of the run's; the run has an Adam optimizer then. Its
            learning rate and clip are the two above.
    """

    learning_rate: float
    mechanism: GaussianMechanism | None = None
    global_clip: float | None = None
    adam: AdamParams | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step did.

    Attributes:
        grad_norm: L2 norm of the (noised) mean gradient, before the global clip.
        norm_before_clip: mean over units of the unit's norm, non-finite units left out; NaN without privacy.
        norm_after_clip: the same after clipping.
        num_clipped: units whose norm was above the bound.
        nonfinite_units: units that contributed zero because their gradient was not finite.
        update_hash: ``sha256:...`` of the (noised) mean gradient.
    """

    grad_norm: float
    norm_before_clip: float
    norm_after_clip: float
    num_clipped: int
    nonfinite_units: int
    update_hash: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineState:
    """Weights and optimizer of a run as plain arrays. No pending gradients, no generator state.

    Attributes:
        tensors: ``weights/<parameter>`` and, if asked for, ``optimizer/<parameter>/<quantity>``; float32. With the
            optimizer also ``anchor/<parameter>``, if a proximal term pulls back to other weights than these.
        scalars: JSON-compatible facts: model, optimizer.
    """

    tensors: Mapping[str, npt.NDArray[np.float32]]
    scalars: Mapping[str, Any]


class Session(Protocol):
    """One run: trainable parameters on a base model, a pending logical batch, an optimizer."""

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        ...

    @property
    def base_dtype(self) -> str:
        """Precision of the frozen base: "float32" or "bfloat16"."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 to this, exclusive."""
        ...

    @property
    def max_positions(self) -> int:
        """Longest sequence the model and the run's configuration take, in tokens."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion."""
        ...

    @property
    def pending_calls(self) -> int:
        """Contributions accumulated since the last step, those of empty batches included."""
        ...

    @property
    def pending_units(self) -> tuple[str, ...]:
        """Their privacy units."""
        ...

    def check(self, request: Request) -> None:
        """Raise InvalidRequestError, with field and constraint, unless batch or datums fit. No model work."""
        ...

    def start(self, request: Request) -> Pass:
        """Begin to compute losses and, in training, a contribution. No model work yet.

        Raises:
            InvalidRequestError: as ``check``.
        """
        ...

    def forward_backward(self, request: Request) -> PassResult:
        """Start a pass and take it to its end. Changes neither weights nor what is pending.

        Raises:
            InvalidRequestError: as ``check``; without privacy also when loss or gradient is not finite.
        """
        ...

    def contribute(self, vectors_UP: npt.NDArray[np.float32], units: tuple[str, ...]) -> PassResult:
        """Make a contribution of rows computed elsewhere [U, P]. Changes neither weights nor what is pending.

        Row i is a gradient of unit ``units[i]``; rows of one unit are summed first. Under privacy each unit is then
        clipped to ``max_grad_norm``, and one whose sum is not finite contributes zero. The array is handed over: it
        must not change afterwards. There are no tokens, so losses and counts of tokens are zero.

        Raises:
            InvalidRequestError: this session computes its own gradients; or the rows do not fit the run; without
                privacy also when a row is not finite.
        """
        ...

    def accumulate(self, contribution: Contribution) -> None:
        """Add a contribution of this session to the pending logical batch.

        Raises:
            InvalidRequestError: a unit is pending already and ``merge_units`` is off, or batches (means) and datums
                (sums) would be mixed; nothing is added.
        """
        ...

    def discard_pending(self) -> None:
        """Forget the pending logical batch."""
        ...

    def step(self, request: StepRequest) -> StepResult:
        """Take one optimizer step with the pending logical batch and clear it.

        Without privacy the gradient is the mean over all pending records, or the plain sum over datums. With it: the
        clipped sum over units, plus noise, divided by ``TrainingConfig.expected_batch_size``. Then
        ``OptimizerConfig.proximal_mu`` times the way from the anchor is added: from the weights last imported in a
        state without an anchor.

        On any exception weights, optimizer and pending batch are as before; the mechanism may be used up.
        """
        ...

    def live_weights(self) -> SampledWeights:
        """The handle from which this run is sampled: there is one, with the weights of the moment, and closing the
        session closes it.

        Raises:
            InvalidRequestError: this run takes no tokens.
        """
        ...

    def export_state(self, *, optimizer: bool) -> EngineState:
        """Copy weights and, if asked, the optimizer's state."""
        ...

    def import_state(self, state: EngineState, *, optimizer: bool) -> None:
        """Take over a state and drop what is pending. With ``optimizer=False`` the optimizer starts anew.

        Raises:
            InvalidRequestError: names, shapes or values do not fit this run; nothing was changed.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """Text to token ids, as the model's tokenizer does by default."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text, special tokens left out."""
        ...

    def close(self) -> None:
        """Give back the adapter's memory and hooks. Further calls are errors; closing twice is not."""
        ...


class Backend(Protocol):
    """Offers base models and opens sessions on them."""

    def models(self) -> list[ModelInfo]:
        """What is offered."""
        ...

    def open(self, *, run_id: str, config: TrainingConfig) -> Session:
        """Make a session.

        Raises:
            InvalidRequestError: unknown model or target module, naming those that exist.
            DPUnsupportedError: something in the model would make epsilon untrue.
        """
        ...


__all__ = [
    "Backend",
    "Contribution",
    "EngineState",
    "LossRequest",
    "Pass",
    "PassRequest",
    "PassResult",
    "Request",
    "Session",
    "StepRequest",
    "StepResult",
]
