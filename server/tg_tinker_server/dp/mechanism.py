"""The Gaussian mechanism: noise for one release, drawn once.

Guarantee: if one privacy unit moves the value by at most ``max_grad_norm`` in L2, adding the noise makes a
Gaussian mechanism of that ``noise_multiplier`` (Dwork and Roth 2014, appendix A).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tg_tinker_server.dp.rng import NormalSource

ROUNDING_ROOM = 1e-3
"""Noise is larger than its multiplier says by this much, relatively: room for what float32 rounding couples.

The shape of a micro-batch decides how its records are rounded, so removing one record can move the others' share
of the clipped sum a little: measured at most 2e-6 of the bound, for 1024 equal records. This is about 500 times
that. It rests on measurements, not on a proof: docs/how-dp-lora-works.md, section 9.
"""


class GaussianMechanism:
    """Noise of one paid-for release; usable exactly once.

    Attributes:
        noise_multiplier: noise standard deviation divided by sensitivity, no unit.
        max_grad_norm: L2 bound on one privacy unit's contribution, in gradient units.
    """

    __slots__ = ("_rng", "_used", "max_grad_norm", "noise_multiplier")

    def __init__(self, noise_multiplier: float, max_grad_norm: float, rng: NormalSource) -> None:
        for name, value in (("noise_multiplier", noise_multiplier), ("max_grad_norm", max_grad_norm)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        self.noise_multiplier = float(noise_multiplier)
        self.max_grad_norm = float(max_grad_norm)
        self._rng = rng
        self._used = False

    @property
    def stddev(self) -> float:
        """Standard deviation of the noise on each coordinate, in gradient units, with ``ROUNDING_ROOM``."""
        return self.noise_multiplier * self.max_grad_norm * (1.0 + ROUNDING_ROOM)

    @property
    def used(self) -> bool:
        """Whether the noise was drawn."""
        return self._used

    def add_noise_(self, arrays: Sequence[npt.NDArray[np.float64]]) -> None:
        """Add independent noise to every coordinate of float64 arrays, in place.

        Raises:
            RuntimeError: the second time; a second draw would be a second release that nobody paid for.
            TypeError: an array is not float64: its rounding would not cover the noise's tail.
        """
        if self._used:
            raise RuntimeError("this mechanism has released already; reserve a new one in the ledger")
        for array in arrays:
            if array.dtype != np.float64:
                raise TypeError(f"noise is added in float64, got {array.dtype}")
        self._used = True
        for array in arrays:
            noise = self._rng.normals(array.size)
            noise *= self.stddev
            np.add(array, noise.reshape(array.shape), out=array)
