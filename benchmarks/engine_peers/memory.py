"""The memory of a step beyond model, adapter and batch: the high-water mark of two steps, in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.engine_peers import build
from benchmarks.engine_peers.contender import Recipe
from benchmarks.engine_peers.shapes import Shape

STATUS, RESET, PAGES = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/self/statm")
PAGE_BYTES = 4096
SAMPLE_S = 0.001


def step_bytes(name: str, shape: Shape, recipe: Recipe, *, threads: int = 1) -> int | None:
    """Peak bytes of a contender's step over what it held before the first, or ``None`` where nothing can tell."""
    if not recipe.device.startswith("cuda") and not STATUS.exists():
        return None
    # A process that has measured another contender has its heap.
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, name, shape, recipe, threads).result()


def _measure(name: str, shape: Shape, recipe: Recipe, threads: int) -> int:
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(threads)
    # Code and tables that the libraries load with the first step are not the step's memory.
    tiny = replace(shape, name="warm-up", model="random", hidden=64, layers=1, vocabulary=256, tokens=16)
    build(name, tiny, recipe).step()
    contender = build(name, shape, recipe)
    gc.collect()
    if recipe.device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _two_steps(contender.step)
        return torch.cuda.max_memory_allocated() - before
    _return_freed_memory()
    with _peak_resident() as over:
        _two_steps(contender.step)
    return over()


def _two_steps(step: Callable[[], None]) -> None:
    # The first makes the optimizer's state, which the second finds in place while it computes.
    step()
    step()


def _return_freed_memory() -> None:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        return  # not glibc: what was freed counts as held, and the step's figure is a little small


@contextmanager
def _peak_resident() -> Iterator[Callable[[], int]]:
    """Within it, resident memory is watched; the callable tells its peak over the beginning, in bytes."""
    before = _resident()
    try:
        RESET.write_text("5")  # Linux: the high-water mark begins anew
    except OSError:
        with _sampled_peak() as peak:
            yield lambda: peak() - before
        return
    yield lambda: _status("VmHWM") - before


@contextmanager
def _sampled_peak() -> Iterator[Callable[[], int]]:
    """For containers that forbid the reset: a thread that looks every millisecond."""
    seen, done = [_resident()], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_S):
            seen[0] = max(seen[0], _resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: seen[0]
    finally:
        done.set()
        thread.join()


def _resident() -> int:
    return int(PAGES.read_text().split()[1]) * PAGE_BYTES


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
