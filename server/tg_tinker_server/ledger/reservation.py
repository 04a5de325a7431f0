"""Values of the ledger: whose budget, the proof that a release was paid for, where a budget stands."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

from tg_tinker.ledger import ChainEntry
from tg_tinker_server.dp.events import Event

NEIGHBOURS = "add-or-remove-one"
MINT = object()  # known to the ledger; a reservation without it cannot be made


@dataclass(frozen=True, slots=True)
class DatasetScope:
    """Whose budget: a dataset of a tenant."""

    tenant: str
    dataset_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """An entry of a dataset's chain and its place in the tenant's tree."""

    entry: ChainEntry
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Proof that one release was paid for. Only the ledger makes it; noise is drawn from its ``event``.

    Attributes:
        leaf: the charge as the ledger keeps it.
        epsilon_before, epsilon_after: of the dataset, at ``delta``, by ``accountant``.
        attempt: 1, or more where a crash came between an earlier charge and its settlement.
    """

    scope: DatasetScope
    run_id: str
    seq: int
    attempt: int
    event: Event
    accountant: str
    leaf: Leaf
    epsilon_before: float
    epsilon_after: float
    delta: float
    mint: InitVar[object]  # not kept: a copy with another event cannot be made from a reservation

    def __post_init__(self, mint: object) -> None:
        if mint is not MINT:
            raise TypeError("only the ledger makes reservations")

    @property
    def position(self) -> int:
        """The charge's place in its dataset's chain."""
        return self.leaf.entry.position


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Where a dataset's budget stands."""

    epsilon: float
    delta: float
    target_epsilon: float | None
    head: bytes
    entries: int
    unit: str
