"""The routes that sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.responses import JSONResponse, Response

from tg_tinker.errors import InvalidRequestError, RateLimitedError, ResourceNotFoundError, ServerError, TGTinkerError
from tg_tinker.types.tokens import SampleQuery, SamplingParams
from tg_tinker_server.gateway import messages, names
from tg_tinker_server.gateway.calls import canonical
from tg_tinker_server.gateway.doors import Handler
from tg_tinker_server.gateway.futures import Futures
from tg_tinker_server.gateway.messages import read
from tg_tinker_server.gateway.requests import HttpCall, aside, parse_json
from tg_tinker_server.gateway.samples import Samples
from tg_tinker_server.gateway.sessions import Sessions
from tg_tinker_server.gateway.tensors import DatumReader, Layout, listed_from_json, model_input_from_json
from tg_tinker_server.service.samplers import SamplerService

_LARGEST = 2**63
_PARAMS = ("max_tokens", "seed", "temperature", "top_k", "top_p")


@dataclass(frozen=True, slots=True)
class SamplingDoors:
    """create_sampling_session, samplers, asample, and what becomes of it."""

    sessions: Sessions
    samplers: SamplerService
    samples: Samples
    futures: Futures

    def handlers(self) -> Mapping[str, Handler]:
        """By route."""
        return {
            "POST create_sampling_session": self.create,
            "POST join_sampling_session": self.join,
            "GET samplers/{sampler}": self.get,
            "POST asample": self.sample,
            "POST retrieve_future": self.futures.retrieve,
            "POST retrieve_futures": self.futures.retrieve_many,
            "POST cancel_future": self.futures.cancel,
        }

    async def create(self, call: HttpCall) -> Response:
        """A sampler of a base model or of saved weights."""
        asked = await call.message(messages.CreateSampler)
        await self.sessions.get(call.caller, asked.session_id)
        sampler_id = names.sampler_id(asked.session_id, asked.sampling_session_seq_id)
        info = await self.samplers.create(
            call.caller,
            sampler_id=sampler_id,
            base_model=(asked.base_model or "") if not asked.model_path else "",
            path=asked.model_path or "",
        )
        return JSONResponse({"type": "create_sampling_session", "sampling_session_id": info.sampler_id})

    async def join(self, call: HttpCall) -> Response:
        """Not offered: the flag that asks for it is off."""
        await self.samplers.get(call.caller, (await call.message(messages.OfSampler)).sampling_session_id)
        raise InvalidRequestError(
            "clients of one sampling session number their requests themselves here; update client/config",
            field="sampling_session_id",
            constraint="not joined",
        )

    async def get(self, call: HttpCall) -> Response:
        """What a sampler samples from."""
        info = await self.samplers.get(call.caller, call.part("sampler"))
        path = info.path if info.path.startswith("tinker://") else None
        return JSONResponse({"sampler_id": info.sampler_id, "base_model": info.base_model, "model_path": path})

    async def sample(self, call: HttpCall) -> Response:
        """Begin to sample. Too many at once: 429, and the client sends it again."""
        data = await call.json_body(large=True)
        asked, body = await aside(len(data), lambda: _read(data))
        if asked.sampling_session_id is None or asked.seq_id is None:
            raise InvalidRequestError(
                "sampling_session_id or seq_id is missing; create a sampling session first",
                field="sampling_session_id",
                constraint="given",
            )
        sampler_id, seq = asked.sampling_session_id, asked.seq_id
        await self.futures.require_sampler(call.caller, sampler_id)
        try:
            query, layout = await aside(len(data), lambda: query_of(asked))
            request_id = await self.samples.submit(call.caller, sampler_id, seq, query, body, layout)
        except (RateLimitedError, ResourceNotFoundError, ServerError):
            raise
        except TGTinkerError as e:
            request_id = self.samples.refuse(call.caller, sampler_id, seq, e, body)
        count = max(0, min(asked.num_samples, 2**16))
        ids = [f"{request_id}:{i}" for i in range(count)]
        return JSONResponse({"request_id": request_id, "sample_sequence_ids": ids})


def _read(data: bytes) -> tuple[messages.Sample, bytes]:
    value = parse_json(data)
    return read(messages.Sample, value), canonical(value)


def query_of(asked: messages.Sample) -> tuple[SampleQuery, Layout | None]:
    """The request for the sampler, and the layout of the ids it asks for where that is sparse.

    Raises:
        InvalidRequestError: naming the option that cannot be.
    """
    prompt = tuple(model_input_from_json(asked.prompt))
    targets, layout = _targets(asked.target_prompt_logprobs)
    query = SampleQuery(
        prompt=prompt,
        num_samples=asked.num_samples,
        params=_params(asked.sampling_params),
        prompt_logprobs=asked.prompt_logprobs,
        topk_prompt_logprobs=asked.topk_prompt_logprobs,
        topk_sample_logprobs=asked.topk_sample_logprobs,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=asked.prompt_alt_tokens_k,
        prompt_logprobs_last_n=asked.prompt_logprobs_last_n,
    )
    return query, layout


def _params(value: Mapping[str, Any]) -> SamplingParams:
    given = {k: value[k] for k in _PARAMS if value.get(k) is not None}
    for key, number in given.items():
        whole = key in ("max_tokens", "seed", "top_k")
        fits = isinstance(number, int) if whole else isinstance(number, int | float)
        if isinstance(number, bool) or not fits or not -_LARGEST < number < _LARGEST:
            raise InvalidRequestError(f"{key} is not a number", field=f"sampling_params.{key}", constraint="a number")
    return SamplingParams(**given, stop=value.get("stop"))


def _targets(value: Mapping[str, Any] | None) -> tuple[npt.NDArray[np.int64] | None, Layout | None]:
    """Row i there scores position i + 1; here row i scores position i, so there is one row more. -1 asks nothing,
    and of a sparse tensor what is not listed asks nothing either.
    """
    if value is None:
        return None, None
    name, layout = "target_prompt_logprobs", None
    rows: npt.NDArray[Any]
    if value.get("sparse_crow_indices") is not None:
        rows, layout = listed_from_json(name, value, filling=-1)
    else:
        sent = {"model_input": {"chunks": []}, "loss_fn_inputs": {name: value}}
        rows = DatumReader().from_json(sent).loss_fn_inputs[name].to_numpy()
    if value.get("dtype") != "int64" or rows.ndim not in (1, 2):
        raise InvalidRequestError(
            f"{name} are token ids, int64 [prompt - 1] or [prompt - 1, K]", field=name, constraint="int64"
        )
    return np.concatenate([np.full((1, *rows.shape[1:]), -1, dtype=np.int64), rows]), layout
