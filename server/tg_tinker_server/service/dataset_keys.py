"""Keys of registered datasets: each has its own, wrapped under its tenant's; records are sealed and named with it."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from tg_tinker.errors import ServerError
from tg_tinker.types.records import RECORD_ID_BYTES
from tg_tinker_server.crypto.aead import DecryptionError, associated_data, derive_key, new_key, open_sealed, seal
from tg_tinker_server.crypto.envelope import TenantKeyring, WrappedKey
from tg_tinker_server.store.dataset_rows import RecordRow, StoreRow


@dataclass(frozen=True, slots=True, repr=False)
class DatasetKey:
    """One dataset's key, unwrapped."""

    tenant: str
    upload_id: str
    key: bytes
    naming_key: bytes

    def row(self, position: int, slot: int, data: bytes) -> RecordRow:
        """A record as it is kept.

        Its id is HMAC-SHA256 over its place and its bytes, cut to 128 bits, so it confirms no guess to anybody
        without the key, and equal records have different ids.
        """
        message = position.to_bytes(8, "big") + data
        record_id = hmac.new(self.naming_key, message, hashlib.sha256).digest()[:RECORD_ID_BYTES]
        return RecordRow(
            position=position, slot=slot, record_id=record_id, sealed=seal(self.key, data, self._aad(position, slot))
        )

    def open(self, row: RecordRow) -> bytes:
        """A record's bytes, verified to be those of this place and this unit.

        Raises:
            ServerError: altered, moved, or another dataset's.
        """
        try:
            return open_sealed(self.key, row.sealed, self._aad(row.position, row.slot))
        except DecryptionError:
            raise ServerError("a stored record failed verification; restore the database") from None

    def _aad(self, position: int, slot: int) -> bytes:
        # The slot says whose the record is: moving it to another unit must not go unnoticed.
        return associated_data("tg-tinker/dataset-record/v1", self.tenant, self.upload_id, str(position), str(slot))


@dataclass(frozen=True, slots=True)
class DatasetKeys:
    """Makes, opens and wraps anew the keys of datasets. Call it off the event loop."""

    keyring: TenantKeyring

    def make(self, tenant: str, upload_id: str) -> WrappedKey:
        """A new dataset's key, as it may be stored."""
        return self.keyring.wrap_dek(tenant, new_key(), _aad(tenant, upload_id))

    def open(self, row: StoreRow) -> DatasetKey:
        """The key of an upload or dataset.

        Raises:
            ServerError: it was destroyed or does not open.
        """
        key = self._unwrap(row)
        naming_key = derive_key(key, associated_data("tg-tinker/dataset-record-id/v1"))
        return DatasetKey(row.tenant, row.upload_id, key, naming_key)

    def rewrap(self, row: StoreRow) -> WrappedKey:
        """The same key under the tenant's newest version; the records stay as they are."""
        return self.keyring.wrap_dek(row.tenant, self._unwrap(row), _aad(row.tenant, row.upload_id))

    def _unwrap(self, row: StoreRow) -> bytes:
        if row.wrapped_key is None:
            raise ServerError("the key of this dataset was destroyed")
        wrapped = WrappedKey(key_id=row.key_id, wrapped=row.wrapped_key)
        try:
            return self.keyring.unwrap_dek(row.tenant, wrapped, _aad(row.tenant, row.upload_id))
        except DecryptionError:
            raise ServerError(
                "the key of a dataset failed verification; restore the database or register the data again"
            ) from None


def _aad(tenant: str, upload_id: str) -> bytes:
    return associated_data("tg-tinker/dataset-key/v1", tenant, upload_id)
