"""The audit catches every planted fault, with the instrument that is made for it; an honest service is left alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.audit.faults import FAULTS, plant
from tg_tinker.data import collate
from tg_tinker_server.dp.calibration import epsilon_for
from tg_tinker_server.empirical.audit import audit
from tg_tinker_server.empirical.bench import bench
from tg_tinker_server.empirical.charges import examine_charges
from tg_tinker_server.empirical.distinguisher import distinguish
from tg_tinker_server.empirical.draws import examine_draws
from tg_tinker_server.empirical.findings import Finding
from tg_tinker_server.empirical.neighbours import Call, Pair, Prober, pairs, probe_neighbours
from tg_tinker_server.empirical.noise_run import TESTS, examine_noise
from tg_tinker_server.empirical.settings import AuditSettings, Mode

SMALL = AuditSettings(model="bigram", canaries=100, noise_steps=4, seed=0)
LOW = SMALL.bounds[0]
SMALLEST_P = SMALL.false_alarm_rate / 2 / TESTS


def probe(name: str, bound: float = LOW) -> Finding:
    """One pair of neighbours."""
    with bench(SMALL) as tools:
        (pair,) = (p for p in pairs(tools, bound) if p.name == name)
        return Prober(tools, bound, merge=False).measure(pair)


@pytest.mark.parametrize(
    ("fault", "name", "distance"),
    [
        ("no clipping", "huge loss weight: gradient of 1e6 C", 1e6),
        ("clipping of the batch", "giant against the rest of the batch", 2.0),
        ("unit counted twice: its records clipped one by one", "unit of four records, each on the boundary", 4.0),
        ("unit counted twice: clipped in every call", "unit in two calls", 2.0),
        ("unit counted twice: clipped in every call", "unnamed record sent twice", 2.0),
        ("unit counted twice: contributions added twice", "gradient on the boundary", 2.0),
    ],
)
def test_worst_case_neighbours_show_a_sum_that_moves_too_far(fault: str, name: str, distance: float) -> None:
    with plant(fault):
        found = probe(name)
    assert found.alarm
    assert found.figure == pytest.approx(distance, rel=1e-3)


def test_worst_case_neighbours_show_a_loss_that_couples_records() -> None:
    with plant("batch-token-mean loss"):
        found = probe("long canary beside short records", bound=1.5)
    assert found.alarm
    assert found.figure > 5


@pytest.mark.parametrize("refusable", [False, True])
def test_only_the_refusal_of_a_unit_that_comes_again_is_an_answer(refusable: bool) -> None:
    """Whoever may not send the batch for another reason has measured nothing, and nothing is an alarm."""
    with bench(SMALL) as tools:
        too_long, fits = tools.records(1, 600), tools.records(1, 6)
        pair = Pair(
            name="too long",
            with_unit=[Call(records=too_long, units=["unit"])],
            without=[Call(records=fits, units=["other"])],
            refusable=refusable,
        )
        found = Prober(tools, LOW, merge=False).measure(pair)
    assert found.alarm
    assert "longer than max_sequence_length" in found.note


def test_a_gradient_too_long_for_any_weight_shows_where_nothing_clips() -> None:
    with plant("no clipping"):
        assert probe("huge loss weight: gradient of 1e18 C").alarm


@pytest.mark.parametrize(
    ("fault", "test", "figure"),
    [
        ("no noise", "less noise than paid for (C = 0.5)", 0.0),
        ("half the noise", "less noise than paid for (C = 2)", 0.5),
        ("noise that forgets C", "noise over C, at two bounds C", 4.0),
        ("noise reused between steps", "reused between steps (C = 0.5)", 1.0),
        ("unit counted twice: contributions added twice", "times the clipped sum is in it (C = 0.5)", 2.0),
        ("seeded noise, the same in every run", "reused between runs", 1.0),
        ("noise put back by load_state", "reused between steps (C = 2)", 1.0),
    ],
)
def test_statistics_show_noise_that_is_not_what_was_paid_for(fault: str, test: str, figure: float) -> None:
    with plant(fault), bench(SMALL) as tools:
        found = {f.name: f for f in examine_noise(tools, smallest_p=SMALLEST_P)}
    assert found[test].alarm
    assert found[test].figure == pytest.approx(figure, abs=0.15)
    assert found[test].p_value < 1e-30


@pytest.mark.parametrize("fault", ["none", "the same units in every draw"])
def test_what_the_server_draws_is_held_against_the_declared_rate(fault: str) -> None:
    """Every kind of wrong draw: tests/server/empirical/test_draws.py."""
    with plant(fault), bench(SMALL) as tools:
        found = examine_draws(tools, smallest_p=SMALLEST_P)
    assert [f.alarm for f in found] == [False, fault != "none", fault != "none", fault != "none"]


@pytest.mark.parametrize(
    ("fault", "over"),
    [("none", (0.90, 0.88, 0.90)), ("half the price", (1.1, 1.1, 1.1)), ("turns of a unit not counted", (0, 0, 2))],
)
def test_charges_are_held_against_what_the_audits_own_runs_cost_at_least(
    fault: str, over: tuple[float, float, float]
) -> None:
    settings = replace(SMALL, draws=16)
    with plant(fault), bench(settings) as tools:
        examine_draws(tools, smallest_p=SMALLEST_P)
        found = distinguish(tools, smallest_p=SMALLEST_P)
        charges = examine_charges(tools, found.claim)
    assert all(f.figure > least for f, least in zip(charges, over, strict=True))
    assert [f.alarm for f in charges] == [least > 1 for least in over]


@pytest.mark.parametrize("fault", ["no noise", "no clipping"])
def test_guesses_refute_the_claim_where_nothing_hides_the_canaries(fault: str) -> None:
    settings = AuditSettings(model="bigram", canaries=200, epsilon=1.0, seed=0)
    with plant(fault), bench(settings) as tools:
        found = distinguish(tools, smallest_p=settings.false_alarm_rate / 2)
    assert found.bound.epsilon == pytest.approx(found.bound.power, abs=1e-4)
    assert found.bound.epsilon > found.claim.epsilon
    assert found.finding.alarm


@pytest.mark.parametrize("mode", ["gradient", "input"])
def test_guesses_of_an_honest_service_prove_something_and_stay_below_the_claim(mode: Mode) -> None:
    settings = AuditSettings(model="bigram", mode=mode, canaries=200, epsilon=8.0, seed=0)
    with bench(settings) as tools:
        found = distinguish(tools, smallest_p=settings.false_alarm_rate / 2)
    assert not found.finding.alarm
    assert 0.5 < found.bound.epsilon < found.claim.epsilon <= 8.0
    assert found.claim.epsilon == pytest.approx(
        epsilon_for(
            noise_multiplier=found.claim.noise_multiplier, target_delta=1e-6, sample_rate=1.0, steps=found.claim.steps
        )
    )


def test_worst_cases_reach_the_bound_of_an_honest_service_and_do_not_pass_it() -> None:
    """A probe that stayed far below C would prove nothing."""
    with bench(SMALL) as tools:
        findings = probe_neighbours(tools)
    found = {f.name: f.figure for f in findings}
    on = [v for name, v in found.items() if "boundary" in name or "huge" in name or "giant" in name]
    assert min(on) == pytest.approx(1.0, abs=1e-4)
    assert max(found.values()) <= 1.0 + 1e-4
    assert not any(f.alarm for f in findings)
    assert sum("refused" in f.note for f in findings) == 4


@pytest.mark.slow
def test_every_measurement_starts_from_the_same_weights() -> None:
    with bench(AuditSettings(seed=0)) as tools:
        (pair,) = (p for p in pairs(tools, 10.0) if p.name == "ordinary record")
        prober = Prober(tools, 10.0, merge=False)
        assert prober.measure(pair).figure == pytest.approx(prober.measure(pair).figure, rel=1e-4)


@pytest.mark.slow
def test_both_halves_of_an_adapter_are_probed() -> None:
    with bench(AuditSettings(seed=0)) as tools:
        prober = Prober(tools, LOW, merge=False)
        prober.client.forward_backward(collate(tools.records(8, 12)))
        prober.client.optim_step(apply_dp_noise=False).result()
        released = tools.watch.steps[-1].released_P
    assert np.count_nonzero(released) > 0.9 * len(released)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_torch_engine_is_caught_with_every_fault(fault: str) -> None:
    with plant(fault):
        result = audit(AuditSettings(canaries=1000, seed=0))
    assert result.alarms


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_honest_torch_engine_raises_no_alarm(seed: int) -> None:
    result = audit(AuditSettings(canaries=1000, epsilon=8.0, seed=seed))
    assert result.alarms == ()
    assert 1.0 < result.bound.epsilon < result.claim.epsilon
