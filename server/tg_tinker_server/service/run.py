"""One training run in memory: its session on the model, its lane, and the position up to which it is durable."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from dataclasses import dataclass, field
from datetime import datetime

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.types import DPConfig, TrainingConfig
from tg_tinker.wire.calls import LossPass, Pass
from tg_tinker_server.dp.events import Event, SampledGaussian
from tg_tinker_server.dp.rng import SecureNormal
from tg_tinker_server.engine.backend import Session
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.service.lanes import Lane
from tg_tinker_server.service.lineage import Lineage

ACTIVE, DONE, BROKEN = "active", "completed", "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateRun:
    """What a run with differential privacy carries besides.

    Attributes:
        event: what one step releases, resolved when the run was created; the ledger records this value and
            the noise is drawn from the record.
        accountant: "prv" only for a schedule fixed in advance; "gdp" is no bound and never gates.
        noise: the run's own generator, keyed by the operating system, never saved.
    """

    config: DPConfig
    scope: DatasetScope
    event: Event
    noise_multiplier: float
    accountant: str
    noise: SecureNormal

    @property
    def drawn_here(self) -> bool:
        """Whether the server draws the run's batches, from a registered dataset."""
        return isinstance(self.event, SampledGaussian) and self.event.vouched_by == "server"


@dataclass(eq=False, kw_only=True)
class Run:
    """A run's state. Changed only by operations of its own lane, one at a time.

    Attributes:
        step: optimizer steps done and durable.
        durable_seq: effects of operations up to here survive a restart.
        state_id: the encrypted snapshot to restart from.
        passes: training passes since the last step; with ``step`` it seeds dropout.
        lineage: what its weights owe to other data than its own.
        pending: what the passes since the last step were made of.
        restored: it came from disk, and no step was asked for since: what was seen of its passes before is not known.
        poison: why the pending gradient is incomplete; the next step is refused.
        secret: key of this run's own MACs.
        weights: held while weights are between two settled states, so that nobody samples what is not settled.
    """

    tenant: str
    run_id: str
    config: TrainingConfig
    session: Session
    lane: Lane
    private: PrivateRun | None
    secret: bytes
    created: datetime
    status: str = ACTIVE
    step: int = 0
    durable_seq: int = 0
    state_id: str = ""
    passes: int = 0
    lineage: Lineage = ()
    restored: bool = False
    poison: str | None = None
    pending: type[Pass | LossPass] | None = None
    weights: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    def mac(self, purpose: str, data: bytes) -> bytes:
        """A keyed hash that nobody outside the server can confirm a guess with."""
        return hmac.new(self.secret, purpose.encode() + b"\x00" + data, hashlib.sha256).digest()

    def mac_text(self, purpose: str, data: bytes) -> str:
        """The same, as ``hmac-sha256:<hex>``."""
        return "hmac-sha256:" + self.mac(purpose, data).hex()

    def dropout_seed(self) -> int:
        """Seed of the next pass's dropout: from the run's seed and position, so a replay repeats it."""
        base = self.mac("seed", b"") if self.config.seed is None else str(self.config.seed).encode()
        digest = hashlib.sha256(b"dropout\x00" + base + f"\x00{self.step}\x00{self.passes}".encode()).digest()
        return int.from_bytes(digest[:7], "little")

    def require_active(self) -> None:
        """Refuse training on a run that has ended.

        Raises:
            InvalidRequestError: the run is completed or failed.
        """
        self.require_intact()
        if self.status != ACTIVE:
            raise InvalidRequestError(
                f"training client {self.run_id} is {self.status}; it can be sampled from and saved, not trained",
                field="training_client_id",
                constraint="status active",
            )

    def require_intact(self) -> None:
        """Refuse to show weights that may not be settled.

        Raises:
            ServerError: an earlier operation failed half-way and could not be taken back.
        """
        if self.status == BROKEN:
            raise ServerError(
                f"training client {self.run_id} failed half-way and could not be taken back; restart the server to "
                "go on from its last settled step"
            )

    def drop_pending(self) -> None:
        """Forget gradients that were not stepped."""
        self.session.discard_pending()
        self.passes = 0
        self.pending = None
        self.poison = None
