"""The gate's arithmetic: the divergence to its last digits, against thirty digits and against Opacus."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import mpmath
import numpy as np
import pytest
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.special import expit, gammaln, logsumexp

from tg_tinker.privacy import renyi
from tg_tinker.privacy.renyi import INFINITE, ORDERS, UNITS, add, divergence, epsilon, repeated, step_costs, zero
from tg_tinker_server.dp import accounting as server
from tg_tinker_server.dp.events import Gaussian, ParticipationGaussian, SampledGaussian


def in_many_digits(sigma: float, rate: float, order: float) -> float:
    """log E[(1 - q + q exp((2z - 1) / 2 sigma^2))^order] / (order - 1): a sum if it is whole, else by quadrature."""
    with mpmath.workdps(30):
        s, q, a = mpmath.mpf(sigma), mpmath.mpf(rate), mpmath.mpf(order)

        if order == int(order):
            terms = (
                mpmath.binomial(a, k) * q**k * (1 - q) ** (a - k) * mpmath.exp((k * k - k) / (2 * s**2))
                for k in range(int(order) + 1)
            )
            return float(mpmath.log(mpmath.fsum(terms)) / (a - 1))

        def integrand(z: mpmath.mpf) -> mpmath.mpf:
            return (1 - q + q * mpmath.exp((2 * z - 1) / (2 * s**2))) ** a * mpmath.npdf(z, 0, s)

        crossing = s**2 * mpmath.log((1 - q) / q) + mpmath.mpf(1) / 2
        top = max(a, 2) + 12 * s
        marks = sorted({-12 * s, mpmath.mpf(0), a, mpmath.mpf(2), top, min(max(crossing, -12 * s), top)})
        fine: list[mpmath.mpf] = [marks[0]]
        for low, high in pairwise(marks):
            pieces = max(1, int((high - low) / (2 * s)))
            fine += [low + (high - low) * (i + 1) / pieces for i in range(pieces)]
        return float(mpmath.log(mpmath.quad(integrand, fine)) / (a - 1))


@pytest.mark.parametrize("order", [1.1, 2.5, 3.0, 63.0])
@pytest.mark.parametrize(
    ("sigma", "rate"), [(0.3, 1e-9), (0.3, 0.999999), (0.7, 1e-4), (1.0, 0.01), (4.0, 0.5), (20.0, 1e-9), (20.0, 0.9)]
)
def test_the_divergence_is_that_of_thirty_digits(sigma: float, rate: float, order: float) -> None:
    truth = in_many_digits(sigma, rate, order)
    assert divergence(sigma, rate, order) == pytest.approx(truth, rel=3e-12, abs=1e-16)


@pytest.mark.parametrize(
    ("sigma", "rate", "order"),
    [
        (0.15, 1e-12, 1.1),
        (0.1, 1e-12, 1.1),
        (0.17, 1e-9, 1.1),
        (0.2, 1e-17, 2.5),
        (0.05, 1e-9, 1.5),
        (0.05, 1e-9, 1.1),
        (0.14, 6e-4, 1.1),
        (2.6, 0.0103, 63.0),
        (3.06, 0.0352, 63.0),
        (1.6, 6e-6, 63.0),
    ],
)
def test_nothing_is_lost_between_the_peaks(sigma: float, rate: float, order: float) -> None:
    truth = in_many_digits(sigma, rate, order)
    assert divergence(sigma, rate, order) == pytest.approx(truth, rel=3e-12, abs=1e-15)


def test_whole_orders_are_exact_where_both_peaks_and_all_between_them_weigh_most() -> None:
    """The sum over k units of Mironov et al., at rates that make the first and the last of its terms equal."""
    for sigma in np.linspace(0.6, 4.0, 35):
        for order in (2.0, 8.0, 20.0, 35.0, 50.0, 63.0):
            for tilt in (-1.0, -0.3, 0.0, 0.3, 1.0):
                k = np.arange(order + 1)
                rate = expit(-(order - 1) / (2 * sigma**2) + tilt)
                ways = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
                terms = ways + k * math.log(rate) + (order - k) * math.log1p(-rate) + (k * k - k) / (2 * sigma**2)
                truth = float(logsumexp(terms)) / (order - 1)
                assert divergence(sigma, rate, order) == pytest.approx(truth, rel=1e-11, abs=1e-12), (sigma, rate)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5, 1.0, 20.0])
@pytest.mark.parametrize("rate", [1e-9, 1e-4, 0.3, 1 - 1e-9, 1.0])
def test_the_divergence_is_that_of_opacus_at_every_order(sigma: float, rate: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for order in ORDERS:
            theirs = float(compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=float(order)))
            # Their series stops at a term of 1e-13, of either sign; relative to order - 1.
            assert divergence(sigma, rate, float(order)) == pytest.approx(theirs, rel=1e-9, abs=2e-12)


@pytest.mark.parametrize("rate", [1e-9, 0.01, 0.999])
def test_below_the_smallest_noise_the_bound_is_joined_from_above(rate: float) -> None:
    for order in (1.1, 5.0, 63.0):
        inside, outside = divergence(0.01, rate, order), divergence(0.00999999, rate, order)
        assert inside <= outside <= inside + math.log(1 / rate) * order / (order - 1) + 1e-3 * inside


def test_impossible_precision_is_infinite_or_zero_and_never_an_error() -> None:
    for sigma in (5e-324, 1e-200, 1e-9, 1e6, 1e150):
        for rate in (5e-324, 1e-300, 1e-9, 0.5, 1 - 2**-53, 1.0):
            for order in (1.1, 2.0, 63.0):
                assert 0.0 <= divergence(sigma, rate, order) <= math.inf


def test_more_noise_or_a_smaller_rate_never_costs_more() -> None:
    sigmas, rates = (0.1, 0.3, 1.0, 3.0, 20.0), (1e-9, 1e-4, 0.1, 0.9, 1.0)
    for rate in rates:
        costs = [step_costs(sigma, rate) for sigma in sigmas]
        assert all((a >= b).all() for a, b in pairwise(costs))
    for sigma in sigmas:
        costs = [step_costs(sigma, rate) for rate in rates]
        assert all((a <= b).all() for a, b in pairwise(costs))


def test_costs_are_rounded_up_by_no_more_than_two_units() -> None:
    for sigma, rate in ((0.5, 0.01), (1.0, 1.0), (20.0, 1e-9)):
        exact = np.array([divergence(sigma, rate, float(order)) for order in ORDERS]) * UNITS
        over = step_costs(sigma, rate) - exact
        assert (over > 1 - 1e-3).all()
        assert (over <= 2 + exact * 2e-11).all()


def test_the_server_charges_these_very_integers() -> None:
    sampled = SampledGaussian(noise_multiplier=0.8, sample_rate=0.02, vouched_by="client")
    assert (server.cost(sampled) == step_costs(0.8, 0.02)).all()
    assert (server.cost(Gaussian(noise_multiplier=0.8)) == step_costs(0.8, 1.0)).all()
    thrice = server.cost(ParticipationGaussian(noise_multiplier=0.8, releases=3))
    assert (thrice == repeated(step_costs(0.8, 1.0), 3)).all()


def test_totals_saturate_and_never_wrap_around() -> None:
    one = step_costs(1.0, 1.0)
    assert (repeated(one, 10**18) == INFINITE).all()
    assert (add(repeated(one, 10**18), one) == INFINITE).all()
    assert epsilon(repeated(one, 10**18), 1e-5) == math.inf
    assert epsilon(zero(), 1e-5) == 0.0
    assert epsilon(one, 0.0) == math.inf


@pytest.mark.parametrize(("sigma", "most"), [(0.0099, 0), (0.01, 10_000), (0.1, 2_000), (1.0, 500), (20.0, 500)])
def test_a_divergence_is_a_sum_of_few_terms(monkeypatch: pytest.MonkeyPatch, sigma: float, most: int) -> None:
    sizes = [0]
    grid = renyi._grid
    monkeypatch.setattr(renyi, "_grid", lambda *args: sizes.append(len(grid(*args))) or grid(*args))
    for order in ORDERS:
        divergence(sigma, 0.5, float(order))
    assert max(sizes) <= most
    assert (len(sizes) - 1 == len(ORDERS)) == (most > 0)
