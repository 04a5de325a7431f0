"""save_state, load_state, and the artifacts that come of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from tg_tinker.errors import DPUnsupportedError, InvalidRequestError, ResourceNotFoundError
from tg_tinker.exports.manifest import is_attested
from tg_tinker.types import EncryptionInfo, LoadStateResult, SavedState
from tg_tinker.wire.runs import config_to_json
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.engine.backend import EngineState
from tg_tinker_server.engine.state import checkpoint_of
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.service.durability import CHECKPOINT, Durability, new_id, now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.lanes import Operation
from tg_tinker_server.service.lineage import (
    Lineage,
    has_finite_epsilon,
    lineage_after,
    refuse_one_name_for_two_datasets,
)
from tg_tinker_server.service.run import ACTIVE, DONE, Run
from tg_tinker_server.service.sealed_text import SealedText
from tg_tinker_server.store import artifact_rows
from tg_tinker_server.store.database import Database, Transaction

NAME = "artifact-name"
MAX_METADATA_BYTES = 1 << 20


def not_found(artifact_id: str) -> ResourceNotFoundError:
    """The one answer for a missing artifact and for another tenant's."""
    return ResourceNotFoundError(
        "no such artifact for this tenant", resource_type="artifact", resource_id=artifact_id
    )


@dataclass(frozen=True, slots=True)
class CheckpointService:
    """Encrypted checkpoints of runs."""

    db: Database
    vault: Vault
    ledger: PrivacyLedger
    durability: Durability
    executors: Executors
    texts: SealedText

    async def save(
        self,
        run: Run,
        operation: Operation,
        *,
        include_optimizer: bool,
        metadata: Mapping[str, Any],
        name: str,
    ) -> SavedState:
        """Write trainable weights, step, configuration, metadata and the ledger's head, encrypted.

        Pending gradients and the state of the noise generator are never part of it.
        """
        run.require_intact()
        operation.commit()  # from here on a cancellation comes too late: the checkpoint will exist
        if len(json.dumps(metadata)) > MAX_METADATA_BYTES:
            raise InvalidRequestError(
                "metadata is over 1 MiB; keep large things elsewhere",
                field="metadata",
                constraint="<= 1 MiB of JSON",
            )
        engine = checkpoint_of(await self.executors.compute(run.session.export_state, optimizer=include_optimizer))
        artifact_id, when = new_id("ckpt"), now()
        head = await self._ledger_head(run)
        sealed = await self.executors.io(
            self.vault.seal,
            tenant=run.tenant,
            artifact_id=artifact_id,
            kind=CHECKPOINT,
            tensors=engine.tensors,
            state={
                "engine": engine.scalars,
                "step": run.step,
                "run_id": run.run_id,
                "config": json.loads(config_to_json(run.config)),
                "metadata": dict(metadata),
                "optimizer": include_optimizer,
                "saved": when.isoformat(),
                "ledger": head,
                "provenance": list(run.lineage),
            },
        )
        result = SavedState(
            artifact_id=artifact_id,
            size_bytes=sealed.size_bytes,
            encryption=EncryptionInfo(algorithm=sealed.algorithm, key_id=sealed.key_id),
            metadata=dict(metadata),
            timestamp=when,
            path=f"tg://{run.run_id}/{name or artifact_id}",
            content_hash=sealed.content_hash,
        )
        row = artifact_rows.ArtifactRow(
            tenant=run.tenant,
            artifact_id=artifact_id,
            run_id=run.run_id,
            kind=CHECKPOINT,
            step=run.step,
            size_bytes=sealed.size_bytes,
            content_hash=sealed.content_hash,
            algorithm=sealed.algorithm,
            key_id=sealed.key_id,
            name=await self.executors.io(self.texts.seal, run.tenant, NAME, name, artifact_id),
            created=when,
        )
        await self.durability.keep_result(
            run, operation, result, also=lambda tx: artifact_rows.insert_artifact(tx, row)
        )
        return result

    async def load(
        self, run: Run, operation: Operation, *, artifact_id: str, optimizer: bool | None
    ) -> LoadStateResult:
        """Verify, decrypt and load a checkpoint. Budgets never go back: the ledger is not part of it."""
        opened, state = await self.open(run.tenant, artifact_id)
        self.check_fits(run, state)
        if optimizer and not state["optimizer"]:
            raise InvalidRequestError(
                "this checkpoint was saved without optimizer state; load it with optimizer=False or leave it out",
                field="optimizer",
                constraint="saved with include_optimizer=True",
            )
        with_optimizer = bool(state["optimizer"]) if optimizer is None else optimizer
        operation.commit()
        async with run.weights:
            await self.executors.compute(run.session.import_state, opened, optimizer=with_optimizer)
            run.drop_pending()
            before, run.lineage = run.lineage, self.lineage(run, artifact_id, state)
            try:
                return await self._settle_load(run, operation, artifact_id, state)
            except Exception:
                run.lineage = before
                await self.durability.rewind(run)
                raise

    async def _settle_load(
        self, run: Run, operation: Operation, artifact_id: str, state: Mapping[str, Any]
    ) -> LoadStateResult:
        step = int(state["step"])
        result = LoadStateResult(
            artifact_id=artifact_id,
            step=step,
            metadata=dict(state["metadata"]),
            timestamp=datetime.fromisoformat(state["saved"]),
        )
        engine = await self.executors.compute(run.session.export_state, optimizer=True)
        state_id = await self.durability.write_state(run, engine, step=step)
        ended = run.config.max_steps is not None and step >= run.config.max_steps
        run.status = ACTIVE  # whole weights, also where an earlier failure had set the run aside
        await self.durability.advance(
            run, operation, result, state_id=state_id, step=step, status=DONE if ended else ACTIVE
        )
        return result

    async def open(self, tenant: str, artifact_id: str) -> tuple[EngineState, Mapping[str, Any]]:
        """A tenant's checkpoint, verified to its end before anything of it is used.

        Raises:
            ResourceNotFoundError: there is none for this tenant.
            InvalidRequestError: it was altered.
        """
        await self.row(tenant, artifact_id)
        opened = await self.executors.io(self.vault.open, tenant=tenant, artifact_id=artifact_id, kind=CHECKPOINT)
        return EngineState(tensors=opened.tensors, scalars=opened.state["engine"]), opened.state

    async def row(self, tenant: str, artifact_id: str) -> artifact_rows.ArtifactRow:
        """The index row of a tenant's checkpoint."""
        row = await self.executors.io(self.db.read, lambda tx: artifact_rows.get_artifact(tx, tenant, artifact_id))
        if row is None:
            raise not_found(artifact_id)
        return row

    async def list(self, tenant: str, run_id: str, limit: int) -> list[artifact_rows.ArtifactRow]:
        """A tenant's checkpoints, newest first."""

        def read(tx: Transaction) -> list[artifact_rows.ArtifactRow]:
            return artifact_rows.list_artifacts(tx, tenant, run_id=run_id or None, limit=limit)

        def opened() -> list[artifact_rows.ArtifactRow]:
            rows = self.db.read(read)
            return [replace(r, name=self.texts.open(tenant, NAME, r.name, r.artifact_id)) for r in rows]

        return await self.executors.io(opened)

    async def pull(self, tenant: str, artifact_id: str) -> Iterator[bytes]:
        """The ciphertext, in pieces of at most 1 MiB; iterate it off the event loop."""
        await self.row(tenant, artifact_id)
        return self.vault.stream(tenant=tenant, artifact_id=artifact_id)

    async def delete(self, tenant: str, artifact_id: str) -> None:
        """Delete a checkpoint. What it cost stays in the ledger."""
        await self.row(tenant, artifact_id)
        await self.executors.io(self.db.write, lambda tx: artifact_rows.mark_deleted(tx, tenant, artifact_id, now()))
        await self.executors.io(self.vault.delete, tenant=tenant, artifact_id=artifact_id)

    @staticmethod
    def lineage(run: Run, artifact_id: str, state: Mapping[str, Any]) -> Lineage:
        """What the run's weights owe to other data once it has loaded this checkpoint."""
        own = None if run.private is None else run.private.scope.dataset_id
        return lineage_after(run.lineage, artifact_id, state, dataset_id=own)

    async def _ledger_head(self, run: Run) -> dict[str, Any] | None:
        if run.private is None:
            return None
        spent = await self.executors.io(self.ledger.spent, run.private.scope)
        return {
            "dataset_id": run.private.scope.dataset_id,
            "head": spent.head.hex(),
            "entries": spent.entries,
            "epsilon": repr(spent.epsilon),
            "delta": repr(spent.delta),
            "initial_weights": run.private.config.initial_weights,
            "unit": spent.unit,
        }

    def _check_provenance(self, run: Run, state: Mapping[str, Any]) -> None:
        """A private run starts from nothing whose cost is unknown: an unknown never costs zero."""
        if run.private is None:
            return
        refuse_one_name_for_two_datasets(tuple(state.get("provenance", [])), run.private.scope.dataset_id)
        if run.private.config.initial_weights == "public":
            return
        ledger = state["ledger"]
        attested = ledger is not None and ledger.get("initial_weights") == "public"
        unknown = any(not has_finite_epsilon(e["privacy"]) for e in state.get("provenance", []))
        if unknown or ledger is None or attested or not has_finite_epsilon(ledger):
            how = (
                "further from such weights"
                if unknown
                else "without privacy"
                if ledger is None
                else "from weights without a ledger"
            )
            how = how if unknown or ledger is None or attested else "with an un-noised step"
            if ledger is not None and is_attested(ledger):
                how = "in a federation that promises nothing"
            raise DPUnsupportedError(
                f"this checkpoint was trained {how}, so what it reveals about its data is not in any budget",
                feature="checkpoint",
                reason="weights of unknown privacy would count as free",
                alternative="start from the base model, or, if it was trained on public data only, create the run "
                "with DPConfig(initial_weights='public')",
            )

    def check_fits(self, run: Run, state: Mapping[str, Any]) -> None:
        self._check_provenance(run, state)
        saved, here = _shape(state["config"]), _shape(json.loads(config_to_json(run.config)))
        different = [k for k in ("model_ref", "lora_config") if saved.get(k) != here[k]]
        if different:
            raise InvalidRequestError(
                f"the checkpoint was saved with another {' and '.join(different)}: "
                + "; ".join(f"{k} was {saved.get(k)}, this run has {here[k]}" for k in different),
                field="artifact_id",
                constraint="same base model and adapter",
            )


def _shape(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration without what may differ from the checkpoint's: which factor of an adapter is trained."""
    lora = config.get("lora_config")
    return config if lora is None else {**config, "lora_config": {**lora, "frozen_factor": None}}
