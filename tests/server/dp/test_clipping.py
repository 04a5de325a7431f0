import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tg_tinker_server.dp.clipping import clip_and_sum, clip_factors, norm_stats

ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.floats(-1e3, 1e3, width=32)
GRADS = st.integers(1, 8).flatmap(
    lambda units: st.integers(1, 12).flatmap(lambda size: arrays(np.float32, (units, size), elements=ANY_FLOAT))
)
BOUND = st.floats(1e-3, 1e3)


@given(grads_UP=GRADS, bound=BOUND, data=st.data())
@settings(max_examples=300, deadline=None)
def test_removing_any_one_unit_moves_the_sum_by_at_most_the_bound(grads_UP, bound, data):
    row = data.draw(st.integers(0, len(grads_UP) - 1))
    with_it = clip_and_sum(grads_UP, max_grad_norm=bound).sum_P
    without = clip_and_sum(np.delete(grads_UP, row, axis=0), max_grad_norm=bound).sum_P
    assert np.isfinite(with_it).all()
    assert np.linalg.norm(with_it - without) <= bound


@given(grads_UP=arrays(np.float64, (1, 5), elements=st.floats(allow_nan=True, allow_infinity=True)), bound=BOUND)
@settings(max_examples=300, deadline=None)
def test_one_unit_contributes_at_most_the_bound_even_at_the_ends_of_float64(grads_UP, bound):
    assert np.linalg.norm(clip_and_sum(grads_UP, max_grad_norm=bound).sum_P) <= bound


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_unit_that_is_not_finite_contributes_exactly_zero_and_is_counted(poison):
    grads_UP = np.random.default_rng(0).normal(size=(4, 6)) * 10
    poisoned = grads_UP.copy()
    poisoned[2, 3] = poison
    clipped = clip_and_sum(poisoned, max_grad_norm=1.0)
    np.testing.assert_array_equal(
        clipped.sum_P, clip_and_sum(np.delete(grads_UP, 2, axis=0), max_grad_norm=1.0).sum_P
    )
    stats = norm_stats(clipped.norms_U, max_grad_norm=1.0)
    assert stats.nonfinite == 1
    assert stats.num_clipped == 3


def test_a_gradient_within_the_bound_is_left_as_it_is():
    grads_UP = np.array([[0.3, 0.4]])
    np.testing.assert_array_equal(clip_and_sum(grads_UP, max_grad_norm=1.0).sum_P, grads_UP[0])


def test_clipping_keeps_the_direction_and_reaches_the_bound_to_a_millionth():
    sum_P = clip_and_sum(np.array([[30.0, 40.0]]), max_grad_norm=2.0).sum_P
    np.testing.assert_allclose(sum_P, [1.2, 1.6], rtol=2e-6)


def test_no_units_sum_to_nothing():
    clipped = clip_and_sum(np.zeros((0, 7)), max_grad_norm=1.0)
    np.testing.assert_array_equal(clipped.sum_P, np.zeros(7))
    assert norm_stats(clipped.norms_U, max_grad_norm=1.0).mean_before == 0.0


def test_factors_lie_between_zero_and_one():
    factors = clip_factors(np.array([0.0, 0.5, 1.0, 10.0, np.inf, np.nan]), max_grad_norm=1.0)
    assert ((factors >= 0) & (factors <= 1)).all()
    assert factors[4] == factors[5] == 0


def test_statistics_are_means_over_units_before_and_after():
    stats = norm_stats(np.array([0.5, 3.0]), max_grad_norm=1.0)
    assert stats.mean_before == 1.75
    assert stats.mean_after == pytest.approx(0.75, abs=1e-6)
    assert stats.num_clipped == 1
