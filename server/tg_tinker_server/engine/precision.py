"""Whether this machine multiplies bfloat16 faster than float32; without hardware for it, it is much slower."""

from __future__ import annotations

import functools
import statistics
import time

import torch

_SIZE, _ROUNDS = 1024, 5
WORTHWHILE = 1.5
"""Speed-up of the product from which a model gains; the rest of its work gains nothing."""


@functools.cache
def bfloat16_pays(device: str) -> bool:
    """Whether a product in bfloat16 takes at most 1/``WORTHWHILE`` of its time in float32. Measured once per process.

    With matrix units for it the ratio is 4 or more, without it is below 1: a busy machine does not change the answer.
    """
    ratios = []
    wide = torch.ones(_SIZE, _SIZE, device=device)
    half = wide.to(torch.bfloat16)
    for round_ in range(_ROUNDS + 1):
        ratio = _seconds(wide) / _seconds(half)
        if round_:  # the first prepares kernels
            ratios.append(ratio)
    return statistics.median(ratios) >= WORTHWHILE


def _seconds(matrix: torch.Tensor) -> float:
    start = time.perf_counter()
    product = matrix @ matrix
    product[0, 0].item()  # waits for the device
    return time.perf_counter() - start
