"""save_state and load_state: a run's weights into a checkpoint, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import EncryptionInfo, LoadStateResult, SavedState
from tg_tinker.wire.calls import Load, Save
from tg_tinker.wire.runs import config_to_json
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.engine.state import checkpoint_of
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.checkpoint_fit import check_fits, lineage_with, takes_optimizer
from tg_tinker_server.service.checkpoints import METADATA, CheckpointService, expiry_after
from tg_tinker_server.service.durability import CHECKPOINT, Durability, new_id, now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.lanes import Operation
from tg_tinker_server.service.paths import NAME, Paths, check_name, path_of
from tg_tinker_server.service.run import ACTIVE, DONE, Run
from tg_tinker_server.service.sealed_text import SealedText
from tg_tinker_server.store import artifact_rows
from tg_tinker_server.store.database import Transaction

MAX_METADATA_BYTES = 1 << 20
MAX_LISTED_METADATA_BYTES = 1 << 12
_PURPOSE_OF_KIND = {"state": "weights", "sampler": "sampler_weights", "external": "external_weights"}


@dataclass(frozen=True, slots=True)
class StateService:
    """Writes checkpoints of runs and loads them, inside the run's lane."""

    checkpoints: CheckpointService
    vault: Vault
    ledger: PrivacyLedger
    durability: Durability
    executors: Executors
    texts: SealedText
    paths: Paths

    async def save(self, run: Run, operation: Operation, request: Save) -> SavedState:
        """Write trainable weights, step, configuration, metadata and the ledger's head, encrypted.

        Pending gradients and the state of the noise generator are never part of it. Nor is the optimizer, where it is
        for sampling.

        Raises:
            InvalidRequestError: the name cannot be, or is taken and ``overwrite`` is off.
        """
        run.require_intact()
        metadata, purpose = dict(request.metadata), _PURPOSE_OF_KIND[request.kind]
        include_optimizer = request.include_optimizer and request.kind == "state"
        check_name(request.name)
        expires = expiry_after(request.ttl_seconds)
        operation.commit()  # from here on a cancellation comes too late: the checkpoint will exist
        metadata_json = json.dumps(metadata)
        if len(metadata_json) > MAX_METADATA_BYTES:
            raise InvalidRequestError(
                "metadata is over 1 MiB; keep large things elsewhere",
                field="metadata",
                constraint="<= 1 MiB of JSON",
            )
        name_mac = None
        if request.name:
            name_mac = await self.executors.io(self.paths.name_mac, run.tenant, run.run_id, purpose, request.name)
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
        listed = metadata_json if len(metadata_json) <= MAX_LISTED_METADATA_BYTES else "{}"
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
            name=await self.executors.io(self.texts.seal, run.tenant, NAME, request.name, artifact_id),
            created=when,
            purpose=purpose,
            name_mac=name_mac,
            expires=expires,
            optimizer=include_optimizer,
            metadata_json=await self.executors.io(self.texts.seal, run.tenant, METADATA, listed, artifact_id),
        )
        result = SavedState(
            artifact_id=artifact_id,
            size_bytes=sealed.size_bytes,
            encryption=EncryptionInfo(algorithm=sealed.algorithm, key_id=sealed.key_id),
            metadata=metadata,
            timestamp=when,
            path=path_of(row, request.name),
            content_hash=sealed.content_hash,
        )
        replaced: list[str] = []
        try:
            await self.durability.keep_result(
                run,
                operation,
                result,
                also=lambda tx: replaced.extend(self._insert(tx, row, overwrite=request.overwrite)),
            )
        except InvalidRequestError:  # of any other failure the row may be on disk; the next start sweeps if it is not
            await self.executors.io(self.vault.delete, tenant=run.tenant, artifact_id=artifact_id)
            raise
        for old in replaced:
            self.executors.io_later(self.durability.delete_state, run.tenant, old)
        return result

    def _insert(self, tx: Transaction, row: artifact_rows.ArtifactRow, *, overwrite: bool) -> list[str]:
        """Add a row; returns which artifact it took the name of. One transaction: a name never stands for two."""
        replaced = []
        if row.name_mac is not None:
            there = artifact_rows.find_named(tx, row.tenant, row.run_id, row.purpose, row.name_mac)
            if there is not None:
                if self.paths.live(there) and not overwrite:
                    raise InvalidRequestError(
                        "this run has a checkpoint of that name; choose another, delete it, or save with "
                        "overwrite=True",
                        field="name",
                        constraint="unique for the run and kind",
                    )
                artifact_rows.mark_deleted(tx, row.tenant, there.artifact_id, now())
                replaced.append(there.artifact_id)
        artifact_rows.insert_artifact(tx, row)
        return replaced

    async def load(self, caller: Caller, run: Run, operation: Operation, request: Load) -> LoadStateResult:
        """Verify, decrypt and load a checkpoint. Budgets never go back: the ledger is not part of it.

        By id all that was saved is loaded, by path the weights; ``optimizer`` says otherwise.

        Raises:
            ResourceNotFoundError: there is none for this caller.
            InvalidRequestError: it was altered, or does not fit the run.
        """
        row = await self.checkpoints.row(caller, request.artifact_id)
        artifact_id = row.artifact_id
        opened, state = await self.checkpoints.open(run.tenant, artifact_id)
        check_fits(run, state)
        with_optimizer = takes_optimizer(request.artifact_id, request.optimizer, state)
        operation.commit()
        async with run.weights:
            await self.executors.compute(run.session.import_state, opened, optimizer=with_optimizer)
            run.drop_pending()
            before, run.lineage = run.lineage, lineage_with(run, artifact_id, state)
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
