"""Tensors as a safetensors file, in NumPy alone: written by either side, read by whoever does not trust the writer.

    file = header length (8, little-endian) | header (JSON, padded with spaces to 8) | data
    header = {"__metadata__": {...}, "<name>": {"dtype", "shape", "data_offsets"}, ...}

Reading is strict: tensors cover the data without gap or overlap, sizes agree with shapes, only numbers are
known. Nothing is allocated for a size that the file claims; arrays are views of the bytes given.

Source: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LENGTH_BYTES = 8
LARGEST_HEADER_BYTES = 16 * 2**20
LARGEST_RANK = 32
METADATA = "__metadata__"
WEIGHTS_METADATA = {"format": "pt"}  # transformers refuses a file of weights that does not say so
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
NAMES = {np.dtype(code): name for name, code in DTYPES.items()}

Array = npt.NDArray[Any]
Bytes = bytes | bytearray | memoryview


class FormatError(ValueError):
    """These bytes are not in the format; whoever reads turns it into an error for people."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as a file's header describes it; ``start`` and ``end`` count from the beginning of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def write_tensors(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """The file, in pieces: the header, then each array's bytes without a copy where they are contiguous.

    Raises:
        ValueError: a dtype safetensors has no name for, or a reserved name.
    """
    # Largest items first, as the safetensors library does, keeps every array aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    described = []
    for name, array in ordered:
        dtype = NAMES.get(array.dtype.newbyteorder("<"))
        if dtype is None or name == METADATA:
            raise ValueError(f"tensor {name!r} of dtype {array.dtype} cannot be stored")
        described.append((name, dtype, array.shape, array.nbytes))
    yield memoryview(header_bytes(described, metadata))
    for _, array in ordered:
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        yield memoryview(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)


def read_tensors(file: memoryview) -> tuple[dict[str, Array], dict[str, Any]]:
    """Tensors, as views of ``file``, and the metadata.

    Raises:
        FormatError: anything but a whole, gapless safetensors file of numbers with metadata.
    """
    length = header_length(file[:LENGTH_BYTES], len(file))
    data = file[LENGTH_BYTES + length :]
    entries, metadata = parse_header(file[LENGTH_BYTES : LENGTH_BYTES + length], len(data))
    tensors = {e.name: _array(data[e.start : e.end], np.dtype(DTYPES[e.dtype]), e.shape) for e in entries}
    return tensors, metadata


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file.

    Args:
        tensors: name, dtype, shape and size in bytes, in the order of their data.

    Raises:
        ValueError: it would be longer than readers take.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)}
    offset = 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER_BYTES:
        raise ValueError(f"the state and tensor names take {len(text)} bytes, over {LARGEST_HEADER_BYTES}")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def header_length(start: Bytes, file_bytes: int) -> int:
    """The length that the first bytes of a file announce.

    Raises:
        FormatError: longer than allowed or than the file.
    """
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < LENGTH_BYTES or length > min(LARGEST_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise FormatError("the header is longer than allowed or than the file")
    return length


def parse_header(text: memoryview, data_bytes: int) -> tuple[list[Entry], dict[str, Any]]:
    """Every tensor in the order of the data, and the metadata.

    Raises:
        FormatError: tensors do not cover the data without gap and overlap, or are not of numbers.
    """
    header = parse_object(_utf8(text))
    metadata = header.pop(METADATA, None)
    if not isinstance(metadata, dict):
        raise FormatError("no metadata")
    entries = []
    for name, value in header.items():
        dtype, shape, (start, end) = _entry(value)
        if not start <= end <= data_bytes or math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize != end - start:
            raise FormatError("a tensor does not fit")
        entries.append(Entry(name, dtype, shape, start, end))
    entries.sort(key=lambda e: (e.start, e.end))
    position = 0
    for entry in entries:
        if entry.start != position:
            raise FormatError("tensors overlap or leave a gap")
        position = entry.end
    if position != data_bytes:
        raise FormatError("bytes that belong to no tensor")
    return entries, metadata


def _entry(entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("a tensor's entry")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError("dtype")
    if not _sizes(shape) or len(shape) > LARGEST_RANK:
        raise FormatError("shape")
    if not _sizes(offsets) or len(offsets) != 2:
        raise FormatError("offsets")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _array(data: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    try:
        return np.frombuffer(data, dtype=dtype).reshape(shape)
    except ValueError as e:  # dimensions beyond what an index can count, next to one that is zero
        raise FormatError("shape") from e


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _utf8(text: memoryview) -> str:
    try:
        return str(text, "utf-8")
    except UnicodeDecodeError as e:
        raise FormatError("not UTF-8") from e


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object without repeated names; repeated names could hide one tensor behind another.

    Raises:
        FormatError: anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise FormatError("a name appears twice")
        return values

    def no_constant(name: str) -> Any:
        raise FormatError(f"{name} is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as e:
        raise FormatError("not JSON") from e
    if not isinstance(value, dict):
        raise FormatError("not an object")
    return value
