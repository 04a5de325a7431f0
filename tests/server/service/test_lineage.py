"""Promises made elsewhere: kept along, never lost, never made smaller, and one for each federated job."""

from __future__ import annotations

import itertools
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.types import WeightsSource
from tg_tinker_server.service.lineage import (
    IMPORTED,
    Lineage,
    federation_entry,
    has_finite_epsilon,
    is_foreign,
    lineage_after,
)

JOBS = ("aa" * 32, "bb" * 32)
SOURCES = st.builds(
    WeightsSource,
    job=st.sampled_from(JOBS),
    round=st.integers(0, 5),
    epsilon=st.sampled_from([0.0, 0.5, 2.0, 10.0, math.inf]),
    delta=st.sampled_from([1e-9, 1e-5]),
    unit=st.sampled_from(["datum", "user"]),
)


def brought(source: WeightsSource, artifact_id: str = "ckpt_1") -> dict[str, Any]:
    entry = federation_entry(source, artifact_id, "bigram")
    config = {"model_ref": "bigram", "lora_config": None}
    return {"run_id": IMPORTED, "config": config, "ledger": entry["privacy"], "provenance": [entry]}


def after(sources: list[WeightsSource]) -> Lineage:
    lineage: Lineage = ()
    for i, source in enumerate(sources):
        lineage = lineage_after(lineage, f"ckpt_{i}", brought(source, f"ckpt_{i}"), dataset_id="ours")
    return lineage


@given(st.lists(SOURCES, max_size=12))
def test_each_job_and_unit_has_one_entry_that_is_no_better_than_any_word_on_it(sources: list[WeightsSource]) -> None:
    lineage = after(sources)
    keys = [(e["privacy"]["dataset_id"], e["privacy"]["unit"]) for e in lineage]
    assert sorted(keys) == sorted({(s.dataset_id, s.unit) for s in sources})
    for entry in lineage:
        privacy = entry["privacy"]
        told = [s for s in sources if (s.dataset_id, s.unit) == (privacy["dataset_id"], privacy["unit"])]
        assert float(privacy["epsilon"]) == max(s.epsilon for s in told)
        assert float(privacy["delta"]) == max(s.delta for s in told)
        newest = max(s.round for s in told)
        assert privacy["round"] == newest
        last = [i for i, s in enumerate(sources) if s in told and s.round == newest][-1]
        assert entry["artifact"] == f"ckpt_{last}"


@given(st.lists(SOURCES, max_size=4))
def test_no_order_of_loading_makes_a_promise_look_better(sources: list[WeightsSource]) -> None:
    def promises(order: tuple[WeightsSource, ...]) -> list[Any]:
        shown = ("dataset_id", "unit", "epsilon", "delta", "round")
        return sorted([e["privacy"][k] for k in shown] for e in after(list(order)))

    assert len({str(promises(order)) for order in itertools.permutations(sources)}) <= 1


@given(SOURCES)
def test_what_is_brought_is_foreign_and_protected_exactly_if_something_is_promised(source: WeightsSource) -> None:
    state = brought(source)
    assert is_foreign(state)
    assert has_finite_epsilon(state["ledger"]) == math.isfinite(source.epsilon)


def test_entries_of_other_logs_and_of_ledgers_stay_beside_it() -> None:
    source = WeightsSource(job=JOBS[0], round=1, epsilon=1.0, delta=1e-5)
    mine = federation_entry(source, "ckpt_1", "bigram")
    theirs = {**mine, "origin": "tg-tinker/" + "0" * 32}
    ledger = {**mine, "privacy": {k: v for k, v in mine["privacy"].items() if k not in ("attested_by", "round")}}
    nothing = {**mine, "privacy": None}
    before = (mine, theirs, ledger, nothing)
    assert lineage_after(before, "ckpt_2", brought(source, "ckpt_1"), dataset_id=None) == before
