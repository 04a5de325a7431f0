"""Addresses of checkpoints: ``tg://<run>/<purpose>/<name>``, ``tinker://<model>/<purpose>/<name>``, or the id."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.wire.runs import config_from_json
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.sealed_text import SealedText
from tg_tinker_server.store import artifact_rows, run_rows
from tg_tinker_server.store.artifact_rows import ArtifactRow
from tg_tinker_server.store.database import Database, Transaction

PURPOSES: Final = ("weights", "sampler_weights", "external_weights")
TINKER_RUN: Final = "tinker/"
"""Begins the request id of a run made over the Tinker protocol; the model id follows."""
CONFIG: Final = "run-config"
NAME: Final = "artifact-name"
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_PATH: Final = re.compile(r"(tg|tinker)://([^/]{1,200})/([a-z_]+)/([^/]{1,128})")


def not_found(artifact_id: str) -> ResourceNotFoundError:
    """The one answer for a missing artifact, an expired one, another tenant's and another policy's."""
    return ResourceNotFoundError(
        "no such artifact for this tenant", resource_type="artifact", resource_id=artifact_id[:300]
    )


def is_path(text: str) -> bool:
    """Whether a text is an address rather than an id."""
    return "://" in text


def check_name(name: str) -> None:
    """Refuse what cannot be part of an address.

    Raises:
        InvalidRequestError: it cannot.
    """
    if name and (_NAME.fullmatch(name) is None or name in (".", "..")):
        raise InvalidRequestError(
            "the name of a checkpoint has 1 to 128 characters of A-Z, a-z, 0-9, '.', '_' and '-', and is not '.' or "
            "'..'",
            field="name",
            constraint="[A-Za-z0-9._-]{1,128}",
        )


def path_of(row: ArtifactRow, name: str) -> str:
    """The address of a checkpoint, its name being known."""
    return f"tg://{row.run_id}/{row.purpose}/{name or row.artifact_id}"


@dataclass(frozen=True, slots=True)
class Paths:
    """Finds checkpoints by address or id, of those that a caller may see. Call it off the event loop."""

    db: Database
    keyring: TenantKeyring
    texts: SealedText
    clock: Callable[[], datetime]

    def resolve(self, caller: Caller, path_or_id: str) -> ArtifactRow:
        """The row of a checkpoint.

        Raises:
            ResourceNotFoundError: there is none for this caller.
        """
        row = self.db.read(lambda tx: self._find(tx, caller.tenant, path_or_id))
        if row is None or not self.live(row) or not self.visible(caller, row):
            raise not_found(path_or_id)
        return row

    def live(self, row: ArtifactRow) -> bool:
        """Whether it is neither deleted nor expired."""
        return row.deleted is None and (row.expires is None or row.expires > self.clock())

    def visible(self, caller: Caller, row: ArtifactRow) -> bool:
        """Whether a checkpoint exists for the caller: a policy admits those of runs that it would admit."""
        if caller.policy is None:
            return True
        run = self.db.read(lambda tx: run_rows.get_run_of_any_status(tx, row.tenant, row.run_id))
        if run is None or run.dataset_id != caller.policy.dataset_id:
            return False
        return caller.policy.admits(
            config_from_json(self.texts.open(run.tenant, CONFIG, run.config_json, run.run_id))
        )

    def name_mac(self, tenant: str, run_id: str, purpose: str, name: str) -> bytes:
        """What stands for a name in the index of names; nobody can confirm a guess with it."""
        key = self.keyring.mac_key(tenant, NAME)
        return hmac.new(key, f"{run_id}\x00{purpose}\x00{name}".encode(), hashlib.sha256).digest()

    def _find(self, tx: Transaction, tenant: str, text: str) -> ArtifactRow | None:
        if not is_path(text):
            return artifact_rows.get_artifact(tx, tenant, text)
        parts = _PATH.fullmatch(text)
        if parts is None or parts[3] not in PURPOSES:
            return None
        scheme, run_id, purpose, name = parts.groups()
        if scheme == "tinker":
            run = run_rows.find_run_by_request(tx, tenant, TINKER_RUN + run_id)
            if run is None:
                return None
            run_id = run.run_id
        named = artifact_rows.find_named(tx, tenant, run_id, purpose, self.name_mac(tenant, run_id, purpose, name))
        if named is not None:
            return named
        row = artifact_rows.get_artifact(tx, tenant, name)
        return row if row is not None and (row.run_id, row.purpose) == (run_id, purpose) else None
