"""Rounds under masks from end to end: the mean is the plain one, whoever drops, whenever, and across restarts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tg_tinker.federated.masking.parties import STEPS, Federation, plain_mean
from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.masking import error_bound

CLIP, BITS = 0.25, 20


def check(federation: Federation, updates: dict, mean: object, stayed: set[str]) -> None:
    """The mean is that of the sites that stayed, within the bound."""
    assert set(mean.stayed) == stayed  # type: ignore[attr-defined]
    bound = mean.error_bound  # type: ignore[attr-defined]
    assert bound == error_bound(CLIP, BITS)
    expected_P = plain_mean({site: updates[site] for site in stayed}, clip=CLIP)
    assert np.abs(mean.mean - expected_P).max() <= bound  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [3, 4, 10])
def test_the_mean_is_the_plain_mean_of_the_clipped_updates(count: int) -> None:
    federation = Federation.of(count)
    updates = federation.updates(200)
    _, mean = federation.run(updates)
    check(federation, updates, mean, set(updates))
    assert mean.dropped == ()
    assert any(np.abs(u).max() > CLIP for u in updates.values())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("count", [4, 6, 10])
def test_a_third_may_drop_at_any_step(count: int, step: str) -> None:
    federation = Federation.of(count)
    updates = federation.updates()
    gone = set(sorted(updates)[: count // 3])
    round_, mean = federation.run(updates, silent={step: gone})
    counted = set(updates) - gone if step in {"keys", "shares", "train"} else set(updates)
    check(federation, updates, mean, counted)
    assert set(mean.dropped) == (gone if step == "train" else set())
    assert round_.excluded == {}


@pytest.mark.parametrize("step", STEPS)
def test_more_than_a_third_may_not(step: str) -> None:
    federation = Federation.of(6)
    with pytest.raises(FederationRefusedError, match="masking needs 4 of 6") as error:
        federation.run(federation.updates(), silent={step: {"site-1", "site-3", "site-6"}})
    assert error.value.reason == "too_few_sites"


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(3, 9),
    drops=st.lists(st.tuples(st.integers(0, 8), st.sampled_from(STEPS)), max_size=3),
    restart=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_drops_either_leave_the_right_mean_or_too_few(
    count: int, drops: list[tuple[int, str]], restart: bool, seed: int
) -> None:
    federation = Federation.of(count, restart=restart)
    updates = federation.updates(seed=seed)
    sites = sorted(updates)
    silent: dict[str, set[str]] = {}
    for index, step in drops:
        silent.setdefault(step, set()).add(sites[index % count])
    ends = {site for group in silent.values() for site in group}
    if count - len(ends) < max(3, -(-2 * count // 3)):
        with pytest.raises(FederationRefusedError, match="try the round again"):
            federation.run(updates, silent=silent)
        return
    _, mean = federation.run(updates, silent=silent)
    uncounted = set().union(*(silent.get(step, set()) for step in ("keys", "shares", "train")))
    check(federation, updates, mean, set(updates) - uncounted)


def test_rounds_follow_each_other() -> None:
    federation = Federation.of(3, restart=True)
    for round_ in (1, 2, 3):
        updates = federation.updates(seed=round_)
        _, mean = federation.run(updates, round_=round_)
        check(federation, updates, mean, set(updates))
