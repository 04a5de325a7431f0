"""The routes that make models and train them. Whatever can be read is accepted; failures become failed futures."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from tg_tinker.errors import (
    AuthenticationError,
    AuthorizationError,
    RateLimitedError,
    ResourceNotFoundError,
    ServerError,
    TGTinkerError,
)
from tg_tinker.types.run import RunInfo
from tg_tinker_server.gateway import messages, names
from tg_tinker_server.gateway.calls import canonical, request_of
from tg_tinker_server.gateway.doors import Handler
from tg_tinker_server.gateway.errors import TooLargeError
from tg_tinker_server.gateway.futures import Futures
from tg_tinker_server.gateway.messages import read
from tg_tinker_server.gateway.requests import SMALL_BYTES, HttpCall, aside, parse_json
from tg_tinker_server.gateway.sessions import Sessions
from tg_tinker_server.gateway.training import Training, sampler_seal
from tg_tinker_server.service.custom_losses import CustomLosses
from tg_tinker_server.service.run_info import RunInfos

JSON_PASS_BYTES = 4 * SMALL_BYTES  # of clients that do not send protobuf; a body of theirs is read in one go
# These a client must hear at once: to wait, to give up, or to correct its key or its ids.
_AT_ONCE = (
    AuthenticationError,
    AuthorizationError,
    RateLimitedError,
    ResourceNotFoundError,
    ServerError,
    TooLargeError,
)


@dataclass(frozen=True, slots=True)
class TrainingDoors:
    """create_model, load_weights, get_info, and every operation with a seq_id."""

    sessions: Sessions
    training: Training
    futures: Futures
    losses: CustomLosses
    infos: RunInfos

    def handlers(self) -> Mapping[str, Handler]:
        """By route."""
        operations = ("forward_backward", "forward", "optim_step", "save_weights", "save_weights_for_sampler")
        return {
            "POST create_model": self.create_model,
            "POST load_weights": self.load_weights,
            "POST get_info": self.get_info,
            "POST create_custom_loss": self.create_custom_loss,
            **{f"POST {name}": self._operation(name) for name in (*operations, "save_weights_external")},
        }

    async def create_model(self, call: HttpCall) -> Response:
        """A new model, as a future."""
        data = await call.json_body()
        value = await aside(len(data), lambda: parse_json(data))
        message = read(messages.CreateModel, value)
        try:
            model_id = await self.training.models.create(call.caller, message, value)
        except TGTinkerError as e:
            return self._refused(call, e)
        return _submitted(names.create_request(model_id), model_id)

    async def load_weights(self, call: HttpCall) -> Response:
        """A new model that begins with saved weights; or, as old clients do it, weights into a model."""
        data = await call.json_body()
        value = await aside(len(data), lambda: parse_json(data))
        if isinstance(value, dict) and value.get("model_id") is not None:
            return await self._submit(call, "load_weights", data, protobuf=False)
        message = read(messages.LoadWeights, value)
        try:
            model_id = await self.training.models.load(call.caller, message, value)
        except TGTinkerError as e:
            return self._refused(call, e)
        return _submitted(names.load_request(model_id), model_id)

    async def get_info(self, call: HttpCall) -> Response:
        """What a model is."""
        model_id = (await call.message(messages.OfModel)).model_id
        run = await self.training.run(call.caller, model_id)
        info = await self.infos.of_run(run)
        # Clients load the tokenizer themselves, from the hub or from a folder, which only this machine has.
        folder = self.infos.tokenizers.folder_of(info.model_name) if call.from_this_machine else None
        return JSONResponse(model_info(model_id, info, tokenizer_id=str(folder or info.tokenizer_id)))

    async def create_custom_loss(self, call: HttpCall) -> Response:
        """A loss that runs on the server, as a graph of functions that are on a list."""
        message = await call.message(messages.CreateCustomLoss, large=True)
        await self.sessions.get(call.caller, message.session_id)
        graph = {**message.graph, "inputs": [i.model_dump() for i in message.inputs]}
        try:
            text = await asyncio.to_thread(lambda: canonical(graph).decode())
            loss_id = await self.losses.create(call.caller.tenant, text)
        except TGTinkerError as e:
            return self._refused(call, e)
        return _submitted(names.loss_request(message.session_id, message.custom_loss_seq_id, loss_id), None)

    def _operation(self, name: str) -> Handler:
        async def submit(call: HttpCall) -> Response:
            tensors = name in ("forward_backward", "forward")
            limit = call.most_bytes if call.is_protobuf else JSON_PASS_BYTES if tensors else SMALL_BYTES
            data = await call.body(min(limit, call.most_bytes))
            return await self._submit(call, name, data, protobuf=call.is_protobuf)

        return submit

    async def _submit(self, call: HttpCall, name: str, data: bytes, *, protobuf: bool) -> Response:
        request = await aside(len(data), lambda: request_of(name, data, protobuf=protobuf))
        if name == "save_weights_external":
            call.caller.require("TRAIN")  # it takes a number of the model's
        seal = ""
        try:
            await self.training.submit(call.caller, request)
            if request.sampler is not None:
                run = await self.training.run(call.caller, request.model_id)
                seal = sampler_seal(run, request.seq, names.sampler_of(request.model_id, request.sampler))
        except TGTinkerError as e:
            return self._refused(call, e)
        request_id = names.operation_request(request.model_id, request.seq, request.sampler, seal)
        return _submitted(request_id, request.model_id)

    def _refused(self, call: HttpCall, error: TGTinkerError) -> Response:
        if isinstance(error, _AT_ONCE):
            raise error
        return _submitted(self.futures.refuse(call.caller, error), None)


def model_info(model_id: str, info: RunInfo, *, tokenizer_id: str) -> dict[str, Any]:
    """A model as the protocol describes it."""
    return {
        "type": "get_info",
        "model_id": model_id,
        "model_data": {
            "arch": info.family or None,
            "model_name": info.model_name,
            "tokenizer_id": tokenizer_id or None,
        },
        "model_name": info.model_name,
        "optimizer_config": {"type": "adamw"},
        "is_lora": info.is_lora,
        "lora_rank": info.lora_rank,
    }


def _submitted(request_id: str, model_id: str | None) -> Response:
    return JSONResponse({"request_id": request_id, "model_id": model_id})
