"""Data and its budget: registered datasets, ledgers, reports, audit records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from tg_tinker import datasets
from tg_tinker._service.connection import Connection
from tg_tinker.datasets import Dataset
from tg_tinker.ledger import PrivacyLedger
from tg_tinker.types import AuditLogEntry
from tg_tinker.types.federation import check_note
from tg_tinker.types.records import Budget
from tg_tinker.wire import federation, requests
from tg_tinker.wire.privacy import audit_from_lines, ledger_from_proto, report_of


class Data(Connection):
    """What was spent stays spent, whoever asks."""

    def create_dataset(
        self,
        dataset_id: str,
        records: Sequence[str | Mapping[str, Any]],
        *,
        unit_ids: Sequence[str] | None = None,
        privacy_unit: str = "datum",
        target_epsilon: float | None = 8.0,
        target_delta: float | None = None,
        truncate: bool = False,
    ) -> Dataset:
        """Register records: the server keeps them encrypted, draws batches from them, and guards their budget.

        Args:
            dataset_id: a name that was never used; its budget is set here, once.
            records: texts, or dicts of token lists {input_ids, labels, attention_mask}.
            unit_ids: whose each record is, for privacy units larger than a record. They stay in this process.
            target_epsilon: the promise for all runs together; ``None``: no limit.
            target_delta: default 1 / (2 * units), rounded down to one digit.
            truncate: cut records that are longer than a run allows; otherwise such a run is refused.

        Raises:
            InvalidRequestError: the name was used before, or a record cannot be. Nothing is left of the upload.
        """
        self._handshake()
        return datasets.create(
            self._transport,
            dataset_id,
            records,
            unit_ids=unit_ids,
            privacy_unit=privacy_unit,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            truncate=truncate,
        )

    def get_dataset(self, dataset_id: str) -> Dataset:
        """A handle on a registered dataset."""
        return Dataset(self._transport, datasets.get(self._transport, dataset_id))

    def list_datasets(self, limit: int = 100) -> list[Dataset]:
        """The newest registered datasets of the tenant."""
        return datasets.listed(self._transport, limit)

    def delete_dataset(self, dataset_id: str) -> None:
        """Erase every record for good. The ledger and what was spent stay, and the name is never free again."""
        datasets.delete(self._transport, dataset_id)

    def raise_budget(self, dataset_id: str, target_epsilon: float, reason: str) -> Budget:
        """Raise the target of a dataset, registered or not. Needs a key with the role budget_officer.

        Args:
            reason: one line; stands in the ledger beside the id of the key, so name nobody.

        Raises:
            InvalidRequestError: not larger than the target in force.
        """
        return datasets.raise_budget(self._transport, dataset_id, target_epsilon, reason)

    # Privacy and audit.

    def get_privacy_ledger(self, dataset_id: str) -> PrivacyLedger:
        """The whole ledger of a dataset; ``verify()`` checks it without trusting the server.

        Raises:
            LogVerificationError: the log does not continue what was seen of it: the ledger may be an old one.
        """
        self._handshake()
        return ledger_from_proto(self._transport.call(requests.ledger(dataset_id)))

    def get_privacy_report(self, dataset_or_run: str) -> dict[str, Any]:
        """The report on a dataset, or on that of a run: guarantee, curve, coverage, mechanism, accounting, integrity.

        As the server sent it; ``get_signed_report`` is what others can check. A report adds an entry to the ledger.
        """
        return report_of(self.get_signed_report(dataset_or_run))

    def get_signed_report(self, dataset_or_run: str) -> bytes:
        """The report in its signed envelope, to hand out: ``tg-tinker audit verify`` checks it offline.

        Raises:
            LogVerificationError: the server's log does not continue what was seen of it: the report may leave out
                what was spent.
        """
        self._handshake()
        return str(self._transport.call(requests.report(dataset_or_run)).report_json).encode()

    def attach_audit(self, dataset_id: str, result: Mapping[str, Any]) -> None:
        """Note in a dataset's ledger what ``tg-tinker audit run --out FILE`` found, so that its reports say it.

        Raises:
            InvalidRequestError: ``result`` is not such a document.
        """
        self._transport.call(requests.attach_audit(dataset_id, result))

    def get_audit_logs(
        self,
        training_client_id: str | None = None,
        operation: str | None = None,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        limit: int = 100,
    ) -> list[AuditLogEntry]:
        """The newest audit records that fit, oldest of them first. Times are timezone-aware."""
        request = requests.audit_log(training_client_id, operation, start_time, end_time, limit)
        return audit_from_lines(self._transport.call(request).entries_json)

    def check_log(self) -> int:
        """Verify that the server's transparency log continues what was seen of it; the number of its entries.

        Done by itself whenever a run is created or taken up, before a ledger or a report is fetched, after every
        restart of the server, and with every paid step.

        Raises:
            LogVerificationError: it was rolled back or forked, or another log answers.
        """
        return self._guarded(self._handshake().tenant_id).known_size

    def note_federation(self, event: str, *, job: str, reason: str = "", round: int = 0) -> None:
        """Note in the audit log what became of a federated job or of a round of it, as ``federation.<event>``.

        Args:
            event: one of ``tg_tinker.types.federation.EVENTS``.
            job: digest of the job, hex.
            reason: of a refusal or a failure, one of those of ``FederationRefusedError``.
            round: 0 outside of rounds.

        Raises:
            InvalidRequestError: a value that is not of the lists: the log takes no free text.
        """
        check_note(event, job, round, reason)
        self._transport.call(federation.note(event, job, round, reason))
