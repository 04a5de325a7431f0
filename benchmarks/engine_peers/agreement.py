"""Whether a contender computes what it is timed for: its first update against a loop over single records.

Shape suffixes: B records, P parameters.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.engine_peers.contender import Contender, PeftModel, Recipe, Weights, record_losses
from benchmarks.engine_peers.shapes import Shape

TOLERANCE = 1e-3
"""Largest relative L2 difference of an update that still counts as the same computation in float32."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """Every record's gradient alone, as a brute-force loop finds it.

    Attributes:
        names: parameters, in the order in which they lie in a row.
        grads_BP: float64, of each record's mean loss.
        batch_size: the divisor of a step.
    """

    names: tuple[str, ...]
    grads_BP: npt.NDArray[np.float64]  # noqa: N815 - shape suffix
    batch_size: int

    @property
    def median_norm(self) -> float:
        """The C at which half of the records are clipped."""
        return float(np.median(np.linalg.norm(self.grads_BP, axis=1)))

    def update(self, *, max_grad_norm: float | None) -> npt.NDArray[np.float64]:
        """Mean over records [P], each clipped first if there is a bound: what SGD at rate 1 subtracts."""
        norms_B = np.linalg.norm(self.grads_BP, axis=1)
        factors_B = np.ones_like(norms_B) if max_grad_norm is None else np.minimum(1.0, max_grad_norm / norms_B)
        return factors_B @ self.grads_BP / self.batch_size


def reference(shape: Shape, recipe: Recipe) -> Reference:
    """Forward and backward for one record at a time, cut to its own length."""
    peft = PeftModel(shape, recipe)
    rows = []
    for batch in peft.batches:
        for index in range(shape.records):
            length = int(batch["attention_mask"][index].sum())
            ids, labels = (batch[name][index : index + 1, :length] for name in ("input_ids", "labels"))
            loss = record_losses(peft.model(input_ids=ids, use_cache=False).logits, labels).sum()
            grads = torch.autograd.grad(loss, [peft.named[name] for name in sorted(peft.named)])
            rows.append(torch.cat([g.flatten() for g in grads]).double().cpu().numpy())
    return Reference(names=tuple(sorted(peft.named)), grads_BP=np.stack(rows), batch_size=shape.expected_batch_size)


def disagreement(contender: Contender, expected: Reference, *, max_grad_norm: float | None) -> float:
    """Relative L2 difference of one noiseless SGD step at learning rate 1 to the reference. Changes the weights."""
    before = _flat(copy.deepcopy(contender.weights()), expected.names)
    contender.step()
    update = before - _flat(contender.weights(), expected.names)
    wanted = expected.update(max_grad_norm=max_grad_norm)
    return float(np.linalg.norm(update - wanted) / np.linalg.norm(wanted))


def _flat(weights: Weights, names: tuple[str, ...]) -> npt.NDArray[np.float64]:
    if tuple(sorted(weights)) != names:
        raise ValueError(f"trains {len(weights)} parameters where the reference trains {len(names)}, or others")
    return np.concatenate([weights[name].ravel().astype(np.float64) for name in names])
