import copy
import math
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from tg_tinker_server.dp.rng import BLOCK, SecureNormal, normals_from_words_

COUNT = 400_000
FALSE_ALARM = 1e-10  # of each comparison, so that all of this file's together stay below 1e-8 in ten runs
SIGMAS = stats.norm.isf(FALSE_ALARM / 2)  # 6.5


def binomial_is(successes, trials, probability):
    low, high = stats.binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], trials, probability)
    return bool(low <= successes <= high)


def is_standard_normal(values):
    """Kolmogorov-Smirnov for the shape, chi-square for the scale, counts for the tails; each at ``FALSE_ALARM``."""
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], df=values.size)
    return bool(
        stats.kstest(values, "norm").pvalue > FALSE_ALARM
        and low < float((values**2).sum()) < high
        and all(
            binomial_is(int((side * values > z).sum()), values.size, stats.norm.sf(z))
            for side in (1, -1)
            for z in (2.0, 3.0, 4.0)
        )
    )


def distinct(values):
    """Up to the one coincidence of two floats that half a million honest values have once in 1e5 runs."""
    return len(np.unique(values)) >= np.size(values) - 1


def uncorrelated(a, b):
    return bool(abs(np.corrcoef(a, b)[0, 1]) < SIGMAS / np.sqrt(len(a)))


def test_values_are_standard_normal():
    assert is_standard_normal(SecureNormal().normals(COUNT))


@pytest.mark.parametrize("scale", [0.5, 0.98, 1.02, 2.0])
def test_the_same_test_rejects_a_wrong_scale(scale):
    assert not is_standard_normal(SecureNormal().normals(COUNT) * scale)


def test_the_same_test_rejects_other_shapes_of_unit_variance():
    rng = np.random.default_rng(0)
    assert not is_standard_normal(rng.uniform(-np.sqrt(3), np.sqrt(3), COUNT))
    assert not is_standard_normal(rng.laplace(0, np.sqrt(0.5), COUNT))


def test_the_same_test_rejects_a_tail_cut_at_three():
    values = np.random.default_rng(0).standard_normal(COUNT)
    assert is_standard_normal(values)
    assert not is_standard_normal(np.clip(values, -2.99, 2.99))


def test_neighbouring_values_are_uncorrelated():
    values = SecureNormal().normals(COUNT)
    for lag in (1, 2, BLOCK // 2, BLOCK, COUNT // 2):
        assert uncorrelated(values[:-lag], values[lag:])


def test_the_two_values_of_a_pair_are_independent():
    first, second = SecureNormal().normals(COUNT // BLOCK * BLOCK).reshape(-1, 2, BLOCK // 2).transpose(1, 0, 2)
    first, second = first.ravel(), second.ravel()
    assert uncorrelated(first, second)
    assert uncorrelated(first, np.abs(second))
    assert uncorrelated(np.abs(first), np.abs(second))
    # The rotational symmetry that makes them independent: an exponential squared radius, a uniform angle.
    assert stats.kstest((first**2 + second**2) / 2, "expon").pvalue > FALSE_ALARM
    assert stats.kstest(np.arctan2(second, first) / (2 * np.pi) + 0.5, "uniform").pvalue > FALSE_ALARM


def test_two_draws_are_independent():
    rng = SecureNormal()
    first, second = rng.normals(COUNT), rng.normals(COUNT)
    assert distinct([first, second])
    assert uncorrelated(first, second)


def reference(words):
    """The same transform in Python's integers and ``math``, by sine and cosine."""
    pairs = len(words) // 2
    halves = words[:pairs].view(np.uint32).tolist()
    radii = [
        math.sqrt(-2.0 * math.log((2 * ((upper << 32) + lower) + 1) / 2**65))
        for upper, lower in zip(halves[:pairs], halves[pairs:], strict=True)
    ]
    angles = [2.0 * math.pi * (word / 2**64) for word in words[pairs:].tolist()]
    cosines = [r * math.cos(a) for r, a in zip(radii, angles, strict=True)]
    return np.array(cosines + [r * math.sin(a) for r, a in zip(radii, angles, strict=True)])


def assert_agrees(words):
    normals = words.copy()
    normals_from_words_(normals)
    # Away from zero the reference rounds its angle, up to a whole turn, in units of 9e-16.
    np.testing.assert_allclose(normals.view(np.float64), reference(words), rtol=0, atol=1e-14)


def test_the_transform_agrees_with_sine_and_cosine_of_another_library():
    assert_agrees(np.random.default_rng(1).integers(0, 2**64, 20_000, dtype=np.uint64))


def test_the_transform_agrees_where_words_are_extreme():
    quarters = [(k * 2**62 + d) % 2**64 for k in range(4) for d in (-1, 0, 1)]
    words = np.array([[r, a] for r in [*quarters, 2**31, 2**32 - 1, 2**32, 2**53 + 1] for a in quarters], np.uint64)
    radius_words, angle_words = words.T
    halves = np.concatenate([radius_words >> np.uint64(32), radius_words % np.uint64(2**32)]).astype(np.uint32)
    assert_agrees(np.concatenate([halves.view(np.uint64), angle_words]))


def test_the_tail_goes_beyond_float32_box_muller():
    # The smallest uniform at once instead of waiting for 2^64 draws; the largest ends the other side.
    words = np.array([0, 0], dtype=np.uint64)
    normals_from_words_(words)
    np.testing.assert_allclose(words.view(np.float64), [math.sqrt(130 * math.log(2)), 0], rtol=1e-15)
    assert words.view(np.float64)[0] > 9.49
    words = np.array([2**64 - 1, 0], dtype=np.uint64)
    normals_from_words_(words)
    assert abs(words.view(np.float64)).max() < 1e-7


@pytest.mark.parametrize("count", [5, BLOCK, 2 * BLOCK + 5])
def test_values_come_from_aes_ctr_under_the_system_s_key_alone(monkeypatch, count):
    asked = []

    def known(size):
        asked.append(size)
        return bytes(range(size))

    monkeypatch.setattr(os, "urandom", known)
    values = SecureNormal().normals(count)
    assert asked == [32]
    # GCM counts from 2 under its nonce (NIST SP 800-38D, section 7.1).
    ctr = Cipher(algorithms.AES(bytes(range(32))), modes.CTR(bytes(15) + b"\2")).encryptor()
    words = np.frombuffer(ctr.update(bytes(8 * (count + count % 2))), dtype=np.uint64)
    blocks = [reference(words[start : start + BLOCK]) for start in range(0, len(words), BLOCK)]
    np.testing.assert_allclose(values, np.concatenate(blocks)[:count], rtol=0, atol=1e-14)


def test_each_draw_takes_a_key_of_its_own(monkeypatch):
    keys = []
    system = os.urandom

    def watched(size):
        keys.append(system(size))
        return keys[-1]

    monkeypatch.setattr(os, "urandom", watched)
    rng = SecureNormal()
    for _ in range(3):
        rng.normals(2)
    assert [len(key) for key in keys] == [32, 32, 32]
    assert len(set(keys)) == 3


def test_nothing_is_kept_between_draws():
    assert SecureNormal.__slots__ == ()
    assert not hasattr(SecureNormal(), "__dict__")


def test_threads_may_share_it():
    rng = SecureNormal()
    with ThreadPoolExecutor(4) as pool:
        draws = list(pool.map(rng.normals, [BLOCK] * 16))
    assert distinct(draws)


@pytest.mark.parametrize("count", [0, 1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK + 1])
def test_any_number_of_values_can_be_drawn(count):
    values = SecureNormal().normals(count)
    assert values.shape == (count,)
    assert values.dtype == np.float64
    assert np.isfinite(values).all()
    assert distinct(values)


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
