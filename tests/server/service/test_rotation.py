"""Changing keys loses nothing, can be interrupted anywhere, and destroying them loses everything."""

from __future__ import annotations

import asyncio
import base64
import copy
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from tests.server.rpc.raw_client import RawClient
from tests.support.fake_vault import running_vault
from tg_tinker import BatchData, DPConfig, ServiceClient, TrainingConfig
from tg_tinker.errors import AuthenticationError, InvalidRequestError, ServerError
from tg_tinker.proto.v1 import sampling_pb2
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.crypto.keys import LocalKeyProvider, key_provider
from tg_tinker_server.crypto.signing import TenantSigner
from tg_tinker_server.foundation import SYSTEM_TENANT, Foundation
from tg_tinker_server.gateway.messages import CreateSession
from tg_tinker_server.gateway.sessions import Sessions
from tg_tinker_server.ledger.audit import AuditLog
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.custom_losses import CustomLosses
from tg_tinker_server.service.dataset_keys import DatasetKeys
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.journal import Entry, Journal
from tg_tinker_server.service.rotation import KeyRotation
from tg_tinker_server.service.sealed_text import SealedText
from tg_tinker_server.store import dataset_rows, sealed_rows, tables, tenant_key_rows

CONFIG = TrainingConfig(model_ref="bigram", batch_size=4, seed=1, metadata={"note": "kept"})
PRIVATE = CONFIG.model_copy(update={"dp_config": DPConfig(dataset_id="data", target_epsilon=100.0)})


class Place:
    """A data folder with two tenants' runs and checkpoints, and the server that goes with it, now and then."""

    def __init__(self, folder: Path) -> None:
        self.config = ServerConfig(port=0, backend="bigram", data_dir=folder)
        self.runs: dict[str, str] = {}
        self.checkpoints: dict[str, str] = {}
        self.keys: dict[str, str] = {}
        with EmbeddedServer(self.config) as server:
            for tenant in ("acme", "other"):
                self.keys[tenant] = server.mint_key(tenant)
                with ServiceClient(api_key=self.keys[tenant], base_url=server.address) as service:
                    service.create_dataset("registered", ["one record", "another"])
                    client = service.create_training_client(PRIVATE)
                    batch = np.random.default_rng(3).integers(1, 200, (4, 12))
                    client.forward_backward(BatchData(input_ids=batch)).result()
                    client.optim_step().result()
                    self.checkpoints[tenant] = client.save_state(name="first").artifact_id
                    self.runs[tenant] = client.id
                    sampler = sampling_pb2.CreateSamplerRequest(sampler_id="s", path=self.checkpoints[tenant])
                    RawClient(server.address, self.keys[tenant]).send(sampler)
        foundation = self.foundation()  # a loss of a caller's own, which this backend computes none of
        texts = SealedText(foundation.keyring)
        losses = CustomLosses(foundation.db, foundation.keyring, texts, Executors(), parse=len)
        for tenant in self.runs:
            losses._create(tenant, "{}")
            asyncio.run(self._keep_request(foundation, tenant))
        foundation.db.close()

    async def _keep_request(self, foundation: Foundation, tenant: str) -> None:
        """A session of the Tinker protocol, and a request that was acknowledged there."""
        executors = Executors()
        caller = Caller(tenant=tenant, key_id="k", scopes=frozenset())
        session = await Sessions(foundation.db, foundation.keyring, executors).create(caller, CreateSession())
        entry = Entry(model_id=f"{session}:train:0", seq=1, name="optim_step", body=b"{}" * 20, actor="k")
        await Journal(foundation.db, foundation.keyring, executors).keep(tenant, entry)
        executors.close()

    def foundation(self) -> Foundation:
        return Foundation.open(self.config)

    def use(self, tenant: str) -> tuple[str, Any, str]:
        """Everything that is stored of a tenant, read through a server: a sample, the list, the signer."""
        with EmbeddedServer(self.config) as server:
            with ServiceClient(api_key=self.keys[tenant], base_url=server.address) as service:
                client = service.get_training_client(self.runs[tenant])
                client.load_state(self.checkpoints[tenant])
                text = client.sample("the ", max_tokens=8, temperature=0.0).samples[0].completion
                (info,) = service.list_artifacts()
                assert info.name == "first"
                assert info.key_id == f"tenant-kek/{tenant}/v{self.newest(tenant)}"
                name = service.tenant_id
            return text, name, TenantSigner(server._foundation.keyring).signer(tenant).verifier_key

    def newest(self, tenant: str) -> int:
        foundation = self.foundation()
        found = int(foundation.keyring.key_id(tenant).rpartition("/v")[2])
        foundation.db.close()
        return found


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("template") / "data")


@pytest.fixture
def place(template: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TG_TINKER_DATA_DIR", str(tmp_path / "user"))  # a copy looks like a server put back
    shutil.copytree(template.config.data_dir, tmp_path / "data")
    copied = copy.copy(template)
    copied.config = template.config.model_copy(update={"data_dir": tmp_path / "data"})
    return copied


@pytest.fixture
def rotation(place: Place) -> Iterator[KeyRotation]:
    foundation = place.foundation()
    yield KeyRotation(foundation.db, foundation.keyring, foundation.vault)
    foundation.db.close()


def reopened(place: Place) -> KeyRotation:
    foundation = place.foundation()
    return KeyRotation(foundation.db, foundation.keyring, foundation.vault)


def test_after_a_rotation_all_is_readable_and_the_old_key_can_be_destroyed(place: Place) -> None:
    before = place.use("acme")
    rotation = reopened(place)
    renewed = rotation.rotate("acme")
    assert renewed.key_id == "tenant-kek/acme/v2"
    assert renewed.artifacts >= 2  # the checkpoint and the run's own state
    assert renewed.values >= 3  # results, a configuration, a name
    assert renewed.datasets == 1
    assert renewed.damaged == []
    rotation.destroy_old("acme")
    assert [r.destroyed is None for r in rotation.versions("acme")] == [False, True]
    assert [r.destroyed is None for r in rotation.versions("other")] == [True]
    (dataset,) = rotation.db.read(lambda tx: dataset_rows.wrapped_keys(tx, "acme"))
    assert DatasetKeys(rotation.keyring).open(dataset).upload_id == dataset.upload_id
    rotation.db.close()
    assert place.use("acme") == before


def test_a_rotation_leaves_the_bytes_and_the_hash_of_an_artifact_as_they_are(
    place: Place, rotation: KeyRotation
) -> None:
    def stored() -> bytes:
        return b"".join(rotation.vault.stream(tenant="acme", artifact_id=place.checkpoints["acme"]))

    before = stored()
    rotation.rotate("acme")
    assert stored() == before


@pytest.mark.parametrize("crash_after", [0, 1, 2, 3, 5])
def test_a_rotation_interrupted_anywhere_is_finished_by_running_it_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, crash_after: int
) -> None:
    rotation = reopened(place)
    left = crash_after

    def dying(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(type(rotation.db), "write", dying(type(rotation.db).write))
        patch.setattr(type(rotation.vault), "rewrap", dying(type(rotation.vault).rewrap))
        with pytest.raises(KeyboardInterrupt):
            rotation.rotate("acme")
    rotation.db.close()
    rotation = reopened(place)
    rotation.renew("acme")
    again = rotation.renew("acme")
    assert (again.artifacts, again.datasets, again.values) == (0, 0, 0)
    rotation.destroy_old("acme")
    rotation.db.close()
    place.use("acme")


def test_a_server_that_runs_meanwhile_goes_on(place: Place) -> None:
    with EmbeddedServer(place.config) as server, ServiceClient(place.keys["acme"], server.address) as service:
        client = service.get_training_client(place.runs["acme"])
        other = reopened(place)
        for number in range(2, 5):
            other.rotate("acme")
            batch = np.random.default_rng(number).integers(1, 200, (4, 12))
            client.forward_backward(BatchData(input_ids=batch)).result()
            client.optim_step().result()
        saved = client.save_state().artifact_id
        client.load_state(saved)
        other.db.close()


def test_what_cannot_be_put_under_the_new_key_keeps_the_old_one_alive(place: Place, rotation: KeyRotation) -> None:
    file = place.config.resolved_artifacts_dir / place.checkpoints["acme"]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # the body is not read by a rotation
    file.write_bytes(data)
    assert rotation.rotate("acme").damaged == []
    end = 14 + int.from_bytes(data[10:14], "big")
    data[end] ^= 1  # the tag of the header is
    file.write_bytes(data)
    assert rotation.rotate("acme").damaged == [place.checkpoints["acme"]]
    with pytest.raises(ServerError, match="would be lost"):
        rotation.destroy_old("acme")
    assert all(r.destroyed is None for r in rotation.versions("acme"))


def test_every_sealed_column_is_known_to_a_rotation(place: Place, rotation: KeyRotation) -> None:
    """Whatever in the database looks like a sealed value lies in a column that a rotation renews."""
    known = {(c.table.name, c.column) for c in sealed_rows.COLUMNS}
    found = set()
    header = bytes([1, 0, 0, 0, 1])

    def scan(tx: sa.Connection) -> None:
        for table in tables.metadata.sorted_tables:
            for row in tx.execute(sa.select(table)):
                for name, value in row._mapping.items():
                    text = value.encode() if isinstance(value, str) else value
                    sealed = isinstance(text, bytes) and len(text) > 40
                    if sealed and (text.startswith(header) or text.startswith(base64.b64encode(header)[:6])):
                        found.add((table.name, name))

    rotation.db.read(scan)
    assert found == known


def test_a_shredded_tenant_is_gone_and_its_neighbour_is_not(place: Place) -> None:
    rotation = reopened(place)
    (row,) = rotation.versions("acme")
    assert rotation.shred("acme") == 1
    assert rotation.versions("acme")[0].wrapped == b""
    assert "acme" not in rotation.tenants()
    with pytest.raises(InvalidRequestError, match="no tenant"):
        rotation.rotate("acme")
    rotation.db.close()
    remains = b"".join(p.read_bytes() for p in place.config.data_dir.glob("tg-tinker.db*"))
    assert row.wrapped not in remains  # not in free pages and not in the write-ahead log either
    with EmbeddedServer(place.config) as server:
        with pytest.raises(AuthenticationError), ServiceClient(place.keys["acme"], server.address) as service:
            service.list_artifacts()
        with pytest.raises(InvalidRequestError, match="destroyed"):
            server.mint_key("acme")
    assert place.use("other")[1] == "other"


def wrapped_keys(place: Place) -> dict[str, bytes]:
    """What must not be found again, read with a connection that leaves the files as they are."""
    with sqlite3.connect(f"file:{place.config.data_dir}/tg-tinker.db?mode=ro", uri=True) as connection:
        rows = connection.execute("SELECT tenant, wrapped FROM tenant_keys WHERE wrapped <> ''").fetchall()
    connection.close()
    return {tenant: bytes(wrapped) for tenant, wrapped in rows}


def left_over(place: Place, keys: Iterable[bytes]) -> set[str]:
    """Files of the database that still hold one of these."""
    files = place.config.data_dir.glob("tg-tinker.db*")
    return {p.name for p in files for data in [p.read_bytes()] if any(k in data for k in keys)}


@pytest.mark.parametrize("what", ["shred", "destroy_old", "rewrap_root"])
def test_destroyed_keys_are_off_the_disk_when_the_command_reports_success(place: Place, what: str) -> None:
    rotation = reopened(place)
    if what == "destroy_old":
        rotation.rotate("acme")
    old = {r.tenant: r.wrapped for t in rotation.tenants() for r in rotation.versions(t) if r.version == 1}
    doomed = list(old.values()) if what == "rewrap_root" else [old["acme"]]
    assert left_over(place, doomed)
    open_still = rotation.db  # a connection that would keep the write-ahead log from being emptied by a close
    open_still.read(lambda tx: tx.execute(sa.text("SELECT 1")))
    if what == "shred":
        rotation.shred("acme")
    elif what == "destroy_old":
        rotation.destroy_old("acme")
    else:
        rotation.rewrap_root(key_provider(place.config.resolved_root_key), LocalKeyProvider(bytes(32)))
    assert left_over(place, doomed) == set()
    rotation.db.close()


DYING = """
import os, sys
from pathlib import Path
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.foundation import Foundation
from tg_tinker_server.service.rotation import KeyRotation
from tg_tinker_server.store.database import Database
foundation = Foundation.open(ServerConfig(data_dir=Path(sys.argv[1])))
foundation.db.read(lambda tx: None)
Database.forget_deleted = lambda self: os.kill(os.getpid(), 9)
KeyRotation(foundation.db, foundation.keyring, foundation.vault).shred("acme")
"""


def test_keys_destroyed_right_before_a_crash_are_off_the_disk_after_the_next_start(place: Place) -> None:
    doomed = wrapped_keys(place)["acme"]
    dead = subprocess.run([sys.executable, "-c", DYING, str(place.config.data_dir)], check=False)
    assert dead.returncode == -9
    assert left_over(place, [doomed])  # committed, and still in a file
    keeper = sqlite3.connect(place.config.data_dir / "tg-tinker.db")  # as another command of the operator would
    keeper.execute("SELECT count(*) FROM tenant_keys").fetchall()
    with EmbeddedServer(place.config) as server:
        assert left_over(place, [doomed]) == set()
        (record,) = AuditLog(server._foundation.db).query("acme", operation="shred_keys")
        assert record.body["actor"] == "operator"
    keeper.close()
    assert place.use("other")[1] == "other"


def test_a_key_is_destroyed_together_with_its_record_or_not_at_all(
    place: Place, rotation: KeyRotation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("no space left")

    before = {t: rotation.versions(t) for t in rotation.tenants()}
    monkeypatch.setattr(AuditLog, "insert", broken)
    with pytest.raises(OSError, match="no space"):
        rotation.shred("acme")
    with pytest.raises(OSError, match="no space"):
        rotation.rewrap_root(key_provider(place.config.resolved_root_key), LocalKeyProvider(bytes(32)))
    assert {t: rotation.versions(t) for t in rotation.tenants()} == before


def test_the_root_key_can_be_changed_and_the_old_one_opens_nothing_then(place: Place, tmp_path: Path) -> None:
    before = place.use("acme")
    old = key_provider(place.config.resolved_root_key)
    with running_vault() as vault:
        environ = {"VAULT_TOKEN": vault.token}
        new = key_provider(f"vault:{vault.url}/transit/keys/tg-tinker", environ)
        rotation = reopened(place)
        assert rotation.rewrap_root(old, new) == len(rotation.tenants()) == 3
        with pytest.raises(ServerError, match="nothing was changed"):
            rotation.rewrap_root(old, new)
        rotation.db.close()
        with pytest.raises(ServerError, match="does not open under this server's root key"):
            place.foundation()
        back = reopened_under(place, new)
        assert back.rewrap_root(new, LocalKeyProvider(bytes(32))) == 3
        back.db.close()
    file = tmp_path / "new.key"
    file.write_text(base64.b64encode(bytes(32)).decode())
    file.chmod(0o600)
    place.config = place.config.model_copy(update={"root_key": f"file:{file}"})
    assert place.use("acme") == before


def reopened_under(place: Place, provider: Any) -> KeyRotation:
    from tg_tinker_server.artifacts.blobs import LocalBlobs
    from tg_tinker_server.artifacts.vault import Vault
    from tg_tinker_server.crypto.envelope import TenantKeyring
    from tg_tinker_server.service.tenant_keys import StoredKeyRows
    from tg_tinker_server.store.database import Database

    db = Database.open(place.config.resolved_database_url)
    keyring = TenantKeyring(provider, StoredKeyRows(db))
    return KeyRotation(db, keyring, Vault(LocalBlobs(place.config.resolved_artifacts_dir), keyring))


def test_a_root_key_that_does_not_work_changes_nothing(place: Place, rotation: KeyRotation) -> None:
    class Forgetful(LocalKeyProvider):
        def unwrap(self, wrapped: bytes, aad: bytes) -> bytes:
            return bytes(32)

    before = [rotation.versions(t) for t in rotation.tenants()]
    old = key_provider(place.config.resolved_root_key)
    with pytest.raises(ServerError, match="nothing was changed"):
        rotation.rewrap_root(old, Forgetful(bytes(32)))
    with pytest.raises(ServerError, match="nothing was changed"):
        rotation.rewrap_root(LocalKeyProvider(bytes(32)), old)
    assert [rotation.versions(t) for t in rotation.tenants()] == before


def test_a_key_row_that_is_damaged_is_not_carried_over(place: Place, rotation: KeyRotation) -> None:
    (row,) = rotation.versions("acme")
    damaged = row.wrapped[:-1] + bytes([row.wrapped[-1] ^ 1])  # in the tenant's secret, behind the key itself
    rotation.db.write(lambda tx: tenant_key_rows.replace_wrapped(tx, "acme", 1, damaged))
    with pytest.raises(ServerError, match="nothing was changed"):
        rotation.rewrap_root(key_provider(place.config.resolved_root_key), LocalKeyProvider(bytes(32)))
    assert rotation.versions("acme")[0].wrapped == damaged


def test_the_operators_doings_stand_in_the_tenants_audit_log(place: Place, rotation: KeyRotation) -> None:
    rotation.rotate("acme")
    with EmbeddedServer(place.config) as server:
        with ServiceClient(api_key=place.keys["acme"], base_url=server.address) as service:
            (entry,) = service.get_audit_logs(operation="rotate_keys")
        assert (entry.actor, entry.facts) == ("operator", {"key_id": "tenant-kek/acme/v2"})
    assert SYSTEM_TENANT in rotation.tenants()
