"""Faults that make epsilon untrue, planted in the service's own code. The audit is never touched.

Each is what a library or a hurried change has done before. ``plant`` puts one in place for the time of a test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tg_tinker.data import PoissonSampler
from tg_tinker.privacy.renyi import step_costs
from tg_tinker.types import IGNORE_INDEX
from tg_tinker_server.dp import accounting, clipping
from tg_tinker_server.dp.clipping import ClippedSum
from tg_tinker_server.dp.mechanism import ROUNDING_ROOM, GaussianMechanism
from tg_tinker_server.dp.rng import SecureNormal
from tg_tinker_server.engine import bigram, dp_optimizer, pending, torch_pass
from tg_tinker_server.engine.bigram import BigramSession
from tg_tinker_server.engine.dp_optimizer import UnitClippingOptimizer
from tg_tinker_server.engine.pending import PendingBatch
from tg_tinker_server.engine.torch_pass import TorchPass
from tg_tinker_server.service import draws, run_factory
from tg_tinker_server.service.states import StateService
from tg_tinker_server.store import ledger_rows


def no_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GaussianMechanism, "add_noise_", lambda self, arrays: None)


def half_the_noise(patch: pytest.MonkeyPatch) -> None:
    full = GaussianMechanism.stddev.fget
    patch.setattr(GaussianMechanism, "stddev", property(lambda self: full(self) / 2))


def noise_that_forgets_the_bound(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GaussianMechanism, "stddev", property(lambda self: self.noise_multiplier * (1 + ROUNDING_ROOM)))


def noise_reused_between_steps(patch: pytest.MonkeyPatch) -> None:
    fresh, kept = SecureNormal.normals, {}

    def normals(self, count):
        if count not in kept:
            kept[count] = fresh(self, count)
        return kept[count].copy()

    patch.setattr(SecureNormal, "normals", normals)


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    def factors(norms_U, *, max_grad_norm, margin=0.0):
        return np.isfinite(norms_U).astype(np.float64)

    patch.setattr(clipping, "clip_factors", factors)
    patch.setattr(dp_optimizer, "clip_factors", factors)


def clipping_of_the_batch(patch: pytest.MonkeyPatch) -> None:
    """The sum of a call's units is clipped, and not each of them: what an optimizer's max_grad_norm does."""

    def whole(grads_UP, *, max_grad_norm):
        norms_U = np.linalg.norm(grads_UP, axis=1)
        total_P = np.asarray(grads_UP, dtype=np.float64)[np.isfinite(norms_U)].sum(axis=0)
        return ClippedSum(
            sum_P=total_P * min(1.0, max_grad_norm / max(np.linalg.norm(total_P), 1e-300)), norms_U=norms_U
        )

    clip = UnitClippingOptimizer.clip_and_sum

    def whole_torch(self, grads_NW, unit_of_N, *, scale=1.0):
        rows = whole(grads_NW.double().cpu().numpy() / scale, max_grad_norm=self.max_grad_norm)
        sum_P = self._columns.flat(torch.from_numpy(rows.sum_P))
        return dataclasses.replace(clip(self, grads_NW, unit_of_N, scale=scale), sum_P=sum_P)

    patch.setattr(bigram, "clip_and_sum", whole)
    patch.setattr(pending, "clip_and_sum", whole)
    patch.setattr(UnitClippingOptimizer, "clip_and_sum", whole_torch)


def units_ignored(patch: pytest.MonkeyPatch) -> None:
    """A unit counts once for each of its records: each is clipped alone."""

    for module in (bigram, torch_pass):
        grouped = module.units_of

        def each_alone(request, grouped=grouped):
            names, unit_of_B = grouped(request)
            return tuple(f"{names[u]} {i}" for i, u in enumerate(unit_of_B)), np.arange(len(unit_of_B))

        patch.setattr(module, "units_of", each_alone)


def unit_counted_in_every_call(patch: pytest.MonkeyPatch) -> None:
    """A unit that comes in two calls is clipped in each of them."""
    add = PendingBatch.add

    def forgetful(self, contribution):
        self._units = {}
        add(self, contribution)

    patch.setattr(PendingBatch, "add", forgetful)


def contribution_added_twice(patch: pytest.MonkeyPatch) -> None:
    """Every call goes into the pending sum twice."""
    add = PendingBatch.add

    def twice(self, contribution):
        add(self, contribution)
        self._sum_P = self._sum_P + contribution.sum_P

    patch.setattr(PendingBatch, "add", twice)


def batch_token_mean(patch: pytest.MonkeyPatch) -> None:
    """The loss is the mean over the call's tokens, as transformers returns it: records weigh on each other."""
    contribution, part = BigramSession._contribution, TorchPass.part

    def coupled(self, units, unit_of_B, errors, **form):
        total = max(1, sum(len(tokens) for tokens, _ in errors))
        weighed = [(tokens, rows * (len(tokens) * len(errors) / total)) for tokens, rows in errors]
        return contribution(self, units, unit_of_B, weighed, **form)

    def coupled_torch(self, gradient):
        if gradient is not None:
            targets_B = (self.request.labels_BT[:, 1:] != IGNORE_INDEX).sum(axis=1)
            weights_B = targets_B * len(targets_B) / max(1, targets_B.sum())
            gradient.mul_(torch.from_numpy(weights_B[self.index]).to(gradient.dtype)[:, None])
        return part(self, gradient)

    patch.setattr(BigramSession, "_contribution", coupled)
    patch.setattr(TorchPass, "part", coupled_torch)


class _Seeded:
    """What Opacus and ``torch.manual_seed`` make together: the same noise in every run, known to all."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def normals(self, count: int) -> np.ndarray:
        return self._rng.standard_normal(count)


def seeded_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run_factory, "SecureNormal", _Seeded)


def noise_put_back_by_load_state(patch: pytest.MonkeyPatch) -> None:
    """The generator's state is part of a checkpoint, as for a run that must repeat exactly."""
    load, fresh = StateService._settle_load, SecureNormal.normals
    served: dict[int, list[np.ndarray]] = {}
    again: dict[int, int] = {}

    def normals(self, count):
        drawn, at = served.setdefault(id(self), []), again.get(id(self), 10**9)
        if at < len(drawn):
            again[id(self)] = at + 1
            return drawn[at].copy()
        drawn.append(fresh(self, count))
        return drawn[-1].copy()

    async def settle(self, run, *rest):
        if run.private is not None:
            again[id(run.private.noise)] = 0
        return await load(self, run, *rest)

    patch.setattr(SecureNormal, "normals", normals)
    patch.setattr(StateService, "_settle_load", settle)


def drawn_at_twice_the_rate(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(draws, "poisson_draw", lambda slots, rate: PoissonSampler(slots, min(1.0, 2 * rate)).draw())


def drawn_at_five_quarters_of_the_rate(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(draws, "poisson_draw", lambda slots, rate: PoissonSampler(slots, min(1.0, 1.25 * rate)).draw())


def the_same_units_in_every_draw(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(draws, "poisson_draw", lambda slots, rate: np.arange(int(slots * rate)))


def shuffled_epochs(patch: pytest.MonkeyPatch) -> None:
    """Disjoint batches of a fixed size, charged as if they were Poisson draws: what most libraries do."""
    left: list[int] = []

    def draw(slots: int, rate: float) -> np.ndarray:
        if not left:
            left.extend(np.random.default_rng().permutation(slots).tolist())
        batch, left[: int(slots * rate)] = left[: int(slots * rate)], []
        return np.array(sorted(batch), dtype=np.int64)

    patch.setattr(draws, "poisson_draw", draw)


def fixed_size_draws(patch: pytest.MonkeyPatch) -> None:
    """A random batch of exactly the expected size: without replacement, so not every unit on its own."""

    def draw(slots: int, rate: float) -> np.ndarray:
        return np.sort(np.random.default_rng().choice(slots, int(slots * rate), replace=False))

    patch.setattr(draws, "poisson_draw", draw)


def half_of_the_units_twice_as_often(patch: pytest.MonkeyPatch) -> None:
    """Half of them at twice the rate and the others never; the sizes of draws are right on average."""

    def draw(slots: int, rate: float) -> np.ndarray:
        return PoissonSampler(slots // 2, min(1.0, 2 * rate)).draw()

    patch.setattr(draws, "poisson_draw", draw)


def half_the_price(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accounting, "step_costs", lambda sigma, rate: np.maximum(step_costs(sigma, rate) // 2, 1))


def turns_not_counted(patch: pytest.MonkeyPatch) -> None:
    """Who took part before is forgotten, so only a run's first step costs anything."""
    patch.setattr(ledger_rows, "participations", lambda *_: {})


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "no noise": no_noise,
    "half the noise": half_the_noise,
    "noise that forgets C": noise_that_forgets_the_bound,
    "noise reused between steps": noise_reused_between_steps,
    "no clipping": no_clipping,
    "clipping of the batch": clipping_of_the_batch,
    "unit counted twice: its records clipped one by one": units_ignored,
    "unit counted twice: clipped in every call": unit_counted_in_every_call,
    "unit counted twice: contributions added twice": contribution_added_twice,
    "batch-token-mean loss": batch_token_mean,
    "seeded noise, the same in every run": seeded_noise,
    "noise put back by load_state": noise_put_back_by_load_state,
    "drawn at twice the rate": drawn_at_twice_the_rate,
    "drawn at 1.25 times the rate": drawn_at_five_quarters_of_the_rate,
    "the same units in every draw": the_same_units_in_every_draw,
    "shuffled epochs for Poisson draws": shuffled_epochs,
    "draws of a fixed size": fixed_size_draws,
    "half of the units drawn twice as often, the others never": half_of_the_units_twice_as_often,
    "half the price": half_the_price,
    "turns of a unit not counted": turns_not_counted,
}


@contextmanager
def plant(fault: str) -> Iterator[None]:
    """With this fault in the code; "none" plants nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if fault != "none":
            FAULTS[fault](patch)
        yield
