"""Takes the weights out of an artifact's plaintext, or puts them into one, while the bytes stream by.

An artifact holds ``weights/<name>`` and ``optimizer/<name>/<quantity>``; a file to hand out holds the weights alone,
under the names that PEFT and transformers use. Data keeps its order, so nothing is ever held but one piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tg_tinker.tensor_file import (
    LENGTH_BYTES,
    WEIGHTS_METADATA,
    Array,
    Bytes,
    Entry,
    FormatError,
    header_bytes,
    header_length,
    parse_header,
)
from tg_tinker.wire.federation import check_entries, finite, refused_tensor
from tg_tinker_server.artifacts.tensors import STATE, state_to_json

WEIGHTS = "weights/"
SAVED_MODULES = ".modules_to_save"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file that is being read: its header, and its data to come."""

    entries: list[Entry]
    metadata: Mapping[str, Any]
    data: Iterator[Bytes]

    @classmethod
    def read(cls, pieces: Iterable[Bytes], size: int) -> TensorFile:
        """Read the header of a file of ``size`` bytes, cut anywhere.

        Raises:
            FormatError: not a safetensors file of numbers that covers its bytes.
        """
        source, held = iter(pieces), b""

        def need(count: int) -> None:
            nonlocal held
            while len(held) < count:
                piece = next(source, None)
                if piece is None:
                    raise FormatError("too short")
                held += piece

        need(LENGTH_BYTES)
        length = header_length(held, size)
        need(LENGTH_BYTES + length)
        header, rest = held[LENGTH_BYTES : LENGTH_BYTES + length], held[LENGTH_BYTES + length :]
        entries, metadata = parse_header(memoryview(header), size - LENGTH_BYTES - length)

        def data() -> Iterator[Bytes]:
            yield rest
            yield from source

        return cls(entries, metadata, data())

    def select(self, wanted: Sequence[Entry]) -> Iterator[memoryview]:
        """The data of some tensors, in order, to the end of the file: what is not wanted is read, too."""
        spans = iter([(e.start, e.end) for e in wanted])
        start, end = next(spans, (0, 0))
        position = 0
        for piece in self.data:
            view, after = memoryview(piece), position + len(piece)
            while start < after and start < end:
                yield view[max(start - position, 0) : min(end, after) - position]
                if end > after:
                    break
                start, end = next(spans, (0, 0))
            position = after


@dataclass(frozen=True, slots=True)
class Weights:
    """A file of weights to hand out: its size in bytes, and its pieces, to be read once."""

    size: int
    pieces: Iterator[Bytes]


def take_weights(pieces: Iterable[Bytes], size: int) -> Weights:
    """The weights of an artifact's plaintext as a file of their own.

    Raises:
        FormatError: as `TensorFile.read`.
    """
    file = TensorFile.read(pieces, size)
    wanted = [e for e in file.entries if e.name.startswith(WEIGHTS) and e.end > e.start]
    described = [(public_name(e.name.removeprefix(WEIGHTS)), e.dtype, e.shape, e.end - e.start) for e in wanted]
    header = header_bytes(described, WEIGHTS_METADATA)

    def out() -> Iterator[Bytes]:
        yield header
        yield from file.select(wanted)

    return Weights(len(header) + sum(d[3] for d in described), out())


def weight_names(pieces: Iterable[Bytes], size: int) -> list[str]:
    """Names of the weights in an artifact's plaintext, as the engine knows them."""
    file = TensorFile.read(pieces, size)
    return [e.name.removeprefix(WEIGHTS) for e in file.entries if e.name.startswith(WEIGHTS)]


def put_weights(
    pieces: Iterable[Bytes], size: int, state: Mapping[str, Any], saved_modules: Sequence[str]
) -> Iterator[Bytes]:
    """An artifact's plaintext from a file of weights; undoes `take_weights`.

    Args:
        saved_modules: ``modules_to_save`` of the adapter, whose names a file to hand out shortens.

    Raises:
        FormatError: not a file that `take_weights` writes.
    """
    file = TensorFile.read(pieces, size)
    if file.metadata != WEIGHTS_METADATA:
        raise FormatError("metadata")
    yield _header_of(file, state, saved_modules)
    yield from file.data


def put_plain_weights(
    pieces: Iterable[Bytes], size: int, state: Mapping[str, Any], saved_modules: Sequence[str]
) -> Iterator[Bytes]:
    """As `put_weights`, for a file that nobody vouches for: finite float32 alone, and not a byte more or less.

    Raises:
        InvalidRequestError: it is another file; raised before its last piece is given.
    """
    try:
        file = TensorFile.read(_exactly(pieces, size), size)
        check_entries(file.entries)
        yield _header_of(file, state, saved_modules)
        yield from finite(file.data)
    except FormatError as e:
        raise refused_tensor(f"they are not a safetensors file of {size} bytes") from e


def weights_of(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The weights among an engine's tensors, under the names that PEFT uses."""
    return {public_name(n.removeprefix(WEIGHTS)): v for n, v in tensors.items() if n.startswith(WEIGHTS) and v.size}


def _header_of(file: TensorFile, state: Mapping[str, Any], saved_modules: Sequence[str]) -> bytes:
    described = [
        (WEIGHTS + engine_name(e.name, saved_modules), e.dtype, e.shape, e.end - e.start) for e in file.entries
    ]
    return header_bytes(described, {STATE: state_to_json(state)})


def _exactly(pieces: Iterable[Bytes], size: int) -> Iterator[Bytes]:
    for piece in pieces:
        size -= len(piece)
        if size < 0:
            raise FormatError("too long")
        yield piece
    if size:
        raise FormatError("too short")


def public_name(name: str) -> str:
    """As PEFT writes it: a module that is trained whole stands under its own name."""
    return name.replace(SAVED_MODULES, "") if name.startswith(PEFT_PREFIX) else name


def engine_name(name: str, saved_modules: Sequence[str]) -> str:
    """Undo `public_name`."""
    if not name.startswith(PEFT_PREFIX):
        return name
    parts = name.removeprefix(PEFT_PREFIX).split(".")
    for i in range(1, len(parts)):
        path = ".".join(parts[:i])
        if any(path == m or path.endswith("." + m) for m in saved_modules):
            return PEFT_PREFIX + path + SAVED_MODULES + "." + ".".join(parts[i:])
    return name
