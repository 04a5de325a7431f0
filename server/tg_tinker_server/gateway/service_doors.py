"""The routes that a client opens with: flags, capabilities, sessions; and what is accepted and dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker_server.gateway import messages, names
from tg_tinker_server.gateway.doors import Handler
from tg_tinker_server.gateway.requests import HttpCall
from tg_tinker_server.gateway.samples import Samples
from tg_tinker_server.gateway.sessions import Sessions
from tg_tinker_server.service.runs import RunRegistry
from tg_tinker_server.store import gateway_rows

MOST_LISTED = 1000
MOST_CHUNK_BYTES = 48_000_000  # the client has 50 MB under way at most
# What a client may do, for a server of a few users; docs/how-to/tinker.md explains each.
FLAGS: Mapping[str, Any] = {
    "pjwt_auth_enabled": False,
    "credential_default_source": "api_key",
    "parallel_fwdbwd_chunks": False,  # chunks in order
    "fwdbwd_max_chunk_len": 1024,
    "billing_exception_max_pause_duration_sec": 0,
    "sample_max_concurrent_requests": 64,
    # Off: a client that only waits for the list of what ended would wait for ever for what a restart has taken.
    "sample_use_retrieve_futures": False,
    "sample_join_sampling_session": False,
}
DYNAMIC_FLAGS: Mapping[str, Any] = {
    "refresh_interval_sec": 300,
    "sample_cancel_enabled": True,
    "sample_cancel_max_batch_size": 64,
}


@dataclass(frozen=True, slots=True)
class ServiceDoors:
    """What belongs to no model.

    Attributes:
        zstd: whether clients shall compress batches.
        graphs: whether custom losses can run here.
    """

    sessions: Sessions
    samples: Samples
    registry: RunRegistry
    zstd: bool
    graphs: bool

    def handlers(self) -> Mapping[str, Handler]:
        """By route."""
        return {
            "GET healthz": self.health,
            "POST client/config": self.config,
            "POST client/dynamic_config": self.dynamic_config,
            "POST auth/token": self.no_tokens,
            "GET auth/apikey/me": self.key,
            "DELETE auth/apikey/me": self.keep_key,
            "POST telemetry": self.telemetry,
            "GET get_server_capabilities": self.capabilities,
            "POST create_session": self.create,
            "POST session_heartbeat": self.beat,
            "POST sessions/{session}/finish": self.finish,
            "GET sessions": self.list,
            "GET sessions/{session}": self.get,
            "POST sessions/search": self.search,
            "PUT sessions/{session}/project": self.project,
            "GET sessions/{session}/trace_export": self.trace,
            "GET billing/usage/events": self.no_bills,
            "GET billing/usage/checkpoints/current": self.no_bills,
        }

    async def health(self, _call: HttpCall) -> Response:
        """It answers."""
        return JSONResponse({"status": "ok"})

    async def config(self, call: HttpCall) -> Response:
        """How the client shall behave."""
        own = {
            # As large as a request may be, with room for what the client does not count: every cut may part a pair.
            "fwdbwd_max_chunk_bytes_count": min(MOST_CHUNK_BYTES, call.most_bytes * 3 // 4),
            "proto_compress_fwdbwd": self.zstd,
            "custom_loss_server_side": self.graphs,
        }
        return JSONResponse({**FLAGS, **own})

    async def dynamic_config(self, _call: HttpCall) -> Response:
        """The same, of what may change."""
        return JSONResponse(dict(DYNAMIC_FLAGS))

    async def no_tokens(self, _call: HttpCall) -> Response:
        """Keys are used as they are."""
        raise ResourceNotFoundError("this server exchanges no keys for tokens", resource_type="token", resource_id="")

    async def key(self, call: HttpCall) -> Response:
        """Whose key it is."""
        number = int(call.caller.key_id, 16) % 2**53 if call.caller.key_id else 0
        return JSONResponse(
            {
                "key_id": number,
                "name": call.caller.key_id,
                "note": None,
                "details": {
                    "org_details": {"name": call.caller.tenant},
                    "user_details": {"email": f"{call.caller.key_id}@{call.caller.tenant}"},
                },
            }
        )

    async def keep_key(self, _call: HttpCall) -> Response:
        """Keys are revoked where they were made."""
        raise InvalidRequestError(
            "keys are revoked on the server's machine: tg-tinker keys revoke", field="key", constraint="not from here"
        )

    async def telemetry(self, _call: HttpCall) -> Response:
        """Accepted and dropped unread: it carries tracebacks, and keys."""
        return JSONResponse({"status": "accepted"})

    async def capabilities(self, _call: HttpCall) -> Response:
        """What is offered."""
        models = [
            {
                "model_name": m.name,
                "max_context_length": m.max_sequence_length,
                "trainable": True,
                "sampleable": True,
            }
            for m in await self.registry.models()
        ]
        return JSONResponse({"supported_models": models})

    async def create(self, call: HttpCall) -> Response:
        """A session."""
        session_id = await self.sessions.create(call.caller, await call.message(messages.CreateSession))
        answer: dict[str, Any] = {"type": "create_session", "session_id": session_id}
        policy = call.caller.policy
        if policy is not None:
            answer["info_message"] = (
                f"models made with this key are trained with differential privacy on dataset {policy.dataset_id}: "
                f"epsilon {policy.target_epsilon:g} at delta {policy.target_delta:g} for each {policy.privacy_unit}"
            )
        return JSONResponse(answer)

    async def beat(self, call: HttpCall) -> Response:
        """Its client is there. 410 ends its heartbeat."""
        session_id = (await call.message(messages.OfSession)).session_id
        row = await self.sessions.get(call.caller, session_id)
        if row.finished is not None:
            return JSONResponse({"detail": "the session is finished"}, status_code=410)
        self.samples.seen(call.caller.tenant, session_id)
        return JSONResponse({"type": "session_heartbeat"})

    async def finish(self, call: HttpCall) -> Response:
        """Its client is done. Models and checkpoints stay."""
        session_id = call.part("session")
        row = await self.sessions.get(call.caller, session_id)
        if row.key_id != call.caller.key_id:
            call.caller.require("SAMPLE")  # it ends what others are doing
        await self.sessions.finish(call.caller, session_id)
        self.samples.forget_session(call.caller.tenant, session_id)
        return Response(status_code=204)

    async def list(self, call: HttpCall) -> Response:
        """Sessions, newest first."""
        limit, offset = call.number("limit", 20, most=MOST_LISTED), call.number("offset", 0, most=10**9)
        found, _ = await self.sessions.list(call.caller, limit=limit, offset=offset)
        return JSONResponse({"sessions": found})

    async def search(self, call: HttpCall) -> Response:
        """The newest sessions; what their users wrote lies sealed and is not searched."""
        await call.message(messages.SessionSearch)
        raise ResourceNotFoundError(
            "sessions are listed, not searched: what users say about them lies encrypted; use list_sessions",
            resource_type="search",
            resource_id="",
        )

    async def get(self, call: HttpCall) -> Response:
        """A session with its models and samplers."""
        session_id = call.part("session")
        about = await self.sessions.about(call.caller, session_id)
        tenant, policy = call.caller.tenant, call.caller.policy
        db, io = self.sessions.db, self.sessions.executors.io
        runs, _ = await io(
            db.read,
            lambda tx: gateway_rows.list_models(
                tx,
                tenant,
                prefix=f"{names.RUN_PREFIX}{session_id}:",
                dataset_id=policy.dataset_id if policy else None,
                limit=MOST_LISTED,
                offset=0,
            ),
        )
        samplers = await io(db.read, lambda tx: gateway_rows.samplers_of_session(tx, tenant, session_id + ":sample:"))
        metadata = {str(k): str(v) for k, v in (about.get("user_metadata") or {}).items()}
        return JSONResponse(
            {
                "training_run_ids": [r.request_id.removeprefix(names.RUN_PREFIX) for r in runs],
                "sampler_ids": samplers,
                "user_metadata": metadata,
                "display_name": about.get("display_name"),
            }
        )

    async def project(self, call: HttpCall) -> Response:
        """There are no projects."""
        await self.sessions.get(call.caller, call.part("session"))
        raise ResourceNotFoundError(
            "this server has no projects; tenants are kept apart by their keys",
            resource_type="project",
            resource_id="",
        )

    async def trace(self, call: HttpCall) -> Response:
        """There are no traces: they would tell when whose data was used."""
        await self.sessions.get(call.caller, call.part("session"))
        return JSONResponse({"status": "failed", "error": "this server records no traces of sessions"})

    async def no_bills(self, _call: HttpCall) -> Response:
        """Nothing is billed."""
        return JSONResponse({"data": [], "sessions": {}})
