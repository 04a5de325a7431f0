"""Torch, only where it is needed, and what every built-in regularizer does with tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.datum import Datum

Reduction = Literal["sum", "mean"]
Reference = Sequence[Any] | Callable[[Sequence[Datum]], Sequence[Any]] | str


def torch_module() -> Any:
    """The module torch.

    Raises:
        InvalidRequestError: it is not installed.
    """
    try:
        import torch
    except ImportError as e:
        raise InvalidRequestError(
            "losses and regularizers of one's own need PyTorch: pip install 'tg-tinker[torch]'",
            field="torch",
            constraint="installed",
        ) from e
    return torch


def choose(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse an option that is not one of a list.

    Raises:
        InvalidRequestError: naming it.
    """
    if value not in allowed:
        listed = ", ".join(map(repr, allowed))
        raise InvalidRequestError(f"{name}={value!r} is none of {listed}", field=name, constraint=f"one of: {listed}")


def finite(name: str, value: Any, *, above: float | None = None, least: float | None = None) -> None:
    """Refuse a setting that is not a finite number within its bounds.

    Raises:
        InvalidRequestError: naming it.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    if not number or (above is not None and value <= above) or (least is not None and value < least):
        rule = f"above {above}" if above is not None else f"{least} or more" if least is not None else "a number"
        raise InvalidRequestError(f"{name}={value!r} must be {rule}, and finite", field=name, constraint=rule)


def reduced(values: Sequence[Any], reduction: Reduction) -> Any:
    """The sum or the mean over every element of every tensor; 0 where there is none."""
    torch = torch_module()
    flat = torch.cat([v.reshape(-1) for v in values]) if len(values) else torch.zeros(0)
    return flat.sum() if reduction == "sum" or flat.numel() == 0 else flat.mean()


def field_of(data: Sequence[Datum], field: str) -> list[Any]:
    """One input of every datum, as tensors.

    Raises:
        InvalidRequestError: a datum lacks it.
    """
    for i, datum in enumerate(data):
        if field not in datum.loss_fn_inputs:
            raise InvalidRequestError(
                f"datum {i} has no loss_fn_inputs[{field!r}]", field=f"loss_fn_inputs.{field}", constraint="present"
            )
    return [datum.loss_fn_inputs[field].to_torch() for datum in data]


def referred(reference: Reference, data: Sequence[Datum], logprobs: Sequence[Any]) -> list[Any]:
    """The reference of every datum: the name of an input, a function of the data, or tensors in order.

    One tensor alone stands for every datum.

    Raises:
        InvalidRequestError: not one for each datum, or of another shape.
    """
    torch = torch_module()
    if isinstance(reference, str):
        found = field_of(data, reference)
    else:
        given = reference(data) if callable(reference) else reference
        found = [given] * len(logprobs) if isinstance(given, torch.Tensor) else list(given)
    found = [torch.as_tensor(r) for r in found]
    if [tuple(r.shape) for r in found] != [tuple(x.shape) for x in logprobs]:
        raise InvalidRequestError(
            f"the reference has the shapes {[list(r.shape) for r in found][:4]} and the log-probabilities "
            f"{[list(x.shape) for x in logprobs][:4]}",
            field="reference",
            constraint="one for each datum, of its shape",
        )
    return [r.to(x.dtype) for r, x in zip(found, logprobs, strict=True)]
