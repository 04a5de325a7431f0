"""The plaintext of an artifact: a safetensors file with one JSON text, ``state``, in its metadata.

header = {"__metadata__": {"state": "<JSON text>"}, "<name>": {"dtype", "shape", "data_offsets"}, ...}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tg_tinker.tensor_file import (
    DTYPES,
    LARGEST_HEADER_BYTES,
    Array,
    Bytes,
    FormatError,
    parse_object,
    read_tensors,
    write_tensors,
)

STATE = "state"


def serialize(tensors: Mapping[str, Array], state: Mapping[str, Any]) -> Iterator[memoryview]:
    """The file, in pieces: the header, then each array's bytes without a copy where they are contiguous.

    Raises:
        ValueError: a dtype safetensors has no name for, a reserved name, or a state that is not JSON.
    """
    yield from write_tensors(tensors, {STATE: state_to_json(state)})


def parse(file: memoryview) -> tuple[dict[str, Array], dict[str, Any]]:
    """Tensors, as views of ``file``, and the state.

    Raises:
        FormatError: anything but a whole, gapless safetensors file of numbers with a state.
    """
    tensors, metadata = read_tensors(file)
    return tensors, state_from(metadata)


def state_from(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The state in an artifact's metadata.

    Raises:
        FormatError: there is none, or something beside it.
    """
    if set(metadata) != {STATE} or not isinstance(metadata[STATE], str):
        raise FormatError("no state")
    return parse_object(metadata[STATE])


def state_to_json(state: Mapping[str, Any]) -> str:
    """The state as the metadata holds it.

    Raises:
        ValueError: not plain JSON.
    """
    try:
        return json.dumps(dict(state), allow_nan=False, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"the state is not plain JSON: {e}") from e


__all__ = [
    "DTYPES",
    "LARGEST_HEADER_BYTES",
    "STATE",
    "Array",
    "Bytes",
    "FormatError",
    "parse",
    "serialize",
    "state_from",
    "state_to_json",
]
