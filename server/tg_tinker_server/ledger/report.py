"""The privacy report of a dataset, closed by an entry of its own and signed over the log that ends with it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import rfc8785

from tg_tinker.errors import InvalidRequestError
from tg_tinker.ledger.history import read_history
from tg_tinker.reports import recompute
from tg_tinker.reports.statement import PAYLOAD_TYPE, statement
from tg_tinker.reports.verdicts import MAX_BYTES
from tg_tinker.transparency import merkle
from tg_tinker_server.ledger.log import TransparencyLog
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope, Leaf
from tg_tinker_server.store import log_rows
from tg_tinker_server.store.database import Transaction

_ENTRY = 40  # bytes of a report beside an entry's body
_HASH = 67  # bytes of one hash in it
_REST = 250_000  # its curve, its sentences, its runs and changes as a rule


@dataclass(frozen=True, slots=True)
class ReportWriter:
    """Writes reports.

    Guarantees: a report covers every entry that the dataset had when its own entry was appended, in the same
    transaction; nothing in it comes from anywhere but those entries, the log and this server's version.
    """

    ledger: PrivacyLedger
    log: TransparencyLog
    most_bytes: int = MAX_BYTES

    def signed(self, scope: DatasetScope) -> bytes:
        """The report as a DSSE envelope, RFC 8785 JSON; see docs/formats/report.md.

        Raises:
            ResourceNotFoundError: there is no such dataset.
            InvalidRequestError: the report would be larger than ``most_bytes``, or what it covers is more than a
                reader can check in a minute. Nothing was appended.
        """
        payload = rfc8785.dumps(self.report(scope))
        signer = self.log.signers.signer(scope.tenant)
        return rfc8785.dumps(signer.sign_dsse(PAYLOAD_TYPE, payload))

    def report(self, scope: DatasetScope) -> dict[str, Any]:
        """The report unsigned, as JSON values. May take seconds, for the second accountant."""
        entries, size = self.ledger.weight(scope)
        self._refuse_over(scope, entries, size)
        leaves = self.ledger.leaves(scope)
        # Read before anything is appended: what cannot be reported on must not grow with every attempt.
        history = read_history(scope.dataset_id, (leaf.entry.body for leaf in leaves))
        recompute.refuse_too_many_kinds(history)
        self._refuse_over(scope, entries, size + _HASH * self._hashes(scope.tenant, leaves))
        newest = self.ledger.attest(scope, start=len(leaves))
        history.read_on(leaf.entry.body for leaf in newest)
        leaves += newest
        return statement(
            history,
            recompute.figures(history),
            time=str(leaves[-1].entry.body["time"]),
            server_version=version("tg-tinker"),
            integrity=self._integrity(scope.tenant, leaves),
        )

    def _hashes(self, tenant: str, leaves: list[Leaf]) -> int:
        """How many hashes will stand for the rest of the log, at most."""
        size = self.log.db.read(lambda tx: log_rows.size(tx, tenant))
        return len(merkle.subset_nodes([*(leaf.index for leaf in leaves), size], size + 1))

    def _refuse_over(self, scope: DatasetScope, entries: int, size: int) -> None:
        """Refuse a report over the limit; ``size``: of the entries' bodies and hashes, in bytes."""
        whole = 4 * (size + _ENTRY * entries + _REST) // 3  # base64
        if whole > self.most_bytes:
            raise InvalidRequestError(
                f"the report on dataset {scope.dataset_id} would have about {whole / 2**20:.3g} MiB for {entries:,} "
                f"entries, over the {self.most_bytes / 2**20:.3g} MiB of one answer. It can still be trained "
                "on; for a report, begin a new dataset before a ledger grows so long",
                field="dataset_id",
                constraint=f"a report of at most {self.most_bytes} bytes",
            )

    def _integrity(self, tenant: str, leaves: list[Leaf]) -> dict[str, Any]:
        """What shows that these entries are in the tenant's log, and that the last of them ends it."""
        indexes = [leaf.index for leaf in leaves]

        def read(tx: Transaction) -> dict[str, Any]:
            size = indexes[-1] + 1
            checkpoint = self.log.checkpoint(tx, tenant, size)
            return {
                "origin": self.log.signers.signer(tenant).origin,
                "verifier_key": checkpoint.verifier_key,
                "checkpoint": checkpoint.note,
                "proof": [h.hex() for h in self.log.subset(tx, tenant, indexes, size)],
                "entries": [{"body": dict(leaf.entry.body), "leaf_index": leaf.index} for leaf in leaves],
            }

        return self.log.db.read(read)
