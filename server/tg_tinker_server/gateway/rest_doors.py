"""The routes that list and manage: training runs, checkpoints, the audit log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Any

from starlette.responses import JSONResponse, Response

from tg_tinker.errors import DPUnsupportedError, InvalidRequestError
from tg_tinker.types import TrainingConfig
from tg_tinker_server.gateway import messages, names
from tg_tinker_server.gateway.doors import Handler
from tg_tinker_server.gateway.paths import KINDS, checkpoint_path, shown
from tg_tinker_server.gateway.requests import HttpCall
from tg_tinker_server.ledger.audit import AuditLog
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.checkpoints import CheckpointService, Described
from tg_tinker_server.service.runs import RunRegistry
from tg_tinker_server.store import gateway_rows, run_rows
from tg_tinker_server.store.run_rows import RunRow

MOST_LISTED = 1000
MOST_AUDITED = 10_000
_CHECKPOINT = "training_runs/{model}/checkpoints/{kind}/{name}"


@dataclass(frozen=True, slots=True)
class RestDoors:
    """What the command line and the REST client of the protocol ask."""

    registry: RunRegistry
    checkpoints: CheckpointService
    audit: AuditLog

    def handlers(self) -> Mapping[str, Handler]:
        """By route."""
        return {
            "GET training_runs": self.runs,
            "GET training_runs/{model}": self.run,
            "GET training_runs/{model}/checkpoints": self.checkpoints_of,
            f"DELETE {_CHECKPOINT}": self.delete,
            f"PUT {_CHECKPOINT}/ttl": self.ttl,
            f"POST {_CHECKPOINT}/publish": self.publish,
            f"DELETE {_CHECKPOINT}/publish": self.publish,
            "GET checkpoints": self.all_checkpoints,
            "POST weights_info": self.weights_info,
            "POST copy_weights": self.copy_weights,
            "GET audit": self.audited,
        }

    async def runs(self, call: HttpCall) -> Response:
        """Models, newest first."""
        limit, offset = call.number("limit", 20, most=MOST_LISTED), call.number("offset", 0, most=10**9)
        tenant, policy = call.caller.tenant, call.caller.policy
        rows, total = await self.registry.executors.io(
            self.registry.db.read,
            lambda tx: gateway_rows.list_models(
                tx,
                tenant,
                prefix=names.RUN_PREFIX,
                dataset_id=policy.dataset_id if policy else None,
                limit=limit,
                offset=offset,
            ),
        )
        shown_runs = [await self._run(call.caller, row) for row in rows]
        cursor = {"offset": offset, "limit": limit, "total_count": total}
        return JSONResponse({"training_runs": [r for r in shown_runs if r is not None], "cursor": cursor})

    async def run(self, call: HttpCall) -> Response:
        """One model."""
        row = await self._row(call.caller, call.part("model"))
        found = await self._run(call.caller, row)
        if found is None:
            raise names.not_found("model", call.part("model"))
        return JSONResponse(found)

    async def checkpoints_of(self, call: HttpCall) -> Response:
        """A model's checkpoints, newest first."""
        row = await self._row(call.caller, call.part("model"))
        found, _ = await self.checkpoints.list(call.caller, run_id=row.run_id, limit=MOST_LISTED)
        listed = [checkpoint_json(call.part("model"), d) for d in found]
        return JSONResponse({"checkpoints": [c for c in listed if c is not None]})

    async def all_checkpoints(self, call: HttpCall) -> Response:
        """Checkpoints of all models, newest first."""
        limit, offset = call.number("limit", 100, most=MOST_LISTED), call.number("offset", 0, most=10**9)
        found, total = await self.checkpoints.list(call.caller, limit=max(1, limit), offset=offset)
        models: dict[str, str] = {}
        for described in found:
            run_id = described.row.run_id
            if run_id not in models:
                models[run_id] = await self._model_of(call.caller, run_id)
        listed = [checkpoint_json(models[d.row.run_id], d) for d in found]
        cursor = {"offset": offset, "limit": limit, "total_count": total}
        return JSONResponse({"checkpoints": [c for c in listed if c is not None], "cursor": cursor})

    async def delete(self, call: HttpCall) -> Response:
        """Delete a checkpoint. What it cost stays in the ledger."""
        await self.checkpoints.delete(call.caller, _path(call))
        return Response(status_code=204)

    async def ttl(self, call: HttpCall) -> Response:
        """Let a checkpoint expire, or not."""
        asked = await call.message(messages.Ttl)
        row = await self.checkpoints.row(call.caller, _path(call))
        await self.checkpoints.set_ttl(call.caller, row, asked.ttl_seconds)
        return Response(status_code=204)

    async def publish(self, call: HttpCall) -> Response:
        """Refused: what was trained here leaves it encrypted, for somebody."""
        await self.checkpoints.row(call.caller, _path(call))
        raise DPUnsupportedError(
            "checkpoints cannot be published on this server; nothing was changed",
            feature="publish",
            reason="weights would be readable by everybody, also where no privacy was promised for their data",
            alternative="save_weights_external with the age key of whoever shall have them",
        )

    async def weights_info(self, call: HttpCall) -> Response:
        """What is needed to make a model of a checkpoint."""
        path = (await call.message(messages.WeightsPath)).tinker_path
        row = await self.checkpoints.row(call.caller, path)
        config = await self.registry.config_behind(row)
        lora = config.lora_config
        groups = lora.target_modules if lora else []
        return JSONResponse(
            {
                "base_model": config.model_ref,
                "optimizer_config": {"type": "adamw"},
                "is_lora": lora is not None,
                "lora_rank": lora.rank if lora else None,
                "train_attn": "@attention" in groups,
                "train_mlp": "@mlp" in groups,
                "train_unembed": "@unembed" in groups,
            }
        )

    async def copy_weights(self, _call: HttpCall) -> Response:
        """Refused: there are no projects to copy into."""
        raise InvalidRequestError(
            "checkpoints are not copied here: there are no projects, and every key of the tenant can load them. "
            "Create a training client from the path",
            field="source_path",
            constraint="create_training_client_from_state",
        )

    async def audited(self, call: HttpCall) -> Response:
        """The audit log of a day, or of the newest records."""
        start = end = None
        text = call.request.query_params.get("day")
        if text is not None:
            try:
                start = datetime.combine(datetime.fromisoformat(text).date(), time(), UTC)
                end = start + timedelta(days=1)
            except (ValueError, OverflowError) as e:
                raise InvalidRequestError("day is not a date", field="day", constraint="YYYY-MM-DD") from e
        kind = call.request.query_params.get("event_type", "all")
        entries = await self.registry.executors.io(
            lambda: self.audit.query(call.caller.tenant, start=start, end=end, limit=MOST_AUDITED)
        )
        bodies: list[dict[str, Any]] = [dict(e.body) for e in entries]
        if call.caller.policy is not None:  # one party's key: what its tenant does elsewhere is not for it
            seen = {r: await self._sees(call.caller, r) for r in {b["training_client_id"] for b in bodies}}
            bodies = [b for b in bodies if seen[b["training_client_id"]]]
        if kind == "checkpoints":
            bodies = [b for b in bodies if b["artifact_ids"]]
        elif kind != "all":
            bodies = []
        shown_entries = [
            {
                "timestamp": b["started"],
                "event": b["operation"],
                "event_details": b,
                "model_id": b["training_client_id"],
            }
            for b in bodies
        ]
        return JSONResponse({"entries": shown_entries})

    async def _sees(self, caller: Caller, run_id: str) -> bool:
        """Whether a run, also a deleted one, is or was the caller's to see."""
        row = await self._any_row(caller, run_id)
        return row is not None and caller.sees(await self._config(row))

    async def _row(self, caller: Caller, model_id: str) -> RunRow:
        if not names.is_model(model_id):
            raise names.not_found("model", model_id)
        return await self.registry.find(caller, names.RUN_PREFIX + model_id)

    async def _config(self, row: RunRow) -> TrainingConfig:
        return await self.registry.executors.io(self.registry.config_of, row)

    async def _model_of(self, caller: Caller, run_id: str) -> str:
        """The model behind a run, also a deleted one; empty where it was made elsewhere."""
        row = await self._any_row(caller, run_id)
        request_id = "" if row is None else row.request_id
        return request_id.removeprefix(names.RUN_PREFIX) if request_id.startswith(names.RUN_PREFIX) else ""

    async def _any_row(self, caller: Caller, run_id: str) -> RunRow | None:
        return await self.registry.executors.io(
            self.registry.db.read, lambda tx: run_rows.get_run_of_any_status(tx, caller.tenant, run_id)
        )

    async def _run(self, caller: Caller, row: RunRow) -> dict[str, Any] | None:
        config = await self._config(row)
        if not caller.sees(config):
            return None
        model_id = row.request_id.removeprefix(names.RUN_PREFIX)
        lora = config.lora_config
        last: dict[str, Any] = {}
        for purpose in ("weights", "sampler_weights"):
            found, _ = await self.checkpoints.list(caller, run_id=row.run_id, purpose=purpose, limit=1)
            last[purpose] = checkpoint_json(model_id, found[0]) if found else None
        return {
            "training_run_id": model_id,
            "base_model": config.model_ref,
            "model_owner": caller.tenant,
            "is_lora": lora is not None,
            "corrupted": row.status == "failed",
            "lora_rank": lora.rank if lora else None,
            "last_request_time": row.updated.isoformat(),
            "last_checkpoint": last["weights"],
            "last_sampler_checkpoint": last["sampler_weights"],
            "user_metadata": {str(k): str(v) for k, v in config.metadata.items()} or None,
        }


def checkpoint_json(model_id: str, described: Described) -> dict[str, Any] | None:
    """A checkpoint as the protocol shows it; ``None`` for one that it has no address for."""
    if not model_id:
        return None
    return shown(model_id, described.path, described.row, described.metadata)


def _path(call: HttpCall) -> str:
    if call.part("kind") not in KINDS:
        raise names.not_found("checkpoint", call.part("kind"))
    return checkpoint_path(call.part("model"), call.part("kind"), call.part("name"))
