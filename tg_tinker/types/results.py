"""What the operations return: the reference's dataclasses, same fields, same order, and their extensions."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

from tg_tinker.types.datum import TensorData
from tg_tinker.types.log import LogReceipt


class Ready:
    """Lets a value that is already here be used like a future: ``result()`` and ``await`` return it."""

    def result(self, timeout: float | None = None) -> Self:  # noqa: ARG002 - same shape as FutureHandle
        """Return self, so that code written for futures works."""
        return self

    async def result_async(self, timeout: float | None = None) -> Self:  # noqa: ARG002
        """Return self, so that code written for futures works."""
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self
        yield  # makes this a generator


@dataclass
class ForwardBackwardResult:
    """One forward and backward pass.

    Attributes:
        loss: mean over records of each record's own mean negative log-likelihood per target token, in nats.
        batch_hash: ``sha256:...`` of the batch; ``hmac-sha256:...`` under differential privacy. Empty, like the next,
            for a draw of the server under ``diagnostics="off"``.
        gradient_hash: identifies the gradient this call contributed; empty in eval mode.
        num_tokens: sum of the attention mask.
        latency_ms: time on the server.
    """

    loss: float
    batch_hash: str
    gradient_hash: str
    num_tokens: int
    latency_ms: float


@dataclass
class ForwardBackwardOutput(ForwardBackwardResult):
    """With metrics such as ``loss:sum`` and ``loss:mean`` (nats per token), named ``name:reducer``.

    Attributes:
        loss_fn_output_type: what kind of outputs those are; empty where there are none.
        loss_fn_outputs: one for each datum, in order; ``logprobs`` in the shape of its target_tokens. NaN where
            diagnostics are off.
        custom_loss: of ``forward_backward_custom``: what the loss and each regularizer came to.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    loss_fn_output_type: str = ""
    loss_fn_outputs: list[dict[str, TensorData]] = field(default_factory=list)
    custom_loss: Any = None


@dataclass
class DPMetrics:
    """What one step cost.

    Attributes:
        noise_applied: whether noise was added.
        epsilon_spent: total after this step minus total before it.
        total_epsilon: of the whole history of the dataset at ``delta``.
        delta: the delta epsilon is stated at.
        grad_norm_before_clip: mean over units of the unit's norm (owner's diagnostics; NaN when off).
        grad_norm_after_clip: the same after clipping.
        num_clipped: units whose norm exceeded max_grad_norm; -1 when diagnostics are off.
    """

    noise_applied: bool
    epsilon_spent: float
    total_epsilon: float
    delta: float
    grad_norm_before_clip: float
    grad_norm_after_clip: float
    num_clipped: int


@dataclass
class OptimStepResult:
    """One optimizer step.

    Attributes:
        grad_norm: L2 norm of the (noised) mean gradient before global clipping.
        learning_rate: the rate just used.
        step: number of steps taken, this one included.
        dp_metrics: ``None`` without differential privacy.
        latency_ms: time on the server.
    """

    grad_norm: float
    learning_rate: float
    step: int
    dp_metrics: DPMetrics | None
    latency_ms: float


@dataclass
class OptimStepOutput(OptimStepResult):
    """With further metrics by name, and the proof that the charge is in the log; ``None`` without privacy."""

    metrics: dict[str, float] = field(default_factory=dict)
    receipt: LogReceipt | None = None


@dataclass
class Sample:
    """One completion; ``finish_reason`` is "length", "stop" or "eos"."""

    prompt: str
    completion: str
    num_tokens: int
    finish_reason: str
    latency_ms: float


@dataclass
class SampleResult(Ready):
    """Completions, prompt-major: all completions of the first prompt, then of the second."""

    samples: list[Sample]
    total_tokens: int
    latency_ms: float


@dataclass
class StreamChunk:
    """A piece of generated text; ``finish_reason`` is set on the last one."""

    text: str
    index: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class EncryptionInfo:
    """How an artifact is encrypted, and the id of the key that wraps its own key."""

    algorithm: str
    key_id: str


@dataclass
class SaveStateResult(Ready):
    """An encrypted checkpoint."""

    artifact_id: str
    size_bytes: int
    encryption: EncryptionInfo
    metadata: dict[str, Any]
    timestamp: datetime


@dataclass
class SavedState(SaveStateResult):
    """With the checkpoint's address and the SHA-256 of its ciphertext."""

    path: str = ""
    content_hash: str = ""


@dataclass
class LoadStateResult(Ready):
    """A restored checkpoint; ``timestamp`` is when it was saved."""

    artifact_id: str
    step: int
    metadata: dict[str, Any]
    timestamp: datetime
