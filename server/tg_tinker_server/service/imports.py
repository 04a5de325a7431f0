"""Takes in what another server exported: verified against a signer that the caller names, sealed as ours.

It keeps where it came from. What its weights cost the people in its training data was paid there, and is carried
along: into runs that start from it, and into exports of what they become.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.exports.errors import refused
from tg_tinker.exports.manifest import ORIGIN, PEFT, Manifest
from tg_tinker.exports.reader import ExportReader
from tg_tinker.exports.tar import LARGEST_BYTES, REPORT, REPORT_PAGE
from tg_tinker.reports.exported import check_export, refuse_bulk
from tg_tinker.reports.verdicts import Trust
from tg_tinker.transparency.note import VerifierKey
from tg_tinker.types import LoRAConfig
from tg_tinker_server.artifacts.tensors import Bytes, FormatError
from tg_tinker_server.artifacts.weights import put_weights
from tg_tinker_server.crypto.signing import TenantSigner
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.intake import Intake, Opened
from tg_tinker_server.service.lineage import IMPORTED
from tg_tinker_server.store import artifact_rows

OPERATION = "import_artifact"
LARGEST = {**LARGEST_BYTES, REPORT: 24 * 2**20, REPORT_PAGE: 8 * 2**20}
"""Bytes of files that are held in memory; what a server writes of 20,000 steps fits."""


@dataclass(frozen=True, slots=True)
class ImportService:
    """Imports of exports."""

    ledger: PrivacyLedger
    signers: TenantSigner
    intake: Intake

    async def take(
        self, caller: Caller, signer: str, data: AsyncIterator[bytes]
    ) -> tuple[artifact_rows.ArtifactRow, Manifest]:
        """Verify the archive of an export while it comes, and keep it as a checkpoint of the caller's tenant.

        Weights stream through; of the rest no more than `LARGEST` is held.

        Raises:
            LogVerificationError: not signed by ``signer``, or altered.
            InvalidRequestError: not an export, not one that this version knows, or it comes too slowly.
        """
        key = VerifierKey.parse(signer)
        if ORIGIN.fullmatch(key.name) is None:  # it will stand in the audit log, which takes no free text
            raise InvalidRequestError(
                "the signer's key is not named after a log of TG-Tinker", field="signer", constraint="tg-tinker/..."
            )

        def opening(_: str, pieces: Iterator[bytes]) -> Opened[Manifest]:
            return self._open(caller.tenant, key, pieces)

        return await self.intake.take(
            caller, data, opening, operation=OPERATION, what="export", facts={"origin": key.name}
        )

    def _open(self, tenant: str, key: VerifierKey, pieces: Iterator[bytes]) -> Opened[Manifest]:
        reader = ExportReader(pieces, key, largest_bytes=LARGEST)
        refuse_bulk(reader)
        for _ in check_export(reader, Trust(keys=[key])):
            pass
        state, modules = self._state(tenant, reader)

        def plaintext() -> Iterator[Bytes]:
            try:
                yield from put_weights(reader.weights(), reader.weights_bytes, state, modules)
            except FormatError as e:
                raise refused("its weights are not a safetensors file as a TG-Tinker server writes it") from e

        privacy = reader.manifest.predicate["privacy"] or {"epsilon": "inf"}
        return Opened(
            plaintext=plaintext(),
            step=int(reader.manifest.predicate["artifact"]["step"]),
            facts={k: privacy[k] for k in ("dataset_id", "epsilon", "delta") if k in privacy},
            about=reader.manifest,
        )

    def _state(self, tenant: str, reader: ExportReader) -> tuple[dict[str, Any], list[str]]:
        """The state of the checkpoint to be, and ``modules_to_save`` of its adapter."""
        claims = reader.manifest.predicate
        lora = _lora(claims["lora_config"], adapter=claims["layout"] == PEFT)
        try:
            saved = datetime.fromisoformat(claims["artifact"]["saved"])
        except ValueError as e:
            raise refused("its manifest does not say when it was saved") from e
        if saved.tzinfo is None:
            raise refused("its manifest does not say when it was saved")
        here = {
            "artifact": claims["artifact"]["id"],
            "base_model": claims["base_model"],
            "manifest": f"sha256:{reader.manifest_digest}",
            "origin": claims["origin"],
            "privacy": claims["privacy"],
        }
        known = self._is_ours(tenant, claims)
        state = {
            "engine": {"model": claims["base_model"], "optimizer": None},
            "step": claims["artifact"]["step"],
            "run_id": IMPORTED,
            "config": {"model_ref": claims["base_model"], "lora_config": lora},
            "metadata": {},
            "optimizer": False,
            "saved": saved.isoformat(),
            "ledger": claims["privacy"],
            # What our own ledger holds already is not a promise of somebody else.
            "provenance": claims["provenance"] + ([] if known else [here]),
        }
        return state, [] if lora is None else list(lora["modules_to_save"])

    def _is_ours(self, tenant: str, claims: Mapping[str, Any]) -> bool:
        """Whether this tenant's own ledger holds the head that the export names."""
        privacy = claims["privacy"]
        if privacy is None or claims["origin"] != self.signers.signer(tenant).origin:
            return False
        try:
            entries = self.ledger.entries(DatasetScope(tenant=tenant, dataset_id=privacy["dataset_id"]))
        except ResourceNotFoundError:
            return False
        at = privacy["entries"] - 1
        return bool(0 <= at < len(entries) and entries[at].entry_hash.hex() == privacy["head"])


def _lora(claim: Any, *, adapter: bool) -> dict[str, Any] | None:
    if claim is None:
        if adapter:
            raise refused("it holds an adapter and does not describe it")
        return None
    try:
        values = {**claim, "alpha": float(claim["alpha"]), "dropout": float(claim["dropout"])}
        config: dict[str, Any] = json.loads(LoRAConfig.model_validate(values).model_dump_json())
    except (KeyError, TypeError, ValueError, ValidationError) as e:
        raise refused("its adapter is described in an unknown form") from e
    return config
