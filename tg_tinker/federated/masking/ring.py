"""Numbers of an update as integers modulo 2^32, where masks vanish exactly.

A coordinate is cut to [-clip, clip] and rounded to the nearest of ``2**bits - 1`` evenly spaced values, zero among
them; negative ones in two's complement. Sums of n such integers do not wrap while ``n * 2**bits < 2**32``.

Shape suffixes: P parameters.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import FederationRefusedError

MODULUS = 2**32
Words = npt.NDArray[np.uint32]


def levels(bits: int) -> int:
    """The largest integer a coordinate becomes: ``clip`` in units of the grid."""
    return (1 << (bits - 1)) - 1


def error_bound(clip: float, bits: int) -> float:
    """How far a coordinate of the mean may lie from the mean of the clipped updates: half a step of the grid.

    The step is ``clip / (2**(bits - 1) - 1)``; rounding moves each update, and so their mean, by at most half of it:
    ``clip / (2**bits - 2)``. The last factor covers float64 arithmetic, which adds less than 2**-26 of that. What
    clipping cuts off comes on top, and how much that is stays the site's secret.
    """
    return clip / (2 * levels(bits)) * (1 + 2.0**-24)


def check_headroom(sites: int, bits: int) -> None:
    """Require that the sum of all sites cannot wrap.

    Raises:
        FederationRefusedError: reason "masking".
    """
    if sites << bits >= MODULUS:
        raise FederationRefusedError(
            f"the sum of {sites} sites of {bits} bits each can overflow 32 bits; set masking.bits to at most "
            f"{(MODULUS // sites - 1).bit_length() - 1} or take fewer sites",
            reason="masking",
        )


def quantise(vector_P: npt.NDArray[np.floating], *, clip: float, bits: int) -> Words:
    """Clip and round; halves go to the even neighbour. The same input gives the same output everywhere.

    Raises:
        FederationRefusedError: reason "bad_update": not a vector, or a number that is not finite.
    """
    if vector_P.ndim != 1 or not np.isfinite(vector_P).all():
        raise FederationRefusedError(
            "only a vector of finite numbers can be masked; look at the training of this round", reason="bad_update"
        )
    scaled_P = np.clip(vector_P.astype(np.float64), -clip, clip) * (levels(bits) / clip)
    return np.rint(scaled_P).astype(np.int32).view(np.uint32)


def dequantise_mean(sum_P: Words, *, sites: int, clip: float, bits: int) -> npt.NDArray[np.float64]:
    """The mean update behind a sum of ``sites`` quantised ones, float64: float32 would cost more than 24 bits hold.

    Raises:
        FederationRefusedError: reason "bad_update": a coordinate that no ``sites`` clipped updates sum to. Then masks
            did not cancel, or somebody sent what is not a masked update. Nobody can be named: that is what masks do.
    """
    signed_P = sum_P.astype("<u4", copy=False).view("<i4").astype(np.int64)
    outside = int(np.count_nonzero(np.abs(signed_P) > sites * levels(bits)))
    if outside:
        raise FederationRefusedError(
            f"{outside} of {sum_P.size} coordinates of the sum are larger than {sites} clipped updates can make it: "
            "a site did not follow the protocol, and masks hide which; go on to the next round, with fewer sites if "
            "it happens again",
            reason="bad_update",
        )
    mean_P: npt.NDArray[np.float64] = signed_P * (clip / levels(bits)) / sites
    return mean_P
