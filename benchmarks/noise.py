"""Measures the privacy noise: `python -m benchmarks.noise`.

How many normals one CPU-second makes, beside generators that are fast but predictable, and which share of a training
step the noise takes. Contenders take turns, in a new order each round; CPU time is that of the whole process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from benchmarks.engine_peers.contender import Recipe
from benchmarks.engine_peers.ours import Ours
from benchmarks.engine_peers.shapes import SHAPES
from benchmarks.engine_peers.timing import interleave
from benchmarks.report import machine, paired_ratio, print_table, results_path, round_orders, write_json
from tg_tinker_server.dp.mechanism import GaussianMechanism
from tg_tinker_server.dp.rng import SecureNormal

ROUNDS, STEP_ROUNDS = 15, 7
PER_ROUND = 2_500_000  # normals
COUNTS = (221_184, 1_250_000)
STEPS = ("D", "B")  # shapes whose adapters have 221,184 and about 1,250,000 parameters
OURS, ADDED, PLAIN = "ours", "ours, added to a vector", "AES-CTR, sin and cos"

Draw = Callable[[], object]


class PlainBoxMuller:
    """What the formula costs when it is written down in NumPy: the base of the ratios."""

    def __init__(self) -> None:
        self._stream = Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor()

    def normals(self, count: int) -> npt.NDArray[np.float64]:
        """Not secret, and otherwise as good as ours."""
        pairs = 1 << 15
        out = np.empty(count)
        for start in range(0, count, 2 * pairs):
            block = out[start : start + 2 * pairs]
            half = (len(block) + 1) // 2
            words = np.frombuffer(self._stream.update(bytes(16 * half)), dtype=np.uint64).reshape(2, half)
            radius = np.sqrt(-2.0 * np.log((words[0].astype(np.float64) + 0.5) * 2.0**-64))
            angle = words[1].astype(np.float64) * (2.0 * np.pi * 2.0**-64)
            block[:half] = radius * np.cos(angle)
            block[half:] = (radius * np.sin(angle))[: len(block) - half]
        return out


def contenders(count: int) -> dict[str, Draw]:
    """Each one's draw of ``count`` normals."""
    secure, plain, numpy_rng = SecureNormal(), PlainBoxMuller(), np.random.default_rng()
    vector, zeros = np.zeros(count), {kind: torch.zeros(count, dtype=kind) for kind in (torch.float32, torch.float64)}
    return {
        OURS: lambda: secure.normals(count),
        ADDED: lambda: GaussianMechanism(1.0, 1.0, secure).add_noise_([vector]),
        PLAIN: lambda: plain.normals(count),
        f"{PLAIN}, added": lambda: np.add(vector, plain.normals(count) * 1.1, out=vector),
        "torch.normal float32": lambda: torch.normal(zeros[torch.float32], 1.0),
        "torch.normal float64": lambda: torch.normal(zeros[torch.float64], 1.0),
        "NumPy standard_normal": lambda: numpy_rng.standard_normal(count),
    }


def cpu_seconds(draws: dict[str, Draw], count: int) -> dict[str, list[float]]:
    """CPU seconds of one draw of each contender, a value per round."""
    times = max(1, PER_ROUND // count)
    samples: dict[str, list[float]] = {name: [] for name in draws}
    for draw in draws.values():
        draw()
    for order in round_orders(list(draws), rounds=ROUNDS):
        for name in order:
            start_s = time.process_time()
            for _ in range(times):
                draws[name]()
            samples[name].append((time.process_time() - start_s) / times)
    return samples


def step_share(shape_name: str) -> dict[str, object]:
    """The noise of one shape's step beside the step: CPU milliseconds, and their ratio in percent."""
    ours = Ours(SHAPES[shape_name], Recipe(max_grad_norm=1.0))
    parameters = sum(value.size for value in ours.weights().values())
    step_s = statistics.median(interleave({OURS: ours}, rounds=STEP_ROUNDS)[OURS].cpu_s)
    noise_s = statistics.median(cpu_seconds({ADDED: contenders(parameters)[ADDED]}, parameters)[ADDED])
    return {
        "shape": shape_name,
        "parameters": parameters,
        "noise_ms": round(1e3 * noise_s, 2),
        "step_ms": round(1e3 * step_s, 1),
        "share_percent": round(100 * noise_s / step_s, 2),
    }


def main() -> None:
    torch.set_num_threads(1)
    facts = machine()
    versions = f"NumPy {np.__version__}, torch {facts['torch']}"
    print(f"{facts['cpu']}, {facts['cores']} cores; {versions}; {facts['date'][:10]}")
    rates = {}
    for count in COUNTS:
        samples = cpu_seconds(contenders(count), count)
        rates[count] = {name: round(count / 1e6 / statistics.median(values), 1) for name, values in samples.items()}
        rows = [(name, rate, paired_ratio(samples[PLAIN], samples[name])) for name, rate in rates[count].items()]
        print_table(f"{count:,} normals", ["", "million per CPU-s", f"times {PLAIN}"], rows)
    shares = [step_share(name) for name in STEPS]
    print_table(
        "Noise within one private training step, one thread",
        ["shape", "parameters", "noise, CPU-ms", "step, CPU-ms", "share, %"],
        [list(share.values()) for share in shares],
    )
    path = results_path("noise", facts)
    write_json(path, {"machine": facts, "million_normals_per_cpu_s": rates, "steps": shares})
    print(f"kept as {path}")


if __name__ == "__main__":
    main()
