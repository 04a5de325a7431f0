import copy
import os
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from tg_tinker_server.dp.rng import SecureNormal

COUNT = 400_000
FALSE_ALARM = 1e-6  # per test


def is_standard_normal(values):
    """Kolmogorov-Smirnov for the shape, chi-square for the scale: both at the stated false-alarm rate."""
    square_sum = float((values**2).sum())
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], df=values.size)
    return bool(stats.kstest(values, "norm").pvalue > FALSE_ALARM and low < square_sum < high)


def test_values_are_standard_normal():
    assert is_standard_normal(SecureNormal().normals(COUNT))


@pytest.mark.parametrize("scale", [0.5, 0.98, 1.02, 2.0])
def test_the_same_test_rejects_a_wrong_scale(scale):
    assert not is_standard_normal(SecureNormal().normals(COUNT) * scale)


def test_the_same_test_rejects_other_shapes_of_unit_variance():
    rng = np.random.default_rng(0)
    assert not is_standard_normal(rng.uniform(-np.sqrt(3), np.sqrt(3), COUNT))
    assert not is_standard_normal(rng.laplace(0, np.sqrt(0.5), COUNT))


def test_neighbouring_values_are_uncorrelated():
    values = SecureNormal().normals(COUNT)
    for lag in (1, 2, COUNT // 2):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 5 / np.sqrt(COUNT - lag)


def test_the_tail_goes_beyond_float32_box_muller():
    # Deterministic bound instead of waiting 1e8 draws: the largest radius of a 64-bit uniform.
    assert np.sqrt(-2 * np.log(0.5 * 2.0**-64)) > 9


@pytest.mark.parametrize("count", [0, 1, 2, 3, 65535, 65536, 65537, 131073])
def test_any_number_of_values_can_be_drawn(count):
    values = SecureNormal().normals(count)
    assert values.shape == (count,)
    assert values.dtype == np.float64
    assert np.isfinite(values).all()
    assert len(np.unique(values)) == count


def test_no_global_seed_reaches_it():
    draws = []
    for _ in range(2):
        torch.manual_seed(42)
        np.random.seed(42)
        draws.append(SecureNormal().normals(8))
    assert not np.isin(draws[0], draws[1]).any()


def test_it_leaves_the_global_generators_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    SecureNormal().normals(1000)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_takes_no_seed():
    with pytest.raises(TypeError):
        SecureNormal(1)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_cannot_be_copied_or_pickled(duplicate):
    with pytest.raises(TypeError, match="never copied"):
        duplicate(SecureNormal())


def test_it_does_not_show_its_key():
    assert repr(SecureNormal()) == "SecureNormal(<secret>)"


def test_a_forked_child_draws_other_numbers():
    rng = SecureNormal()
    rng.normals(2)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, rng.normals(4).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(read, 32), dtype=np.float64)
    assert not np.isin(theirs, rng.normals(4)).any()
