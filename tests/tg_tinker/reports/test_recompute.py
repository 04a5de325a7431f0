"""Epsilon computed again: against dp_accounting's own accountants, and what decides where two disagree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import mpmath
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from tests.tg_tinker.reports.conftest import DELTA, EVENT, Forge
from tg_tinker.errors import InvalidRequestError
from tg_tinker.ledger.history import History, read_history
from tg_tinker.privacy import accounting
from tg_tinker.reports import recompute

COUNTED = {"kind": "participation_gaussian", "noise_multiplier": "3.0", "releases": 1}


def history_of(forge: Forge) -> History:
    return read_history(forge.dataset_id, [b for b, _ in forge.chain])


def mixed() -> Forge:
    forge = Forge().open().spend(3)
    forge.charge(4, event={"kind": "gaussian", "noise_multiplier": "5.0"})
    forge.charge(5, event=COUNTED)
    forge.charge(6, event={**COUNTED, "releases": 0})
    return forge


def test_the_figures_are_those_of_the_librarys_own_accountants() -> None:
    sampled = dp_event.PoissonSampledDpEvent(0.1, dp_event.GaussianDpEvent(1.0))
    events = [(sampled, 3), (dp_event.GaussianDpEvent(5.0), 1), (dp_event.GaussianDpEvent(3.0), 1)]
    pld, rdp = PLDAccountant(value_discretization_interval=1e-4), RdpAccountant()
    for event, times in events:
        pld.compose(event, times)
        rdp.compose(event, times)
    found = recompute.figures(history_of(mixed()))
    assert found.pld == pytest.approx(pld.get_epsilon(DELTA), abs=2e-3)
    assert found.rdp == pytest.approx(rdp.get_epsilon(DELTA), rel=0.02)  # on other orders
    assert found.rdp >= found.pld
    assert found.gdp is None  # of one kind of release only
    assert [d for d, _, _ in found.profile] == sorted((d for d, _, _ in found.profile), reverse=True)
    for delta, by_gate, by_loss in found.profile:
        assert by_loss == pytest.approx(pld.get_epsilon(delta), abs=2e-3)
        assert by_gate >= by_loss


def test_one_kind_of_release_has_an_estimate_and_no_release_costs_nothing() -> None:
    assert 0 < (recompute.figures(history_of(Forge().open().spend(2))).gdp or 0) < math.inf
    nothing = recompute.figures(history_of(Forge().open()))
    assert (nothing.rdp, nothing.pld) == (0.0, 0.0)


def test_the_first_charge_that_is_wrong_is_found() -> None:
    assert recompute.first_fault(history_of(mixed())) is None
    forge = Forge().open().spend(2)
    forge.charge(3, epsilon_after="3.0")
    forge.charge(4, epsilon_after="4.0")
    fault = recompute.first_fault(history_of(forge))
    assert fault is not None
    assert fault.position == 3


@dataclass
class Said:
    """A loss distribution that says this."""

    epsilon: float

    def get_epsilon(self, delta: float) -> float:
        return self.epsilon


@pytest.mark.parametrize(("upper", "lower", "bound"), [(1.0, 0.5, None), (9.0, 2.0, None), (9.0, 8.5, 8.5)])
def test_where_the_pessimistic_estimate_exceeds_the_gate_the_optimistic_one_decides(
    monkeypatch: pytest.MonkeyPatch, upper: float, lower: float, bound: float | None
) -> None:
    def said(counts: object, *, pessimistic: bool = True) -> Said:
        return Said(upper if pessimistic else lower)

    monkeypatch.setattr(recompute.accounting, "loss_distribution", said)
    history = history_of(Forge().open("run_a", EVENT).spend(3))
    assert recompute.understated(history) == bound
    monkeypatch.setattr(recompute.accounting, "loss_distribution", lambda *a, **k: None)
    assert recompute.understated(history) is None  # too many releases to compose: the gate's proof stands alone


@pytest.mark.parametrize(("sigma", "times"), [(0.05, 2), (0.5, 1), (1.0, 7), (10.0, 120), (200.0, 1000)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_what_a_gaussian_costs_exactly_is_what_the_library_says(sigma: float, times: int, delta: float) -> None:
    epsilon = accounting.pld_epsilon({(sigma, 1.0): times}, delta)
    exact = recompute.gaussian_delta(math.sqrt(times) / sigma, epsilon)
    assert exact == pytest.approx(delta, rel=0.02)
    assert exact <= delta * (1 + 1e-9)  # the library's is pessimistic
    high_precision = mpmath_delta(math.sqrt(times) / sigma, epsilon)
    assert exact == pytest.approx(high_precision, rel=1e-6)


@pytest.mark.parametrize("mu", [30.0, 60.0, 200.0])
def test_where_float64_ends_the_exact_delta_is_below_by_a_thousandth_at_most(mu: float) -> None:
    epsilon = mu * mu / 2 + 4.3 * mu
    exact, true = recompute.gaussian_delta(mu, epsilon), mpmath_delta(mu, epsilon)
    assert true * (1 - 1e-3) <= exact <= true * (1 + 1e-9)


def mpmath_delta(mu: float, epsilon: float) -> float:
    with mpmath.workdps(60):
        reached, missed = mpmath.mpf(epsilon) / mu - mpmath.mpf(mu) / 2, mpmath.mpf(epsilon) / mu + mpmath.mpf(mu) / 2
        return float(mpmath.ncdf(-reached) - mpmath.exp(epsilon) * mpmath.ncdf(-missed))


@pytest.mark.parametrize(("mu", "epsilon"), [(1e-320, 0.0), (1e-320, 1.0), (math.inf, 1.0), (1e200, 1.0), (0.0, 0.0)])
def test_numbers_at_the_ends_of_float64_have_a_delta(mu: float, epsilon: float) -> None:
    assert 0.0 <= recompute.gaussian_delta(mu, epsilon) <= 1.0


def plan(said: list[float], event: dict[str, str]) -> History:
    forge = Forge(target="50.0").open(event=event, planned_steps=len(said))
    for seq, epsilon in enumerate(said, 1):
        forge.charge(seq, event=event, accountant="prv", epsilon_after=repr(epsilon))
    return history_of(forge)


def test_a_plan_without_sampling_is_held_to_its_price_at_every_step() -> None:
    steps, normal = 120, NormalDist()

    def epsilon(mu: float) -> float:
        low, high = 0.0, 50.0
        for _ in range(100):
            e = (low + high) / 2
            delta = normal.cdf(mu / 2 - e / mu) - math.exp(e) * normal.cdf(-mu / 2 - e / mu)
            low, high = (low, e) if delta <= DELTA else (e, high)
        return high + 1e-6

    true = [epsilon(math.sqrt(n) / 10) for n in range(1, steps + 1)]
    event = {"kind": "gaussian", "noise_multiplier": "10.0"}
    assert recompute.first_fault(plan(true, event)) is None
    for at in range(1, steps):  # the epsilon of the step before, once more
        fault = recompute.first_fault(plan([*true[:at], true[at - 1], *true[at + 1 :]], event))
        assert fault is not None
        assert fault.position == at + 1


def test_the_charge_that_somebody_relies_on_is_looked_at_even_between_the_points_of_a_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = 7
    monkeypatch.setattr(recompute, "_PLAN_POINTS", 4)
    assert recompute.thinned(steps, 4) == [0, 2, 4, 6]
    low = [accounting.pld_epsilon({(1.0, 0.1): n}, DELTA) for n in (1, 2, 3)]
    rest = [accounting.gate_epsilon({(1.0, 0.1): n}, DELTA) for n in range(4, steps + 1)]
    for said, wrong in ((low[1], False), (low[0], True)):
        history = plan([low[0], said, low[2], *rest], EVENT)
        assert recompute.first_fault(history) is None
        assert recompute.last_fault(history) is None
        del history.charges[2:]
        fault = recompute.last_fault(history)
        assert (fault is not None) == wrong
    assert recompute.last_fault(history_of(mixed())) is None
    assert recompute.last_fault(history_of(Forge().open())) is None


def test_an_entry_of_another_dataset_is_refused_with_its_position() -> None:
    forge = Forge().open().spend(1)
    forge.chain[1][0]["dataset_id"] = "data-2"
    with pytest.raises(InvalidRequestError, match="wrong at position 1: it belongs to dataset 'data-2'") as caught:
        history_of(forge)
    assert caught.value.details["position"] == 1
