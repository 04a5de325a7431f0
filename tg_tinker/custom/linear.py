"""A custom loss C of log-probabilities as weights of a loss that the server knows.

With w = -dC/dlogprobs the cross entropy -sum(w logprobs) has, at these log-probabilities, the gradient of C. Under
differential privacy C is evaluated once for each privacy unit, on that unit's data alone, and the sum is taken: then
one unit's weights say nothing of another, and clipping bounds what each contributes.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker import metrics as reducing
from tg_tinker.custom.trace import LossHandle
from tg_tinker.errors import DPUnsupportedError, InvalidRequestError
from tg_tinker.regularizers.outputs import BaseLoss, CustomLossOutput
from tg_tinker.regularizers.pipeline import Composed, LossFn, compute
from tg_tinker.regularizers.spec import RegularizerSpec
from tg_tinker.regularizers.tensors import torch_module
from tg_tinker.types.datum import Datum, TensorData

_log = logging.getLogger("tg_tinker")


class LossGradientError(InvalidRequestError, ValueError):
    """A custom loss has no gradient to the log-probabilities of some datum, or one that is not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How regularizers run; see ``regularizers.compute``."""

    regularizers: Sequence[RegularizerSpec] = ()
    track_grad_norms: bool = False
    parallel: bool = True
    timeout: float = 30.0
    max_concurrency: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A custom loss at one point.

    Attributes:
        data: the datums with ``target_tokens`` and ``weights``, for cross entropy.
        metrics: the loss's own.
        output: what it and the regularizers came to.
    """

    data: list[Datum]
    metrics: dict[str, Any]
    output: CustomLossOutput


def forward_data(data: Sequence[Datum]) -> list[Datum]:
    """The datums as the first pass needs them: targets, and no weight on any.

    Raises:
        InvalidRequestError: a datum has no target_tokens.
    """
    for i, datum in enumerate(data):
        if "target_tokens" not in datum.loss_fn_inputs:
            raise InvalidRequestError(
                f"datum {i} has no loss_fn_inputs['target_tokens']",
                field="loss_fn_inputs.target_tokens",
                constraint="present",
            )
    return [_weighted(d, np.zeros(d.loss_fn_inputs["target_tokens"].shape, dtype=np.float32)) for d in data]


def linearize(
    data: Sequence[Datum],
    logprobs: Sequence[npt.NDArray[np.float32]],
    loss_fn: LossFn,
    options: Options,
    *,
    units: Sequence[str] | None = None,
) -> Linear:
    """Evaluate the loss and turn it into weights.

    Args:
        logprobs: one array for each datum, in the shape of its target_tokens.
        units: one for each datum: the loss is evaluated for each of them alone; ``None``: once, on everything.

    Raises:
        LossGradientError: no gradient, or none that can be used.
        RegularizerFailedError: naming the regularizer.
    """
    torch = torch_module()
    leaves = [torch.tensor(np.asarray(x, dtype=np.float32)).requires_grad_() for x in logprobs]
    if any(bool(torch.isnan(x).any()) for x in leaves):
        raise DPUnsupportedError(
            "the server keeps the log-probabilities of this run to itself (diagnostics='off'), so no loss can be "
            "computed from them here",
            feature="forward_backward_custom",
            reason="diagnostics are off",
            alternative="service.create_custom_loss(fn, input_ranks): the server runs it",
        )
    groups = _groups(len(data), units)
    parts: list[Composed] = []
    for rows in groups:
        part = _compute([data[i] for i in rows], [leaves[i] for i in rows], loss_fn, options)
        if not part.total.requires_grad:
            raise LossGradientError(
                "the custom loss has no gradient to the log-probabilities it was given",
                field="loss_fn",
                constraint="differentiable in every log-probability",
            )
        part.total.backward()
        parts.append(part)
    weights = [_weight(i, leaf.grad) for i, leaf in enumerate(leaves)]
    output, metrics = _joined(parts, [len(rows) for rows in groups])
    return Linear(data=[_weighted(d, w) for d, w in zip(data, weights, strict=True)], metrics=metrics, output=output)


def per_datum_loss(loss_fn: Callable[..., Any] | LossHandle) -> LossFn:
    """A loss of one datum, ``loss_fn(logprobs, **inputs)`` to (scalar, metrics), as a loss of many: their sum.

    It gets those inputs of the datum that its parameters name, as tensors. Its metrics are named ``name:reducer``.

    Raises:
        InvalidRequestError: on evaluation: a datum lacks an input, or a metric's name has no reducer.
    """
    names = (
        loss_fn.input_names
        if isinstance(loss_fn, LossHandle)
        else [p.name for p in list(inspect.signature(loss_fn).parameters.values())[1:] if p.kind is not p.VAR_KEYWORD]
    )
    everything = not isinstance(loss_fn, LossHandle) and any(
        p.kind is p.VAR_KEYWORD for p in inspect.signature(loss_fn).parameters.values()
    )

    def whole(data: Sequence[Datum], logprobs: list[Any]) -> tuple[Any, dict[str, Any]]:
        losses, found = [], []
        for i, (datum, x) in enumerate(zip(data, logprobs, strict=True)):
            wanted = list(datum.loss_fn_inputs) if everything else names
            missing = [n for n in wanted if n not in datum.loss_fn_inputs]
            if missing:
                raise InvalidRequestError(
                    f"datum {i} has no loss_fn_inputs[{missing[0]!r}], which the loss takes",
                    field=f"loss_fn_inputs.{missing[0]}",
                    constraint="present",
                )
            value, metrics = loss_fn(x, **{n: datum.loss_fn_inputs[n].to_torch() for n in wanted})
            losses.append(value)
            found.append(
                {name: float(getattr(v, "detach", lambda v=v: v)()) for name, v in dict(metrics or {}).items()}
            )
            for name in found[-1]:
                reducing.split(name)
        return sum(losses), reducing.reduce(found)

    return whole


def _compute(data: Sequence[Datum], leaves: Sequence[Any], loss_fn: LossFn, options: Options) -> Composed:
    return compute(
        data,
        leaves,
        loss_fn,
        options.regularizers,
        track_grad_norms=options.track_grad_norms,
        parallel=options.parallel,
        timeout=options.timeout,
        max_concurrency=options.max_concurrency,
    )


def _groups(count: int, units: Sequence[str] | None) -> list[list[int]]:
    if units is None:
        return [list(range(count))]
    groups: dict[str, list[int]] = {}
    for i, unit in enumerate(units):
        groups.setdefault(unit, []).append(i)
    return list(groups.values())


def _weight(i: int, gradient: Any) -> npt.NDArray[np.float32]:
    if gradient is None:
        raise LossGradientError(
            f"the custom loss has no gradient to the log-probabilities of datum {i}",
            field="loss_fn",
            constraint="differentiable in every log-probability",
        )
    weights: npt.NDArray[np.float32] = -gradient.numpy()
    if not np.isfinite(weights).all():
        raise LossGradientError(
            f"the gradient of the custom loss to the log-probabilities of datum {i} is not finite",
            field="loss_fn",
            constraint="a finite gradient",
        )
    return weights


def _weighted(datum: Datum, weights: npt.NDArray[np.float32]) -> Datum:
    targets = datum.loss_fn_inputs["target_tokens"]
    return Datum(datum.model_input, {"target_tokens": targets, "weights": TensorData(weights, dtype="float32")})


def _joined(parts: Sequence[Composed], sizes: Sequence[int]) -> tuple[CustomLossOutput, dict[str, Any]]:
    if len(parts) == 1:
        return parts[0].output, parts[0].output.base_loss.custom
    output = CustomLossOutput.total([p.output for p in parts])
    metrics = _reduced([p.output.base_loss.custom for p in parts], sizes)
    base = output.base_loss
    return (
        CustomLossOutput(
            loss_total=output.loss_total,
            base_loss=BaseLoss(value=base.value, grad_norm=base.grad_norm, custom=metrics),
            regularizer_total=output.regularizer_total,
            total_grad_norm=output.total_grad_norm,
            regularizers=output.regularizers,
        ),
        metrics,
    )


def _reduced(parts: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
    """Metrics of units as one set; a name without a reducer is a mean over datums."""
    plain = {name for part in parts for name in part if ":" not in name}
    numbers = [
        {(f"{n}:mean" if n in plain else n): v for n, v in part.items() if isinstance(v, int | float)}
        for part in parts
    ]
    found = reducing.reduce(numbers, sizes)
    return {(n.removesuffix(":mean") if n.removesuffix(":mean") in plain else n): v for n, v in found.items()}
