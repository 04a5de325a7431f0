"""save_state, load_state, and the artifacts that come of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from tg_tinker.errors import DPUnsupportedError, InvalidRequestError
from tg_tinker.exports.manifest import is_attested
from tg_tinker.types import EncryptionInfo, LoadStateResult, SavedState
from tg_tinker.wire.calls import MAX_TTL_S, Load, Save
from tg_tinker.wire.runs import config_to_json
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.engine.backend import EngineState
from tg_tinker_server.engine.state import checkpoint_of
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.durability import CHECKPOINT, Durability, new_id, now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.lanes import Operation
from tg_tinker_server.service.lineage import (
    Lineage,
    has_finite_epsilon,
    lineage_after,
    refuse_one_name_for_two_datasets,
)
from tg_tinker_server.service.paths import NAME, PURPOSES, Paths, check_name, is_path, not_found, path_of
from tg_tinker_server.service.run import ACTIVE, DONE, Run
from tg_tinker_server.service.sealed_text import SealedText
from tg_tinker_server.store import artifact_rows
from tg_tinker_server.store.database import Database, Transaction

METADATA = "artifact-metadata"
MAX_METADATA_BYTES = 1 << 20
MAX_LISTED_METADATA_BYTES = 1 << 12
_PURPOSE_OF_KIND = {"state": "weights", "sampler": "sampler_weights", "external": "external_weights"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A checkpoint as its owner may see it.

    Attributes:
        metadata: of its writer; empty when it was over 4 KiB.
    """

    row: artifact_rows.ArtifactRow
    name: str
    path: str
    metadata: Mapping[str, Any]


Page = tuple[list[Described], int]
Rows = tuple[list[artifact_rows.ArtifactRow], int]


@dataclass(frozen=True, slots=True)
class CheckpointService:
    """Encrypted checkpoints of runs. Names are unique for a run and purpose; what has expired is missing."""

    db: Database
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
        row = await self.row(caller, request.artifact_id)
        artifact_id = row.artifact_id
        opened, state = await self.open(run.tenant, artifact_id)
        self.check_fits(run, state)
        with_optimizer = takes_optimizer(request.artifact_id, request.optimizer, state)
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
        """A tenant's checkpoint whose `row` was found, verified to its end before anything of it is used.

        Raises:
            InvalidRequestError: it was altered, or was deleted just now.
        """
        opened = await self.executors.io(self.vault.open, tenant=tenant, artifact_id=artifact_id, kind=CHECKPOINT)
        return EngineState(tensors=opened.tensors, scalars=opened.state["engine"]), opened.state

    async def row(self, caller: Caller, path_or_id: str) -> artifact_rows.ArtifactRow:
        """The index row of a checkpoint that the caller may see, by address or id.

        Raises:
            ResourceNotFoundError: there is none.
        """
        return await self.executors.io(self.paths.resolve, caller, path_or_id)

    async def describe(self, row: artifact_rows.ArtifactRow) -> Described:
        """A checkpoint with what is sealed in its row."""
        return await self.executors.io(self._described, row)

    async def list(self, caller: Caller, *, run_id: str = "", purpose: str = "", limit: int, offset: int = 0) -> Page:
        """A page of the checkpoints that the caller may see, newest first, and how many there are in all."""
        if purpose and purpose not in PURPOSES:
            raise InvalidRequestError("unknown kind of checkpoint", field="kind", constraint=", ".join(PURPOSES))
        check_page(limit, offset)
        return await self.executors.io(self._list, caller, run_id or None, purpose or None, limit, offset)

    def _list(self, caller: Caller, run_id: str | None, purpose: str | None, limit: int, offset: int) -> Page:
        at, everything = now(), caller.policy is None

        def read(tx: Transaction) -> Rows:
            rows = artifact_rows.list_artifacts(
                tx,
                caller.tenant,
                run_id=run_id,
                purpose=purpose,
                at=at,
                limit=limit if everything else None,
                offset=offset if everything else 0,
            )
            if not everything:
                return rows, 0
            return rows, artifact_rows.count_artifacts(tx, caller.tenant, run_id=run_id, purpose=purpose, at=at)

        rows, total = self.db.read(read)
        if not everything:
            admitted = {run: self.paths.visible(caller, row) for run, row in {r.run_id: r for r in rows}.items()}
            rows = [r for r in rows if admitted[r.run_id]]
            rows, total = rows[offset : offset + limit], len(rows)
        return [self._described(r) for r in rows], total

    def _described(self, row: artifact_rows.ArtifactRow) -> Described:
        name = self.texts.open(row.tenant, NAME, row.name, row.artifact_id)
        sealed = row.metadata_json
        text = "{}" if sealed is None else self.texts.open(row.tenant, METADATA, sealed, row.artifact_id)
        # A name from before names were unique is no address.
        path = path_of(row, name if row.name_mac is not None else "")
        return Described(row=row, name=name, path=path, metadata=json.loads(text))

    async def pull(self, caller: Caller, path_or_id: str) -> Iterator[bytes]:
        """The ciphertext, in pieces of at most 1 MiB; iterate it off the event loop."""
        row = await self.row(caller, path_or_id)
        return self.vault.stream(tenant=row.tenant, artifact_id=row.artifact_id)

    async def set_ttl(
        self, caller: Caller, row: artifact_rows.ArtifactRow, ttl_seconds: int | None
    ) -> artifact_rows.ArtifactRow:
        """Let a checkpoint expire so many seconds from now; ``None`` keeps it until it is deleted.

        Raises:
            ResourceNotFoundError: it is gone meanwhile.
            InvalidRequestError: no such time.
        """
        expires = expiry_after(ttl_seconds)

        def write(tx: Transaction) -> None:
            there = artifact_rows.get_artifact(tx, row.tenant, row.artifact_id)
            if there is None or not self.paths.live(there):  # what has expired does not come back
                raise not_found(row.artifact_id)
            artifact_rows.set_expiry(tx, row.tenant, row.artifact_id, expires)

        await self.executors.io(self.db.write, write)
        return await self.row(caller, row.artifact_id)

    async def delete(self, caller: Caller, path_or_id: str) -> None:
        """Delete a checkpoint. What it cost stays in the ledger."""
        row = await self.row(caller, path_or_id)
        await self.executors.io(self.erase, row.tenant, row.artifact_id)

    def erase(self, tenant: str, artifact_id: str) -> None:
        """Delete a checkpoint: first it is missing, then its ciphertext goes. Call it off the event loop."""
        self.db.write(lambda tx: artifact_rows.mark_deleted(tx, tenant, artifact_id, now()))
        self.vault.delete(tenant=tenant, artifact_id=artifact_id)

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


def takes_optimizer(asked_for: str, optimizer: bool | None, state: Mapping[str, Any]) -> bool:
    """Whether a load takes the optimizer over: what was said, or else of an id what was saved, of a path nothing.

    Raises:
        InvalidRequestError: it was asked for and not saved.
    """
    saved = bool(state["optimizer"])
    if optimizer and not saved:
        raise InvalidRequestError(
            "this checkpoint was saved without optimizer state; load it with optimizer=False or leave it out",
            field="optimizer",
            constraint="saved with include_optimizer=True",
        )
    return (saved and not is_path(asked_for)) if optimizer is None else optimizer


def expiry_after(ttl_seconds: int | None) -> datetime | None:
    """When something expires that lives so many seconds from now.

    Raises:
        InvalidRequestError: no such time.
    """
    if ttl_seconds is None:
        return None
    if not 1 <= ttl_seconds <= MAX_TTL_S:
        raise InvalidRequestError(
            f"ttl_seconds={ttl_seconds} is not possible", field="ttl_seconds", constraint=f"1 to {MAX_TTL_S}"
        )
    return now() + timedelta(seconds=ttl_seconds)


def check_page(limit: int, offset: int) -> None:
    """Refuse a page that cannot be.

    Raises:
        InvalidRequestError: it cannot.
    """
    if limit < 1 or not 0 <= offset < 2**62:
        raise InvalidRequestError(
            f"limit={limit}, offset={offset}: no such page", field="offset", constraint="limit from 1, offset from 0"
        )


def _shape(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration without what may differ from the checkpoint's: which factor of an adapter is trained."""
    lora = config.get("lora_config")
    return config if lora is None else {**config, "lora_config": {**lora, "frozen_factor": None}}
