"""Gradients as one flat vector per call, and the layout that names its parts.

Shape suffixes: P parameters, U units.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Form = Literal["mean", "sum"]
_DOMAIN = b"tg-tinker/gradient/v1\x00"


@dataclass(frozen=True, slots=True)
class ParamLayout:
    """Names and shapes of the trained parameters, sorted by name; where each lies in the flat vector."""

    shapes: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", dict(sorted(self.shapes.items())))

    @property
    def size(self) -> int:
        """P, how many numbers are trained."""
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes.values())

    def flatten(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Floats:
        """Join arrays by name into one float64 vector [P]."""
        parts = [np.asarray(arrays[name], dtype=np.float64).reshape(-1) for name in self.shapes]
        return np.concatenate(parts) if parts else np.zeros(0)

    def split(self, flat_P: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Views of a flat vector [P] by name."""
        out, start = {}, 0
        for name, shape in self.shapes.items():
            end = start + int(np.prod(shape, dtype=np.int64))
            out[name] = flat_P[start:end].reshape(shape)
            start = end
        return out

    def digest(self, flat_P: npt.NDArray[Any]) -> bytes:
        """SHA-256 over a domain tag, then per sorted name: name, shape, float32 little-endian bytes."""
        digest = hashlib.sha256(_DOMAIN)
        for name, array in self.split(flat_P).items():
            header = f"{name}:float32:{','.join(map(str, array.shape))}".encode()
            digest.update(len(header).to_bytes(4, "little") + header)
            digest.update(array.astype("<f4").tobytes())
        return digest.digest()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GradientContribution:
    """The gradient of one call.

    Attributes:
        layout: of the session that made it.
        units: privacy units, each once; empty without privacy.
        num_records: records summed over.
        sum_P: without privacy the sum over records, with it the clipped sum over units; float64.
        norms_U: each unit's norm before clipping.
        grads_UP: each unit's own gradient, kept only where units may be merged over calls.
        form: what the step makes of it without privacy: the mean over all records, or the sum as it is.
    """

    layout: ParamLayout
    units: tuple[str, ...] = ()
    num_records: int
    sum_P: Floats  # noqa: N815 - shape suffix
    norms_U: Floats = field(default_factory=lambda: np.zeros(0))  # noqa: N815
    grads_UP: npt.NDArray[Any] | None = None  # noqa: N815
    private: bool
    form: Form = "mean"

    def digest(self) -> bytes:
        """See ``backend.Contribution.digest``."""
        divisor = 1 if self.private or self.form == "sum" else max(1, self.num_records)
        return self.layout.digest(self.sum_P / divisor)
