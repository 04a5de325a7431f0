"""The ledger of one dataset as a server handed it out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tg_tinker.errors import InvalidRequestError
from tg_tinker.ledger.chain import START, ChainEntry, LedgerEntry, verify_chain
from tg_tinker.ledger.history import read_history


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyLedger:
    """The whole ledger of one dataset as the server gave it, and what it adds up to.

    Attributes:
        epsilon_spent: of every charge, settled or not, at ``delta``.
        target_epsilon: the budget; inf when there is none.
    """

    dataset_id: str
    entries: tuple[LedgerEntry, ...]
    epsilon_spent: float
    target_epsilon: float
    delta: float

    @classmethod
    def from_lines(
        cls, dataset_id: str, lines: Iterable[str], *, epsilon_spent: float, target_epsilon: float, delta: float
    ) -> PrivacyLedger:
        """Read the entries from their lines, unverified."""
        return cls(
            dataset_id=dataset_id,
            entries=tuple(ChainEntry.from_json(line) for line in lines),
            epsilon_spent=epsilon_spent,
            target_epsilon=target_epsilon,
            delta=delta,
        )

    @classmethod
    def from_file_lines(cls, lines: Iterable[str]) -> PrivacyLedger:
        """Read a ledger that stands alone, unverified; what was spent is what its last charge says.

        Raises:
            InvalidRequestError: a line is no entry, or the first does not open a dataset.
        """
        entries = tuple(ChainEntry.from_json(line) for line in lines if line.strip())
        try:
            first = entries[0].body
            spent = [float(e.body["epsilon_after"]) for e in entries if e.kind == "charge"]
            targets = [float(e.body["target_epsilon"]) for e in entries if e.kind == "raise"]
            return cls(
                dataset_id=str(first["dataset_id"]),
                entries=entries,
                epsilon_spent=spent[-1] if spent else 0.0,
                target_epsilon=[float(first["target_epsilon"]), *targets][-1],
                delta=float(first["target_delta"]),
            )
        except (IndexError, KeyError, TypeError, ValueError) as e:
            raise InvalidRequestError(
                "this is not a ledger: its first entry does not open a dataset, or a charge has no epsilon",
                field="entries",
                constraint="from the first entry on",
                details={"position": 0},
            ) from e

    @property
    def head(self) -> bytes:
        """Hash of the last entry."""
        return self.entries[-1].entry_hash if self.entries else START

    @property
    def charges(self) -> tuple[LedgerEntry, ...]:
        """Every release that was paid for."""
        return tuple(e for e in self.entries if e.kind == "charge")

    def verify(self, *, head: bytes | None = None) -> None:
        """Check the chain, that it is of this dataset, that charges come first, and that they kept the budget.

        Args:
            head: a hash noted earlier, e.g. ``client.privacy.ledger_head``; shows a history that was cut or replaced.

        Raises:
            InvalidRequestError: naming the first position that does not fit.
        """
        verify_chain(self.entries, head=head)
        read_history(self.dataset_id, (entry.body for entry in self.entries))
