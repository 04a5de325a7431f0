"""Takes in what another server exported: verified against a signer that the caller names, sealed as ours.

It keeps where it came from. What its weights cost the people in its training data was paid there, and is carried
along: into runs that start from it, and into exports of what they become.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeVar

from pydantic import ValidationError

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError, TGTinkerError
from tg_tinker.exports.errors import refused
from tg_tinker.exports.manifest import PEFT, Manifest
from tg_tinker.exports.reader import ExportReader
from tg_tinker.reports.exported import check_export
from tg_tinker.reports.verdicts import Trust
from tg_tinker.transparency.note import VerifierKey
from tg_tinker.types import LoRAConfig
from tg_tinker_server.artifacts.tensors import FormatError
from tg_tinker_server.artifacts.vault import SealedArtifact, Vault
from tg_tinker_server.artifacts.weights import put_weights
from tg_tinker_server.crypto.signing import TenantSigner
from tg_tinker_server.ledger.audit import AuditLog, AuditRecord
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.checkpoints import NAME
from tg_tinker_server.service.durability import CHECKPOINT, new_id, now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.lineage import IMPORTED
from tg_tinker_server.service.sealed_text import SealedText
from tg_tinker_server.store import artifact_rows
from tg_tinker_server.store.database import Database

OPERATION = "import_artifact"
PATIENCE_S = 60.0
MOST_AT_ONCE = 4
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ImportService:
    """Imports of exports."""

    db: Database
    vault: Vault
    ledger: PrivacyLedger
    signers: TenantSigner
    audit: AuditLog
    executors: Executors
    texts: SealedText
    places: asyncio.Semaphore

    async def take(
        self, caller: Caller, signer: str, data: AsyncIterator[bytes]
    ) -> tuple[artifact_rows.ArtifactRow, Manifest]:
        """Verify the archive of an export while it comes, and keep it as a checkpoint of the caller's tenant.

        Weights stream through; nothing but one piece is held. What fails leaves nothing behind.

        Raises:
            LogVerificationError: not signed by ``signer``, or altered.
            InvalidRequestError: not an export, or not one that this version knows.
        """
        key = VerifierKey.parse(signer)
        started, artifact_id = now(), new_id("ckpt")
        loop = asyncio.get_running_loop()
        async with self.places:
            try:
                sealed, manifest = await asyncio.to_thread(
                    self._seal, caller.tenant, artifact_id, key, _from_loop(loop, data)
                )
            except TGTinkerError as e:
                await self._note(caller, (), key.name, started, error=e.code)
                raise
        row = artifact_rows.ArtifactRow(
            tenant=caller.tenant,
            artifact_id=artifact_id,
            run_id=IMPORTED,
            kind=CHECKPOINT,
            step=int(manifest.predicate["artifact"]["step"]),
            size_bytes=sealed.size_bytes,
            content_hash=sealed.content_hash,
            algorithm=sealed.algorithm,
            key_id=sealed.key_id,
            name=await self.executors.io(self.texts.seal, caller.tenant, NAME, "", artifact_id),
            created=now(),
        )
        await self.executors.io(self.db.write, lambda tx: artifact_rows.insert_artifact(tx, row))
        await self._note(caller, (artifact_id,), key.name, started, manifest=manifest)
        return replace(row, name=""), manifest

    def _seal(
        self, tenant: str, artifact_id: str, key: VerifierKey, pieces: Iterator[bytes]
    ) -> tuple[SealedArtifact, Manifest]:
        reader = ExportReader(pieces, key)
        for _ in check_export(reader, Trust(keys=[key])):
            pass
        state, modules = self._state(tenant, reader)
        try:
            plaintext = put_weights(reader.weights(), reader.weights_bytes, state, modules)
            sealed = self.vault.seal_plain(
                tenant=tenant, artifact_id=artifact_id, kind=CHECKPOINT, plaintext=plaintext
            )
        except FormatError as e:
            raise refused("its weights are not a safetensors file as a TG-Tinker server writes it") from e
        return sealed, reader.manifest

    def _state(self, tenant: str, reader: ExportReader) -> tuple[dict[str, Any], list[str]]:
        """The state of the checkpoint to be, and ``modules_to_save`` of its adapter."""
        claims = reader.manifest.predicate
        lora = _lora(claims["lora_config"], adapter=claims["layout"] == PEFT)
        try:
            saved = datetime.fromisoformat(claims["artifact"]["saved"])
        except ValueError as e:
            raise refused("its manifest does not say when it was saved") from e
        if claims["artifact"]["step"] < 0 or saved.tzinfo is None:
            raise refused("its manifest does not say when it was saved, or after how many steps")
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

    async def _note(
        self,
        caller: Caller,
        artifact_ids: tuple[str, ...],
        origin: str,
        started: datetime,
        *,
        manifest: Manifest | None = None,
        error: str = "",
    ) -> None:
        facts = {"origin": origin}
        if manifest is not None:
            privacy = manifest.predicate["privacy"] or {"epsilon": "inf"}
            facts |= {k: privacy[k] for k in ("dataset_id", "epsilon", "delta") if k in privacy}
        record = AuditRecord(
            operation=OPERATION,
            run_id=IMPORTED,
            request_hash="",
            request_bytes=0,
            artifact_ids=artifact_ids,
            started=started,
            completed=now(),
            success=not error,
            error_code=error,
            dp_metrics=None,
            actor=caller.key_id,
            facts=facts,
        )
        await self.executors.io(self.audit.append(caller.tenant, record).result)


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


def _from_loop(loop: asyncio.AbstractEventLoop, data: AsyncIterator[bytes]) -> Iterator[bytes]:
    """What arrives on the loop, for a thread to read piece by piece."""

    def wait(coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            return future.result(PATIENCE_S)
        except TimeoutError:
            future.cancel()
            raise InvalidRequestError(
                f"no more of the export came for {PATIENCE_S:.0f} s; send it again",
                field="data",
                constraint="without long pauses",
            ) from None

    async def following() -> bytes | None:
        return await anext(data, None)

    while (piece := wait(following())) is not None:
        if piece:
            yield piece
