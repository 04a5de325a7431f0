"""A custom loss and its regularizers, computed and added up: total = loss + sum of weight_i * regularizer_i."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tg_tinker import telemetry
from tg_tinker.errors import InvalidRequestError
from tg_tinker.regularizers.outputs import BaseLoss, CustomLossOutput, RegularizerOutput
from tg_tinker.regularizers.spec import RegularizerFailedError, RegularizerSpec, RegularizerTimeoutError, check
from tg_tinker.regularizers.tensors import torch_module
from tg_tinker.types.datum import Datum

LossFn = Callable[[Sequence[Datum], list[Any]], tuple[Any, dict[str, Any]]]
_log = logging.getLogger("tg_tinker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """The composed loss; ``total`` is a scalar tensor with gradient to the log-probabilities."""

    total: Any
    output: CustomLossOutput


def compute(
    data: Sequence[Datum],
    logprobs: Sequence[Any],
    loss_fn: LossFn,
    regularizers: Sequence[RegularizerSpec] = (),
    *,
    track_grad_norms: bool = False,
    parallel: bool = True,
    timeout: float = 30.0,
    max_concurrency: int | None = None,
) -> Composed:
    """Compute the loss, then every regularizer, and add them up.

    Args:
        logprobs: one leaf tensor for each datum.
        loss_fn: to (scalar tensor, metrics).
        track_grad_norms: also the norm of each gradient to ``logprobs``.
        parallel: regularizers run on threads; the outcome is the same either way. Otherwise one after the other,
            up to the first that fails.
        timeout: seconds that an asynchronous one may take.
        max_concurrency: threads; default: as many as cores, but at least four.

    Raises:
        RegularizerFailedError: naming the first in the list that failed.
        InvalidRequestError: the loss is no scalar tensor.
    """
    check(regularizers)
    data, logprobs = list(data), list(logprobs)
    with telemetry.span("custom_loss", datums=len(data), regularizers=len(regularizers)) as found:
        base, metrics = _scalar(loss_fn(data, logprobs), "the custom loss")
        results = _run(data, logprobs, regularizers, parallel, timeout, max_concurrency)
        total, outputs = base, {}
        for spec, (value, custom) in zip(regularizers, results, strict=True):
            total = total + spec.weight * value
            norm = _grad_norm(value, logprobs, spec.name) if track_grad_norms else None
            number = float(value.detach())
            outputs[spec.name] = RegularizerOutput(
                name=spec.name,
                value=number,
                weight=spec.weight,
                contribution=spec.weight * number,
                grad_norm=norm,
                grad_norm_weighted=None if norm is None else spec.weight * norm,
                custom=custom,
            )
        output = CustomLossOutput(
            loss_total=float(total.detach()),
            base_loss=BaseLoss(
                value=float(base.detach()),
                grad_norm=_grad_norm(base, logprobs, "loss") if track_grad_norms else None,
                custom=metrics,
            ),
            regularizer_total=sum(o.contribution for o in outputs.values()),
            total_grad_norm=_grad_norm(total, logprobs, "total") if track_grad_norms else None,
            regularizers=outputs,
        )
        found["value"] = output.loss_total
        if track_grad_norms:
            norms = {name: o.grad_norm for name, o in outputs.items()}
            found["grad_norms"] = {**norms, "total": output.total_grad_norm}
    return Composed(total=total, output=output)


def _run(
    data: Sequence[Datum],
    logprobs: Sequence[Any],
    specs: Sequence[RegularizerSpec],
    parallel: bool,
    timeout: float,
    max_concurrency: int | None,
) -> list[tuple[Any, dict[str, Any]]]:
    if max_concurrency is not None and max_concurrency < 1:
        raise InvalidRequestError("max_concurrency is below 1", field="max_concurrency", constraint="1 or more")
    if not specs:
        return []
    threads = min(len(specs), max_concurrency or max(4, os.cpu_count() or 1)) if parallel else 1
    with _pool(threads) as pool:
        if not parallel:
            return [pool.submit(_one, s, data, logprobs, timeout).result() for s in specs]
        under_way = [pool.submit(_one, s, data, logprobs, timeout) for s in specs]
        return [f.result() for f in under_way]


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tg-tinker-regularizer")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # one that hangs must not keep the error of another


def _one(
    spec: RegularizerSpec, data: Sequence[Datum], logprobs: Sequence[Any], timeout: float
) -> tuple[Any, dict[str, Any]]:
    """On a thread of its own, so that an awaitable has an event loop to itself."""
    with telemetry.span("regularizer.compute", name=spec.name, weight=spec.weight) as found:
        try:
            answer = spec.run(data, logprobs)
            if spec.async_:
                answer = _awaited(answer, timeout)
            value, metrics = _scalar(answer, f"the regularizer {spec.name!r}")
        except TimeoutError as e:
            failure = RegularizerTimeoutError if spec.async_ else RegularizerFailedError
            raise failure(spec.name, e) from e
        except Exception as e:
            raise RegularizerFailedError(spec.name, e) from e
        found["value"] = float(value.detach())
        found["contribution"] = spec.weight * found["value"]
    return value, metrics


def _awaited(answer: Any, timeout: float) -> Any:
    if isinstance(answer, Future):
        try:
            return answer.result(timeout)
        except TimeoutError:
            answer.cancel()
            raise TimeoutError(f"no answer within {timeout} s") from None
    if not inspect.isawaitable(answer):
        raise TypeError("async_=True, and what it returned cannot be awaited")

    async def wait() -> Any:
        try:
            return await asyncio.wait_for(answer, timeout)
        except TimeoutError:
            raise TimeoutError(f"no answer within {timeout} s") from None

    return asyncio.run(wait())


def _scalar(answer: Any, who: str) -> tuple[Any, dict[str, Any]]:
    torch = torch_module()
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise InvalidRequestError(f"{who} must return (scalar, metrics)", field="loss_fn", constraint="a pair")
    value, metrics = answer
    if isinstance(value, int | float):
        value = torch.tensor(float(value))
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise InvalidRequestError(f"{who} must return a scalar, not {shape}", field="loss_fn", constraint="a scalar")
    return value.reshape(()), {
        name: float(v.detach()) if isinstance(v, torch.Tensor) else v for name, v in dict(metrics or {}).items()
    }


def _grad_norm(value: Any, logprobs: Sequence[Any], name: str) -> float:
    torch = torch_module()
    if not value.requires_grad:
        _log.warning("%s has no gradient to the log-probabilities", name)
        return 0.0
    gradients = torch.autograd.grad(value, logprobs, retain_graph=True, allow_unused=True)
    return math.hypot(*(float(g.double().norm()) for g in gradients if g is not None))
