"""Draws batches from registered datasets. The draw is made here, used here, and stored nowhere.

Every slot of the registration is drawn on its own with the run's rate, however many records were erased since: an
erased slot contributes nothing, so the rate is a public constant.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.data import PoissonSampler
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.records import Record
from tg_tinker.wire.calls import Pass
from tg_tinker_server.service.dataset_keys import DatasetKeys
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.fitting import DrawnBatch, Misfits, PassLimits, Tokens, as_tokens, packed
from tg_tinker_server.service.run import PrivateRun, Run
from tg_tinker_server.store import dataset_rows as rows
from tg_tinker_server.store.database import Database

PAGE = 256  # records encoded in one visit to the compute thread
KNOWN = 1024  # combinations of dataset and run shape that are known to fit

Ints = npt.NDArray[np.int64]


def poisson_draw(slots: int, sample_rate: float) -> Ints:
    """One Poisson draw from the operating system's randomness; nobody can seed or repeat it.

    Guarantee: each slot is drawn independently, with a probability never above ``sample_rate`` and below it by less
    than 2**-64 (``tg_tinker.data.PoissonSampler``).
    """
    return PoissonSampler(slots, sample_rate).draw()


@dataclass(frozen=True, slots=True)
class DrawService:
    """Draws for runs on registered datasets."""

    db: Database
    keys: DatasetKeys
    executors: Executors
    limits: PassLimits
    _fitting: OrderedDict[tuple[Any, ...], None] = field(default_factory=OrderedDict)

    async def draw(self, run: Run, ensure_wanted: Callable[[], None]) -> list[DrawnBatch]:
        """One Poisson draw at the run's rate, in as many batches as it needs; one empty batch for an empty draw.

        Args:
            ensure_wanted: called between pages of a long check; what it raises ends the draw.

        Raises:
            InvalidRequestError: the dataset's records are gone, or some do not fit this run.
        """
        assert run.private is not None
        tenant, dataset_id = run.tenant, run.private.scope.dataset_id
        row = await self.executors.io(self.db.read, lambda tx: rows.find_dataset(tx, tenant, dataset_id))
        if row is None or row.status != rows.SEALED:
            raise InvalidRequestError(
                f"the records of dataset {dataset_id} were deleted; nothing can be drawn from it any more",
                field="dataset",
                constraint="a registered dataset",
            )
        await self._require_fit(run, row, ensure_wanted)
        drawn = await self.executors.io(self._drawn, row, run.config.sample_rate)
        records = await self._tokens(run, row, drawn)
        return await self.executors.io(lambda: list(packed(records, self.limits)))

    def _drawn(self, row: rows.StoreRow, sample_rate: float) -> list[tuple[int, Record]]:
        slots = [int(s) for s in poisson_draw(row.slots, sample_rate)]
        key = self.keys.open(row)
        found = self.db.read(lambda tx: rows.records_of_slots(tx, row.tenant, row.upload_id, slots))
        return [(r.slot, Record.from_bytes(key.open(r))) for r in found]

    async def _tokens(self, run: Run, row: rows.StoreRow, records: Sequence[tuple[int, Record]]) -> list[Tokens]:
        limit = run.session.max_positions if row.truncate else None
        found: list[Tokens] = []
        for start in range(0, len(records), PAGE):
            page = records[start : start + PAGE]
            texts = [r.text for _, r in page if r.text is not None]
            encoded = iter(await self.executors.compute(_encode, run, texts) if texts else ())
            found += [as_tokens(s, r, next(encoded) if r.text is not None else None, limit) for s, r in page]
        return found

    async def _require_fit(self, run: Run, row: rows.StoreRow, ensure_wanted: Callable[[], None]) -> None:
        """Look at every record once for each shape of run. Erasing only takes away, so the answer stays true."""
        shape = (row.tenant, row.upload_id, run.config.model_ref, run.session.max_positions, run.session.vocab_size)
        if shape in self._fitting:
            return
        key = await self.executors.io(self.keys.open, row)
        misfits = Misfits(run.session.max_positions, run.session.vocab_size, self.limits)

        def page_from(position: int) -> list[tuple[int, int, Record]]:
            page = self.db.read(lambda tx: rows.records_from(tx, row.tenant, row.upload_id, position, PAGE))
            return [(r.position, r.slot, Record.from_bytes(key.open(r))) for r in page]

        position = 0
        while page := await self.executors.io(page_from, position):
            ensure_wanted()
            misfits.look_at(await self._tokens(run, row, [(slot, record) for _, slot, record in page]))
            position = page[-1][0] + 1
        assert run.private is not None
        misfits.refuse(row.dataset_id, shown=run.private.config.diagnostics == "owner")
        self._fitting[shape] = None
        while len(self._fitting) > KNOWN:
            self._fitting.popitem(last=False)


def require_drawable(run: Run, request: Pass) -> PrivateRun:
    """Refuse a draw that would not be one independent Poisson draw of a logical batch.

    Raises:
        InvalidRequestError: saying which part does not fit and what to do.
    """
    private = run.private
    if private is None or not private.drawn_here:
        why = (
            "has no differential privacy"
            if private is None
            else "does not sample by Poisson from a registered dataset"
        )
        raise InvalidRequestError(
            f"this run {why}, so the server draws nothing for it; create it with dp_config=dataset.dp_config()",
            field="dataset",
            constraint="a run with the dataset's dp_config",
        )
    if request.dataset_id != private.scope.dataset_id:
        raise InvalidRequestError(
            f"this run spends the budget of dataset {private.scope.dataset_id}; it cannot be given another one",
            field="dataset",
            constraint=private.scope.dataset_id,
        )
    if not request.train:
        raise InvalidRequestError(
            "a registered dataset is drawn from for training only; evaluate on a batch that you send",
            field="dataset",
            constraint="train mode",
        )
    if run.session.pending_calls:
        raise InvalidRequestError(
            "a batch was drawn since the last optim_step already; a step takes one Poisson draw. Call optim_step, "
            "then draw again",
            field="dataset",
            constraint="one draw per optim_step",
        )
    return private


def _encode(run: Run, texts: Sequence[str]) -> list[list[int]]:
    return [run.session.encode(text) for text in texts]
