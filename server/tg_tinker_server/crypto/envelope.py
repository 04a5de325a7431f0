"""The keys of tenants: versions under the root key, and what is wrapped, sealed and keyed-hashed under them.

    root key (KeyProvider)
      └ tenant key, versions 1, 2, ...      one row each; the newest seals, older ones still open
          ├ data keys (DEK)                 one per artifact, wrapped
          └ small values at rest            operation results
      └ tenant secret                       sealed under every version; never changes, so keyed hashes stay
                                            comparable across rotations
Destroying every version of a tenant makes all of it unreadable for ever, and the tenant gets no new key.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker_server.crypto.aead import (
    KEY_BYTES,
    DecryptionError,
    associated_data,
    derive_key,
    new_key,
    open_sealed,
    seal,
)
from tg_tinker_server.crypto.key_rows import KeyRow, KeyRows
from tg_tinker_server.crypto.keys import KeyProvider

VALUE_FORMAT = 1
VALUE_HEADER_BYTES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class WrappedKey:
    """A data key as it may be stored: ``key_id`` names the tenant key version it is wrapped under."""

    key_id: str
    wrapped: bytes


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class _TenantKey:
    """One live version in memory."""

    version: int
    key: bytes
    secret: bytes


class TenantKeyring:
    """Wraps, seals and derives for tenants. Safe to use from many threads.

    Rows are read again after ``max_age_s`` seconds, so that a rotation or destruction by another process
    takes effect within that time; rotation and destruction through this object at once. A tenant's first
    key is made at its first use: call `ensure` early where a write at that moment would be in the way.
    """

    def __init__(
        self,
        provider: KeyProvider,
        rows: KeyRows,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic_s: Callable[[], float] = time.monotonic,
        max_age_s: float = 1.0,
    ) -> None:
        self._provider = provider
        self._rows = rows
        self._now = now
        self._monotonic_s = monotonic_s
        self._max_age_s = max_age_s
        self._cache: dict[str, tuple[float, dict[int, _TenantKey]]] = {}
        self._lock = threading.RLock()

    def ensure(self, tenant: str) -> None:
        """Make the tenant's first key if it has none.

        Raises:
            InvalidRequestError: the tenant's keys were destroyed.
        """
        self._newest(tenant)

    def key_id(self, tenant: str) -> str:
        """Name of the version that seals now, e.g. ``tenant-kek/acme/v1``."""
        return _key_id(tenant, self._newest(tenant).version)

    def rotate(self, tenant: str) -> str:
        """Add a version and seal with it from now on; returns its key id. Older ones still open."""
        with self._lock:
            current = self._newest(tenant)
            version = max(row.version for row in self._rows.get_versions(tenant)) + 1
            self._add_version(tenant, version, current.secret)
            self._cache.pop(tenant, None)
            return self.key_id(tenant)

    def destroy_old_versions(self, tenant: str) -> None:
        """Destroy every version but the newest: what was not rewrapped or sealed anew is lost."""
        with self._lock:
            self._cache.pop(tenant, None)
            newest = self._newest(tenant).version
            self._destroy(tenant, keep=newest)

    def destroy_tenant(self, tenant: str) -> None:
        """Destroy every version: nothing of this tenant can be read again, here or from a copy.

        Guarantee: holds for storage and copies of it without the erased rows, once the key store has forgotten older
        versions of them (`Database.forget_deleted`). A backup of the key table together with the root key still
        opens everything; erase those as well.
        """
        with self._lock:
            self._destroy(tenant, keep=None)

    def wrap_dek(self, tenant: str, dek: bytes, aad: bytes) -> WrappedKey:
        """Wrap an artifact's 32-byte key under the tenant's newest version, bound to ``aad``."""
        if len(dek) != KEY_BYTES:
            raise ValueError(f"a data key has {KEY_BYTES} bytes, not {len(dek)}")
        newest = self._newest(tenant)
        key_id = _key_id(tenant, newest.version)
        return WrappedKey(key_id=key_id, wrapped=seal(_dek_key(newest), dek, _dek_aad(key_id, aad)))

    def unwrap_dek(self, tenant: str, wrapped: WrappedKey, aad: bytes) -> bytes:
        """Undo `wrap_dek`.

        Raises:
            DecryptionError: another tenant's, for another ``aad``, changed, or its version is destroyed.
        """
        prefix, _, number = wrapped.key_id.rpartition("/v")
        version = int(number) if number.isascii() and number.isdecimal() else 0
        if not prefix or _key_id(tenant, version) != wrapped.key_id:
            raise DecryptionError
        return open_sealed(_dek_key(self._version(tenant, version)), wrapped.wrapped, _dek_aad(wrapped.key_id, aad))

    def seal_value(self, tenant: str, purpose: str, plaintext: bytes, context: bytes) -> bytes:
        """Encrypt a small value at rest, bound to tenant, purpose and context (e.g. the id of its row)."""
        newest = self._newest(tenant)
        header = bytes([VALUE_FORMAT]) + newest.version.to_bytes(VALUE_HEADER_BYTES - 1, "big")
        return header + seal(_value_key(newest, purpose), plaintext, _value_aad(tenant, header, context))

    def open_value(self, tenant: str, purpose: str, sealed: bytes, context: bytes) -> bytes:
        """Undo `seal_value`.

        Raises:
            ServerError: another tenant's, purpose's or context's, changed, or its version is destroyed.
        """
        header = sealed[:VALUE_HEADER_BYTES]
        try:
            if len(header) != VALUE_HEADER_BYTES or header[0] != VALUE_FORMAT:
                raise DecryptionError
            key = _value_key(self._version(tenant, int.from_bytes(header[1:], "big")), purpose)
            return open_sealed(key, sealed[VALUE_HEADER_BYTES:], _value_aad(tenant, header, context))
        except DecryptionError:
            raise ServerError(
                f"a stored value ({purpose}) failed verification; restore the database or submit the operation again"
            ) from None

    def is_newest(self, tenant: str, sealed: bytes) -> bool:
        """Whether a value that `seal_value` made is sealed under the tenant's newest version."""
        return int.from_bytes(sealed[1:VALUE_HEADER_BYTES], "big") == self._newest(tenant).version

    def mac_key(self, tenant: str, purpose: str) -> bytes:
        """32 bytes for keyed hashes: the same for a tenant and purpose for ever, unrelated for any other."""
        return derive_key(
            self._newest(tenant).secret, associated_data("tg-tinker/tenant-mac-key/v1", tenant, purpose)
        )

    def _newest(self, tenant: str) -> _TenantKey:
        with self._lock:
            live = self._live(tenant)
            if not live:
                rows = self._rows.get_versions(tenant)
                if not rows:
                    self._add_version(tenant, 1, new_key())
                    live = self._live(tenant, refresh=True)
            if not live:
                raise InvalidRequestError(
                    f"the keys of tenant {tenant} were destroyed and nothing of it can be read or written; "
                    "use another tenant",
                    field="tenant_id",
                    constraint="a tenant whose keys exist",
                )
            return live[max(live)]

    def _version(self, tenant: str, version: int) -> _TenantKey:
        with self._lock:
            live = self._live(tenant)
            if version not in live:
                live = self._live(tenant, refresh=True)
            if version not in live:
                raise DecryptionError
            return live[version]

    def _live(self, tenant: str, *, refresh: bool = False) -> dict[int, _TenantKey]:
        now_s = self._monotonic_s()
        read_s, live = self._cache.get(tenant, (0.0, {}))
        if refresh or not live or now_s - read_s > self._max_age_s:
            known, live = live, {}
            for row in self._rows.get_versions(tenant):
                if row.destroyed is None:
                    live[row.version] = known.get(row.version) or self._unwrap(row)
            self._cache[tenant] = (now_s, live)
        return live

    def _unwrap(self, row: KeyRow) -> _TenantKey:
        aad = _row_aad(row.tenant, row.version)
        try:
            size = int.from_bytes(row.wrapped[:2], "big")
            key = self._provider.unwrap(row.wrapped[2 : 2 + size], aad)
            secret = open_sealed(_secret_key(key), row.wrapped[2 + size :], aad)
        except DecryptionError:
            raise ServerError(
                f"the key {_key_id(row.tenant, row.version)} does not open under this server's root key; "
                "check that root_key names the key the database was made with"
            ) from None
        return _TenantKey(version=row.version, key=key, secret=secret)

    def _add_version(self, tenant: str, version: int, secret: bytes) -> None:
        aad, key = _row_aad(tenant, version), new_key()
        wrapped = self._provider.wrap(key, aad)
        sealed = len(wrapped).to_bytes(2, "big") + wrapped + seal(_secret_key(key), secret, aad)
        self._rows.put_version(KeyRow(tenant=tenant, version=version, wrapped=sealed, created=self._now()))

    def _destroy(self, tenant: str, *, keep: int | None) -> None:
        self._cache.pop(tenant, None)
        doomed = [r.version for r in self._rows.get_versions(tenant) if r.destroyed is None and r.version != keep]
        self._rows.destroy_versions(tenant, doomed, self._now())


def rewrap_row(row: KeyRow, old: KeyProvider, new: KeyProvider) -> KeyRow:
    """The same version of a tenant's key under another root key, opened again to be sure.

    Raises:
        DecryptionError: it does not open under ``old``.
        ServerError: ``new`` gives back another key than it was given.
    """
    aad = _row_aad(row.tenant, row.version)
    size = int.from_bytes(row.wrapped[:2], "big")
    key, secret = old.unwrap(row.wrapped[2 : 2 + size], aad), row.wrapped[2 + size :]
    open_sealed(_secret_key(key), secret, aad)
    wrapped = new.wrap(key, aad)
    if new.unwrap(wrapped, aad) != key:
        raise ServerError("the new root key does not open what it wrapped; nothing was changed")
    return replace(row, wrapped=len(wrapped).to_bytes(2, "big") + wrapped + secret)


def _key_id(tenant: str, version: int) -> str:
    return f"tenant-kek/{tenant}/v{version}"


def _row_aad(tenant: str, version: int) -> bytes:
    return associated_data("tg-tinker/tenant-key/v1", tenant, str(version))


def _secret_key(key: bytes) -> bytes:
    return derive_key(key, associated_data("tg-tinker/tenant-secret/v1"))


def _dek_key(tenant_key: _TenantKey) -> bytes:
    return derive_key(tenant_key.key, associated_data("tg-tinker/dek-wrapping/v1"))


def _dek_aad(key_id: str, aad: bytes) -> bytes:
    return associated_data("tg-tinker/dek/v1", key_id, aad)


def _value_key(tenant_key: _TenantKey, purpose: str) -> bytes:
    return derive_key(tenant_key.key, associated_data("tg-tinker/value-sealing/v1", purpose))


def _value_aad(tenant: str, header: bytes, context: bytes) -> bytes:
    return associated_data("tg-tinker/value/v1", tenant, header, context)
