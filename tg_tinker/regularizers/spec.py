"""One regularizer and its weight, and how it may fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.datum import Datum


class InvalidSpecError(InvalidRequestError, ValueError):
    """A regularizer, or a list of them, that cannot be; ``field`` names what is wrong."""


class RegularizerFailedError(InvalidRequestError):
    """A regularizer raised, so nothing was sent for the backward pass.

    Attributes:
        name: of the regularizer; what it raised is the cause.
    """

    def __init__(self, name: str, error: BaseException) -> None:
        super().__init__(
            f"the regularizer {name!r} failed, so no gradient was added: {type(error).__name__}: {error}",
            field=f"regularizers.{name}",
            constraint="computes",
            details={"kind": "regularizer_failed", "regularizer": name, "error": type(error).__name__},
        )
        self.name = name


class RegularizerTimeoutError(RegularizerFailedError, TimeoutError):
    """An asynchronous regularizer did not answer in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegularizerSpec:
    """A regularizer.

    Attributes:
        fn: ``fn(data, logprobs)`` to (scalar tensor, metrics), or an object with ``compute(data, logprobs, **opts)``;
            ``logprobs`` holds one tensor for each datum.
        weight: what it is multiplied with, 0 or more.
        name: unique in a list.
        async_: ``fn`` returns an awaitable or a future, which is waited for.
        opts: for ``compute``.

    Raises:
        InvalidRequestError: naming the field that cannot be.
    """

    fn: Callable[..., Any] | Any
    weight: float
    name: str
    async_: bool = False
    opts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        for what, holds, constraint in (
            ("fn", callable(self.fn) or hasattr(self.fn, "compute"), "a function, or an object with compute()"),
            ("weight", number and math.isfinite(self.weight) and self.weight >= 0, "a number, 0 or more, finite"),
            ("name", isinstance(self.name, str) and bool(self.name), "a text that is not empty"),
            ("async_", isinstance(self.async_, bool), "True or False"),
        ):
            if not holds:
                raise InvalidSpecError(
                    f"{what}={getattr(self, what)!r} of a regularizer must be {constraint}",
                    field=what,
                    constraint=constraint,
                )

    def run(self, data: Sequence[Datum], logprobs: Sequence[Any]) -> Any:
        """Call it."""
        compute = getattr(self.fn, "compute", None)
        return self.fn(data, logprobs) if compute is None else compute(data, logprobs, **self.opts)


def check(specs: Sequence[RegularizerSpec]) -> None:
    """Refuse a list that is not one of regularizers of different names.

    Raises:
        InvalidSpecError: it is not.
    """
    if not all(isinstance(s, RegularizerSpec) for s in specs):
        raise InvalidSpecError(
            "regularizers is a list of RegularizerSpec", field="regularizers", constraint="RegularizerSpec"
        )
    names = [s.name for s in specs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise InvalidSpecError(
            f"two regularizers are named {twice[0]!r}", field="name", constraint="unique in the list"
        )
