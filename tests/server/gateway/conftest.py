"""A server in this process and a client of the Tinker protocol that is nothing but HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tg_tinker.proto.v1 import gateway_pb2 as pb
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

MODEL = "bigram"


def config(path: Path, **settings: Any) -> ServerConfig:
    return ServerConfig(port=0, tinker_port=0, backend="bigram", data_dir=path, **settings)


@dataclass
class Raw:
    """Speaks the protocol with one key."""

    url: str
    key: str
    session: str = ""
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=120))

    def call(self, method: str, path: str, json: Any = None, **options: Any) -> httpx.Response:
        headers = {"X-API-Key": f"tml-{self.key}", **options.pop("headers", {})}
        return self.http.request(method, f"{self.url}/api/v1/{path}", json=json, headers=headers, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> httpx.Response:
        return self.call("POST", path, json, **options)

    def ok(self, path: str, json: Any = None) -> Any:
        response = self.post(path, json)
        assert response.status_code == 200, response.text
        return response.json()

    def open(self) -> Raw:
        self.session = self.ok("create_session", {"tags": [], "user_metadata": {"who": "me"}, "sdk_version": "t"})[
            "session_id"
        ]
        return self

    def retrieve(self, request_id: str, *, proto: bool = False) -> Any:
        headers = {"Accept": "application/x-protobuf"} if proto else {}
        while True:
            response = self.post("retrieve_future", {"request_id": request_id}, headers=headers)
            if response.status_code != 408:
                break
        assert response.status_code == 200, response.text
        if response.headers["content-type"] == "application/x-protobuf":
            return response.content
        return response.json()

    def create(self, n: int = 0, **more: Any) -> str:
        body = {
            "session_id": self.session,
            "model_seq_id": n,
            "base_model": MODEL,
            "lora_config": {"rank": 4},
            **more,
        }
        answer = self.ok("create_model", body)
        made = self.retrieve(answer["request_id"])
        assert made.get("model_id") == f"{self.session}:train:{n}", made
        return str(made["model_id"])

    def submit(self, route: str, model: str, seq: int, **body: Any) -> str:
        return str(self.ok(route, {"model_id": model, "seq_id": seq, **body})["request_id"])

    def step(self, model: str, seq: int, lr: float = 0.1) -> str:
        return self.submit("optim_step", model, seq, adam_params={"learning_rate": lr})

    def forward_backward(self, request: pb.ForwardBackwardRequest) -> httpx.Response:
        return self.post(
            "forward_backward",
            content=request.SerializeToString(),
            headers={"Content-Type": "application/x-protobuf"},
        )

    def train(self, model: str, seq: int, *rows: list[int], forward_only: bool = False) -> str:
        response = self.forward_backward(cross_entropy(model, seq, *rows, forward_only=forward_only))
        assert response.status_code == 200, response.text
        return str(response.json()["request_id"])

    def outputs(self, request_id: str) -> pb.ForwardBackwardOutput:
        data = self.retrieve(request_id, proto=True)
        assert isinstance(data, bytes), data
        return pb.ForwardBackwardOutput.FromString(data)


def tensor(values: Any, dtype: str = "float32") -> pb.Tensor:
    array = np.asarray(values, dtype=dtype)
    kind = pb.DTYPE_INT64 if dtype == "int64" else pb.DTYPE_FLOAT32
    return pb.Tensor(dense=array.tobytes(), dtype=kind, shape=array.shape)


def datum(tokens: list[int], targets: list[int], **inputs: pb.Tensor) -> pb.Datum:
    made = pb.Datum()
    made.model_input.add().encoded_text.tokens = np.asarray(tokens, dtype="<i4").tobytes()
    made.loss_fn_inputs["target_tokens"].CopyFrom(tensor(targets, "int64"))
    for name, value in inputs.items():
        made.loss_fn_inputs[name].CopyFrom(value)
    return made


def cross_entropy(model: str, seq: int, *rows: list[int], forward_only: bool = False) -> pb.ForwardBackwardRequest:
    request = pb.ForwardBackwardRequest(
        model_id=model, seq_id=seq, loss_fn="cross_entropy", forward_only=forward_only
    )
    for row in rows or ([1, 2, 3, 4],):
        weights = tensor([1.0] * (len(row) - 1))
        request.data.append(datum(row[:-1], row[1:], weights=weights))
    return request


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(config(tmp_path_factory.mktemp("gateway"), tinker_gap_s=0.3)) as running:
        yield running


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[Raw]:
    with httpx.Client(timeout=120) as http:
        yield Raw(server.tinker_url, server.mint_key(), http=http).open()
