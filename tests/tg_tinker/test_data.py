import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.data import PoissonSampler, collate
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import DPConfig, TrainingConfig

RECORDS = st.lists(st.lists(st.integers(0, 999), max_size=6), max_size=5)


def test_each_unit_is_drawn_at_the_stated_rate_whatever_its_neighbours_do():
    units, draws, rate = 50, 4000, 0.3
    taken = np.zeros((draws, units), dtype=bool)
    for row, indices in zip(taken, PoissonSampler(units, rate, steps=draws), strict=True):
        row[indices] = True
    # Six standard deviations: wrong once in 10 million runs of this test.
    assert abs(taken.mean(axis=0) - rate).max() < 6 * math.sqrt(rate * (1 - rate) / draws)
    sizes = taken.sum(axis=1)
    variance = units * rate * (1 - rate)
    assert abs(sizes.var() - variance) < 6 * variance * math.sqrt(2 / draws)


def test_draws_are_sorted_indices_without_repeats():
    for indices in PoissonSampler(1000, 0.05, steps=20):
        assert indices.dtype == np.int64
        assert (np.diff(indices) > 0).all()
        assert len(indices) == 0 or (indices[0] >= 0 and indices[-1] < 1000)


def test_a_draw_may_be_empty_and_still_counts_as_a_step():
    sizes = [len(d) for d in PoissonSampler(3, 0.05, steps=200)]
    assert len(sizes) == 200
    assert 0 in sizes


def test_rate_one_takes_everything_and_no_steps_means_no_end():
    assert PoissonSampler(5, 1.0).draw().tolist() == [0, 1, 2, 3, 4]
    assert len(list(itertools.islice(PoissonSampler(5, 0.5), 100))) == 100


def test_large_datasets_are_drawn_in_blocks():
    indices = PoissonSampler((1 << 20) + 500, 0.01).draw()
    expected = 0.01 * ((1 << 20) + 500)
    assert abs(len(indices) - expected) < 6 * math.sqrt(expected)
    assert (np.diff(indices) > 0).all()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((0, 0.1), "dataset_size"),
        ((5, 0.0), "sample_rate"),
        ((5, 1.1), "sample_rate"),
        ((5, math.nan), "sample_rate"),
    ],
)
def test_an_impossible_sampler_is_refused_by_name(arguments, field):
    with pytest.raises(InvalidRequestError) as caught:
        PoissonSampler(*arguments)
    assert caught.value.field == field


def test_a_configuration_gives_its_own_sampler():
    dp = DPConfig(sampling="poisson", dataset_size=100)
    config = TrainingConfig(model_ref="m", dp_config=dp, batch_size=5, gradient_accumulation_steps=2, max_steps=7)
    sampler = PoissonSampler.from_config(config)
    assert (sampler.dataset_size, sampler.sample_rate, sampler.steps) == (100, 0.1, 7)
    assert PoissonSampler.from_config(config, 3).steps == 3


def test_a_configuration_without_poisson_gives_none():
    with pytest.raises(InvalidRequestError, match="does not claim Poisson"):
        PoissonSampler.from_config(TrainingConfig(model_ref="m", dp_config=DPConfig()))


@given(RECORDS, st.integers(0, 9))
def test_collating_keeps_every_token_and_masks_the_rest(records, pad_id):
    batch = collate(records, pad_id)
    assert batch.num_records == len(records)
    for row, mask, labels, record in zip(batch.input_ids, batch.attention_mask, batch.labels, records, strict=True):
        assert row[mask == 1].tolist() == record
        assert labels[mask == 1].tolist() == record
        assert (row[mask == 0] == pad_id).all()
        assert (labels[mask == 0] == -100).all()


def test_no_records_are_an_empty_batch():
    assert collate([]).input_ids.shape == (0, 0)


def test_prompts_are_no_targets_and_records_are_cut_only_when_asked():
    batch = collate([[1, 2, 3, 4], [5, 6]], 9, prompt_lengths=[2, 7], max_length=3)
    assert batch.input_ids.tolist() == [[1, 2, 3], [5, 6, 9]]
    assert batch.labels.tolist() == [[-100, -100, 3], [-100, -100, -100]]


def test_given_labels_are_padded_and_cut_like_their_records():
    batch = collate([[1, 2, 3], [4]], labels=[[-100, 2, 3], [4]], max_length=2)
    assert batch.labels.tolist() == [[-100, 2], [4, -100]]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"labels": [[1], [2]]}, "labels"),
        ({"labels": [[1, 2]], "prompt_lengths": [1]}, "labels"),
        ({"prompt_lengths": [1, 1]}, "prompt_lengths"),
        ({"prompt_lengths": [-1]}, "prompt_lengths"),
        ({"max_length": 0}, "max_length"),
    ],
)
def test_what_does_not_fit_the_records_is_refused_by_name(options, field):
    with pytest.raises(InvalidRequestError) as caught:
        collate([[1, 2]], **options)
    assert caught.value.field == field
