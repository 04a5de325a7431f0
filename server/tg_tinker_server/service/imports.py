"""Takes in what another server exported: verified against a signer that the caller names, sealed as ours.

It keeps where it came from. What its weights cost the people in its training data was paid there, and is carried
along: into runs that start from it, and into exports of what they become.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from tg_tinker.errors import FutureCancelledError, InvalidRequestError, ResourceNotFoundError, TGTinkerError
from tg_tinker.exports.errors import refused
from tg_tinker.exports.manifest import ORIGIN, PEFT, Manifest
from tg_tinker.exports.reader import ExportReader
from tg_tinker.exports.tar import LARGEST_BYTES, REPORT, REPORT_PAGE
from tg_tinker.reports.exported import check_export, refuse_bulk
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
from tg_tinker_server.store.database import Database, Transaction

OPERATION = "import_artifact"
PATIENCE_S = 60.0
SLOWEST_BYTES_PER_S = 128 * 1024
LARGEST = {**LARGEST_BYTES, REPORT: 24 * 2**20, REPORT_PAGE: 8 * 2**20}
"""Bytes of files that are held in memory; what a server writes of 20,000 steps fits."""
MOST_PER_TENANT = 2


class ImportPlaces:
    """How many imports each tenant may have under way; nobody waits for another tenant's."""

    def __init__(self) -> None:
        self._places: dict[str, asyncio.Semaphore] = {}

    def of(self, tenant: str) -> asyncio.Semaphore:
        """The places of one tenant."""
        return self._places.setdefault(tenant, asyncio.Semaphore(MOST_PER_TENANT))


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
    places: ImportPlaces

    async def take(
        self, caller: Caller, signer: str, data: AsyncIterator[bytes]
    ) -> tuple[artifact_rows.ArtifactRow, Manifest]:
        """Verify the archive of an export while it comes, and keep it as a checkpoint of the caller's tenant.

        Weights stream through; of the rest no more than `LARGEST` is held. What fails, or is given up by its
        caller, is noted and leaves nothing behind; what is kept and its record are there together or not at all.

        Raises:
            LogVerificationError: not signed by ``signer``, or altered.
            InvalidRequestError: not an export, not one that this version knows, or it comes too slowly.
        """
        key = VerifierKey.parse(signer)
        if ORIGIN.fullmatch(key.name) is None:  # it will stand in the audit log, which takes no free text
            raise InvalidRequestError(
                "the signer's key is not named after a log of TG-Tinker", field="signer", constraint="tg-tinker/..."
            )
        place, given_up = self.places.of(caller.tenant), threading.Event()
        await place.acquire()
        pieces = _from_loop(asyncio.get_running_loop(), data)
        work = self.executors.upload(self._take, caller, key, pieces, given_up)

        def ended(done: asyncio.Future[Any]) -> None:
            place.release()
            if not done.cancelled():
                done.exception()  # was looked at, also where nobody waits any more

        work.add_done_callback(ended)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            given_up.set()  # the thread sees it, at the latest before it would keep anything
            raise

    def _take(
        self, caller: Caller, key: VerifierKey, pieces: Iterator[bytes], given_up: threading.Event
    ) -> tuple[artifact_rows.ArtifactRow, Manifest]:
        """All of an import, in one thread: whatever becomes of the call, this comes to an end of its own."""
        started, artifact_id = now(), new_id("ckpt")
        try:
            sealed, manifest = self._seal(caller.tenant, artifact_id, key, pieces)
            try:
                row = self._row(caller.tenant, sealed, manifest)
                if given_up.is_set():
                    raise FutureCancelledError("the import was given up by its caller; nothing of it was kept")
            except BaseException:
                self.vault.delete(tenant=caller.tenant, artifact_id=artifact_id)
                raise
        except TGTinkerError as e:
            record = _record(caller, (), key.name, started, error=e.code)
            self.audit.append(caller.tenant, record).result()
            raise
        record = _record(caller, (artifact_id,), key.name, started, manifest=manifest)

        def write(tx: Transaction) -> None:
            artifact_rows.insert_artifact(tx, row)
            self.audit.insert(tx, caller.tenant, record)

        # A write that failed may still be on disk: then its ciphertext is needed. If not, the next start deletes it.
        self.db.write(write)
        return replace(row, name=""), manifest

    def _row(self, tenant: str, sealed: SealedArtifact, manifest: Manifest) -> artifact_rows.ArtifactRow:
        return artifact_rows.ArtifactRow(
            tenant=tenant,
            artifact_id=sealed.artifact_id,
            run_id=IMPORTED,
            kind=CHECKPOINT,
            step=int(manifest.predicate["artifact"]["step"]),
            size_bytes=sealed.size_bytes,
            content_hash=sealed.content_hash,
            algorithm=sealed.algorithm,
            key_id=sealed.key_id,
            name=self.texts.seal(tenant, NAME, "", sealed.artifact_id),
            created=now(),
        )

    def _seal(
        self, tenant: str, artifact_id: str, key: VerifierKey, pieces: Iterator[bytes]
    ) -> tuple[SealedArtifact, Manifest]:
        reader = ExportReader(pieces, key, largest_bytes=LARGEST)
        refuse_bulk(reader)
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


def _record(
    caller: Caller,
    artifact_ids: tuple[str, ...],
    origin: str,
    started: datetime,
    *,
    manifest: Manifest | None = None,
    error: str = "",
) -> AuditRecord:
    facts = {"origin": origin}
    if manifest is not None:
        privacy = manifest.predicate["privacy"] or {"epsilon": "inf"}
        facts |= {k: privacy[k] for k in ("dataset_id", "epsilon", "delta") if k in privacy}
    return AuditRecord(
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
    """What arrives on the loop, for a thread to read piece by piece.

    Raises:
        InvalidRequestError: it was waited for longer than what came allows: `PATIENCE_S`, and a second for each
            `SLOWEST_BYTES_PER_S`.
        FutureCancelledError: the caller is gone.
    """
    waited_s, received = 0.0, 0

    async def following() -> bytes | None:
        return await anext(data, None)

    while True:
        left_s = min(PATIENCE_S, PATIENCE_S + received / SLOWEST_BYTES_PER_S - waited_s)
        future, began_s = asyncio.run_coroutine_threadsafe(following(), loop), time.monotonic()
        try:
            piece = future.result(max(0.0, left_s))
        except TimeoutError:
            future.cancel()
            raise InvalidRequestError(
                f"the export comes too slowly: {received:,} bytes after {waited_s + left_s:.0f} s; send it again "
                "over a faster connection",
                field="data",
                constraint=f"at least {SLOWEST_BYTES_PER_S} bytes a second, pauses of at most {PATIENCE_S:.0f} s",
            ) from None
        except CancelledError:
            raise FutureCancelledError("the import was given up by its caller; nothing of it was kept") from None
        waited_s += time.monotonic() - began_s
        if piece is None:
            return
        received += len(piece)
        if piece:
            yield piece
