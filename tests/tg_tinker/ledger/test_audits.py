"""Audit results in ledgers and reports: only what an audit wrote, and its verdict is that of its findings."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import pytest
import rfc8785

from tests.e2e.server_process import batch
from tests.tg_tinker.reports.conftest import Forge
from tg_tinker import DPConfig, ServiceClient, TrainingConfig
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.ledger.audits import MAX_AUDITS, check_summary, summary_of
from tg_tinker.ledger.history import read_history
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

RESULT: dict[str, Any] = {
    "schema": "tg-tinker/empirical-audit/v1",
    "version": "0.1.0",
    "created": "2026-01-02T03:04:05+00:00",
    "model": "bigram",
    "trainable_parameters": 256,
    "mode": "gradient",
    "canaries": 200,
    "inclusion_probability": "0.5",
    "neighbours": "add-or-remove-one",
    "seed": None,
    "claimed": {
        "epsilon": "4.0",
        "delta": "1e-5",
        "noise_multiplier": "1.0",
        "steps": 3,
        "dataset_id": "audit-1",
        "ledger_head": "00",
    },
    "lower_bound": {
        "epsilon": "1.2",
        "confidence": "0.95",
        "p_value_of_claim": "0.3",
        "guesses": 100,
        "correct": 80,
        "tried": [],
        "most_provable": "3.9",
        "most_provable_with_one_count": "4.2",
    },
    "findings": [
        {
            "instrument": "noise",
            "name": "scale",
            "figure": "1.0",
            "threshold": "1e-4",
            "p_value": "0.4",
            "alarm": False,
            "note": "",
        },
        {
            "instrument": "neighbours",
            "name": "long canary",
            "figure": "0.9",
            "threshold": "1.0",
            "p_value": None,
            "alarm": False,
            "note": "",
        },
    ],
    "false_alarm_rate": "0.001",
    "alarm": False,
    "seconds": "12.0",
}


def changed(**more: Any) -> dict[str, Any]:
    return {**copy.deepcopy(RESULT), **more}


def test_a_summary_holds_the_figures_and_a_digest_of_everything() -> None:
    summary = summary_of(RESULT)
    assert (summary["lower_bound"], summary["claimed_epsilon"], summary["checks"], summary["alarms"]) == (
        "1.2",
        "4.0",
        2,
        [],
    )
    assert summary["digest"] == "sha256:" + hashlib.sha256(rfc8785.dumps(RESULT)).hexdigest()


@pytest.mark.parametrize(
    "document",
    [
        {},
        changed(schema="v9"),
        changed(mode="wishful"),
        changed(alarm=True),
        changed(findings=[{**RESULT["findings"][0], "alarm": True}]),
        changed(findings=[{**RESULT["findings"][0], "alarm": "no"}]),
        changed(lower_bound={**RESULT["lower_bound"], "epsilon": "-1"}),
        changed(lower_bound={**RESULT["lower_bound"], "confidence": "1.5"}),
        changed(canaries=-1),
        changed(model="a\nb"),
        changed(model="x" * 101),
        changed(model="Jane Doe; HIV positive"),
        changed(model="caf\u00e9"),
        changed(version=""),
        changed(created=None),
        changed(created="yesterday"),
        changed(created="2026-01-02T03:04:05"),
        changed(canaries=0),
        changed(findings=[]),
        changed(claimed={**RESULT["claimed"], "dataset_id": "a\u202eb"}),
        changed(lower_bound={**RESULT["lower_bound"], "epsilon": "4.1"}),
        changed(lower_bound={**RESULT["lower_bound"], "epsilon": "1." + 50 * "0"}),
        changed(lower_bound={**RESULT["lower_bound"], "confidence": "0.0000001"}),
        changed(lower_bound={**RESULT["lower_bound"], "most_provable": "inf"}),
        changed(alarm=True, findings=[{**RESULT["findings"][0], "alarm": True, "name": "<b>"}]),
    ],
)
def test_what_is_not_the_result_of_an_audit_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="empirical audit"):
        summary_of(document)


def test_a_bound_above_the_claim_is_an_alarm_whatever_the_findings_say() -> None:
    bound = {**RESULT["lower_bound"], "epsilon": "3.5"}
    over = changed(lower_bound=bound, claimed={**RESULT["claimed"], "epsilon": "3.4"})
    summary = summary_of(over)
    assert summary["alarms"] == ["lower bound above the claim"]
    with pytest.raises(ValueError, match="raises no alarm"):
        check_summary({**summary, "alarms": []})
    assert summary_of(changed(lower_bound=bound))["alarms"] == []


def test_an_audit_speaks_of_its_own_training_only() -> None:
    forge = Forge().open().spend(1)
    forge.append("audit", seq=2, actor="k", result=summary_of(RESULT))
    section = forge.close().document()["empirical_audit"]
    assert "a training of its own" in section["note"]
    assert "nothing of this dataset's epsilon" in section["note"]


def test_whatever_an_audit_can_find_has_a_name_that_a_ledger_takes() -> None:
    long = [{**RESULT["findings"][0], "alarm": True, "name": name} for name in (
        "lower bound on epsilon at 95% confidence, claimed 1.234e-05",
        "unit of four records, each on the boundary (C = 0.000123, merged)",
    )]  # fmt: skip
    alarms = summary_of(changed(alarm=True, findings=long))["alarms"]
    assert [len(a) <= 60 for a in alarms] == [True, True]


def test_twenty_audits_are_the_most_of_a_dataset() -> None:
    forge = Forge().open()
    for n in range(MAX_AUDITS):
        forge.append("audit", seq=n, actor="k", result=summary_of(RESULT))
    assert len(read_history("data-1", [body for body, _ in forge.chain]).audits) == 20
    forge.append("audit", seq=99, actor="k", result=summary_of(RESULT))
    with pytest.raises(InvalidRequestError, match="position 21: it attaches an audit after 20"):
        read_history("data-1", [body for body, _ in forge.chain])


def test_an_entry_with_another_field_is_refused() -> None:
    forge = Forge().open()
    forge.append("audit", seq=1, actor="k", result={**summary_of(RESULT), "note": "all is well"})
    with pytest.raises(InvalidRequestError, match="position 1"):
        read_history("data-1", [body for body, _ in forge.chain])


def test_an_attached_audit_stands_in_the_ledger_and_in_every_later_report(tmp_path: Any) -> None:
    config = TrainingConfig(model_ref="bigram", batch_size=2, dp_config=DPConfig(dataset_id="data-1"))
    with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path)) as server:
        service = ServiceClient(api_key=server.mint_key(), base_url=server.address)
        with service:
            tc = service.create_training_client(config)
            tc.forward_backward(batch(0))
            tc.optim_step().result(timeout=60)
            spent = service.get_privacy_ledger("data-1").epsilon_spent
            assert service.get_privacy_report("data-1")["empirical_audit"]["status"] == "not run"
            for _ in range(2):
                service.attach_audit("data-1", json.loads(json.dumps(RESULT)))
            section = service.get_privacy_report("data-1")["empirical_audit"]
            assert section["status"] == "no alarm"
            assert [r["lower_bound"] for r in section["results"]] == ["1.2"]
            bad = changed(alarm=True, findings=[{**RESULT["findings"][0], "alarm": True}])
            service.attach_audit("data-1", bad)
            assert service.get_privacy_report("data-1")["empirical_audit"]["status"] == "alarm"
            ledger = service.get_privacy_ledger("data-1")
            ledger.verify()
            assert ledger.epsilon_spent == spent
            with pytest.raises(ResourceNotFoundError):
                service.attach_audit("another", RESULT)
            with pytest.raises(InvalidRequestError, match="empirical audit"):
                service.attach_audit("data-1", {"lower_bound": "0"})
            for n in range(MAX_AUDITS - 2):
                service.attach_audit("data-1", changed(canaries=n + 1))
            with pytest.raises(InvalidRequestError, match="has 20 results of audits"):
                service.attach_audit("data-1", changed(canaries=999))
            assert len(service.get_privacy_report("data-1")["empirical_audit"]["results"]) == MAX_AUDITS
