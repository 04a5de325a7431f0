"""What one tenant seals, that tenant opens, for that purpose, until its keys are destroyed."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

import pytest

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker_server.crypto.aead import DecryptionError, new_key
from tg_tinker_server.crypto.envelope import TenantKeyring, WrappedKey
from tg_tinker_server.crypto.key_rows import KeyRow, MemoryKeyRows
from tg_tinker_server.crypto.keys import LocalKeyProvider

ROOT = bytes(range(32))
DEK = b"d" * 32


def keyring(rows: MemoryKeyRows, root: bytes = ROOT) -> TenantKeyring:
    return TenantKeyring(LocalKeyProvider(root), rows)


@pytest.fixture
def rows() -> MemoryKeyRows:
    return MemoryKeyRows()


@pytest.fixture
def ring(rows: MemoryKeyRows) -> TenantKeyring:
    return keyring(rows)


def test_a_wrapped_key_opens_for_its_tenant_and_associated_data_only(ring: TenantKeyring) -> None:
    wrapped = ring.wrap_dek("acme", DEK, b"artifact")
    ring.ensure("other")
    assert wrapped.key_id == ring.key_id("acme") == "tenant-kek/acme/v1"
    assert ring.unwrap_dek("acme", wrapped, b"artifact") == DEK
    for tenant, aad in [("other", b"artifact"), ("acme", b"another")]:
        with pytest.raises(DecryptionError):
            ring.unwrap_dek(tenant, wrapped, aad)


@pytest.mark.parametrize(
    "key_id",
    ["", "v1", "/v1", "tenant-kek/acme/v2", "tenant-kek/acme/v01", "tenant-kek/acme/v١", "tenant-kek/other/v1"],
)
def test_a_slot_with_another_key_id_is_refused(ring: TenantKeyring, key_id: str) -> None:
    wrapped = ring.wrap_dek("acme", DEK, b"").wrapped
    with pytest.raises(DecryptionError):
        ring.unwrap_dek("acme", WrappedKey(key_id=key_id, wrapped=wrapped), b"")


def test_keys_outlive_the_process(rows: MemoryKeyRows, ring: TenantKeyring) -> None:
    wrapped, mac_key = ring.wrap_dek("acme", DEK, b""), ring.mac_key("acme", "batch")
    sealed = ring.seal_value("acme", "result", b"plain", b"1")
    again = keyring(rows)
    assert again.unwrap_dek("acme", wrapped, b"") == DEK
    assert again.mac_key("acme", "batch") == mac_key
    assert again.open_value("acme", "result", sealed, b"1") == b"plain"


def test_mac_keys_differ_by_tenant_and_purpose_and_survive_rotation(ring: TenantKeyring) -> None:
    keys = {ring.mac_key(t, p) for t in ("acme", "other") for p in ("batch", "unit")}
    assert len(keys) == 4
    before = ring.mac_key("acme", "batch")
    ring.rotate("acme")
    ring.destroy_old_versions("acme")
    assert ring.mac_key("acme", "batch") == before


def test_a_sealed_value_is_bound_to_tenant_purpose_and_context(ring: TenantKeyring) -> None:
    sealed = ring.seal_value("acme", "result", b"plain", b"row 1")
    ring.ensure("other")
    assert b"plain" not in sealed
    assert ring.open_value("acme", "result", sealed, b"row 1") == b"plain"
    for tenant, purpose, context in [
        ("other", "result", b"row 1"),
        ("acme", "results", b"row 1"),
        ("acme", "result", b"row 2"),
    ]:
        with pytest.raises(ServerError, match="failed verification"):
            ring.open_value(tenant, purpose, sealed, context)


def test_a_changed_or_cut_sealed_value_is_refused_with_one_message(ring: TenantKeyring) -> None:
    sealed = ring.seal_value("acme", "result", b"plain", b"")
    messages = set()
    for bit in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ServerError) as caught:
            ring.open_value("acme", "result", bytes(changed), b"")
        messages.add(str(caught.value))
    for size in range(len(sealed)):
        with pytest.raises(ServerError) as caught:
            ring.open_value("acme", "result", sealed[:size], b"")
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_after_rotation_the_new_version_seals_and_the_old_one_still_opens(ring: TenantKeyring) -> None:
    old, value = ring.wrap_dek("acme", DEK, b""), ring.seal_value("acme", "p", b"plain", b"")
    assert ring.rotate("acme") == "tenant-kek/acme/v2"
    assert ring.wrap_dek("acme", DEK, b"").key_id == "tenant-kek/acme/v2"
    assert ring.unwrap_dek("acme", old, b"") == DEK
    assert ring.open_value("acme", "p", value, b"") == b"plain"


def test_destroying_old_versions_leaves_only_what_the_newest_sealed(ring: TenantKeyring) -> None:
    old = ring.wrap_dek("acme", DEK, b"")
    ring.rotate("acme")
    new = ring.wrap_dek("acme", DEK, b"")
    ring.destroy_old_versions("acme")
    assert ring.unwrap_dek("acme", new, b"") == DEK
    with pytest.raises(DecryptionError):
        ring.unwrap_dek("acme", old, b"")


def test_a_destroyed_tenant_reads_nothing_and_gets_no_new_key(rows: MemoryKeyRows, ring: TenantKeyring) -> None:
    wrapped, value = ring.wrap_dek("acme", DEK, b""), ring.seal_value("acme", "p", b"plain", b"")
    ring.rotate("acme")
    ring.ensure("other")
    ring.destroy_tenant("acme")
    for each in (ring, keyring(rows)):
        with pytest.raises(DecryptionError):
            each.unwrap_dek("acme", wrapped, b"")
        with pytest.raises(ServerError):
            each.open_value("acme", "p", value, b"")
        for use in (each.ensure, each.rotate, each.key_id, lambda t, r=each: r.mac_key(t, "p")):
            with pytest.raises(InvalidRequestError, match="destroyed"):
                use("acme")
        each.ensure("other")
    assert all(row.wrapped == b"" and row.destroyed for row in rows.get_versions("acme"))


def test_destruction_by_another_process_takes_effect_within_a_second(rows: MemoryKeyRows) -> None:
    time_s = [100.0]
    here = TenantKeyring(LocalKeyProvider(ROOT), rows, monotonic_s=lambda: time_s[0])
    wrapped = here.wrap_dek("acme", DEK, b"")
    keyring(rows).destroy_tenant("acme")
    time_s[0] += 1.01
    with pytest.raises(DecryptionError):
        here.unwrap_dek("acme", wrapped, b"")


def test_rotation_by_another_process_is_found_at_once_when_needed(rows: MemoryKeyRows) -> None:
    here = TenantKeyring(LocalKeyProvider(ROOT), rows, monotonic_s=lambda: 0.0)
    here.ensure("acme")
    there = keyring(rows)
    there.rotate("acme")
    assert here.unwrap_dek("acme", there.wrap_dek("acme", DEK, b""), b"") == DEK


def test_rows_are_not_read_again_for_every_call() -> None:
    class Counting(MemoryKeyRows):
        reads = 0

        def get_versions(self, tenant: str) -> list[KeyRow]:
            self.reads += 1
            return super().get_versions(tenant)

    rows = Counting()
    ring = TenantKeyring(LocalKeyProvider(ROOT), rows, monotonic_s=lambda: 0.0)
    ring.ensure("acme")
    before = rows.reads
    for _ in range(100):
        ring.seal_value("acme", "p", b"", b"")
    assert rows.reads == before


def test_the_wrong_root_key_is_named_as_such(rows: MemoryKeyRows, ring: TenantKeyring) -> None:
    ring.ensure("acme")
    with pytest.raises(ServerError, match="root_key"):
        keyring(rows, new_key()).ensure("acme")


def test_a_row_moved_to_another_tenant_or_version_is_refused(rows: MemoryKeyRows, ring: TenantKeyring) -> None:
    ring.ensure("acme")
    (row,) = rows.get_versions("acme")
    now = datetime.now(UTC)
    rows.put_version(KeyRow(tenant="thief", version=1, wrapped=row.wrapped, created=now))
    rows.put_version(KeyRow(tenant="late", version=2, wrapped=row.wrapped, created=now))
    for tenant in ("thief", "late"):
        with pytest.raises(ServerError):
            keyring(rows).ensure(tenant)


def test_servers_that_race_for_a_tenants_first_key_agree_on_one(rows: MemoryKeyRows) -> None:
    rings = [keyring(rows) for _ in range(8)]
    barrier, keys = threading.Barrier(8), []

    def work(ring: TenantKeyring) -> None:
        barrier.wait()
        keys.append(ring.mac_key("acme", "p"))

    threads = [threading.Thread(target=work, args=(r,)) for r in rings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1


def test_stored_rows_hold_no_key_in_the_clear(rows: MemoryKeyRows, ring: TenantKeyring) -> None:
    ring.ensure("acme")
    (row,) = rows.get_versions("acme")
    live = ring._live("acme")[1]
    assert live.key not in row.wrapped
    assert live.secret not in row.wrapped
