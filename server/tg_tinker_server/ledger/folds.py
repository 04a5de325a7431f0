"""Folds kept in memory, believed only where the rows of the transaction at hand confirm them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from tg_tinker.ledger import START
from tg_tinker_server.ledger.fold import Fold
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.store import ledger_rows as rows
from tg_tinker_server.store.database import Transaction

KEPT: Final = 4096  # datasets; one fold takes a few KB


class Folds:
    """The newest known fold of each dataset.

    Memory saves work and decides nothing: a commit that failed, another server's entries or a restored database
    change the rows, and the rows win.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[DatasetScope, Fold] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, tx: Transaction, scope: DatasetScope) -> Fold:
        """The fold over every entry that this transaction sees.

        Raises:
            ServerError: an entry cannot be read or the chain is broken.
        """
        last = rows.last_entry(tx, scope.tenant, scope.dataset_id) or (-1, START)
        with self._lock:
            known = self._known.get(scope)
        if known is not None and last == (known.position, known.head):
            return known
        fold = self._from(tx, scope, known)
        with self._lock:
            self._known[scope] = fold
            self._known.move_to_end(scope)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return fold

    def has(self, scope: DatasetScope) -> bool:
        """Whether :meth:`at` starts from something; otherwise it reads every entry, half a minute for a million."""
        with self._lock:
            return scope in self._known

    def _from(self, tx: Transaction, scope: DatasetScope, known: Fold | None) -> Fold:
        """Go on from what is known if its last entry is still there, else from the first entry."""
        if known is not None:
            newer = rows.each_entry_from(tx, scope.tenant, scope.dataset_id, max(known.position, 0))
            last = next(newer, None)
            if last is not None and (last.position, last.entry_hash) == (known.position, known.head):
                return known.extended(newer)
        return Fold().extended(rows.each_entry_from(tx, scope.tenant, scope.dataset_id, 0))
