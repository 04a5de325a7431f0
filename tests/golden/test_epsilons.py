"""Epsilons that were computed once by dp_accounting, which shares no code with the accountant of the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tg_tinker_server.dp.accounting import cost, epsilon, pld_epsilon, prv_epsilon, repeated
from tg_tinker_server.dp.events import SampledGaussian

ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "epsilons.json").read_text())["rows"]


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda r: f"sigma={r['noise_multiplier']} q={r['sample_rate']:.3g} n={r['steps']}"
)
def test_every_accountant_agrees_with_the_golden_epsilon(row: dict[str, Any]) -> None:
    sigma, rate, steps, delta = row["noise_multiplier"], row["sample_rate"], row["steps"], row["delta"]
    event = SampledGaussian(noise_multiplier=sigma, sample_rate=rate, vouched_by="server")
    by_gate = epsilon(repeated(cost(event), steps), delta)
    # At fractional orders dp_accounting rounds its series up; it is never below ours by more than rounding.
    assert row["rdp"] - 2e-3 <= by_gate <= row["rdp"] + 1e-6
    assert by_gate >= row["pld"]
    assert pld_epsilon([event] * steps, delta) == pytest.approx(row["pld"], abs=2e-3)
    assert row["pld"] <= prv_epsilon(sigma, rate, steps, delta) <= row["pld"] + 0.012
