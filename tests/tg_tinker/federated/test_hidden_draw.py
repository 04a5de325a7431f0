"""Where sites are drawn, nothing that others see depends on who was drawn, whatever the sites do."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.tg_tinker.federated.coordinating import coordinator, fake_sites, link_to
from tg_tinker import ServiceClient
from tg_tinker.federated.site_privacy import SiteMechanism

SITES = {
    "population": 400,
    "sample_rate": 0.25,
    "noise_multiplier": 1.0,
    "target_epsilon": 50.0,
    "target_delta": 1e-4,
}
DRAWS = {
    "nobody": [[], [], []],
    "everybody": [["site-0", "site-1", "site-2"]] * 3,
    "the one that refuses, twice": [["site-0"], ["site-0"], []],
    "the one that sends nonsense": [["site-1"], [], ["site-1", "site-2"]],
}


def seen_from_outside(folder, service, monkeypatch, draws, refusal):
    sites, seen, left = fake_sites(3), [], list(draws)
    sites[0].refuses["train"] = refusal
    sites[1].update = lambda w, r: {n: np.full(v.shape, np.nan, np.float32) for n, v in w.items()}
    link = link_to(sites)
    monkeypatch.setattr(SiteMechanism, "draw", lambda self, roster: left.pop(0))
    job = {"sites": 3, "rounds": 3, "sites_privacy": SITES}
    result = coordinator(folder, service, job=job, progress=seen.append).run(link)
    assert result.status == "finished"
    assert [sum(r.kind == "train" and r.round == n for r in link.seen) for n in (1, 2, 3)] == [len(d) for d in draws]
    told = json.loads(result.model_dump_json())
    told = {name: told[name] for name in ("members", "left", "unheard", "unstated", "statements", "ignored", "why")}
    audit = [
        (e.operation, sorted(e.facts.items()))
        for e in service.get_audit_logs(limit=1000)
        if e.operation.startswith("federation.")
    ]
    audit = [(operation, [f for f in facts if f[0] != "job"]) for operation, facts in audit]
    return told, audit, [(p.what, p.round, p.site, p.answer) for p in seen]


@pytest.mark.parametrize("refusal", ["policy", "expired", "wrong_round"])
def test_who_was_drawn_shows_neither_in_the_result_nor_in_the_audit_log_nor_in_progress(
    tmp_path, coordinator_server, monkeypatch, refusal
):
    found = {}
    for number, (name, draws) in enumerate(DRAWS.items()):
        key = coordinator_server.mint_key(f"{tmp_path.name}-{number}")
        with ServiceClient(key, coordinator_server.address) as service:
            found[name] = seen_from_outside(tmp_path / str(number), service, monkeypatch, draws, refusal)
    told, audit, progress = found["nobody"]
    assert told["members"] == ["site-0", "site-1", "site-2"]
    assert {operation for operation, _ in audit} == {"federation.round_released", "federation.job_finished"}
    assert {what for what, _, site, _ in progress if site} == {"joined"}
    for name in DRAWS:
        assert found[name] == (told, audit, progress), name
