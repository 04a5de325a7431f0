"""Privacy of whole sites: clip each update, sum, charge, noise, divide by a public number, all at one server.

The coordinator hands the updates of a round to its own server as rows of a run "vector:<P>". The server clips them,
charges the federation's ledger, and only then adds noise. What comes back is the noised mean; everything after that,
the strategy and the next clipping bound included, is post-processing.

With an adaptive bound (Andrew et al. 2021, arXiv:1905.03871) a site's row holds its update and one more number:
whether the update was within the bound. Both are scaled so that the row is no longer than 1,

    row = (alpha * clipped / bound, beta * (within - 1/2)),   alpha^2 + beta^2 / 4 = 1,

and one Gaussian of noise multiplier z pays for both. beta = z / count_noise_multiplier gives the count the noise that
was asked for; the update's is then z / alpha, their equation z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2).

Shape suffixes: U sites, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from tg_tinker.data import PoissonSampler
from tg_tinker.errors import FederationRefusedError, InvalidRequestError, ResourceNotFoundError
from tg_tinker.federated.job import Job, SitePrivacy
from tg_tinker.federated.result import ledger_of
from tg_tinker.federated.updates import Factor, trained_names
from tg_tinker.ledger.history import read_history
from tg_tinker.ledger.releases import histogram
from tg_tinker.privacy import gate_epsilon, plan
from tg_tinker.service_client import ServiceClient
from tg_tinker.types import DPConfig, OptimizerConfig, TrainingConfig

MOST_DRIFT = 3.0
"""Noise of all rounds over the longest way that all rounds together can go. Measured on a bigram of 67,600
parameters, 50 sites, 40 rounds, from a held-out loss of 5.67: 3.12 without noise, 3.15 at a ratio of 1, 3.43 at 3,
7.31 at 10."""
_FARTHEST = 1e9  # a bound never moves farther from where it began than this factor
_NOBODY = "nobody"

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteTerms:
    """The numbers of a `SitePrivacy`, checked and derived.

    Attributes:
        population: sites that may be drawn, N.
        expected_sites: q N, the public divisor; a whole number.
        noise_multiplier: of the whole round, z.
        update_scale: alpha; 1 without an adaptive bound.
        count_scale: beta; 0 without.
    """

    population: int
    expected_sites: int
    noise_multiplier: float
    update_scale: float
    count_scale: float

    @classmethod
    def of(cls, sites: SitePrivacy) -> Self:
        """The terms of a job.

        Raises:
            FederationRefusedError: reason "hopeless": they cannot hold together.
        """
        expected = sites.population * sites.sample_rate
        whole = round(expected)
        if whole < 1 or abs(expected - whole) > 1e-6 * whole:
            raise _hopeless(
                f"sites.sample_rate {sites.sample_rate:g} of {sites.population} sites is {expected:g}, and what the "
                f"sum is divided by must be whole: take {max(1, whole) / sites.population:.6g}"
            )
        if sites.target_delta >= 1 / sites.population:
            raise _hopeless(
                f"sites.target_delta {sites.target_delta:g} is not below 1 / population = {1 / sites.population:g}: "
                "such a promise allows publishing a whole site"
            )
        z = sites.noise_multiplier
        beta = z / sites.adaptive.count_noise_multiplier if sites.adaptive is not None else 0.0
        if beta >= 2:
            raise _hopeless(
                f"the count of an adaptive bound alone, at count_noise_multiplier "
                f"{z / beta:g}, costs more than a round of noise_multiplier {z:g} allows; it needs more than "
                f"{z / 2:g}, or a fixed bound"
            )
        return cls(
            population=sites.population,
            expected_sites=whole,
            noise_multiplier=z,
            update_scale=math.sqrt(1 - beta * beta / 4),
            count_scale=beta,
        )

    @property
    def sample_rate(self) -> float:
        """q, as drawn and as charged."""
        return self.expected_sites / self.population

    @property
    def update_noise_multiplier(self) -> float:
        """Noise on the sum of updates over the bound, per coordinate."""
        return self.noise_multiplier / self.update_scale

    def encode(self, update_P: npt.NDArray[np.float32], bound: float) -> npt.NDArray[np.float32]:
        """A site's row: the update itself for a fixed bound, which the server clips; else [P + 1], of norm 1 at most.

        Args:
            update_P: finite; any length.
        """
        if not self.count_scale:
            return update_P
        exact_P = update_P.astype(np.float64)
        norm = float(np.linalg.norm(exact_P))
        row = np.empty(len(update_P) + 1)
        row[:-1] = exact_P * (self.update_scale / max(norm, bound))
        row[-1] = self.count_scale * (0.5 if norm <= bound else -0.5)
        return row.astype(np.float32)

    def decode(self, mean: Vector, bound: float) -> tuple[Vector, float | None]:
        """The noised mean update [P], and the noised share of sites within the bound where there is a count."""
        if not self.count_scale:
            return mean, None
        return mean[:-1] * (bound / self.update_scale), 0.5 + float(mean[-1]) / self.count_scale

    def histogram(self, rounds: int) -> dict[tuple[float, float], int]:
        """So many rounds as a history of releases."""
        return {(self.noise_multiplier, self.sample_rate): rounds}


def next_bound(sites: SitePrivacy, bound: float, share_within: float | None) -> float:
    """The clipping bound of the next round: a geometric step towards the quantile. Post-processing of a noised share.

    The share is cut to [0, 1], so that one round moves the bound by ``exp(rate)`` at most.
    """
    if sites.adaptive is None or share_within is None:
        return bound
    off = min(1.0, max(0.0, share_within)) - sites.adaptive.quantile
    moved = bound * math.exp(-sites.adaptive.rate * off)
    return min(sites.clip * _FARTHEST, max(sites.clip / _FARTHEST, moved))


def trained_sizes(job: Job, weights: Mapping[str, npt.NDArray[Any]]) -> dict[Factor | None, int]:
    """Parameters that the rounds of a job train, by what they freeze."""
    frozen = {job.frozen_factor(r) for r in (1, min(2, job.rounds))}
    return {f: sum(weights[name].size for name in trained_names(weights, f)) for f in frozen}


def check_feasible(job: Job, sizes: Mapping[Factor | None, int]) -> dict[str, float]:
    """Require that site-level privacy can work for a job, before anything is asked or spent.

    Two things are required. The rounds cost no more than ``target_epsilon`` by the gate. And the noise is not
    hopelessly longer than what could be learned: over T rounds the noise of the mean has the norm
    ``z sqrt(P T) bound / (q N)`` and all updates together move the model by ``T bound`` at most; their ratio must
    not be over 3.

    Args:
        sizes: parameters that a round trains, by what it freezes.

    Returns:
        The numbers behind the decision.

    Raises:
        FederationRefusedError: reason "hopeless", with the numbers, and what would do.
    """
    assert job.sites is not None
    terms = SiteTerms.of(job.sites)
    if len(job.roster) > terms.population:
        raise _hopeless(f"sites.population {terms.population} is less than the {len(job.roster)} sites of the roster")
    epsilon = gate_epsilon(terms.histogram(job.rounds), job.sites.target_delta)
    frozen = [job.frozen_factor(r) for r in range(1, job.rounds + 1)]
    per_round = {
        f: terms.update_noise_multiplier * math.sqrt(size) / terms.expected_sites for f, size in sizes.items()
    }
    drift = max(per_round[f] / math.sqrt(frozen.count(f)) for f in set(frozen))
    numbers = {
        "population": float(terms.population),
        "sample_rate": terms.sample_rate,
        "expected_sites": float(terms.expected_sites),
        "noise_multiplier": terms.noise_multiplier,
        "update_noise_multiplier": terms.update_noise_multiplier,
        "noise_of_mean_over_clip": max(per_round.values()),
        "noise_over_longest_way": drift,
        "epsilon": epsilon,
        "target_epsilon": job.sites.target_epsilon,
        "delta": job.sites.target_delta,
    }
    if epsilon > job.sites.target_epsilon:
        raise _hopeless(
            f"{job.rounds} rounds of noise_multiplier {terms.noise_multiplier:g} over {terms.expected_sites} of "
            f"{terms.population} sites cost epsilon {epsilon:.4g} at delta {job.sites.target_delta:g}, over "
            f"target_epsilon {job.sites.target_epsilon:g}: {_enough_noise(job.sites, terms, job.rounds)}",
            numbers,
        )
    if drift > MOST_DRIFT:
        needed = math.ceil(terms.expected_sites * drift / MOST_DRIFT)
        raise _hopeless(
            f"the noise on the mean of {terms.expected_sites} sites is {numbers['noise_of_mean_over_clip']:.3g} "
            f"times as long as any update may be, and over all rounds {drift:.3g} times the longest way that the "
            f"sites together could go; {MOST_DRIFT:g} is the most. It takes {needed} sites a round at this noise: "
            "draw from a larger population, train fewer parameters, or protect records inside each site instead",
            numbers,
        )
    return numbers


def check_left(job: Job, service: ServiceClient) -> None:
    """Require that the sites' budget carries the job after all that earlier jobs over the same sites have spent.

    Raises:
        FederationRefusedError: reason "hopeless": it does not, with what is spent; or the budget has other terms.
    """
    assert job.sites is not None
    sites, name = job.sites, ledger_of(job)
    try:
        ledger = service.get_privacy_ledger(name)
    except ResourceNotFoundError:
        return
    history = read_history(name, [entry.body for entry in ledger.entries])
    here = history.in_force
    if (here.target_epsilon, here.target_delta) != (sites.target_epsilon, sites.target_delta):
        raise _hopeless(
            f"these sites have a budget already, of epsilon {here.target_epsilon:g} at delta {here.target_delta:g}, "
            f"and the job asks for {sites.target_epsilon:g} at {sites.target_delta:g}: use the terms of {name}"
        )
    spent, rounds = histogram(history.releases), SiteTerms.of(sites).histogram(job.rounds)
    if spent is None:
        raise _hopeless(
            f"something was released of these sites without noise, by {name}: nothing is left of a budget"
        )

    def cost(times: int) -> float:
        more = dict.fromkeys(rounds, times)
        kinds = {*spent, *more}
        return gate_epsilon({kind: spent.get(kind, 0) + more.get(kind, 0) for kind in kinds}, sites.target_delta)

    before, after = cost(0) if spent else 0.0, cost(job.rounds)
    if after <= sites.target_epsilon:
        return
    numbers = {"epsilon_before": before, "epsilon": after, "target_epsilon": sites.target_epsilon}
    if cost(1) > sites.target_epsilon:
        raise _hopeless(
            f"nothing is left of the budget of these sites: earlier jobs spent epsilon {before:.4g} of "
            f"{sites.target_epsilon:g}, and not one more round fits. What was released cannot be taken back",
            numbers,
        )
    raise _hopeless(
        f"earlier jobs over these sites spent epsilon {before:.4g} of {sites.target_epsilon:g}, and with "
        f"{job.rounds} rounds more it would be {after:.4g}: take fewer rounds, or more noise",
        numbers,
    )


class SiteDraw(Protocol):
    """Who takes part in a round."""

    def draw(self) -> npt.NDArray[np.int64]:
        """Sorted indices into the population."""
        ...


class SiteMechanism:
    """The noised sums of a job, charged to its ledger at the coordinator's server.

    Each process uses runs of its own over the one dataset, so that what an earlier process had handed in and not
    released can never enter a sum, while what it was charged for counts.
    """

    def __init__(self, service: ServiceClient, job: Job, *, draw: SiteDraw | None = None) -> None:
        """
        Args:
            draw: in tests alone; else each of the population independently, by the operating system's generator.
        """
        assert job.sites is not None
        self.terms = SiteTerms.of(job.sites)
        self._sites, self._service, self._job, self._ledger = job.sites, service, job.digest(), ledger_of(job)
        self._draw = draw or PoissonSampler(self.terms.population, self.terms.sample_rate)
        self._runs: dict[int, Any] = {}

    @property
    def dataset_id(self) -> str:
        """Whose budget it is: that of the sites on the roster, over all jobs."""
        return self._ledger

    def draw(self, roster: Sequence[str]) -> list[str]:
        """The sites of a round. Places of the population that nobody on the roster has are drawn and stay empty."""
        named = sorted(roster)
        return [named[i] for i in self._draw.draw() if i < len(named)]

    def release(
        self, updates: Mapping[str, npt.NDArray[np.float32]], *, size: int, bound: float
    ) -> tuple[Vector, float]:
        """Charge, noise and release one round; it also costs where nobody was drawn or nobody answered.

        Args:
            updates: by site, [P] each; checked. May be empty.
            size: P.

        Returns:
            The noised mean update [P] over the public number of sites, and the next bound.

        Raises:
            DPBudgetExceededError: the round does not fit into the budget; nothing was released.
        """
        width = size + 1 if self.terms.count_scale else size
        rows_UP = np.zeros((len(updates), width), np.float32)
        for row, name in enumerate(sorted(updates)):
            rows_UP[row] = self.terms.encode(updates[name], bound)
        units = sorted(updates)
        if not units and self.terms.sample_rate == 1:
            rows_UP, units = np.zeros((1, width), np.float32), [_NOBODY]  # without sampling a sum has a row
        mean, share = self.terms.decode(self._noised_mean(rows_UP, units), bound)
        return mean, next_bound(self._sites, bound, share)

    def epsilon(self) -> float:
        """Spent by the sites so far in this and all earlier jobs, lost rounds included; 0 before the first charge."""
        for run in self._runs.values():
            return float(run.privacy.total_epsilon)
        try:  # a spent budget opens no new run
            return float(self._service.get_privacy_ledger(self.dataset_id).epsilon_spent)
        except ResourceNotFoundError:
            return 0.0

    def close(self) -> None:
        """Free the runs' memory at the server."""
        for run in self._runs.values():
            run.unload_model()
            run.close()
        self._runs.clear()

    def _noised_mean(self, rows_UP: npt.NDArray[np.float32], units: Sequence[str]) -> Vector:
        width = rows_UP.shape[1]
        run = self._run(width)
        try:
            before = run.pull_weights().tensors["vector"]
            run.add_updates(rows_UP, privacy_unit_ids=list(units)).result()
            run.optim_step().result()
            after = run.pull_weights().tensors["vector"]
        except BaseException:
            self._runs.pop(width).close(wait_s=0.0)  # rows may be left in it
            raise
        mean: Vector = np.subtract(before, after, dtype=np.float64)
        return mean  # plain SGD with rate 1: the step is the noised mean itself

    def _run(self, width: int) -> Any:
        if width not in self._runs:
            sites, terms = self._sites, self.terms
            sampled = terms.sample_rate < 1
            dp = DPConfig(
                noise_multiplier=terms.noise_multiplier,
                max_grad_norm=1.0 if terms.count_scale else sites.clip,
                target_epsilon=sites.target_epsilon,
                target_delta=sites.target_delta,
                dataset_id=self.dataset_id,
                dataset_size=terms.population,
                sampling="poisson" if sampled else "none",
                privacy_unit="site",
                diagnostics="off",
            )
            self._runs[width] = self._service.create_training_client(
                TrainingConfig(
                    model_ref=f"vector:{width}",
                    optimizer=OptimizerConfig(name="sgd", learning_rate=1.0, momentum=0.0, nesterov=False),
                    dp_config=dp,
                    batch_size=terms.expected_sites,
                    metadata={"federated_job": self._job},
                )
            )
        return self._runs[width]


def _enough_noise(sites: SitePrivacy, terms: SiteTerms, rounds: int) -> str:
    try:
        found = plan(
            epsilon=sites.target_epsilon,
            delta=sites.target_delta,
            steps=rounds,
            batch_size=terms.expected_sites,
            dataset_size=terms.population,
            sampling="poisson" if terms.sample_rate < 1 else "none",
        )
    except InvalidRequestError as e:
        return e.message
    return f"it takes noise_multiplier {found.noise_multiplier:g}, fewer rounds, or a lower sample_rate"


def _hopeless(message: str, numbers: Mapping[str, float] | None = None) -> FederationRefusedError:
    return FederationRefusedError(f"site-level privacy: {message}", reason="hopeless", details=dict(numbers or {}))
