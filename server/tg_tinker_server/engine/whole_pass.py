"""A pass that is one slice, for models too small to cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tg_tinker_server.engine.backend import Pass, PassResult


class WholePass:
    """See ``backend.Pass``. All of its work is done in one slice, alone."""

    def __init__(self, compute: Callable[[], PassResult]) -> None:
        self._compute = compute
        self._result: PassResult | None = None

    @property
    def finished(self) -> bool:
        """See ``backend.Pass``."""
        return self._result is not None

    def advance(self, others: Sequence[Pass] = ()) -> list[Pass]:  # noqa: ARG002 - part of the seam
        """See ``backend.Pass``."""
        self._result = self._compute()
        return []

    def result(self) -> PassResult:
        """See ``backend.Pass``."""
        assert self._result is not None, "the pass is not finished"
        return self._result
