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

from tg_tinker.types import IGNORE_INDEX
from tg_tinker_server.dp import clipping
from tg_tinker_server.dp.clipping import ClippedSum
from tg_tinker_server.dp.mechanism import ROUNDING_ROOM, GaussianMechanism
from tg_tinker_server.dp.rng import SecureNormal
from tg_tinker_server.engine import bigram, dp_optimizer, pending, torch_pass
from tg_tinker_server.engine.bigram import BigramSession
from tg_tinker_server.engine.dp_optimizer import UnitClippingOptimizer
from tg_tinker_server.engine.pending import PendingBatch
from tg_tinker_server.engine.torch_pass import TorchPass


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

    def coupled(self, units, unit_of_B, errors):
        total = max(1, sum(len(tokens) for tokens, _ in errors))
        weighed = [(tokens, rows * (len(tokens) * len(errors) / total)) for tokens, rows in errors]
        return contribution(self, units, unit_of_B, weighed)

    def coupled_torch(self, gradient):
        if gradient is not None:
            targets_B = (self.request.labels_BT[:, 1:] != IGNORE_INDEX).sum(axis=1)
            weights_B = targets_B * len(targets_B) / max(1, targets_B.sum())
            gradient.mul_(torch.from_numpy(weights_B[self.index]).to(gradient.dtype)[:, None])
        return part(self, gradient)

    patch.setattr(BigramSession, "_contribution", coupled)
    patch.setattr(TorchPass, "part", coupled_torch)


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
}


@contextmanager
def plant(fault: str) -> Iterator[None]:
    """With this fault in the code; "none" plants nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if fault != "none":
            FAULTS[fault](patch)
        yield
