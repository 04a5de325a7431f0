"""An artifact opens whole, for its tenant, id and kind, or not at all and without a reason."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.support.work import peak_bytes
from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.streaming import SEGMENT_BYTES, decrypt_stream, encrypt_stream
from tg_tinker_server.artifacts import format as artifact_format
from tg_tinker_server.artifacts.blobs import LocalBlobs, MemoryBlobs
from tg_tinker_server.artifacts.format import DataKeys, Header, Scope, header_bytes, parse_header
from tg_tinker_server.artifacts.tensors import Array
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.crypto.key_rows import MemoryKeyRows
from tg_tinker_server.crypto.keys import LocalKeyProvider

A, B = "ck_00000000000000000000000a", "ck_00000000000000000000000b"
TENSORS: dict[str, Array] = {
    "model.layers.0.self_attn.q_proj.lora_A.weight": np.arange(64, dtype=np.float32).reshape(4, 16),
    "optimizer.exp_avg": np.ones(100, np.float32),
}
STATE = {"step": 7, "metadata": {"note": "patient-canary-9f3"}, "rate": 0.1}


def seal(vault: Vault, artifact_id: str = A, tenant: str = "acme", kind: str = "checkpoint") -> bytes:
    vault.seal(tenant=tenant, artifact_id=artifact_id, kind=kind, tensors=TENSORS, state=STATE)
    return b"".join(vault.stream(tenant=tenant, artifact_id=artifact_id))


def assert_refused(vault: Vault, tenant: str = "acme", artifact_id: str = A, kind: str = "checkpoint") -> None:
    """Not opened, with the one error every failure has."""
    for call in (vault.open, vault.verify):
        with pytest.raises(InvalidRequestError) as caught:
            call(tenant=tenant, artifact_id=artifact_id, kind=kind)
        error = caught.value
        assert type(error) is InvalidRequestError
        assert str(error) == f"artifact {artifact_id} failed verification; use another checkpoint of this run"
        assert (error.field, error.constraint) == ("artifact_id", "intact, and of this tenant")
        assert error.details == {"field": error.field, "constraint": error.constraint}
        assert error.__cause__ is None
        assert error.__suppress_context__


def refuses(vault: Vault, blobs: MemoryBlobs, changed: bytes) -> None:
    blobs.put(A, [changed], replace=True)
    assert_refused(vault)


def segments_of(artifact: bytes) -> tuple[bytes, list[bytes]]:
    """Everything before the first segment, and the segments."""
    start = parse_header(artifact)[1].size + 40
    first = start + SEGMENT_BYTES - 40
    cuts = [start, *range(first, len(artifact), SEGMENT_BYTES), len(artifact)]
    return artifact[:start], [artifact[a:b] for a, b in itertools.pairwise(cuts)]


def big(vault: Vault) -> bytes:
    """An artifact of four segments."""
    tensors = {"x": np.random.default_rng(1).integers(0, 255, 3 * SEGMENT_BYTES + 999, np.uint8)}
    vault.seal(tenant="acme", artifact_id=A, kind="checkpoint", tensors=tensors, state={})
    return b"".join(vault.stream(tenant="acme", artifact_id=A))


# --- what works


def test_what_was_sealed_opens_bit_for_bit_and_can_be_written_to(vault: Vault) -> None:
    seal(vault)
    opened = vault.open(tenant="acme", artifact_id=A, kind="checkpoint")
    assert opened.state == STATE
    assert set(opened.tensors) == set(TENSORS)
    for name, array in TENSORS.items():
        assert opened.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(opened.tensors[name], array)
        opened.tensors[name][...] = 0
    vault.verify(tenant="acme", artifact_id=A, kind="checkpoint")


def test_the_receipt_says_what_lies_in_the_store(vault: Vault, keys: TenantKeyring) -> None:
    receipt = vault.seal(tenant="acme", artifact_id=A, kind="checkpoint", tensors=TENSORS, state=STATE)
    pulled = b"".join(vault.stream(tenant="acme", artifact_id=A))
    assert receipt.artifact_id == A
    assert receipt.size_bytes == len(pulled)
    assert receipt.content_hash == f"sha256:{hashlib.sha256(pulled).hexdigest()}"
    assert receipt.algorithm == "AES-256-GCM"
    assert receipt.key_id == keys.key_id("acme") == "tenant-kek/acme/v1"


def test_no_tensor_name_value_or_metadata_can_be_read_from_the_artifact(vault: Vault) -> None:
    pulled = seal(vault)
    for text in [b"lora", b"weight", b"q_proj", b"exp_avg", b"canary", b"metadata", b"step", b"F32", b"dtype"]:
        assert text not in pulled
    for array in TENSORS.values():
        assert array.tobytes()[:16] not in pulled


def test_the_same_state_sealed_twice_has_no_ciphertext_in_common(vault: Vault) -> None:
    one, two = seal(vault, A), seal(vault, B)
    body = parse_header(one)[1].size
    assert {one[i : i + 16] for i in range(body, len(one), 16)}.isdisjoint(
        two[i : i + 16] for i in range(body, len(two))
    )


def test_the_body_is_a_tink_stream_of_a_safetensors_file(vault: Vault, keys: TenantKeyring) -> None:
    pulled = seal(vault)
    header, framed = parse_header(pulled)
    dek = keys.unwrap_dek("acme", header.slots[0], header.scope.aad)
    body = DataKeys.derive(dek, header.scope).body
    plain = b"".join(decrypt_stream(body, header.scope.aad, [pulled[framed.size :]]))
    read = safetensors.numpy.load(plain)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(read[name], array)


def test_an_empty_state_is_an_artifact_too(vault: Vault) -> None:
    vault.seal(tenant="acme", artifact_id=A, kind="state", tensors={}, state={})
    opened = vault.open(tenant="acme", artifact_id=A, kind="state")
    assert (opened.tensors, opened.state) == ({}, {})


def test_artifacts_outlive_the_process(tmp_path: Path) -> None:
    rows = MemoryKeyRows()

    def vault() -> Vault:
        return Vault(LocalBlobs(tmp_path), TenantKeyring(LocalKeyProvider(bytes(32)), rows))

    seal(vault())
    assert vault().open(tenant="acme", artifact_id=A, kind="checkpoint").state == STATE


def test_chunks_of_a_pull_have_at_most_a_mebibyte(vault: Vault) -> None:
    big(vault)
    assert max(map(len, vault.stream(tenant="acme", artifact_id=A))) <= 2**20


# --- what is refused


def test_two_thousand_random_bit_flips_are_all_refused(vault: Vault, blobs: MemoryBlobs) -> None:
    pulled, chance = seal(vault), random.Random(20)
    for bit in chance.sample(range(8 * len(pulled)), 2000):
        changed = bytearray(pulled)
        changed[bit // 8] ^= 1 << bit % 8
        refuses(vault, blobs, bytes(changed))
    blobs.put(A, [pulled], replace=True)
    vault.verify(tenant="acme", artifact_id=A, kind="checkpoint")


def test_every_bit_before_the_body_counts(vault: Vault, blobs: MemoryBlobs) -> None:
    pulled = seal(vault)
    for bit in range(8 * (parse_header(pulled)[1].size + 40)):
        changed = bytearray(pulled)
        changed[bit // 8] ^= 1 << bit % 8
        refuses(vault, blobs, bytes(changed))


def test_two_hundred_truncations_are_all_refused(vault: Vault, blobs: MemoryBlobs) -> None:
    pulled, chance = seal(vault), random.Random(21)
    for size in {0, 1, len(pulled) - 1, *chance.sample(range(len(pulled)), 197)}:
        refuses(vault, blobs, pulled[:size])


def test_flips_and_truncations_of_an_artifact_of_many_segments_are_refused(vault: Vault, blobs: MemoryBlobs) -> None:
    pulled, chance = big(vault), random.Random(22)
    before, segments = segments_of(pulled)
    ends = [len(before) + sum(map(len, segments[:i])) for i in range(len(segments))]
    for size in [*ends, *(e + 1 for e in ends), *(chance.randrange(len(pulled)) for _ in range(10))]:
        refuses(vault, blobs, pulled[:size])
    for _ in range(20):
        changed = bytearray(pulled)
        changed[chance.randrange(len(pulled))] ^= 1 << chance.randrange(8)
        refuses(vault, blobs, bytes(changed))


def test_permuted_repeated_and_lost_segments_and_appended_bytes_are_refused(vault: Vault, blobs: MemoryBlobs) -> None:
    pulled = big(vault)
    before, (a, b, c, d) = segments_of(pulled)
    assert b"".join([before, a, b, c, d]) == pulled
    for order in (
        [b, a, c, d],
        [a, c, b, d],
        [d, b, c, a],
        [a, b, b, c, d],
        [a, b, c, d, d],
        [a, b, c],
        [a, b, d],
        [a, c, d],
    ):
        refuses(vault, blobs, before + b"".join(order))
    for more in (b"\0", bytes(16), bytes(SEGMENT_BYTES), pulled):
        refuses(vault, blobs, pulled + more)


def test_the_header_of_another_artifact_does_not_fit(vault: Vault, blobs: MemoryBlobs) -> None:
    one, two = seal(vault, A), seal(vault, B)
    first, second = parse_header(one)[1].size, parse_header(two)[1].size
    refuses(vault, blobs, two[:second] + one[first:])
    refuses(vault, blobs, one[:first] + two[second:])
    refuses(vault, blobs, two)


def test_the_header_of_an_earlier_artifact_of_the_same_id_does_not_fit(vault: Vault, blobs: MemoryBlobs) -> None:
    one = seal(vault)
    blobs.delete(A)
    two = seal(vault)
    size = parse_header(one)[1].size
    refuses(vault, blobs, one[:size] + two[parse_header(two)[1].size :])


def test_another_tenant_id_or_kind_is_refused(vault: Vault, blobs: MemoryBlobs, keys: TenantKeyring) -> None:
    pulled = seal(vault)
    keys.ensure("other")
    blobs.put(B, [pulled])
    assert_refused(vault, tenant="other")
    assert_refused(vault, artifact_id=B)
    assert_refused(vault, kind="state")
    assert_refused(vault, tenant="")


@pytest.mark.parametrize("field", ["tenant", "artifact_id", "kind"])
def test_a_header_edited_to_the_name_asked_for_is_refused(
    vault: Vault, blobs: MemoryBlobs, keys: TenantKeyring, field: str
) -> None:
    pulled = seal(vault)
    keys.ensure("mine")
    header, framed = parse_header(pulled)
    asked = {"tenant": "acme", "artifact_id": A, "kind": "checkpoint"}
    asked[field] = {"tenant": "mine", "artifact_id": B, "kind": "state"}[field]
    # The editor knows the format and signs with keys of its own.
    forged = header_bytes(
        Header(scope=Scope(**asked), commitment=header.commitment, slots=header.slots),
        DataKeys.derive(bytes(32), Scope(**asked)),
    )
    blobs.put(asked["artifact_id"], [forged + pulled[framed.size :]], replace=True)
    assert_refused(vault, **asked)


def test_a_missing_artifact_and_a_name_no_server_mints_look_like_a_broken_one(vault: Vault) -> None:
    assert_refused(vault)
    for name in ["../../etc/passwd", "", "A", A + ".slots", A + "/", "\0"]:
        assert_refused(vault, artifact_id=name)


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"TGTINKER", pickle.dumps({"x": 1})])
def test_what_is_no_artifact_is_refused(vault: Vault, blobs: MemoryBlobs, content: bytes) -> None:
    refuses(vault, blobs, content)


def sealed_by_insider(keys: TenantKeyring, plain: bytes, commitment: bytes | None = None) -> bytes:
    """An artifact by somebody who has the keys, around any plaintext."""
    scope, dek = Scope(tenant="acme", artifact_id=A, kind="checkpoint"), os.urandom(32)
    derived = DataKeys.derive(dek, scope)
    header = Header(
        scope=scope, commitment=commitment or derived.commitment, slots=(keys.wrap_dek("acme", dek, scope.aad),)
    )
    return header_bytes(header, derived) + b"".join(encrypt_stream(derived.body, scope.aad, [plain]))


def test_the_key_commitment_is_checked(vault: Vault, blobs: MemoryBlobs, keys: TenantKeyring) -> None:
    file = safetensors.numpy.save({}, metadata={"state": "{}"})
    blobs.put(A, [sealed_by_insider(keys, file)])
    vault.open(tenant="acme", artifact_id=A, kind="checkpoint")
    refuses(vault, blobs, sealed_by_insider(keys, file, commitment=bytes(32)))


@pytest.mark.parametrize(
    "plain",
    [
        pickle.dumps({"x": [1]}),
        safetensors.numpy.save({"x": np.zeros(9)}, metadata={"state": "{}"})[:-1],
        safetensors.numpy.save({"x": np.zeros(9)}, metadata={"state": "{}"}) + pickle.dumps(1),
        safetensors.numpy.save({"x": np.zeros(9)}),
        (2**63).to_bytes(8, "little") + b"{}",
        (2**30).to_bytes(8, "little") + b"{}",
        b"",
    ],
)
def test_authentic_nonsense_is_refused_without_allocating_what_it_claims(
    vault: Vault, blobs: MemoryBlobs, keys: TenantKeyring, plain: bytes
) -> None:
    blobs.put(A, [sealed_by_insider(keys, plain)])

    def refuse() -> None:
        with pytest.raises(InvalidRequestError, match="failed verification"):
            vault.open(tenant="acme", artifact_id=A, kind="checkpoint")

    assert peak_bytes(refuse, tries=3) < 4 * 2**20


def test_nothing_is_unpickled(vault: Vault, blobs: MemoryBlobs, keys: TenantKeyring, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    blobs.put(A, [sealed_by_insider(keys, pickle.dumps(Trap()))])
    with pytest.raises(InvalidRequestError):
        vault.open(tenant="acme", artifact_id=A, kind="checkpoint")
    with pytest.raises(InvalidRequestError):
        vault.seal(tenant="acme", artifact_id=B, kind="state", tensors={"x": np.array([Trap()], object)}, state={})
    assert not (tmp_path / "sprung").exists()


def test_a_pull_is_refused_to_another_tenant_before_the_first_byte(
    vault: Vault, blobs: MemoryBlobs, keys: TenantKeyring
) -> None:
    pulled = bytearray(seal(vault))
    keys.ensure("other")
    with pytest.raises(InvalidRequestError, match="failed verification"):
        vault.stream(tenant="other", artifact_id=A)
    pulled[40] ^= 1
    blobs.put(A, [pulled], replace=True)
    with pytest.raises(InvalidRequestError, match="failed verification"):
        vault.stream(tenant="acme", artifact_id=A)


@pytest.mark.parametrize("state", [{"x": float("nan")}, {"x": {1}}, {"x": object()}])
def test_a_state_that_is_not_json_is_refused_and_nothing_stored(
    vault: Vault, blobs: MemoryBlobs, state: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be saved") as caught:
        vault.seal(tenant="acme", artifact_id=A, kind="state", tensors={}, state=state)
    assert caught.value.field == "state"
    assert blobs.names() == []


def test_a_disk_that_fails_is_the_servers_error_and_leaves_nothing(
    tmp_path: Path, keys: TenantKeyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = Vault(LocalBlobs(tmp_path), keys)

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ServerError, match="Input/output error"):
        seal(vault)
    assert list(tmp_path.iterdir()) == []


# --- rotation, destruction, deletion


def test_old_artifacts_stay_readable_after_a_rotation(vault: Vault, keys: TenantKeyring) -> None:
    seal(vault, A)
    keys.rotate("acme")
    seal(vault, B)
    for artifact_id in (A, B):
        assert vault.open(tenant="acme", artifact_id=artifact_id, kind="checkpoint").state == STATE


def test_a_rewrapped_artifact_needs_its_old_key_no_more_and_keeps_every_byte(
    vault: Vault, blobs: MemoryBlobs, keys: TenantKeyring
) -> None:
    pulled = seal(vault)
    keys.rotate("acme")
    puts: list[str] = []
    real = blobs.put
    blobs.put = lambda name, *a, **k: (puts.append(name), real(name, *a, **k))[1]  # type: ignore[method-assign,func-returns-value]
    assert vault.rewrap(tenant="acme", artifact_id=A) == "tenant-kek/acme/v2"
    assert puts == [A + ".slots"]
    assert blobs.size(A + ".slots") < 400
    keys.destroy_old_versions("acme")
    assert vault.open(tenant="acme", artifact_id=A, kind="checkpoint").state == STATE
    assert b"".join(vault.stream(tenant="acme", artifact_id=A)) == pulled


def test_without_a_rewrap_destroying_the_old_version_loses_the_artifact(vault: Vault, keys: TenantKeyring) -> None:
    seal(vault)
    keys.rotate("acme")
    keys.destroy_old_versions("acme")
    assert_refused(vault)


def test_artifacts_are_rewrapped_again_and_again(vault: Vault, keys: TenantKeyring) -> None:
    seal(vault)
    for version in range(2, 6):
        keys.rotate("acme")
        assert vault.rewrap(tenant="acme", artifact_id=A).endswith(f"/v{version}")
        keys.destroy_old_versions("acme")
    vault.verify(tenant="acme", artifact_id=A, kind="checkpoint")


def test_changed_foreign_and_empty_slots_beside_an_artifact_are_refused(
    vault: Vault, blobs: MemoryBlobs, keys: TenantKeyring
) -> None:
    seal(vault, A)
    seal(vault, B)
    for artifact_id in (A, B):
        vault.rewrap(tenant="acme", artifact_id=artifact_id)
    slots = b"".join(blobs.read(A + ".slots"))
    for bit in range(8 * len(slots)):
        changed = bytearray(slots)
        changed[bit // 8] ^= 1 << bit % 8
        blobs.put(A + ".slots", [changed], replace=True)
        assert_refused(vault)
    for content in (b"", slots[:-1], slots + b"\0", b"".join(blobs.read(B + ".slots")), bytes(3 * 2**20)):
        blobs.put(A + ".slots", [content], replace=True)
        assert_refused(vault)
    blobs.put(A + ".slots", [slots], replace=True)
    vault.verify(tenant="acme", artifact_id=A, kind="checkpoint")


def test_another_tenant_cannot_rewrap_or_delete(vault: Vault, blobs: MemoryBlobs, keys: TenantKeyring) -> None:
    seal(vault)
    keys.ensure("other")
    for call in (vault.rewrap, vault.delete):
        with pytest.raises(InvalidRequestError, match="failed verification"):
            call(tenant="other", artifact_id=A)
    assert blobs.names() == [A]


def test_destroying_a_tenants_keys_makes_its_artifacts_unreadable_for_ever(vault: Vault, keys: TenantKeyring) -> None:
    seal(vault, A, tenant="acme")
    seal(vault, B, tenant="other")
    keys.destroy_tenant("acme")
    assert_refused(vault)
    with pytest.raises(InvalidRequestError):
        vault.stream(tenant="acme", artifact_id=A)
    with pytest.raises(InvalidRequestError, match="destroyed"):
        seal(vault, "ck_00000000000000000000000c", tenant="acme")
    assert vault.open(tenant="other", artifact_id=B, kind="checkpoint").state == STATE


def test_deleting_removes_the_artifact_and_its_slots_and_can_be_repeated(vault: Vault, blobs: MemoryBlobs) -> None:
    seal(vault)
    vault.rewrap(tenant="acme", artifact_id=A)
    vault.delete(tenant="acme", artifact_id=A)
    vault.delete(tenant="acme", artifact_id=A)
    assert blobs.names() == []
    assert_refused(vault)


def test_a_damaged_artifact_and_one_whose_keys_are_gone_can_be_deleted(
    vault: Vault, blobs: MemoryBlobs, keys: TenantKeyring
) -> None:
    blobs.put(A, [seal(vault)[:20]], replace=True)
    vault.delete(tenant="acme", artifact_id=A)
    seal(vault, B)
    keys.destroy_tenant("acme")
    vault.delete(tenant="acme", artifact_id=B)
    assert blobs.names() == []


def test_a_sweep_deletes_what_nobody_wants_and_leaves_the_rest(tmp_path: Path, keys: TenantKeyring) -> None:
    blobs = LocalBlobs(tmp_path)
    vault = Vault(blobs, keys)
    seal(vault, A)
    seal(vault, B, tenant="other")
    for tenant, artifact_id in (("acme", A), ("other", B)):
        vault.rewrap(tenant=tenant, artifact_id=artifact_id)
    (tmp_path / ".draft-00").write_bytes(b"half")
    assert vault.sweep({A}) == [B]
    assert blobs.names() == [A, A + ".slots"]
    assert len(list(tmp_path.iterdir())) == 2
    assert vault.sweep({A}) == []


def test_a_server_started_with_the_wrong_database_sweeps_nothing(vault: Vault, blobs: MemoryBlobs) -> None:
    seal(vault)
    blobs.put(B, [b"something else"])
    stranger = Vault(blobs, TenantKeyring(LocalKeyProvider(bytes(range(32))), MemoryKeyRows()))
    assert stranger.sweep(set()) == []
    assert blobs.names() == [A, B]


# --- memory


@pytest.fixture
def local(tmp_path: Path, keys: TenantKeyring) -> Vault:
    return Vault(LocalBlobs(tmp_path), keys)


def test_sealing_pulling_and_verifying_64_mib_takes_a_few_mib_and_opening_the_plaintext_once(
    local: Vault,
) -> None:
    size = 64 * 2**20
    tensors = {f"t{i}": np.zeros(size // 16, np.float32) for i in range(4)}
    asked = {"tenant": "acme", "artifact_id": A}
    few = 8 * 2**20
    assert peak_bytes(lambda: local.seal(**asked, kind="state", tensors=tensors, state={})) < few
    assert peak_bytes(lambda: sum(map(len, local.stream(**asked)))) < few
    assert peak_bytes(lambda: local.verify(**asked, kind="state")) < few
    assert size < peak_bytes(lambda: local.open(**asked, kind="state")) < size + few


def test_the_documented_name_of_the_stream_is_the_one_in_the_header(vault: Vault) -> None:
    assert f'"stream":"{artifact_format.STREAM}"'.encode() in seal(vault)
