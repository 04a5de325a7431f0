import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tg_tinker.types import BatchData
from tg_tinker_server.engine.backend import PassRequest
from tg_tinker_server.engine.microbatch import plan, used_lengths

RECORDS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 6)), max_size=30)


@given(records=RECORDS, max_tokens=st.integers(1, 200), max_records=st.integers(1, 10))
@settings(max_examples=300, deadline=None)
def test_every_record_comes_once_bounds_hold_and_a_unit_is_closed_once_before_the_next_begins(
    records, max_tokens, max_records
):
    lengths = np.array([length for length, _ in records], dtype=np.int64)
    units = np.array([unit for _, unit in records], dtype=np.int64)
    batches = plan(lengths, units, max_tokens=max_tokens, max_records=max_records)
    assert sorted(i for b in batches for i in b.index) == list(range(len(records)))
    closed, open_unit = set(), None
    for batch in batches:
        here = set(units[batch.index].tolist())
        assert not here & closed
        assert open_unit is None or here == {open_unit}
        fits = len(batch.index) * lengths[batch.index].max() <= max_tokens and len(batch.index) <= max_records
        assert fits or len(batch.index) == 1
        assert batch.closes or len(here) == 1
        open_unit = None if batch.closes else here.pop()
        closed |= here
    assert open_unit is None


def test_records_of_similar_length_share_a_micro_batch():
    batches = plan(np.array([2, 40, 3, 40]), np.arange(4), max_tokens=80, max_records=9)
    assert [sorted(b.index.tolist()) for b in batches] == [[0, 2], [1, 3]]


def test_padding_on_the_right_is_not_used_and_on_the_left_it_is():
    batch = BatchData(input_ids=np.ones((3, 4), dtype=int), attention_mask=[[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    assert used_lengths(PassRequest.of_batch(batch)).tolist() == [2, 4, 1]


def test_a_target_on_padding_counts_as_used():
    batch = BatchData(input_ids=[[1, 2, 3]], attention_mask=[[1, 0, 0]], labels=[[-100, -100, 3]])
    assert used_lengths(PassRequest.of_batch(batch)).tolist() == [3]
