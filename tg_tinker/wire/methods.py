"""The methods of the protocol, read from its descriptors: client stubs and server handlers come from one table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from tg_tinker.proto.v1 import (
    artifacts_pb2,
    common_pb2,
    datasets_pb2,
    federation_pb2,
    privacy_pb2,
    runs_pb2,
    sampling_pb2,
    training_pb2,
)

_FILES = (training_pb2, sampling_pb2, runs_pb2, artifacts_pb2, privacy_pb2, datasets_pb2, federation_pb2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One RPC.

    Attributes:
        service: full name, e.g. ``"tg_tinker.v1.TrainingService"``.
        path: what HTTP/2 carries, ``"/<service>/<name>"``.
        scope: what the caller's key must allow: PUBLIC, READ, TRAIN, SAMPLE, EXPORT, AUDIT, BUDGET; UNSPECIFIED
            when the protocol file forgot to say.
    """

    service: str
    name: str
    path: str
    request: type[Message]
    reply: type[Message]
    client_streaming: bool
    server_streaming: bool
    scope: str


@cache
def methods() -> tuple[Method, ...]:
    """Every RPC of every service, in the order of the protocol files."""
    found = []
    for file in _FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                scope = method.GetOptions().Extensions[common_pb2.scope]
                found.append(
                    Method(
                        service=service.full_name,
                        name=method.name,
                        path=f"/{service.full_name}/{method.name}",
                        request=GetMessageClass(method.input_type),
                        reply=GetMessageClass(method.output_type),
                        client_streaming=method.client_streaming,
                        server_streaming=method.server_streaming,
                        scope=common_pb2.Scope.Name(scope).removeprefix("SCOPE_"),
                    )
                )
    return tuple(found)


def method_of(request: type[Message]) -> Method:
    """The method that takes this request; every method has a request message of its own.

    Raises:
        KeyError: no method takes it.
    """
    return _by_request()[request]


@cache
def _by_request() -> dict[type[Message], Method]:
    return {m.request: m for m in methods()}
