"""Short forms of the benchmark of federated training: poison and kills, for real; the pages, from made-up figures."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks.federated_parts import kills, poison, scale
from benchmarks.federated_parts.kept import Kept
from tg_tinker_server.dp.mechanism import GaussianMechanism


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TG_TINKER_DATA_DIR", str(tmp_path / "user"))


def test_two_poisoned_sites_of_ten_ruin_the_average_and_not_a_robust_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """With so few records little of a step may be left to chance: every other one is drawn, with little noise."""
    monkeypatch.setattr(poison, "ROUNDS", 1)
    monkeypatch.setattr(poison, "SHARE", 2)
    with poison.Lab(texts=240, epsilon=1e5) as lab:
        clean, robust = (lab.perplexity("multikrum", attack) for attack in ("clean", "turned"))
        average = lab.perplexity("fedavg", "turned")
    assert robust < 1.15 * clean  # the benchmark asks for 1.05, with twenty times the records
    assert average > 10 * clean


def test_jobs_under_kills_end_or_say_why_and_no_ledger_shows_too_little(tmp_path: Path) -> None:
    with ExitStack() as stack:
        estate = kills.Estate(tmp_path, stack)
        runs = [
            kills.run_once(estate, i, mode, seed=seed)
            for i, (mode, seed) in enumerate(zip(kills.MODES, (3, 4, 5), strict=True))
        ]
    assert sum(run["site_kills"] + run["coordinator_kills"] for run in runs) >= 5
    assert not any(kills.silent(run) for run in runs)
    assert [kills.undercounted(run) for run in runs] == [[], [], []]
    assert all(ledger["draws"] > 0 for run in runs for ledger in run["ledgers"].values())
    assert set(runs[2]["ledgers"]) == {"site-0", "site-1", "site-2", "federation"}


def test_noise_that_nobody_paid_for_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second count does not follow the ledger: a server that draws twice for one charge stands out."""
    plain = GaussianMechanism.add_noise_

    def twice(mechanism: GaussianMechanism, arrays: Any) -> None:
        kills_count(mechanism, arrays)
        mechanism._used = False
        kills_count(mechanism, arrays)

    def kills_count(mechanism: GaussianMechanism, arrays: Any) -> None:
        plain(mechanism, arrays)
        draws.count[round(mechanism.noise_multiplier, 9)] += 1

    draws = kills.Draws()
    monkeypatch.setattr(kills, "Draws", lambda: draws)
    monkeypatch.setattr(draws, "watched", ExitStack)
    monkeypatch.setattr(GaussianMechanism, "add_noise_", twice)
    monkeypatch.setattr(kills, "ROUNDS", 1)
    with ExitStack() as stack:
        found = kills.run_once(kills.Estate(tmp_path, stack), 0, "plain", seed=0)
    assert kills.undercounted(found) == ["site-0", "site-1", "site-2"]


def test_a_run_that_just_stops_or_exceeds_its_target_is_told() -> None:
    good = {"status": "failed", "why": "too few", "ledgers": {"a": ledger()}}
    assert not kills.silent(good)
    assert kills.silent({**good, "why": ""})
    assert kills.undercounted({**good, "ledgers": {"a": ledger(epsilon=8.1)}}) == ["a"]
    assert kills.undercounted({**good, "ledgers": {"a": ledger(draws=5)}}) == ["a"]


def test_a_rule_is_held_to_five_percent_of_its_own_clean_run() -> None:
    found = poison.within({"krum": {"clean": 20.0, "noise": 21.0, "turned": 21.1, "huge": float("inf")}})
    assert found == {"krum": {"noise": True, "turned": False, "huge": False}}


def test_cells_are_kept_one_by_one_and_infinity_too(tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    Kept(path).put(float("inf"), "krum", "huge")
    again = Kept(path)
    again.put(1.5, "krum", "clean")
    assert Kept(path).cells == {"krum": {"huge": float("inf"), "clean": 1.5}}
    assert again.get("krum", "noise") is None
    assert again.get("median", "noise") is None
    json.loads(path.read_text(), parse_constant=pytest.fail)


def test_the_pages_tell_what_was_found() -> None:
    figures: dict[str, Any] = {"sites": 10, "poisoned": 2, "rounds": 3, "records_per_site": 4000, "epsilon": 8.0}
    table = {"clean": 20.0, "noise": 20.9, "turned": 22.0, "huge": "inf"}
    page = "\n".join(poison.page({**figures, "perplexity": {"krum": table}}))
    assert "| krum | 20.0 | **20.9** | 22.0 | over 1e6 |" in page

    run = {"status": "finished", "why": "", "site_kills": 3, "coordinator_kills": 1, "ledgers": {"a": ledger()}}
    page = "\n".join(kills.page({"in process": [run, {**run, "status": "failed"}]}))
    assert "| kills of | sites: 6, the coordinator: 2 |" in page
    assert "| ended | 1 failed, 1 finished |" in page
    assert "| neither finished nor said why | 1 |" in page
    assert "| ledgers that show too little, or exceed their target | 0 |" in page

    job = {"round_s": [1.0, 3.0], "memory_mb": 100.0, "updates": [10, 10], "ledgers": 10, "charges": 40}
    job |= {"epsilon": 7.5, "epsilon_second": 7.0}
    sizes = {"10": {"records": job, "sites": {"refused": "hopeless", "message": "too few"}}}
    page = "\n".join(scale.page({"rounds": 2, "local_steps": 2, "sizes": sizes}))
    assert "| 10 | records | 10 | 2.0 | 200 | 100 | 10 | 40 | 7.500 | 7.000 |" in page
    assert "refused before anybody is asked: too few" in page


def ledger(**changes: float) -> dict[str, float]:
    return {"charges": 4, "draws": 4, "epsilon": 7.9, "target": 8.0, **changes}
