"""Whichever write of a charge the disk refuses, nothing is released that is not paid for, and the ledger goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.ledger.failing_disk import FAULTS, before_a_charge, every_operation
from tests.support.recorded_disk import Fault


@pytest.mark.parametrize(("fault", "for_ever"), FAULTS)
def test_a_charge_of_which_any_write_fails_is_not_handed_out(tmp_path: Path, fault: Fault, for_ever: bool) -> None:
    image, seq = before_a_charge(checkpoint=False)
    outcomes = every_operation(tmp_path / "disk", image, seq, fault, for_ever)
    assert outcomes == [False] * len(outcomes)
    assert len(outcomes) >= 5


@pytest.mark.parametrize("stride", [31, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("fault", "for_ever"), FAULTS)
def test_a_charge_handed_out_while_the_log_cannot_be_carried_over_is_on_disk_all_the_same(
    tmp_path: Path, fault: Fault, for_ever: bool, stride: int
) -> None:
    image, seq = before_a_charge(checkpoint=True)
    outcomes = every_operation(tmp_path / "disk", image, seq, fault, for_ever, stride)
    assert not outcomes[0]
    assert outcomes[-1]  # paid and flushed before the log was carried over: SQLite tries that again later
    assert outcomes == sorted(outcomes)
