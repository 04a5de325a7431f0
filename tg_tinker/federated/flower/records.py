"""Our messages as Flower's records, and back: a header and a signature as bytes, arrays as raw little-endian bytes.

The way in is strict: whoever carries a message may have written anything into it.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import rfc8785
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.messages import DTYPES, Arrays, Envelope

MESSAGE_TYPE = "query.tg_tinker"
"""Flower's type of all our messages. What they ask stands in the signed header."""
LARGEST_HEADER = 16 * 2**20
LARGEST_ARRAYS = 2 * 2**30
"""Bytes of all arrays of a message together."""
MOST_ARRAYS = 20_000

_FORMAT = "tg-tinker/federated-envelope/v1"
_STORAGE = "tg-tinker.little-endian"
_SIGNATURE_BYTES = 64
_MOST_AXES = 8
_TEXTS = {"kind": 64, "job": 128, "site": 64}
_COUNTS = ("round", "attempt")
_FIELDS = {"format", "direction", "facts", *_TEXTS, *_COUNTS}

Shared = dict[int, Array]
"""Arrays that are already converted, by `id` of the NumPy array; a global model goes to every site."""


def to_content(envelope: Envelope, *, shared: Shared | None = None) -> RecordDict:
    """The envelope as a Flower message's content.

    Args:
        shared: filled and used, so that an array in many envelopes is held once. Valid while those arrays live.

    Raises:
        FederationRefusedError: "bad_update": an array's type is not one that is sent, or the message is too large.
    """
    header = rfc8785.dumps(
        {
            "format": _FORMAT,
            "direction": envelope.direction,
            "facts": dict(envelope.facts),
            **{name: getattr(envelope, name) for name in (*_TEXTS, *_COUNTS)},
        }
    )
    total = sum(value.nbytes for value in envelope.arrays.values())
    if len(header) > LARGEST_HEADER or total > LARGEST_ARRAYS or len(envelope.arrays) > MOST_ARRAYS:
        raise _refused(f"it is too large to send: {len(header)} bytes of facts, {total} of arrays")
    known: Shared = {} if shared is None else shared
    arrays: dict[str, Array] = {}
    for name, value in sorted(envelope.arrays.items()):
        if id(value) not in known:
            known[id(value)] = _to_array(value)
        arrays[name] = known[id(value)]
    head = ConfigRecord({"header": header, "signature": envelope.signature})
    return RecordDict({"envelope": head, "arrays": ArrayRecord(arrays)})


def from_content(content: RecordDict) -> Envelope:
    """The envelope in a Flower message's content. Its arrays are read-only. Its signature is not checked here.

    Raises:
        FederationRefusedError: "bad_update": anything is missing, additional, of a wrong type or too large;
            "bad_signature": it has no signature of the right length.
    """
    if set(content) != {"envelope", "arrays"}:
        raise _refused("it has other records than an envelope and arrays")
    head, arrays = content["envelope"], content["arrays"]
    if not isinstance(head, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise _refused("its records are of the wrong kinds")
    if set(head) != {"header", "signature"}:
        raise _refused("its envelope has other fields than a header and a signature")
    signature = head["signature"]
    if not isinstance(signature, bytes) or len(signature) != _SIGNATURE_BYTES:
        raise FederationRefusedError("the message carries no Ed25519 signature", reason="bad_signature")
    return Envelope(**_read_header(head["header"]), arrays=_read_arrays(arrays), signature=signature)


def _read_header(raw: object) -> dict[str, Any]:
    if not isinstance(raw, bytes) or len(raw) > LARGEST_HEADER:
        raise _refused("its header is not a text of reasonable size")
    header: dict[str, Any]
    try:
        header = json.loads(raw, parse_int=_whole_number)
        # One spelling only: no repeated names, no NaN, no number that another reader would round.
        canonical = isinstance(header, dict) and rfc8785.dumps(header) == raw
    except (ValueError, OverflowError, RecursionError) as e:
        raise _refused("its header is not JSON in its canonical form (RFC 8785)") from e
    if not canonical:
        raise _refused("its header is not JSON in its canonical form (RFC 8785)")
    if set(header) != _FIELDS or header.pop("format") != _FORMAT:
        raise _refused(f"its header does not have the fields of {_FORMAT}; compare both versions of tg-tinker")
    texts = all(isinstance(header[name], str) and len(header[name]) <= longest for name, longest in _TEXTS.items())
    counts = all(type(header[name]) is int and 0 <= header[name] < 2**31 for name in _COUNTS)
    if (
        not texts
        or not counts
        or header["direction"] not in ("request", "reply")
        or type(header["facts"]) is not dict
    ):
        raise _refused("a field of its header is of the wrong type")
    return header


def _whole_number(digits: str) -> int | float:
    """JCS writes a float without fraction like an integer; beyond 2**53 only a float can have been meant."""
    number = int(digits)
    return number if abs(number) < 2**53 else float(number)


def _read_arrays(record: ArrayRecord) -> Arrays:
    if len(record) > MOST_ARRAYS:
        raise _refused(f"it has {len(record)} arrays; {MOST_ARRAYS} are the most")
    if sum(len(array.data) for array in record.values()) > LARGEST_ARRAYS:
        raise _refused(f"its arrays are larger than {LARGEST_ARRAYS} bytes together")
    return {name: _from_array(name, array) for name, array in record.items()}


def _to_array(value: npt.NDArray[Any]) -> Array:
    little = np.asarray(value, dtype=value.dtype.newbyteorder("<"), order="C")
    if little.dtype.str not in DTYPES:
        raise _refused(f"arrays of type {value.dtype} are not sent")
    return Array(dtype=little.dtype.str, shape=little.shape, stype=_STORAGE, data=little.tobytes())


def _from_array(name: str, array: Array) -> npt.NDArray[Any]:
    if array.stype != _STORAGE or array.dtype not in DTYPES:
        raise _refused(f"its array {name[:200]!r} is of a type that is not sent")
    shape = array.shape
    if len(shape) > _MOST_AXES or not all(type(size) is int and size >= 0 for size in shape):
        raise _refused(f"its array {name[:200]!r} has no possible shape")
    dtype = np.dtype(array.dtype)
    # NumPy multiplies the sizes other than 0 as well, and knows none beyond its own integers.
    if math.prod(filter(None, shape)) * dtype.itemsize >= 2**63:
        raise _refused(f"its array {name[:200]!r} has no possible shape")
    if math.prod(shape) * dtype.itemsize != len(array.data):
        raise _refused(f"its array {name[:200]!r} has {len(array.data)} bytes, which is not its shape {shape}")
    return np.frombuffer(array.data, dtype=dtype).reshape(shape)


def _refused(what: str) -> FederationRefusedError:
    return FederationRefusedError(f"the message cannot be read: {what}", reason="bad_update")
