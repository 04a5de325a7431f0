"""The federated demo itself, small: four real servers on real sockets, Flower's Grid in memory."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.server.federated_demo.values import TEXTS, Terminal
from tg_tinker.cli import main
from tg_tinker.federated.statement import verify_statement
from tg_tinker.privacy import plan
from tg_tinker_server.federated_demo.progress import RoundLines
from tg_tinker_server.federated_demo.settings import ALONE, DATASET


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TG_TINKER_DATA_DIR", str(tmp_path / "user"))
    return Terminal(tmp_path)


def test_the_demo_federates_compares_and_reports_and_then_shows_it_again(terminal: Terminal) -> None:
    first = terminal.demo()
    assert [point.step for point in first.history] == [2, 4]
    assert {name: [p.step for p in arm.points] for name, arm in first.arms.items()} == {
        name: [2, 4] for name in TEXTS.sites
    }
    assert [p.step for p in first.pooled.points] == [2, 4]
    assert first.federated < first.before
    assert first.reopened_equal
    assert math.isclose(first.alone, sum(a.perplexity for a in first.arms.values()) / 3)
    assert first.result.status == "finished"
    assert "round 2 of 2" in terminal.printed
    assert "north ✓ ε" in terminal.printed
    assert "\x1b" not in terminal.printed
    assert "NOT SO" not in terminal.printed
    page = terminal.out.read_text()
    assert first.artifact.artifact_id in page
    assert first.result.job_digest in page

    report = terminal.out.parent / "federation-report.json"
    verified = CliRunner().invoke(main, ["audit", "verify", str(report), "--key", first.report.verifier_key])
    assert verified.exit_code == 0, verified.output
    assert verified.output.count("statement:") == 3
    assert first.verify_arguments in terminal.printed
    assert f"verify {report}" in first.verify_arguments

    second = terminal.demo()
    assert "nothing is trained again" in " ".join(terminal.printed.split())
    assert second.history == first.history
    assert second.arms == first.arms
    assert second.result == first.result
    assert second.reopened_equal


def test_each_site_signs_what_its_plan_promised_and_its_ledger_shows(terminal: Terminal) -> None:
    found = terminal.demo()
    for site in found.sites:
        records = len(TEXTS.sites[site.name])
        public = 32  # the power of two below: nobody learns the number from noise or epsilon
        planned = plan(epsilon=8, delta=1e-5, steps=4, batch_size=16, dataset_size=public)
        statement = verify_statement(found.result.statements[site.name], found.result.job.roster[site.name])
        assert float(site.noise_multiplier) == planned.noise_multiplier
        assert math.isclose(float(site.sample_rate), 16 / public)
        assert site.steps == 4
        assert site.checked
        assert planned.epsilon <= float(site.epsilon) <= 8
        assert site.records == records
        assert statement.rounds == (1, 2)
    site = (terminal.folder / "north" / "site.toml").read_text()
    key = (terminal.folder / "north" / "api-key").read_text()
    assert re.fullmatch(r"tgk_\S+", key)
    for text in (site, (terminal.folder / "coordinator" / "coordinator.toml").read_text(), terminal.printed):
        assert key not in text
    with terminal.stage() as stage:
        for name in TEXTS.sites:
            with stage.parties[name].client() as service:
                for dataset_id in (DATASET, ALONE):  # two budgets, and neither is exceeded
                    ledger = service.get_privacy_ledger(dataset_id)
                    ledger.verify()
                    assert len(ledger.charges) == 4
                    assert 5 < ledger.epsilon_spent <= 8


def test_an_interrupted_demo_goes_on_and_never_spends_more_than_its_target(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tg_tinker_server.federated_demo import arms

    released, measure, calls = RoundLines._released, arms.perplexity, []

    def after_a_round(self: RoundLines, progress: object) -> None:
        released(self, progress)
        raise KeyboardInterrupt

    def in_the_comparison(*args: object, **kwargs: int) -> float:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(RoundLines, "_released", after_a_round)
    with pytest.raises(KeyboardInterrupt):
        terminal.demo()
    assert "round 1 of 2" in terminal.printed
    monkeypatch.setattr(RoundLines, "_released", released)
    monkeypatch.setattr(arms, "perplexity", in_the_comparison)
    with pytest.raises(KeyboardInterrupt):
        terminal.demo()
    assert "Going on with the interrupted call" in terminal.printed
    assert "round 1 of 2" not in terminal.printed
    assert "round 2 of 2" in terminal.printed

    found = terminal.demo()
    assert "round 2 of 2" not in terminal.printed  # the federation was finished
    assert len(found.history) == 2
    assert [p.epsilon for p in found.history] == sorted(p.epsilon for p in found.history)
    assert all(site.steps == 4 and float(site.epsilon) <= 8 for site in found.sites)
    assert all(arm.points[-1].step == 4 and arm.finished for arm in (*found.arms.values(), found.pooled))
    assert all(arm.points[-1].epsilon <= 8 for arm in found.arms.values())
