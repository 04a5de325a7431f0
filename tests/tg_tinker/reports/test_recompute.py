"""Epsilon computed again: against dp_accounting's own accountants, and what decides where two disagree."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from tests.tg_tinker.reports.conftest import DELTA, EVENT, Forge
from tg_tinker.errors import InvalidRequestError
from tg_tinker.ledger.history import History, read_history
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


def test_an_entry_of_another_dataset_is_refused_with_its_position() -> None:
    forge = Forge().open().spend(1)
    forge.chain[1][0]["dataset_id"] = "data-2"
    with pytest.raises(InvalidRequestError, match="wrong at position 1: it belongs to dataset 'data-2'") as caught:
        history_of(forge)
    assert caught.value.details["position"] == 1
