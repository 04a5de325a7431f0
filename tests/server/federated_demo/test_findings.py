"""What the demo says of what it found: a loss is told like a gain, a figure that does not follow is marked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.server.federated_demo.values import SMALL
from tests.tg_tinker.federated.jobs import key_of
from tg_tinker.federated.keys import public_text
from tg_tinker.federated.statement import Accounting, SiteStatement, sign_statement
from tg_tinker.privacy.accounting import gate_epsilon
from tg_tinker_server.federated_demo.findings import Findings, site_facts
from tg_tinker_server.federated_demo.progress import arm_line
from tg_tinker_server.federated_demo.report import render
from tg_tinker_server.federated_demo.state import Arm, Point


def arm(name: str, perplexity: float, step: int = 4) -> Arm:
    return Arm(name=name, finished=True, points=(Point(step=step, perplexity=perplexity, epsilon=7.9),))


def findings(federated: float, **changes: Any) -> Findings:
    promise = SimpleNamespace(people="disjoint", epsilon=8.0, delta=1e-5)
    trust = {"coordinator_sees_updates": True, "poisoned_updates_borne": False}
    job = SimpleNamespace(strategy=SimpleNamespace(name="fedavg"))
    values: dict[str, Any] = {
        "settings": SMALL,
        "source": "wordings <of> a classification",
        "in_process": True,
        "before": 400.0,
        "history": (Point(step=4, perplexity=federated, epsilon=7.9),),
        "arms": {"north": arm("north", 120.0), "south": arm("south", 140.0)},
        "pooled": arm("all pooled", 80.0),
        "sites": tuple(site_facts(statement(8.0), {"north": 1234})),
        "result": SimpleNamespace(records=promise, trust=trust, job=job, weights_digest="ab", job_digest="cd"),
        "artifact": SimpleNamespace(artifact_id="ckpt_1", algorithm="AES", key_id="k", size_bytes=5),
        "reopened": federated,
        "held_out": 15,
        "seconds": 60.0,
        "made": "2026-01-02",
        "report": SimpleNamespace(report="r.json", page="r.html", verdicts=(1, 2), verifier_key="v"),
    }
    return Findings(**{**values, **changes})


def statement(slack: float, **accounting: Any) -> Any:
    """A result with one site's statement, whose epsilon is what follows plus ``slack`` hundredths."""
    key = key_of("north")
    spent = gate_epsilon({(0.6, 0.1): 4}, 1e-5)
    made = SiteStatement(
        job="0" * 64,
        site="north",
        time="2026-01-01T00:00:00+00:00",
        rounds=(1, 2),
        unit="datum",
        public_units=40,
        epsilon=f"{spent + slack / 1000:.6f}",
        delta="0.00001",
        target_epsilon="8.0",
        dataset_epsilon="8.0",
        dataset_delta="0.00001",
        dataset_target_epsilon="8.0",
        log_origin="log",
        log_checkpoint="note",
        report_sha256="1" * 64,
        accounting=Accounting(**{"noise_multiplier": "0.6", "sample_rate": "0.1", "steps": 4, **accounting}),
    )
    job = SimpleNamespace(roster={"north": public_text(key)})
    return SimpleNamespace(statements={"north": sign_statement(made, key)}, job=job)


def test_the_verdict_follows_the_figures_either_way() -> None:
    assert "beats the mean of the lone sites by a factor of 1.30" in findings(100.0).verdict()
    assert "another 1.25" in findings(100.0).verdict()
    assert "does not beat training alone: 131.0 against 130.0" in findings(131.0).verdict()
    assert "does not beat" in findings(130.0).verdict()


@pytest.mark.parametrize(("slack", "checked"), [(0.5, True), (9.5, True), (-1.0, False), (20.0, False)])
def test_a_signed_epsilon_must_follow_from_noise_rate_and_steps(slack: float, checked: bool) -> None:
    (site,) = site_facts(statement(slack), {"north": 40})
    assert site.checked == checked
    (site,) = site_facts(statement(slack, steps=400), {"north": 40})
    assert not site.checked


def test_the_page_tells_what_does_not_hold() -> None:
    good = render(findings(100.0))
    assert "✗" not in good
    assert "wordings &lt;of&gt; a classification" in good
    assert good.count('class="line alone"') == 2
    assert "1,234" in good
    bad = render(findings(100.0, reopened=101.0, sites=tuple(site_facts(statement(-1.0), {"north": 1234}))))
    assert "✗ ANOTHER PERPLEXITY" in bad
    assert "✗ NOT SO" in bad


def test_an_arm_whose_budget_ended_early_says_so() -> None:
    assert "its budget ended here" in arm_line(arm("north", 120.0, step=3), SMALL)
    assert "its budget" not in arm_line(arm("north", 120.0), SMALL)
    assert arm_line(Arm(name="north"), SMALL) == ""
