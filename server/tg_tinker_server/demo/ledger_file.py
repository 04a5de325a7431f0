"""The ledger as a file, and what follows from that file alone: a whole chain, and epsilon by two accountants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tg_tinker.errors import InvalidRequestError
from tg_tinker.ledger import PrivacyLedger
from tg_tinker_server.dp.accounting import add, cost, epsilon, pld_epsilon, zero
from tg_tinker_server.dp.events import SampledGaussian, event_from_json


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerFacts:
    """What a verified ledger says.

    Attributes:
        head: hash of the last entry, hex.
        epsilon: recomputed from the entries of the file, and equal to what the server says.
        pld_epsilon: of the same events by a second, independent accountant.
        file: the file that was verified.
    """

    entries: int
    charges: int
    head: str
    epsilon: float
    pld_epsilon: float
    target_epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    vouched_by: str
    accountant: str
    file: str


def write_ledger(ledger: PrivacyLedger, path: Path) -> None:
    """One entry a line, as `tg-tinker ledger verify` reads it."""
    path.write_text("".join(entry.to_json() + "\n" for entry in ledger.entries), encoding="utf-8")


def check_ledger(path: Path, said: PrivacyLedger) -> LedgerFacts:
    """Verify the file offline, and recompute epsilon from it.

    Raises:
        InvalidRequestError: the chain is broken, its events are not the demo's, or they do not add up to what
            the server ``said``.
    """
    read = PrivacyLedger.from_lines(
        said.dataset_id,
        path.read_text(encoding="utf-8").splitlines(),
        epsilon_spent=said.epsilon_spent,
        target_epsilon=said.target_epsilon,
        delta=said.delta,
    )
    read.verify()
    events = [event_from_json(charge.body["event"]) for charge in read.charges]
    total = zero()
    for event in events:
        total = add(total, cost(event))
    recomputed = epsilon(total, read.delta)
    if abs(recomputed - said.epsilon_spent) > 1e-9:
        raise InvalidRequestError(
            f"the entries in {path} add up to epsilon {recomputed}, the server says {said.epsilon_spent}",
            field="epsilon_spent",
            constraint="what the entries add up to",
        )
    first = events[0] if events else None
    if not isinstance(first, SampledGaussian):
        raise InvalidRequestError(
            f"{path} holds no sampled Gaussian release; it is not a ledger of this demo",
            field="event",
            constraint="sampled_gaussian",
        )
    return LedgerFacts(
        entries=len(read.entries),
        charges=len(events),
        head=read.head.hex(),
        epsilon=recomputed,
        pld_epsilon=pld_epsilon(events, read.delta),
        target_epsilon=read.target_epsilon,
        delta=read.delta,
        noise_multiplier=first.noise_multiplier,
        sample_rate=first.sample_rate,
        vouched_by=first.vouched_by,
        accountant=str(read.charges[0].body["accountant"]),
        file=str(path),
    )
