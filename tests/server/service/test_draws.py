"""A draw is cut into passes without splitting a unit, and loses nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import IGNORE_INDEX
from tg_tinker.types.records import Record
from tg_tinker_server.service.draws import poisson_draw
from tg_tinker_server.service.fitting import Misfits, PassLimits, Tokens, as_tokens, packed

LIMITS = PassLimits(max_records=8, max_tokens=40)


def tokens(slot: int, size: int) -> Tokens:
    ids = np.arange(size, dtype=np.int64) + 100 * slot
    return Tokens(slot, ids, np.ones_like(ids), ids)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5)), max_size=40))
def test_passes_hold_the_whole_draw_within_the_limits_and_no_unit_twice(sizes: list[tuple[int, int]]) -> None:
    units: dict[int, list[Tokens]] = {}
    for slot, size in sizes:
        if len(units.get(slot, ())) < 8:
            units.setdefault(slot, []).append(tokens(slot, size))
    records = [r for unit in units.values() for r in unit]
    found: list[tuple[str, list[int]]] = []
    seen: list[str] = []
    for part in packed(records, LIMITS):
        ids, mask = part.batch.input_ids, part.batch.attention_mask
        assert ids.shape[0] <= 8
        assert ids.size <= 40
        seen += sorted(set(part.units))
        found += [(u, row[m == 1].tolist()) for u, row, m in zip(part.units, ids, mask, strict=True)]
        assert (part.batch.labels[mask == 0] == IGNORE_INDEX).all()
    assert len(seen) == len(set(seen)) == len(units)
    assert sorted(found) == sorted((f"slot-{r.slot}", r.ids_T.tolist()) for r in records)


def test_an_empty_draw_is_one_empty_pass() -> None:
    (part,) = packed([], LIMITS)
    assert (part.batch.num_records, part.units) == (0, ())


def test_a_record_becomes_what_the_engine_would_make_of_it() -> None:
    plain = as_tokens(3, Record(input_ids=[1, 2, 3], attention_mask=[0, 1, 1]), None, None)
    assert plain.labels_T.tolist() == [IGNORE_INDEX, 2, 3]
    cut = as_tokens(3, Record(input_ids=[1, 2, 3], attention_mask=[0, 1, 1], labels=[7, 8, 9]), None, 2)
    assert (cut.ids_T.tolist(), cut.mask_T.tolist(), cut.labels_T.tolist()) == ([1, 2], [0, 1], [7, 8])
    text = as_tokens(0, Record(text="x"), [5, 6], 1)
    assert (text.ids_T.tolist(), text.labels_T.tolist()) == ([5], [5])


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([tokens(0, 6), tokens(1, 5)], "1 of 2 records are longer than the 5 tokens"),
        ([tokens(9, 2), tokens(0, 1)], "1 of 2 records hold ids outside"),
        ([tokens(0, 0)], "1 of 1 records have no token"),
        ([tokens(0, 1) for _ in range(9)], "1 of 1 privacy units do not fit one pass"),
        ([tokens(0, 5) for _ in range(8)], None),
        ([tokens(0, 5), *[tokens(0, 1) for _ in range(7)]], None),
    ],
)
def test_misfits_are_counted(records: list[Tokens], says: str | None) -> None:
    misfits = Misfits(max_positions=5, vocab_size=500, limits=LIMITS)
    misfits.look_at(records)
    if says is None:
        misfits.refuse("d", shown=True)
        return
    with pytest.raises(InvalidRequestError, match=says):
        misfits.refuse("d", shown=True)
    with pytest.raises(InvalidRequestError, match=r"dataset d: some"):
        misfits.refuse("d", shown=False)


def test_the_draw_is_poisson_and_no_seed_repeats_it() -> None:
    np.random.seed(0)
    first = [poisson_draw(1000, 0.05).tolist() for _ in range(200)]
    np.random.seed(0)
    assert [poisson_draw(1000, 0.05).tolist() for _ in range(200)] != first
    sizes = np.array([len(d) for d in first])
    assert abs(sizes.mean() - 50) < 5 * (47.5 / 200) ** 0.5
    assert 0.6 < sizes.var() / 47.5 < 1.6  # binomial; a fixed batch would have none
    assert poisson_draw(7, 1.0).tolist() == list(range(7))
