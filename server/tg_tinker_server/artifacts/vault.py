"""Seals training state into encrypted artifacts, and opens, streams, rewraps and deletes them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tg_tinker.errors import InvalidRequestError
from tg_tinker.streaming import Bytes, decrypt_segments, encrypt_segments, plaintext_size
from tg_tinker_server.artifacts.blobs import BlobNotFoundError, BlobStore
from tg_tinker_server.artifacts.format import (
    ALGORITHM,
    LARGEST_START_BYTES,
    DataKeys,
    Header,
    Scope,
    header_bytes,
    parse_header,
    parse_slots,
    slots_bytes,
)
from tg_tinker_server.artifacts.tensors import Array, FormatError, parse, serialize
from tg_tinker_server.crypto.aead import DecryptionError, new_key
from tg_tinker_server.crypto.envelope import TenantKeyring, WrappedKey

SLOTS_SUFFIX = ".slots"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedArtifact:
    """An artifact as it was stored.

    Attributes:
        content_hash: ``sha256:`` and hex of all its bytes, as `Vault.stream` gives them; rotation keeps it.
        key_id: the tenant key version that wraps its key.
    """

    artifact_id: str
    size_bytes: int
    content_hash: str
    algorithm: str
    key_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedArtifact:
    """What was sealed. The arrays may be written to; they share one buffer of the artifact's size."""

    tensors: dict[str, Array]
    state: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unlocked:
    """An artifact whose header is verified and whose body is not read yet."""

    scope: Scope
    keys: DataKeys
    dek: bytes
    body_bytes: int
    start: bytes
    start_bytes: int
    rest: Iterator[bytes]

    def body(self) -> Iterator[Bytes]:
        """The encrypted body, once."""
        yield memoryview(self.start)[self.start_bytes :]
        yield from self.rest


class Vault:
    """Encrypted artifacts over a blob store and a keyring. Safe to use from many threads.

    Guarantee: bytes that are not exactly what `seal` wrote for this tenant, id and kind are never returned as
    plaintext. Every such failure, a missing blob included, raises the same InvalidRequestError.
    """

    def __init__(self, blobs: BlobStore, keys: TenantKeyring) -> None:
        self._blobs = blobs
        self._keys = keys

    def seal(
        self,
        *,
        tenant: str,
        artifact_id: str,
        kind: str,
        tensors: Mapping[str, Array],
        state: Mapping[str, Any],
        hashed: bool = True,
    ) -> SealedArtifact:
        """Encrypt and store; durable on return. Needs two mebibytes beside the tensors, whatever their size.

        Without ``hashed`` its content hash is empty: what nobody else ever sees needs none.

        Raises:
            InvalidRequestError: state that is not plain JSON, or a tensor that is not of numbers.
            ServerError: it could not be stored; then nothing was.
        """
        plaintext = serialize(tensors, state)
        try:
            return self.seal_plain(
                tenant=tenant, artifact_id=artifact_id, kind=kind, plaintext=plaintext, hashed=hashed
            )
        except ValueError as e:
            raise InvalidRequestError(
                f"this state cannot be saved: {e}", field="state", constraint="JSON values and arrays of numbers"
            ) from e

    def seal_plain(
        self, *, tenant: str, artifact_id: str, kind: str, plaintext: Iterable[Bytes], hashed: bool = True
    ) -> SealedArtifact:
        """As `seal`, for a plaintext that is in the format already. What ``plaintext`` raises passes on."""
        scope = Scope(tenant=tenant, artifact_id=artifact_id, kind=kind)
        dek = new_key()
        data_keys = DataKeys.derive(dek, scope)
        slot = self._keys.wrap_dek(tenant, dek, scope.aad)
        header = Header(scope=scope, commitment=data_keys.commitment, slots=(slot,))
        digest, size = hashlib.sha256(), 0

        def pieces() -> Iterator[Bytes]:
            nonlocal size
            yield from measured(header_bytes(header, data_keys))
            for piece in encrypt_segments(data_keys.body, scope.aad, plaintext):
                yield from measured(piece)

        def measured(piece: Bytes) -> Iterable[Bytes]:
            nonlocal size
            if hashed:
                digest.update(piece)
            size += len(piece)
            return (piece,)

        self._blobs.put(artifact_id, pieces())
        return SealedArtifact(
            artifact_id=artifact_id,
            size_bytes=size,
            content_hash=f"sha256:{digest.hexdigest()}" if hashed else "",
            algorithm=ALGORITHM,
            key_id=slot.key_id,
        )

    def open(self, *, tenant: str, artifact_id: str, kind: str) -> OpenedArtifact:
        """Decrypt, verified to the last byte before anything is returned. Needs the plaintext's size once.

        Raises:
            InvalidRequestError: not an intact artifact of this tenant, id and kind.
        """

        def attempt() -> OpenedArtifact:
            unlocked = self._unlock(tenant, artifact_id, kind)
            # The size of the stored bytes, not a size that the bytes claim.
            plain = memoryview(bytearray(plaintext_size(unlocked.body_bytes)))
            position = 0
            for piece in decrypt_segments(unlocked.keys.body, unlocked.scope.aad, unlocked.body()):
                plain[position : position + len(piece)] = piece
                position += len(piece)
            tensors, state = parse(plain)
            return OpenedArtifact(tensors=tensors, state=state)

        return _uniform(artifact_id, attempt)

    def verify(self, *, tenant: str, artifact_id: str, kind: str) -> None:
        """Check every byte and keep none; needs two mebibytes whatever the size.

        Raises:
            InvalidRequestError: as `open`.
        """

        def attempt() -> None:
            unlocked = self._unlock(tenant, artifact_id, kind)
            for _ in decrypt_segments(unlocked.keys.body, unlocked.scope.aad, unlocked.body()):
                pass

        _uniform(artifact_id, attempt)

    def plaintext(self, *, tenant: str, artifact_id: str, kind: str) -> tuple[int, Iterator[memoryview]]:
        """Size and pieces of the plaintext, in two mebibytes whatever the size; a piece is overwritten by the next.

        Each piece is authentic and in its place; that none is missing is known at the end. `verify` first, and
        what a second reading shows is what the first one saw, or an error.

        Raises:
            InvalidRequestError: as `open`; also while iterating.
        """

        def attempt() -> tuple[int, Iterator[memoryview]]:
            unlocked = self._unlock(tenant, artifact_id, kind)
            pieces = decrypt_segments(unlocked.keys.body, unlocked.scope.aad, unlocked.body())
            return plaintext_size(unlocked.body_bytes), pieces

        size, pieces = _uniform(artifact_id, attempt)

        def checked() -> Iterator[memoryview]:
            while (piece := _uniform(artifact_id, lambda: next(pieces, None))) is not None:
                yield piece

        return size, checked()

    def stream(self, *, tenant: str, artifact_id: str) -> Iterator[bytes]:
        """The artifact as it is stored, encrypted, in chunks of at most 1 MiB.

        Checked before this returns: the header is intact and of this tenant. The body is the reader's to
        verify, by its hash or by opening it.

        Raises:
            InvalidRequestError: as `open`.
        """

        def attempt() -> Iterator[bytes]:
            self._unlock(tenant, artifact_id, None)
            return self._blobs.read(artifact_id)

        return _uniform(artifact_id, attempt)

    def rewrap(self, *, tenant: str, artifact_id: str) -> str:
        """Wrap the artifact's key under the tenant's newest version; returns its key id.

        The artifact's bytes stay as they are: the new slot lies beside them and counts instead of theirs.

        Raises:
            InvalidRequestError: as `open`.
            ServerError: the slot could not be stored; the old one still counts.
        """
        unlocked = _uniform(artifact_id, lambda: self._unlock(tenant, artifact_id, None))
        slot = self._keys.wrap_dek(tenant, unlocked.dek, unlocked.scope.aad)
        self._blobs.put(artifact_id + SLOTS_SUFFIX, [slots_bytes((slot,), unlocked.keys)], replace=True)
        if not self.exists(artifact_id):  # deleted meanwhile: its slot would lie there for ever
            self._blobs.delete(artifact_id + SLOTS_SUFFIX)
        return slot.key_id

    def owned(self, tenant: str) -> Iterator[tuple[str, str]]:
        """Ids of a tenant's artifacts, and the version that wraps each one's key, as their headers say unverified."""
        for name in self._blobs.names():
            if name.endswith(SLOTS_SUFFIX):
                continue
            try:
                header, _ = parse_header(self._start(name)[0])
                slots = header.slots
                with contextlib.suppress(BlobNotFoundError):
                    slots, _ = parse_slots(next(self._blobs.read(name + SLOTS_SUFFIX), b""))
            except (FormatError, BlobNotFoundError):
                continue  # too damaged to name anybody, or deleted meanwhile
            if header.scope.tenant == tenant:
                yield name, slots[0].key_id

    def exists(self, artifact_id: str) -> bool:
        """Whether anything lies under the id."""
        try:
            return self._blobs.size(artifact_id) >= 0
        except BlobNotFoundError:
            return False

    def delete(self, *, tenant: str, artifact_id: str) -> None:
        """Delete an artifact of this tenant, damaged or not; no error if it is gone already.

        Raises:
            InvalidRequestError: what lies there names another tenant.
            ServerError: it could not be deleted.
        """

        def attempt() -> None:
            try:
                owner = parse_header(self._start(artifact_id)[0])[0].scope.tenant
            except BlobNotFoundError:
                return
            except FormatError:
                owner = tenant  # too damaged to name anybody; the caller's own records said whose it was
            if owner != tenant:
                raise DecryptionError
            self._blobs.delete(artifact_id)
            self._blobs.delete(artifact_id + SLOTS_SUFFIX)

        _uniform(artifact_id, attempt)

    def sweep(self, wanted: Collection[str]) -> list[str]:
        """Delete artifacts not in ``wanted`` and drafts of writers that died; returns the ids deleted.

        Call at the start, before anything is sealed: what is being written now is not wanted yet either.
        An artifact whose key does not open here is left alone, so that a server started with the wrong
        database deletes nothing.
        """
        self._blobs.remove_drafts(older_than_s=0)
        deleted = []
        for name in self._blobs.names():
            artifact_id = name.removesuffix(SLOTS_SUFFIX)
            if name != artifact_id or artifact_id in wanted:
                continue
            try:
                owner = parse_header(self._start(artifact_id)[0])[0].scope.tenant
                self._unlock(owner, artifact_id, None)
            except (DecryptionError, FormatError, BlobNotFoundError):
                continue
            self.delete(tenant=owner, artifact_id=artifact_id)
            deleted.append(artifact_id)
        return deleted

    def _unlock(self, tenant: str, artifact_id: str, kind: str | None) -> _Unlocked:
        start, rest = self._start(artifact_id)
        header, framed = parse_header(start)
        asked = Scope(tenant=tenant, artifact_id=artifact_id, kind=header.scope.kind if kind is None else kind)
        if header.scope != asked:
            raise DecryptionError
        slots, beside = header.slots, None
        with contextlib.suppress(BlobNotFoundError):  # most artifacts were never rewrapped
            slots, beside = parse_slots(next(self._blobs.read(artifact_id + SLOTS_SUFFIX), b""))
        dek = self._unwrap(tenant, slots, asked)
        keys = DataKeys.derive(dek, asked)
        tags_hold = framed.has_tag_of(keys) and (beside is None or beside.has_tag_of(keys))
        if not tags_hold or keys.commitment != header.commitment:
            raise DecryptionError
        return _Unlocked(
            scope=asked,
            keys=keys,
            dek=dek,
            body_bytes=self._blobs.size(artifact_id) - framed.size,
            start=start,
            start_bytes=framed.size,
            rest=rest,
        )

    def _unwrap(self, tenant: str, slots: tuple[WrappedKey, ...], scope: Scope) -> bytes:
        """The data key from the first slot that this tenant's keyring opens."""
        for slot in slots:
            try:
                return self._keys.unwrap_dek(tenant, slot, scope.aad)
            except DecryptionError:
                continue  # a slot of another kind of recipient; the next may be ours
        raise DecryptionError

    def _start(self, artifact_id: str) -> tuple[bytes, Iterator[bytes]]:
        """Enough of the artifact to hold its header, and the rest."""
        chunks = self._blobs.read(artifact_id)
        start = b""
        while len(start) < LARGEST_START_BYTES and (chunk := next(chunks, b"")):
            start += chunk
        return start, chunks


def _uniform(artifact_id: str, attempt: Callable[[], T]) -> T:
    """Run ``attempt``; whatever is wrong with the artifact becomes one error that does not tell what."""
    try:
        return attempt()
    except (DecryptionError, FormatError, BlobNotFoundError):
        raise InvalidRequestError(
            f"artifact {artifact_id} failed verification; use another checkpoint of this run",
            field="artifact_id",
            constraint="intact, and of this tenant",
        ) from None
