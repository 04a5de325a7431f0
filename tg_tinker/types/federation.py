"""What a party of a federation exchanges with its own server: weights, their source, notes of what became of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, get_args

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.configs import MANY, DPConfig

LARGEST_WEIGHTS_BYTES: Final = 2 * 2**30
"""Of plain weights in one call, in or out. An adapter of rank 16 on all layers of a model of 70 billion takes 0.8."""
EVENTS: Final = frozenset(
    {
        "join_accepted",
        "join_refused",
        "round_refused",
        "round_trained",
        "statement_signed",
        "round_released",
        "round_failed",
        "job_finished",
    }
)
"""What may be noted of a federation. The audit log takes no free text."""
REASONS: Final = frozenset(
    {
        "policy",
        "expired",
        "unknown_site",
        "bad_signature",
        "bad_update",
        "wrong_round",
        "too_few_sites",
        "hopeless",
        "masking",
    }
)
"""Those of `FederationRefusedError`."""
REFUSALS: Final = frozenset({"join_refused", "round_refused", "round_failed"})
"""Events that have a reason."""
JOB: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
"""Digest of a job: its name."""
_UNITS = get_args(DPConfig.model_fields["privacy_unit"].annotation)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterWeights:
    """Trainable weights of a run between two operations, without optimizer and without pending gradients.

    Attributes:
        tensors: under the names that PEFT uses (transformers' own where every parameter is trained). They may be
            written to.
        step: optimizer steps that made them.
    """

    tensors: dict[str, Floats]
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsSource:
    """Where plain weights come from, as whoever brings them says; no ledger of the server holds it.

    Attributes:
        kind: "federation": an average over sites.
        job: digest of the job, hex.
        round: the weights are those after this round; 0: before the first.
        epsilon: what the whole job has promised to everybody in its data up to this round, not what the round
            added; ``inf``: nothing is promised.
        delta: that epsilon is stated at.
        unit: what the promise protects.

    Raises:
        InvalidRequestError: a value that cannot be.
    """

    kind: str = "federation"
    job: str
    round: int
    epsilon: float
    delta: float
    unit: str = "datum"

    def __post_init__(self) -> None:
        whole = isinstance(self.round, int) and not isinstance(self.round, bool)
        for field, holds, constraint in (
            ("kind", self.kind == "federation", "federation"),
            ("job", isinstance(self.job, str) and JOB.fullmatch(self.job) is not None, "64 hex digits"),
            ("round", whole and 0 <= self.round <= MANY, f"0 to {MANY}"),
            ("epsilon", _is_number(self.epsilon) and self.epsilon >= 0, ">= 0; inf where nothing is promised"),
            ("delta", _is_number(self.delta) and 0 < self.delta < 1, "in (0, 1)"),
            ("unit", self.unit in _UNITS, "one of: " + ", ".join(_UNITS)),
        ):
            if not holds:
                raise InvalidRequestError(
                    f"source.{field} must be {constraint}", field=f"source.{field}", constraint=constraint
                )

    @property
    def dataset_id(self) -> str:
        """Name of the data behind the weights in lineages, manifests and cards."""
        return f"federation:{self.job}"


def check_note(event: str, job: str, round_: int, reason: str) -> None:
    """Refuse a note that the audit log does not take.

    Raises:
        InvalidRequestError: a value outside of the lists, or a reason where nothing was refused.
    """
    for field, holds, constraint in (
        ("event", event in EVENTS, "one of: " + ", ".join(sorted(EVENTS))),
        ("job", JOB.fullmatch(job) is not None, "64 hex digits"),
        ("round", 0 <= round_ <= MANY, f"0 to {MANY}"),
        ("reason", not reason or reason in REASONS, "empty, or one of: " + ", ".join(sorted(REASONS))),
        ("reason", not reason or event in REFUSALS, "empty, unless the event is a refusal or a failure"),
    ):
        if not holds:
            raise InvalidRequestError(f"{field} must be {constraint}", field=field, constraint=constraint)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
