"""`tg-tinker audit run` and its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner

from tests.audit.faults import plant
from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.empirical import command
from tg_tinker_server.empirical.command import run
from tg_tinker_server.empirical.findings import SCHEMA, Finding, Instrument
from tg_tinker_server.empirical.settings import AuditSettings

SMALL = ["--full", "--model", "bigram", "--canaries", "60", "--epsilon", "8", "--seed", "0"]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What --full measures, in a few steps."""
    monkeypatch.setattr(command, "_FULL", AuditSettings(canaries=5000, noise_steps=2))


def test_an_honest_service_exits_with_0_and_writes_its_result(tmp_path: Path) -> None:
    out = tmp_path / "audit.json"
    done = CliRunner().invoke(run, [*SMALL, "--out", str(out)])
    assert done.exit_code == 0, done.output
    for text in (
        "No alarm",
        "proved by this run",
        "claimed by the ledger",
        "no number above",
        "could not have raised an alarm",
    ):
        assert text in " ".join(done.output.split())
    document = json.loads(out.read_text())
    assert document["schema"] == SCHEMA
    assert document["alarm"] is False
    assert document["neighbours"] == "add-or-remove-one"
    assert 0 <= float(document["lower_bound"]["epsilon"]) < float(document["claimed"]["epsilon"]) <= 8
    assert float(document["lower_bound"]["epsilon"]) <= float(document["lower_bound"]["most_provable"])
    assert {f["instrument"] for f in document["findings"]} == set(get_args(Instrument))
    shares = [float(f["threshold"]) for f in document["findings"] if f["p_value"] is not None]
    assert sum(shares) == pytest.approx(float(document["false_alarm_rate"])), "every test has its share of the rate"


def test_an_alarm_exits_with_1(tmp_path: Path) -> None:
    out = tmp_path / "audit.json"
    with plant("half the noise"):
        done = CliRunner().invoke(run, [*SMALL, "--out", str(out)])
    assert done.exit_code == 1
    assert "Do not hand out models" in done.output
    document = json.loads(out.read_text())
    assert document["alarm"] is True
    assert {f["instrument"] for f in document["findings"] if f["alarm"]} == {"noise"}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--canaries", "5"], "canaries"),
        (["--epsilon", "-1"], "epsilon"),
        (["--epsilon", "nan"], "epsilon"),
        (["--delta", "0.5"], "delta"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_impossible_options_are_refused_in_words(options: list[str], word: str) -> None:
    done = CliRunner().invoke(run, [*SMALL, *options])
    assert done.exit_code == 1
    assert f"the audit's {word} is" in done.output


def test_unknown_models_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="one of"):
        AuditSettings(model="gpt-9")


def test_what_is_not_a_number_is_an_alarm() -> None:
    probe = {"instrument": "neighbours", "name": "x", "threshold": 1.0}
    assert Finding(**probe, figure=float("nan")).alarm
    assert Finding(**probe, figure=float("inf")).alarm
    assert not Finding(**probe, figure=1.0).alarm
    test = {"instrument": "noise", "name": "x", "figure": 1.0, "threshold": 1e-4}
    assert Finding(**test, p_value=float("nan")).alarm
    assert Finding(**test, p_value=1e-5).alarm
    assert not Finding(**test, p_value=1e-3).alarm
