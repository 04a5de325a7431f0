"""Steps of several contenders, interleaved, so that a busy machine slows all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from benchmarks.report import round_orders


class Steps(Protocol):
    """Something that takes steps."""

    def step(self) -> None:
        """Take one."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Seconds per step of one contender, a value per round: of all threads together, and of the clock."""

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)


def synchronizer(device: str) -> Callable[[], None]:
    """What to call before a clock is read: a GPU works on after its call has returned."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def interleave(
    contenders: Mapping[str, Steps], *, rounds: int, warmups: int = 2, device: str = "cpu"
) -> dict[str, Samples]:
    """Take ``rounds`` measured steps of each contender, in a new order each round."""
    synchronize = synchronizer(device)
    for _ in range(warmups):
        for contender in contenders.values():
            contender.step()
    samples = {name: Samples() for name in contenders}
    gc.collect()
    gc.freeze()  # one contender's collections must not walk over the models of all others
    try:
        for order in round_orders(list(contenders), rounds=rounds):
            for name in order:
                gc.collect()
                synchronize()
                cpu_s, wall_s = time.process_time(), time.perf_counter()
                contenders[name].step()
                synchronize()
                samples[name].cpu_s.append(time.process_time() - cpu_s)
                samples[name].wall_s.append(time.perf_counter() - wall_s)
    finally:
        gc.unfreeze()
    return samples
