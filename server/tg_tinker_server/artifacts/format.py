"""The bytes of an artifact around its encrypted body: prefix, header, key slots, tag.

    artifact = prefix | header | tag | body
    prefix   = "TGTINKER" | format version (2, big-endian) | header length (4, big-endian)
    header   = JSON of `Header`, in RFC 8785 form
    tag      = HMAC-SHA256 over prefix and header, under a key derived from the data key (32)
    body     = a stream of tg_tinker.streaming, its associated data `scope`

    slots    = "TGTSLOTS" | version (2) | length (4) | JSON list of slots | tag

Slots written by a later rotation lie in a blob of their own and take the place of the header's, so that an
artifact's bytes, and its hash, never change. docs/formats/artifact.md describes every byte.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import dataclass
from typing import Any

import rfc8785

from tg_tinker_server.artifacts.tensors import FormatError
from tg_tinker_server.crypto.aead import associated_data, derive_key
from tg_tinker_server.crypto.envelope import WrappedKey

MAGIC = b"TGTINKER"
SLOTS_MAGIC = b"TGTSLOTS"
VERSION = 1
ALGORITHM = "AES-256-GCM"
STREAM = "AES256_GCM_HKDF_1MB"
PREFIX_BYTES = 14
TAG_BYTES = 32
LARGEST_HEADER_BYTES = 2**16
LARGEST_START_BYTES = PREFIX_BYTES + LARGEST_HEADER_BYTES + TAG_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What an artifact is and whose; every key and tag in it is bound to this."""

    tenant: str
    artifact_id: str
    kind: str

    @property
    def aad(self) -> bytes:
        """The associated data of the artifact's body and wrapped keys."""
        return associated_data("tg-tinker/artifact/v1", self.tenant, self.artifact_id, self.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What stands before the body, readable by anybody, changeable by nobody.

    Attributes:
        commitment: of the data key. AES-GCM alone lets one ciphertext open under two keys; this does not.
        slots: the data key wrapped for each who may open, normally one.
    """

    scope: Scope
    commitment: bytes
    slots: tuple[WrappedKey, ...]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class DataKeys:
    """The keys of one artifact, all derived from its data key."""

    body: bytes
    tag: bytes
    commitment: bytes

    @classmethod
    def derive(cls, dek: bytes, scope: Scope) -> DataKeys:
        """Three independent keys; the commitment is one that is published."""
        return cls(
            body=derive_key(dek, associated_data("tg-tinker/artifact/body/v1", scope.aad)),
            tag=derive_key(dek, associated_data("tg-tinker/artifact/tag/v1", scope.aad)),
            commitment=derive_key(dek, associated_data("tg-tinker/artifact/commitment/v1", scope.aad)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Framed:
    """A framed JSON value as read, its tag not yet checked."""

    value: Any
    signed: bytes
    tag: bytes

    @property
    def size(self) -> int:
        """Bytes it takes."""
        return len(self.signed) + len(self.tag)

    def has_tag_of(self, keys: DataKeys) -> bool:
        """Whether the holder of these keys wrote exactly these bytes."""
        return hmac.compare_digest(self.tag, hmac.digest(keys.tag, self.signed, hashlib.sha256))


def header_bytes(header: Header, keys: DataKeys) -> bytes:
    """Prefix, header and tag."""
    value = {
        "algorithm": ALGORITHM,
        "artifact_id": header.scope.artifact_id,
        "commitment": base64.b64encode(header.commitment).decode(),
        "kind": header.scope.kind,
        "slots": _slots_to_json(header.slots),
        "stream": STREAM,
        "tenant": header.scope.tenant,
    }
    return _frame(MAGIC, value, keys)


def parse_header(start: bytes) -> tuple[Header, Framed]:
    """Read the header from the first `LARGEST_START_BYTES` (or fewer) of an artifact.

    Raises:
        FormatError: not an artifact of a version known here, or not exactly the bytes `header_bytes` gives.
    """
    framed = _unframe(MAGIC, start)
    value = framed.value
    names = {"algorithm", "artifact_id", "commitment", "kind", "slots", "stream", "tenant"}
    if not isinstance(value, dict) or set(value) != names:
        raise FormatError("header fields")
    if value["algorithm"] != ALGORITHM or value["stream"] != STREAM:
        raise FormatError("algorithm")
    scope = Scope(tenant=_text(value["tenant"]), artifact_id=_text(value["artifact_id"]), kind=_text(value["kind"]))
    slots = _slots_from_json(value["slots"])
    return Header(scope=scope, commitment=_from_base64(value["commitment"]), slots=slots), framed


def slots_bytes(slots: tuple[WrappedKey, ...], keys: DataKeys) -> bytes:
    """The blob of slots that a rotation writes beside an artifact."""
    return _frame(SLOTS_MAGIC, _slots_to_json(slots), keys)


def parse_slots(blob: bytes) -> tuple[tuple[WrappedKey, ...], Framed]:
    """Undo `slots_bytes`.

    Raises:
        FormatError: as `parse_header`, or bytes after the end.
    """
    framed = _unframe(SLOTS_MAGIC, blob)
    if framed.size != len(blob):
        raise FormatError("bytes after the slots")
    return _slots_from_json(framed.value), framed


def _frame(magic: bytes, value: Any, keys: DataKeys) -> bytes:
    text = rfc8785.dumps(value)
    if len(text) > LARGEST_HEADER_BYTES:
        raise ValueError(f"an artifact header of {len(text)} bytes is over {LARGEST_HEADER_BYTES}")
    signed = magic + VERSION.to_bytes(2, "big") + len(text).to_bytes(4, "big") + text
    return signed + hmac.digest(keys.tag, signed, hashlib.sha256)


def _unframe(magic: bytes, start: bytes) -> Framed:
    if start[:8] != magic or start[8:10] != VERSION.to_bytes(2, "big"):
        raise FormatError("not an artifact of a known version")
    length = int.from_bytes(start[10:PREFIX_BYTES], "big")
    end = PREFIX_BYTES + length
    if length > LARGEST_HEADER_BYTES or len(start) < end + TAG_BYTES:
        raise FormatError("header length")
    try:
        value = json.loads(start[PREFIX_BYTES:end])
        canonical: bytes = rfc8785.dumps(value)
    except (ValueError, RecursionError) as e:  # rfc8785's errors are ValueErrors
        raise FormatError("header JSON") from e
    if canonical != start[PREFIX_BYTES:end]:
        raise FormatError("header is not in canonical form")
    return Framed(value=value, signed=start[:end], tag=start[end : end + TAG_BYTES])


def _slots_to_json(slots: tuple[WrappedKey, ...]) -> list[dict[str, str]]:
    return [{"key_id": s.key_id, "wrapped": base64.b64encode(s.wrapped).decode()} for s in slots]


def _slots_from_json(value: Any) -> tuple[WrappedKey, ...]:
    if not isinstance(value, list) or not value:
        raise FormatError("slots")
    slots = []
    for slot in value:
        if not isinstance(slot, dict) or set(slot) != {"key_id", "wrapped"}:
            raise FormatError("slot fields")
        slots.append(WrappedKey(key_id=_text(slot["key_id"]), wrapped=_from_base64(slot["wrapped"])))
    return tuple(slots)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise FormatError("text expected")
    return value


def _from_base64(value: Any) -> bytes:
    try:
        decoded = base64.b64decode(_text(value), validate=True)
    except (binascii.Error, ValueError) as e:
        raise FormatError("base64") from e
    if base64.b64encode(decoded).decode() != value:
        raise FormatError("base64 is not in canonical form")
    return decoded
