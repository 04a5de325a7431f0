"""Rounding to the ring: exact at the ends, within the bound everywhere, no overflow that is not refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

from tests.tg_tinker.federated.masking.parties import make_job, names
from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.masking import MaskingSetting
from tg_tinker.federated.masking.ring import check_headroom, dequantise_mean, error_bound, levels, quantise

CLIPS = st.floats(1e-6, 1e3, allow_subnormal=False)
BITS = st.integers(8, 24)


@given(clip=CLIPS, bits=BITS, data=st.data())
def test_the_error_of_the_mean_is_within_the_bound(clip: float, bits: int, data: st.DataObject) -> None:
    """The second answer is exact: fractions of what float32 holds."""
    count = data.draw(st.integers(1, 5))
    rows = data.draw(
        arrays(np.float32, (count, 6), elements=st.floats(-2 * clip, 2 * clip, width=64).map(np.float32))
    )
    total_P = np.zeros(6, np.uint32)
    for row in rows:
        total_P += quantise(row, clip=clip, bits=bits)
    mean_P = dequantise_mean(total_P, sites=count, clip=clip, bits=bits)
    for column, got in zip(rows.T, mean_P, strict=True):
        clipped = [min(max(Fraction(float(v)), -Fraction(clip)), Fraction(clip)) for v in column]
        assert abs(sum(clipped) / count - Fraction(float(got))) <= Fraction(error_bound(clip, bits))


@pytest.mark.parametrize("bits", [8, 20, 24])
def test_the_bound_is_reached_so_it_is_no_larger_than_it_must_be(bits: int) -> None:
    step = 0.25 / levels(bits)
    halfway = np.array([step / 2 * (1 - 1e-9)])
    mean = dequantise_mean(quantise(halfway, clip=0.25, bits=bits), sites=1, clip=0.25, bits=bits)
    assert mean[0] == 0
    assert halfway[0] == pytest.approx(error_bound(0.25, bits), rel=1e-6)
    assert error_bound(0.25, bits) == pytest.approx(0.25 / (2**bits - 2), rel=1e-6)


def test_known_values() -> None:
    values = np.array([0.0, 1.0, -1.0, 7.0, -7.0, 1 / 127, -1 / 127, 1.5 / 127, 2.5 / 127], np.float64)
    words = quantise(values, clip=1.0, bits=8)
    assert words.tolist() == [0, 127, 2**32 - 127, 127, 2**32 - 127, 1, 2**32 - 1, 2, 2]


def test_an_update_of_zero_stays_zero() -> None:
    words = quantise(np.zeros(3, np.float32), clip=0.25, bits=20)
    assert dequantise_mean(words, sites=7, clip=0.25, bits=20).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [np.array([np.nan]), np.array([np.inf]), np.zeros((2, 2))])
def test_what_is_no_finite_vector_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(FederationRefusedError, match="finite numbers") as error:
        quantise(bad, clip=1.0, bits=8)
    assert error.value.reason == "bad_update"


@pytest.mark.parametrize(("sites", "bits", "most"), [(255, 24, None), (256, 24, 23), (300, 24, 23), (4095, 20, None)])
def test_headroom(sites: int, bits: int, most: int | None) -> None:
    if most is None:
        check_headroom(sites, bits)
        extreme = np.full(1, levels(bits) * sites, np.int64).astype(np.uint32)
        assert dequantise_mean(extreme, sites=sites, clip=1.0, bits=bits)[0] == 1.0
    else:
        with pytest.raises(FederationRefusedError, match=f"masking.bits to at most {most} "):
            check_headroom(sites, bits)
        check_headroom(sites, most)


def test_a_sum_that_no_updates_have_is_refused() -> None:
    for word in (3 * 127 + 1, 2**32 - 3 * 127 - 1, 2**31):
        with pytest.raises(FederationRefusedError, match="1 of 2 coordinates") as error:
            dequantise_mean(np.array([5, word], np.uint32), sites=3, clip=1.0, bits=8)
        assert error.value.reason == "bad_update"
    dequantise_mean(np.array([3 * 127, 2**32 - 3 * 127], np.uint32), sites=3, clip=1.0, bits=8)


class TestTheSettingOfAJob:
    def test_the_threshold_is_two_thirds_rounded_up_and_never_two(self) -> None:
        found = {n: MaskingSetting.of(make_job(names(n))).threshold for n in (3, 4, 5, 6, 9, 10, 50)}
        assert found == {3: 3, 4: 3, 5: 4, 6: 4, 9: 6, 10: 7, 50: 34}
        assert MaskingSetting.of(make_job(names(6), threshold=6)).threshold == 6
        with pytest.raises(ValidationError, match="greater than or equal to 3"):
            make_job(names(3), threshold=2)

    @pytest.mark.parametrize("count", [3, 4, 5, 6, 9, 10, 50])
    def test_with_so_many_in_league_one_view_can_be_opened_and_two_honest_updates_are_in_it(self, count: int) -> None:
        for threshold in range(max(3, count // 2 + 1), count + 1):
            setting = MaskingSetting.of(make_job(names(count), threshold=threshold))
            fits = [m for m in range(count) if 2 * (threshold - m) > count - m and threshold - m >= 2]
            assert setting.sites_in_league == max(fits, default=0)

    def test_two_sites_are_too_few(self) -> None:
        with pytest.raises(FederationRefusedError, match="at least 3 sites") as error:
            MaskingSetting.of(make_job(names(2)))
        assert error.value.reason == "too_few_sites"

    def test_a_job_without_masking(self) -> None:
        with pytest.raises(FederationRefusedError, match="no masking"):
            MaskingSetting.of(make_job(names(3)).model_copy(update={"masking": None}))

    def test_a_sum_that_may_overflow(self) -> None:
        with pytest.raises(FederationRefusedError, match="256 sites of 24 bits"):
            MaskingSetting.of(make_job(names(256), bits=24))

    def test_a_key_that_two_sites_have(self) -> None:
        job = make_job(names(3))
        roster = {**job.roster, "site-2": job.roster["site-1"]}
        with pytest.raises(FederationRefusedError, match="same public key"):
            MaskingSetting.of(job.model_copy(update={"roster": roster}))

    def test_a_key_in_another_spelling(self) -> None:
        job = make_job(names(3))
        key = job.roster["site-1"]
        other = key[:42] + chr(ord(key[42]) + 1) + "="
        with pytest.raises(FederationRefusedError, match="canonical"):
            MaskingSetting.of(job.model_copy(update={"roster": {**job.roster, "site-1": other}}))
