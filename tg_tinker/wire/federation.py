"""Plain weights and notes of a federation on the wire.

Weights travel as a safetensors file of float32 tensors, in pieces of at most 1 MiB after a first message that says
how long the file is. Whoever receives one believes nothing that it says about itself.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import ValidationError

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.exports.manifest import MODEL
from tg_tinker.proto.v1 import federation_pb2
from tg_tinker.tensor_file import (
    WEIGHTS_METADATA,
    Array,
    Bytes,
    Entry,
    FormatError,
    read_tensors,
    write_tensors,
)
from tg_tinker.types import LoRAConfig
from tg_tinker.types.configs import MANY
from tg_tinker.types.federation import LARGEST_WEIGHTS_BYTES, AdapterWeights, WeightsSource

PIECE_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,499}", re.ASCII)  # of parameters; they stand in exports, signed


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWeights:
    """What the first message of an import says.

    Attributes:
        lora_config: ``None`` where every parameter is trained.
        size_bytes: of the file that follows.

    Raises:
        InvalidRequestError: a value that cannot be.
    """

    base_model: str
    lora_config: LoRAConfig | None
    step: int
    size_bytes: int
    source: WeightsSource

    def __post_init__(self) -> None:
        for field, holds, constraint in (
            ("base_model", MODEL.fullmatch(self.base_model) is not None, "letters, digits and ._/:@+-, at most 200"),
            ("step", 0 <= self.step <= MANY, f"0 to {MANY}"),
            ("tensors", 0 < self.size_bytes <= LARGEST_WEIGHTS_BYTES, f"at most {LARGEST_WEIGHTS_BYTES} bytes"),
        ):
            if not holds:
                raise InvalidRequestError(f"{field} must be {constraint}", field=field, constraint=constraint)


def pull_weights(run_id: str) -> federation_pb2.PullWeightsRequest:
    """Stream a run's weights."""
    return federation_pb2.PullWeightsRequest(run_id=run_id)


def weights_to_proto(weights: AdapterWeights) -> Iterator[federation_pb2.WeightsChunk]:
    """Weights as messages."""
    size, pieces = weights_file(weights.tensors)
    yield federation_pb2.WeightsChunk(head=federation_pb2.WeightsHead(step=weights.step, size_bytes=size))
    for piece in pieces:
        yield federation_pb2.WeightsChunk(data=piece)


def weights_from_proto(chunks: Iterable[federation_pb2.WeightsChunk]) -> AdapterWeights:
    """Weights from messages.

    Raises:
        ServerError: they are not whole, or not a file of finite float32 tensors.
    """
    source = iter(chunks)
    first = next(source, None)
    if first is None or first.WhichOneof("part") != "head" or not 0 < first.head.size_bytes <= LARGEST_WEIGHTS_BYTES:
        raise _unreadable("they do not begin with a size that can be")
    file = bytearray()
    for chunk in source:
        file += chunk.data
        if len(file) > first.head.size_bytes:
            raise _unreadable("they are longer than the server said")
    if len(file) != first.head.size_bytes:
        raise _unreadable("they are shorter than the server said")
    try:
        tensors, _ = read_tensors(memoryview(file))
    except FormatError as e:
        raise _unreadable("they are not a safetensors file") from e
    for array in tensors.values():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise _unreadable("they are not finite float32 numbers")
    return AdapterWeights(tensors=tensors, step=first.head.step)


def import_weights(
    tensors: Mapping[str, Array],
    *,
    base_model: str,
    lora_config: LoRAConfig | None,
    step: int,
    source: WeightsSource,
) -> Iterator[federation_pb2.ImportWeightsRequest]:
    """Send plain weights to be made a checkpoint.

    Raises:
        InvalidRequestError: naming the tensor that is not of finite float32, before anything is sent.
    """
    for name, array in tensors.items():
        check_name(name)
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise refused_tensor(f"{name} is of {kind}; give numpy arrays of float32")
        if not np.isfinite(array).all():
            raise refused_tensor(f"{name} holds values that are not finite")
    size, pieces = weights_file(tensors)
    new = NewWeights(base_model=base_model, lora_config=lora_config, step=step, size_bytes=size, source=source)

    def messages() -> Iterator[federation_pb2.ImportWeightsRequest]:
        yield federation_pb2.ImportWeightsRequest(head=new_weights_to_proto(new))
        for piece in pieces:
            yield federation_pb2.ImportWeightsRequest(data=piece)

    return messages()


def new_weights_to_proto(new: NewWeights) -> federation_pb2.ImportWeightsHead:
    """The first message of an import."""
    return federation_pb2.ImportWeightsHead(
        base_model=new.base_model,
        lora_config_json="" if new.lora_config is None else new.lora_config.model_dump_json(),
        step=new.step,
        size_bytes=new.size_bytes,
        source=source_to_proto(new.source),
    )


def new_weights_from_proto(head: federation_pb2.ImportWeightsHead) -> NewWeights:
    """The first message of an import, read.

    Raises:
        InvalidRequestError: naming what is wrong.
    """
    try:
        lora = LoRAConfig.model_validate_json(head.lora_config_json) if head.lora_config_json else None
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(["lora_config", *map(str, first["loc"])])
        raise InvalidRequestError(f"{where}: {first['msg']}", field=where, constraint=first["type"]) from e
    return NewWeights(
        base_model=head.base_model,
        lora_config=lora,
        step=head.step,
        size_bytes=head.size_bytes,
        source=source_from_proto(head.source),
    )


def source_to_proto(source: WeightsSource) -> federation_pb2.WeightsSource:
    """Where weights come from, as a message."""
    return federation_pb2.WeightsSource(
        kind=source.kind,
        job=source.job,
        round=source.round,
        epsilon=source.epsilon,
        delta=source.delta,
        unit=source.unit,
    )


def source_from_proto(message: federation_pb2.WeightsSource) -> WeightsSource:
    """Where weights come from, from a message."""
    return WeightsSource(
        kind=message.kind,
        job=message.job,
        round=message.round,
        epsilon=message.epsilon,
        delta=message.delta,
        unit=message.unit,
    )


def note(event: str, job: str, round_: int, reason: str) -> federation_pb2.NoteFederationRequest:
    """Note what became of a job or a round."""
    return federation_pb2.NoteFederationRequest(event=event, job=job, round=round_, reason=reason)


def weights_file(tensors: Mapping[str, Array]) -> tuple[int, Iterator[bytes]]:
    """Size in bytes of the file of these weights, and its pieces.

    Raises:
        InvalidRequestError: there are more names than a header takes.
    """
    pieces = write_tensors(tensors, WEIGHTS_METADATA)
    try:
        header = next(pieces)
    except ValueError as e:
        raise refused_tensor(str(e)) from e
    return len(header) + sum(a.nbytes for a in tensors.values()), _cut(itertools.chain((header,), pieces))


def check_name(name: str) -> None:
    """Refuse what is no name of a parameter.

    Raises:
        InvalidRequestError: it is not.
    """
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise refused_tensor(f"{str(name)[:100]!r} is no name of a parameter")


def check_entries(entries: Iterable[Entry]) -> None:
    """Refuse tensors that an import does not take, by what the header of their file says.

    Raises:
        InvalidRequestError: naming the first.
    """
    for entry in entries:
        check_name(entry.name)
        if entry.dtype != "F32":
            raise refused_tensor(f"{entry.name} is of {entry.dtype}; give float32")


def finite(data: Iterable[Bytes]) -> Iterator[Bytes]:
    """Pass float32 numbers on, cut anywhere.

    Raises:
        InvalidRequestError: one is not finite.
    """
    rest = b""
    for piece in data:
        whole = len(rest) + len(piece) - (len(rest) + len(piece)) % 4
        joined = rest + bytes(piece) if rest else piece
        if not np.isfinite(np.frombuffer(joined, dtype="<f4", count=whole // 4)).all():
            raise refused_tensor("they hold values that are not finite")
        rest = bytes(joined[whole:])
        yield piece


def refused_tensor(what: str) -> InvalidRequestError:
    """Tensors that are not taken."""
    return InvalidRequestError(
        f"these weights cannot be taken: {what}", field="tensors", constraint="finite float32, by parameter name"
    )


def _cut(pieces: Iterable[Bytes]) -> Iterator[bytes]:
    for piece in pieces:
        view = memoryview(piece)
        for i in range(0, len(view), PIECE_BYTES):
            yield bytes(view[i : i + PIECE_BYTES])


def _unreadable(why: str) -> ServerError:
    return ServerError(f"the weights that the server sent cannot be used: {why}; ask for them again")
