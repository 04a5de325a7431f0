"""retrieve_future: waits for a result, and tells it in the form the client can read."""

from __future__ import annotations

import asyncio
import hmac
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response

from tg_tinker.errors import (
    RateLimitedError,
    ServerError,
    TGTinkerError,
)
from tg_tinker.types import ForwardBackwardOutput, LoadStateResult, OptimStepOutput
from tg_tinker.types.results import SavedState
from tg_tinker_server.gateway import names, samples
from tg_tinker_server.gateway.errors import bare, failure
from tg_tinker_server.gateway.messages import RetrieveFuture, RetrieveFutures
from tg_tinker_server.gateway.models import Models
from tg_tinker_server.gateway.paths import tinker_path
from tg_tinker_server.gateway.requests import PROTOBUF, HttpCall
from tg_tinker_server.gateway.results import finite, pass_to_json, pass_to_proto, sample_to_proto
from tg_tinker_server.gateway.samples import Samples
from tg_tinker_server.gateway.training import Training, sampler_seal
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.samplers import SamplerService

HOLD_S = 30.0
MOST_REFUSED = 10_000
_SAVED = {  # what kind of answer names a checkpoint of which kind
    "weights": "save_weights",
    "sampler_weights": "save_weights_for_sampler",
    "external_weights": "save_weights_external",
}
LARGE_OUTPUTS = 64  # datums from which encoding leaves the event loop


@dataclass(frozen=True, slots=True)
class Futures:
    """Results of all requests."""

    models: Models
    training: Training
    samples: Samples
    samplers: SamplerService
    hold_s: float = HOLD_S
    _refused: OrderedDict[tuple[str, str], TGTinkerError] = field(default_factory=OrderedDict)

    def refuse(self, caller: Caller, error: TGTinkerError) -> str:
        """Give a request that could be read and is refused an id, under which its user finds the reason."""
        request_id = names.new_refusal()
        self._refused[(caller.tenant, request_id)] = bare(error)
        while len(self._refused) > MOST_REFUSED:
            self._refused.popitem(last=False)
        return request_id

    async def retrieve(self, call: HttpCall) -> Response:
        """Wait up to ``hold_s`` for one result."""
        request_id = (await call.message(RetrieveFuture)).request_id
        parsed = names.parse_request(request_id)
        match parsed.kind:
            case "refused":
                error = self._refused.get((call.caller.tenant, request_id))
                answer = JSONResponse(failure(error) if error else _forgotten_refusal())
            case "loss":
                answer = JSONResponse({"type": "create_custom_loss", "loss_id": parsed.loss})
            case "sample":
                return await self._sample(call, request_id)
            case "create" | "load":
                made = {"type": "create_model" if parsed.kind == "create" else "load_weights"}
                return await self._created(call, request_id, {**made, "model_id": parsed.owner})
            case "operation":
                return await self._operation(call, request_id, parsed)
        return answer

    async def _created(self, call: HttpCall, request_id: str, answer: dict[str, str]) -> Response:
        model_id = answer["model_id"]
        making = self.models.making(call.caller, model_id)
        if making is not None and not making.done():
            await asyncio.wait({making}, timeout=self.hold_s)
            if not making.done():
                return try_again(request_id, "the model is being made")
        try:
            await self.models.run(call.caller, model_id)
        except TGTinkerError as e:
            if making is None:
                raise
            return _failed(e, request_id)
        return JSONResponse(answer)

    async def _operation(self, call: HttpCall, request_id: str, name: names.RequestName) -> Response:
        try:
            run, operation = await self.training.find(call.caller, name.owner, name.seq)
        except RateLimitedError as e:
            return try_again(request_id, e.message)
        sealed = not name.sampler or hmac.compare_digest(name.seal, sampler_seal(run, name.seq, name.sampler))
        if operation is None or not sealed:
            raise names.not_found("request", request_id)
        try:
            await self.training.operations.wait(operation, self.hold_s)
        except ServerError:  # it stops; the next one goes on with what was acknowledged
            return try_again(request_id, "the server is restarting")
        if not operation.ended.is_set():
            behind = operation.seq - run.lane.expected
            return try_again(request_id, f"{behind} operations are before it" if behind > 0 else "it is running")
        if operation.error is not None:
            return _failed(operation.error, request_id)
        return await self._result(call, name, operation.result)

    async def _result(self, call: HttpCall, name: names.RequestName, result: Any) -> Response:
        answer: dict[str, Any]
        match result:
            case ForwardBackwardOutput():
                if call.wants_protobuf:
                    return Response(await _encoded(result), media_type=PROTOBUF)
                answer = pass_to_json(result.loss_fn_outputs, result.metrics)
            case OptimStepOutput():
                answer = {"metrics": finite(result.metrics), "type": "optim_step"}
            case SavedState() if name.sampler:
                await self.samplers.create(call.caller, sampler_id=name.sampler, path=result.artifact_id)
                answer = {"sampling_session_id": name.sampler, "type": "save_weights_for_sampler", "path": None}
            case SavedState():
                path = tinker_path(name.owner, result.path)
                answer = {"path": path, "type": _SAVED[path.split("/")[3]]}
            case LoadStateResult():
                answer = {"path": None, "type": "load_weights", "model_id": name.owner}
            case _:
                answer = failure(ServerError("this operation was not made in the Tinker protocol"))
        return JSONResponse(answer)

    async def _sample(self, call: HttpCall, request_id: str) -> Response:
        kept = self.samples.get(call.caller, request_id)
        if kept is None:
            return _gone(request_id)
        if not kept.task.done():
            await asyncio.wait({kept.task}, timeout=self.hold_s)
        if not kept.task.done():
            return try_again(request_id, "it is being sampled")
        error = samples.error_of(kept)
        if isinstance(error, RateLimitedError) or (error is not None and error.details.get("retry") is True):
            self.samples.forget(call.caller, [request_id])
            return _gone(request_id)  # its client sends it again
        if error is not None:
            return _failed(error, request_id)
        if kept.delivered is None:
            kept.delivered = asyncio.get_running_loop().time()
        return Response(sample_to_proto(kept.task.result(), kept.layout).SerializeToString(), media_type=PROTOBUF)

    async def retrieve_many(self, call: HttpCall) -> Response:
        """What ended of one client's samples since it last asked."""
        asked = await call.message(RetrieveFutures, large=True)
        await self.require_sampler(call.caller, asked.target.sampling_session_id)
        self.samples.forget(call.caller, asked.retrieved_request_ids)
        wait_s = min(max(asked.timeout if asked.timeout is not None else self.hold_s, 0.0), self.hold_s)
        target = (asked.target.sampling_session_id, asked.target.cloned_sampler_id)
        ended, cursor = await self.samples.ended_after(call.caller, target, asked.prev_cursor, wait_s)
        completions = [
            {"state": "failed", "request_id": e.request_id}
            if e.failed
            else {"state": "finished", "request_id": e.request_id, "response_payload_uncompressed_size": e.size}
            for e in ended
        ]
        return JSONResponse({"completions": completions, "cursor": cursor})

    async def require_sampler(self, caller: Caller, sampler_id: str) -> None:
        """Refuse a sampler that is not there for this caller.

        Raises:
            ResourceNotFoundError: one answer for a missing one and for another's.
        """
        await self.samplers.get(caller, sampler_id)
        if caller.policy is not None:  # its session must be this key's
            await self.models.sessions.get(caller, names.session_of(sampler_id))

    async def cancel(self, call: HttpCall) -> Response:
        """Stop a sample that its client has given up. Training is not cancelled this way."""
        request_id = (await call.message(RetrieveFuture)).request_id
        if names.parse_request(request_id).kind == "sample":
            self.samples.cancel(call.caller, request_id)
        return Response(status_code=204)


async def _encoded(result: ForwardBackwardOutput) -> bytes:
    def encode() -> bytes:
        return pass_to_proto(result.loss_fn_outputs, result.metrics).SerializeToString()

    return encode() if len(result.loss_fn_outputs) < LARGE_OUTPUTS else await asyncio.to_thread(encode)


def try_again(request_id: str, reason: str) -> Response:
    """Not yet: the client asks again at once, and silently."""
    body = {
        "type": "try_again",
        "request_id": request_id,
        "queue_state": "active",
        "queue_state_reason": reason,
    }
    return JSONResponse(body, status_code=408)


def _failed(error: TGTinkerError, request_id: str) -> Response:
    if isinstance(error, ServerError) and error.details.get("retry") is True:
        return try_again(request_id, "the server is restarting")
    return JSONResponse(failure(error))


def _gone(request_id: str) -> Response:
    text = "the result is not kept any more; send the request again"
    return JSONResponse({"detail": text, "request_id": request_id}, status_code=410)


def _forgotten_refusal() -> dict[str, Any]:
    return {"error": "the request was refused before the server was restarted; send it again", "category": "user"}
