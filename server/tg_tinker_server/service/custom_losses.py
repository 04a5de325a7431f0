"""Losses that callers made: graphs of allow-listed functions, kept by tenant and found by id."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass

from tg_tinker.errors import InvalidRequestError, RateLimitedError, ResourceNotFoundError
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.service.durability import now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.sealed_text import SealedText
from tg_tinker_server.store import loss_rows
from tg_tinker_server.store.database import Database, Transaction

PURPOSE = "custom-loss"
MAX_GRAPH_BYTES = 1 << 20
MAX_LOSSES = 1000  # of a tenant


@dataclass(frozen=True, slots=True)
class CustomLosses:
    """Keeps and finds them.

    Attributes:
        parse: reads a graph, and raises InvalidRequestError for what is not on the list.
    """

    db: Database
    keyring: TenantKeyring
    texts: SealedText
    executors: Executors
    parse: Callable[[str], object]

    async def create(self, tenant: str, graph_json: str) -> str:
        """Keep a loss and return its id: the same for the same graph.

        Raises:
            InvalidRequestError: it is no graph, or holds a function that is not allowed.
            RateLimitedError: the tenant has too many.
        """
        if len(graph_json) > MAX_GRAPH_BYTES:
            raise InvalidRequestError(
                "the graph of the loss is over 1 MiB", field="graph_json", constraint="at most 1 MiB"
            )
        return await self.executors.io(self._create, tenant, graph_json)

    def _create(self, tenant: str, graph_json: str) -> str:
        self.parse(graph_json)
        key = self.keyring.mac_key(tenant, PURPOSE)
        loss_id = "loss_" + hmac.new(key, graph_json.encode(), hashlib.sha256).hexdigest()[:24]
        sealed = self.texts.seal(tenant, PURPOSE, graph_json, loss_id)

        def write(tx: Transaction) -> None:
            if loss_rows.get_loss(tx, tenant, loss_id) is not None:
                return
            if loss_rows.count_losses(tx, tenant) >= MAX_LOSSES:
                raise RateLimitedError(f"this tenant has {MAX_LOSSES} losses, the limit", retry_after=3600.0)
            loss_rows.insert_loss(tx, tenant, loss_id, sealed, now())

        self.db.write(write)
        return loss_id

    async def graph(self, tenant: str, loss_id: str) -> str:
        """The graph of a tenant's loss, as JSON.

        Raises:
            ResourceNotFoundError: there is none of that id.
        """
        return await self.executors.io(self._graph, tenant, loss_id)

    def _graph(self, tenant: str, loss_id: str) -> str:
        sealed = self.db.read(lambda tx: loss_rows.get_loss(tx, tenant, loss_id))
        if sealed is None:
            raise ResourceNotFoundError(
                "no such loss for this tenant; make it with create_custom_loss",
                resource_type="custom_loss",
                resource_id=loss_id[:100],
            )
        return self.texts.open(tenant, PURPOSE, sealed, loss_id)
