"""Text of users at rest: sealed under the tenant's key, so that a copy of the database shows none of it."""

from __future__ import annotations

import base64
from dataclasses import dataclass

from tg_tinker_server.crypto.envelope import TenantKeyring


@dataclass(frozen=True, slots=True)
class SealedText:
    """Seals and opens text columns; ``context`` is the id of the row. Call it off the event loop."""

    keyring: TenantKeyring

    def seal(self, tenant: str, purpose: str, text: str, context: str) -> str:
        """What to store."""
        sealed = self.keyring.seal_value(tenant, purpose, text.encode(), context.encode())
        return base64.b64encode(sealed).decode()

    def open(self, tenant: str, purpose: str, stored: str, context: str) -> str:
        """What was stored, verified."""
        return self.keyring.open_value(tenant, purpose, base64.b64decode(stored), context.encode()).decode()
