"""Puts a known gradient in place of a canary record's own, before units are summed and clipped, in the real engine.

Everything from the sum over a unit's records onwards is the code under audit, untouched. A planted gradient lies on
one coordinate (a Dirac canary: Nasr et al. 2023, "Tight Auditing of Differentially Private Machine Learning").

Shape suffixes: B records of a call, N records of a slice, W columns of the per-sample matrix, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tg_tinker.errors import ServerError
from tg_tinker.types import TrainingConfig
from tg_tinker_server.engine.backend import Ints, Pass, PassResult, Request, Session
from tg_tinker_server.engine.bigram import BigramBackend, BigramSession
from tg_tinker_server.engine.gradients import Form, GradientContribution
from tg_tinker_server.engine.torch_pass import Part, TorchPass
from tg_tinker_server.engine.torch_session import TorchSession
from tg_tinker_server.engine.whole_pass import WholePass


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A gradient that is ``value`` on one coordinate of the flat layout and zero elsewhere."""

    coordinate: int
    value: float


Row = Planted | None
"""What stands in for one record's gradient; ``None`` keeps its own."""


def planted_pass(session: Session, request: Request, rows_B: Sequence[Row]) -> Pass:
    """Begin a pass in which some records have planted gradients.

    Raises:
        ServerError: the engine has no place to plant one.
    """
    if isinstance(session, PlantingBigramSession):
        return session.start_planted(request, rows_B)
    if isinstance(session, TorchSession):
        session.ensure_open()
        session.check(request)
        return PlantedTorchPass(session, request, rows_B)
    raise ServerError(f"gradients cannot be planted in a {type(session).__name__}; audit it with mode 'input'")


class PlantingBigramBackend(BigramBackend):
    """The bigram backend, with sessions that take planted gradients."""

    def open(self, *, run_id: str, config: TrainingConfig) -> PlantingBigramSession:
        """See ``backend.Backend``."""
        super().open(run_id=run_id, config=config).close()  # its refusals
        return PlantingBigramSession(self._base_VV, config)


class PlantingBigramSession(BigramSession):
    """Replaces the errors of planted records; sums, clips and releases as its base class does."""

    _rows_B: Sequence[Row] = ()  # noqa: N815 - shape suffix

    def start_planted(self, request: Request, rows_B: Sequence[Row]) -> WholePass:
        """Begin a pass with planted rows."""
        self.ensure_open()
        self.check(request)
        return WholePass(lambda: self._compute_planted(request, rows_B))

    def _compute_planted(self, request: Request, rows_B: Sequence[Row]) -> PassResult:
        self._rows_B = rows_B
        try:
            return self._compute(request)
        finally:
            self._rows_B = ()

    def _contribution(
        self, units: tuple[str, ...], unit_of_B: Ints, errors: list[tuple[Any, Any]], *, form: Form = "mean"
    ) -> GradientContribution:
        if self._rows_B:
            errors = [
                own if row is None else self._errors_of(row) for own, row in zip(errors, self._rows_B, strict=True)
            ]
        return super()._contribution(units, unit_of_B, errors, form=form)

    def _errors_of(self, row: Planted) -> tuple[Any, Any]:
        token, column = divmod(row.coordinate, self.vocab_size)
        error = np.zeros((1, self.vocab_size))
        error[0, column] = row.value
        return np.array([token]), error


class PlantedTorchPass(TorchPass):
    """Overwrites planted records' rows of the per-sample matrix before the engine sums and clips them."""

    def __init__(self, session: TorchSession, request: Request, rows_B: Sequence[Row]) -> None:
        super().__init__(session, request)
        self._rows_B = rows_B
        columns = session._columns
        self._column_of_P = columns.flat(torch.arange(columns.width, device=session.device))

    def part(self, gradient: torch.Tensor | None) -> Part | None:
        """See ``TorchPass.part``."""
        if gradient is not None:
            for n, record in enumerate(self.index):
                row = self._rows_B[int(record)]
                if row is not None:
                    gradient[n] = 0.0
                    gradient[n, self._column_of_P[row.coordinate]] = row.value * self.session.scale
        return super().part(gradient)
