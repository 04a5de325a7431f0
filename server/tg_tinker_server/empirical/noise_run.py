"""Instrument 2: trains two private runs at two bounds C and tests the noise that their weights show.

Shape suffixes: S steps, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tg_tinker.data import collate
from tg_tinker.types import DPConfig
from tg_tinker_server.empirical import noise_tests
from tg_tinker_server.empirical.bench import Bench
from tg_tinker_server.empirical.findings import Finding
from tg_tinker_server.empirical.planting import Planted
from tg_tinker_server.empirical.watching import Floats

NOISE_MULTIPLIER = 1.0
TESTS = 2 * 9 + 2
"""How many p-values come out: the error probability is split among them."""

_BATCH = 8
_MOVE = 0.01  # of a weight by one step's noise: small against the weights, large against their rounding


def examine_noise(bench: Bench, *, smallest_p: float, tell: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """Tests of each run, and of the two against each other.

    Args:
        smallest_p: p-values below it are alarms.
    """
    findings, normalised = [], []
    for bound in bench.settings.bounds:
        tell(f"noise at C = {bound:g}")
        noise_SP, signal_SP = _train(bench, bound)
        stddev = NOISE_MULTIPLIER * bound
        normalised.append(noise_SP / stddev)
        tests = noise_tests.examine(noise_SP, signal_SP, stddev=stddev)
        findings += [_finding(test, smallest_p, f" (C = {bound:g})") for test in tests]
    findings.append(_finding(noise_tests.follows_bound(normalised[0], normalised[1]), smallest_p))
    findings.append(_finding(noise_tests.between_runs(normalised[0], normalised[1]), smallest_p))
    assert len(findings) == TESTS
    return findings


def _finding(test: noise_tests.Statistic, smallest_p: float, where: str = "") -> Finding:
    return Finding(
        instrument="noise",
        name=test.name + where,
        figure=test.figure,
        threshold=smallest_p,
        p_value=test.p_value,
    )


def _train(bench: Bench, bound: float) -> tuple[Floats, Floats]:
    """Noise and clipped sums [S, P] of one run. All units pull one way, so their sum is as long as it can be.

    Half way the run goes back to its first checkpoint, so that noise which went back with it is seen twice.
    """
    bench.watch.forget()
    client = bench.open(
        DPConfig(
            noise_multiplier=NOISE_MULTIPLIER, max_grad_norm=bound, target_epsilon=None, dataset_id=f"noise-{bound:g}"
        ),
        batch_size=_BATCH,
        learning_rate=_MOVE * _BATCH / (NOISE_MULTIPLIER * bound),
    )
    record = bench.records(1, 12)
    bench.watch.plant(record[0], Planted(coordinate=7, value=bound))
    batch, units = collate(record * _BATCH), [f"unit-{i}" for i in range(_BATCH)]
    start = client.save_state().artifact_id
    for step in range(bench.settings.noise_steps):
        if step == bench.settings.noise_steps // 2:
            client.load_state(start)
        client.forward_backward(batch, privacy_unit_ids=units)
        client.optim_step().result()
    client.close()
    steps = bench.watch.steps
    noise_SP, signal_SP = np.stack([s.noise_P for s in steps]), np.stack([s.clipped_P for s in steps])
    bench.watch.forget()
    return noise_SP, signal_SP
