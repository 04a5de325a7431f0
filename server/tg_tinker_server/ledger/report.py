"""The privacy report of a dataset, closed by an entry of its own and signed over the log that ends with it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import rfc8785

from tg_tinker.ledger.history import read_history
from tg_tinker.reports import recompute
from tg_tinker.reports.statement import PAYLOAD_TYPE, statement
from tg_tinker_server.ledger.log import TransparencyLog
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope, Leaf
from tg_tinker_server.store.database import Transaction


@dataclass(frozen=True, slots=True)
class ReportWriter:
    """Writes reports.

    Guarantees: a report covers every entry that the dataset had when its own entry was appended, in the same
    transaction; nothing in it comes from anywhere but those entries, the log and this server's version.
    """

    ledger: PrivacyLedger
    log: TransparencyLog

    def signed(self, scope: DatasetScope) -> bytes:
        """The report as a DSSE envelope, RFC 8785 JSON; see docs/formats/report.md.

        Raises:
            ResourceNotFoundError: there is no such dataset.
        """
        payload = rfc8785.dumps(self.report(scope))
        signer = self.log.signers.signer(scope.tenant)
        return rfc8785.dumps(signer.sign_dsse(PAYLOAD_TYPE, payload))

    def report(self, scope: DatasetScope) -> dict[str, Any]:
        """The report unsigned, as JSON values. May take seconds, for the second accountant."""
        leaves = self.ledger.attest(scope)
        history = read_history(scope.dataset_id, (leaf.entry.body for leaf in leaves))
        return statement(
            history,
            recompute.figures(history),
            time=str(leaves[-1].entry.body["time"]),
            server_version=version("tg-tinker"),
            integrity=self._integrity(scope.tenant, leaves),
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
