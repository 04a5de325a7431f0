"""The ordered calls of a run as values; ``wire.call_messages`` turns them into the requests that carry them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tg_tinker.types import BatchData
from tg_tinker.types.datum import Datum
from tg_tinker.types.losses import Loss
from tg_tinker.types.optim import AdamParams
from tg_tinker.types.sampling import GenerationOptions

_UPDATES_DOMAIN = b"tg-tinker/updates/v1\x00"
MAX_TTL_S = 100 * 365 * 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a call stands: the run, the sequence number, and which client handle assigned it."""

    run_id: str
    seq: int
    handle: str = ""

    @property
    def future_id(self) -> str:
        """The public name of the operation at this position."""
        return f"{self.run_id}.{self.seq}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pass:
    """One forward_backward.

    Attributes:
        train: accumulate the gradient; otherwise only evaluate.
        units: one privacy unit id per record, already keyed; ``None``: each record is its own unit.
        batch_hash: ``sha256:...`` that must match, or a label.
        dataset_id: the server draws the batch from this registered dataset; ``batch`` is then empty.
    """

    batch: BatchData
    train: bool = True
    units: tuple[str, ...] | None = None
    batch_hash: str | None = None
    dataset_id: str = ""

    @classmethod
    def drawn_from(cls, dataset_id: str, *, train: bool = True) -> Pass:
        """A pass over a batch that the server draws."""
        return cls(batch=BatchData(input_ids=[]), train=train, dataset_id=dataset_id)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossPass:
    """One forward_backward, or forward, on datums.

    Attributes:
        data: checked against ``loss``.
        train: accumulate the gradient; otherwise only evaluate.
        units: one privacy unit id per datum, already keyed; ``None``: each datum is its own unit.
        coupling: "batch" where the inputs of a datum were computed from others than those of its own privacy unit,
            as far as is known; a run with differential privacy refuses it.
    """

    data: tuple[Datum, ...]
    loss: Loss
    train: bool = True
    units: tuple[str, ...] | None = None
    coupling: Literal["independent", "batch"] = "independent"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Updates:
    """One add_updates.

    Attributes:
        vectors_UP: float32 [rows, parameters]; row i is a contribution of ``units[i]``.
        units: already keyed.
    """

    vectors_UP: npt.NDArray[np.float32]  # noqa: N815 - shape suffix
    units: tuple[str, ...]

    def digest(self) -> bytes:
        """SHA-256 over the canonical bytes of the rows: domain tag, shape, data."""
        digest = hashlib.sha256(_UPDATES_DOMAIN)
        header = f"vectors:float32:{','.join(str(n) for n in self.vectors_UP.shape)}".encode()
        digest.update(len(header).to_bytes(4, "little") + header)
        digest.update(np.ascontiguousarray(self.vectors_UP, dtype="<f4").tobytes())
        return digest.digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optim_step.

    Attributes:
        incomplete: why a pass of this logical batch never arrived, as only the client knows; the server then
            drops the batch and refuses the step. Empty otherwise.
        known_log_size: of the newest log tree that the client verified; the receipt is proven from there.
        adam: settings of this step; ``None``: those of the run and its schedule.
    """

    apply_dp_noise: bool = True
    adam: AdamParams | None = None
    incomplete: str = ""
    known_log_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """One save_state.

    Attributes:
        kind: "state"; "sampler": weights for sampling, "external": weights to hand out; never with the optimizer.
        name: unique for the run and kind, unless ``overwrite``; empty: none.
        ttl_seconds: after which it is deleted; ``None``: never.
    """

    include_optimizer: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    kind: Literal["state", "sampler", "external"] = "state"
    ttl_seconds: int | None = None
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One load_state; ``optimizer`` ``None`` loads whatever was saved.

    ``artifact_id`` may be a path: ``tg://`` or ``tinker://``.
    """

    artifact_id: str
    optimizer: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """One sample; ``num_completions`` for each prompt."""

    prompts: tuple[str, ...]
    params: GenerationOptions = field(default_factory=GenerationOptions)
    num_completions: int = 1


Call = Pass | LossPass | Updates | Step | Save | Load | Generate

# What the operation of each call is named, and whether it may change weights or the pending gradient.
OPERATION = {
    Pass: "forward_backward",
    LossPass: "forward_backward",
    Updates: "add_updates",
    Step: "optim_step",
    Save: "save_state",
    Load: "load_state",
    Generate: "sample",
}


def has_effect(call: Call) -> bool:
    """Whether a restarted server must execute the call again: it may change weights or the pending gradient."""
    return call.train if isinstance(call, Pass | LossPass) else isinstance(call, Updates | Step | Load)
