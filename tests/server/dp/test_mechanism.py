import numpy as np
import pytest
from scipy import stats

from tg_tinker_server.dp.mechanism import ROUNDING_ROOM, GaussianMechanism
from tg_tinker_server.dp.rng import BLOCK, SecureNormal

FALSE_ALARM = 1e-10


def scale_is(values, stddev):
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], df=values.size)
    return bool(low < float(((values / stddev) ** 2).sum()) < high)


@pytest.mark.parametrize(("multiplier", "bound"), [(1.0, 1.0), (0.7, 0.1), (2.5, 30.0)])
def test_noise_has_the_paid_for_scale_and_no_other(multiplier, bound):
    value = np.zeros(200_000)
    mechanism = GaussianMechanism(multiplier, bound, SecureNormal())
    mechanism.add_noise_([value])
    assert mechanism.stddev == pytest.approx(multiplier * bound * (1 + ROUNDING_ROOM), rel=1e-12)
    assert multiplier * bound < mechanism.stddev < multiplier * bound * 1.01
    assert scale_is(value, mechanism.stddev)
    for wrong in (0.5, 0.97, 1.03, 2.0):
        assert not scale_is(value, multiplier * bound * wrong)


def test_noise_is_added_to_the_value_in_every_shape():
    parts = [np.full((3, 4), 1e3), np.full(5, -1e3)]
    GaussianMechanism(1.0, 1.0, SecureNormal()).add_noise_(parts)
    assert (np.abs(parts[0] - 1e3) < 20).all()
    assert (np.abs(parts[1] + 1e3) < 20).all()
    assert len(np.unique(np.concatenate([p.ravel() for p in parts]))) == 17


@pytest.mark.parametrize(
    "view",
    [
        lambda: np.ones((400, 300)).T,
        lambda: np.ones((400, 300))[::2, 1:],
        lambda: np.ones(3 * BLOCK)[::-1],
        lambda: np.ones(()),
        lambda: np.ones((3, 0)),
    ],
    ids=["transposed", "strided", "reversed", "scalar", "empty"],
)
def test_every_coordinate_gets_noise_of_its_own_in_any_memory_layout(view):
    part = view()
    whole = part if part.base is None else part.base
    GaussianMechanism(1.0, 1.0, SecureNormal()).add_noise_([part])
    assert len(np.unique(part)) >= part.size - 1  # 1e5 honest values hold two equal floats once in 1e6 runs
    assert (whole != 1).sum() == part.size


def test_noise_is_drawn_once_per_array_and_coordinate():
    class Counting:
        def __init__(self):
            self.counts = []

        def normals(self, count):
            drawn = sum(self.counts)
            self.counts.append(count)
            return np.arange(drawn, drawn + count, dtype=np.float64)

    rng = Counting()
    parts = [np.full((3, 4), 0.5), np.full(2 * BLOCK + 7, 0.5)]
    mechanism = GaussianMechanism(2.0, 3.0, rng)
    mechanism.add_noise_(parts)
    assert rng.counts == [part.size for part in parts]
    values = np.concatenate([part.ravel() for part in parts])
    np.testing.assert_array_equal(values, 0.5 + np.arange(values.size) * mechanism.stddev)


def test_a_mechanism_releases_once():
    mechanism = GaussianMechanism(1.0, 1.0, SecureNormal())
    value = np.zeros(3)
    mechanism.add_noise_([value])
    after = value.copy()
    with pytest.raises(RuntimeError, match="released already"):
        mechanism.add_noise_([value])
    np.testing.assert_array_equal(value, after)


def test_a_failed_draw_uses_the_mechanism_up():
    class Broken:
        def normals(self, count):
            raise OSError("no randomness")

    mechanism = GaussianMechanism(1.0, 1.0, Broken())
    with pytest.raises(OSError, match="no randomness"):
        mechanism.add_noise_([np.zeros(3)])
    assert mechanism.used


def test_float32_is_refused_before_anything_is_drawn():
    mechanism = GaussianMechanism(1.0, 1.0, SecureNormal())
    with pytest.raises(TypeError, match="float64"):
        mechanism.add_noise_([np.zeros(3, dtype=np.float32)])
    assert not mechanism.used


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_scale_is_refused(bad):
    with pytest.raises(ValueError, match="noise_multiplier"):
        GaussianMechanism(bad, 1.0, SecureNormal())
    with pytest.raises(ValueError, match="max_grad_norm"):
        GaussianMechanism(1.0, bad, SecureNormal())
