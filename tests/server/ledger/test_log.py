"""The transparency log: the tree in the database against one built from the entries, and the move into it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import pytest
import sqlalchemy as sa

from tg_tinker.errors import InvalidRequestError, LogVerificationError
from tg_tinker.ledger import AUDIT_DOMAIN, LEDGER_DOMAIN, START, ChainEntry
from tg_tinker.transparency import merkle
from tg_tinker.transparency.note import Checkpoint, VerifierKey
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.crypto.keys import LocalKeyProvider
from tg_tinker_server.crypto.signing import TenantSigner
from tg_tinker_server.ledger import log
from tg_tinker_server.ledger.audit import AuditLog, AuditRecord
from tg_tinker_server.ledger.log import TransparencyLog
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.service.tenant_keys import StoredKeyRows
from tg_tinker_server.store import database as store
from tg_tinker_server.store import log_rows
from tg_tinker_server.store.database import Database

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 33]


@pytest.fixture
def tlog(db: Database) -> TransparencyLog:
    return TransparencyLog(db, TenantSigner(TenantKeyring(LocalKeyProvider(bytes(32)), StoredKeyRows(db))))


def grown(db: Database, count: int, tenant: str = "t") -> list[bytes]:
    """Leaf hashes of as many entries, as they were appended."""
    bodies = [f'{{"n":{n}}}' for n in range(count)]
    for n, body in enumerate(bodies):
        assert db.write(lambda tx, b=body: log.append(tx, tenant, b)) == n
    return [merkle.leaf_hash(b.encode()) for b in bodies]


def opened(tlog: TransparencyLog, size: int | None = None, tenant: str = "t") -> Checkpoint:
    signed = tlog.db.read(lambda tx: tlog.checkpoint(tx, tenant, size))
    return Checkpoint.open(signed.note, VerifierKey.parse(signed.verifier_key))


def test_every_checkpoint_is_the_root_of_the_first_leaves(db: Database, tlog: TransparencyLog) -> None:
    leaves = grown(db, 33)
    for size in (0, *SIZES):
        checkpoint = opened(tlog, size)
        assert (checkpoint.size, checkpoint.root) == (size, merkle.root_of(leaves[:size]))
    assert opened(tlog).size == 33


def test_what_the_log_proves_verifies_and_nothing_else_does(db: Database, tlog: TransparencyLog) -> None:
    leaves = grown(db, 33)
    for size in SIZES:
        root = opened(tlog, size).root
        for index in range(size):
            proof = db.read(lambda tx, i=index, n=size: tlog.inclusion(tx, "t", i, n))
            merkle.verify_inclusion(leaves[index], index, size, proof, root)
            with pytest.raises(LogVerificationError):
                merkle.verify_inclusion(leaves[(index + 1) % 33], index, size, proof, root)
        for old in (s for s in SIZES if s <= size):
            proof = db.read(lambda tx, o=old, n=size: tlog.consistency(tx, "t", o, n))
            merkle.verify_consistency(old, size, merkle.root_of(leaves[:old]), root, proof)
        wanted = random.Random(size).sample(range(size), (size + 1) // 2)
        proof = db.read(lambda tx, w=wanted, n=size: tlog.subset(tx, "t", w, n))
        merkle.verify_subset({i: leaves[i] for i in wanted}, size, proof, root)


def test_tenants_have_trees_and_keys_of_their_own(db: Database, tlog: TransparencyLog) -> None:
    grown(db, 3)
    assert opened(tlog, tenant="other").size == 0
    assert opened(tlog, tenant="other").origin != opened(tlog).origin


@pytest.mark.parametrize("ask", [(4, 3), (-1, 2), (0, 4)])
def test_a_size_the_log_never_had_is_refused(db: Database, tlog: TransparencyLog, ask: tuple[int, int]) -> None:
    grown(db, 3)
    with pytest.raises(InvalidRequestError, match="older database"):
        db.read(lambda tx: tlog.consistency(tx, "t", *ask))


def test_an_append_that_rolls_back_leaves_no_leaf(db: Database, tlog: TransparencyLog) -> None:
    leaves = grown(db, 5)

    def fail(tx: Any) -> None:
        log.append(tx, "t", "{}")
        raise InvalidRequestError("no")

    with pytest.raises(InvalidRequestError):
        db.write(fail)
    assert opened(tlog).root == merkle.root_of(leaves)


def test_a_lost_node_stops_the_log(db: Database) -> None:
    grown(db, 1)
    db.write(lambda tx: tx.exec_driver_sql("DROP TRIGGER log_nodes_no_update"))
    db.write(lambda tx: tx.exec_driver_sql("UPDATE log_nodes SET tenant = 'x' WHERE level = 0 AND idx = 0"))
    db.write(lambda tx: tx.exec_driver_sql("DROP TRIGGER log_nodes_only_at_end"))
    db.write(lambda tx: log_rows.insert_nodes(tx, "t", {(0, 2): b""}))
    with pytest.raises(Exception, match="lost a node"):
        db.write(lambda tx: log.append(tx, "t", "{}"))


def record(n: int) -> AuditRecord:
    return AuditRecord(
        operation="optim_step", run_id="run_a", request_hash="hmac-sha256:00", request_bytes=n, artifact_ids=(),
        started=NOW, completed=NOW + timedelta(seconds=n), success=True, error_code="", dp_metrics=None,
    )  # fmt: skip


def test_ledger_and_audit_entries_are_leaves_in_the_order_they_were_written(
    tlog: TransparencyLog, book: Callable[..., Any]
) -> None:
    b = book().open()
    audit = AuditLog(b.db)
    audit.append("t", record(1)).result()
    b.settle(b.reserve(1))
    audit.append("t", record(2)).result()
    bodies = b.db.read(lambda tx: log_rows.leaves(tx, "t", 0, 100))
    assert [json.loads(x).get("kind") or json.loads(x)["operation"] for x in bodies] == [
        "open", "optim_step", "charge", "settle", "optim_step",
    ]  # fmt: skip
    assert opened(tlog).root == merkle.root_of([merkle.leaf_hash(x.encode()) for x in bodies])
    assert [e.body_json() for e in b.ledger.entries(b.scope)] == [bodies[i] for i in (0, 2, 3)]


def test_a_report_is_the_last_entry_of_its_own_evidence(book: Callable[..., Any]) -> None:
    b = book().open()
    b.settle(b.reserve(1))
    before = b.epsilon()
    leaves = b.ledger.attest(b.scope)
    assert [leaf.entry.kind for leaf in leaves] == ["open", "charge", "settle", "report"]
    assert [leaf.index for leaf in leaves] == [0, 1, 2, 3]
    assert float(leaves[-1].entry.body["epsilon"]) == before == b.epsilon()
    b.reserve(2)
    assert [leaf.entry.kind for leaf in b.ledger.attest(b.scope)][-3:] == ["report", "charge", "report"]


def old_database(path: Path, tenants: int, entries: int) -> dict[str, list[str]]:
    """A database as the first release wrote it; its entries by tenant, in the order they were written."""
    url = f"sqlite:///{path}"
    engine = sa.create_engine(url)
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(store.__file__).parent / "migrations"))
    written: dict[str, list[str]] = {}
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "0001")
        draw = random.Random(7)
        heads: dict[tuple[str, str], tuple[int, bytes]] = {}
        for n in range(entries):
            tenant, dataset = f"t{draw.randrange(tenants)}", draw.choice(["d0", "d1", "audit"])
            position, head = heads.get((tenant, dataset), (0, START))
            moment = (NOW + timedelta(seconds=n)).isoformat()
            audit = dataset == "audit"
            body = (
                {"operation": "x", "completed": moment}
                if audit
                else {"kind": "open", "dataset_id": dataset, "time": moment}
            )
            entry = ChainEntry.make(AUDIT_DOMAIN if audit else LEDGER_DOMAIN, body, position=position, prev_hash=head)
            columns = {
                "tenant": tenant,
                "position": position,
                "body": entry.body_json(),
                "prev": head,
                "h": entry.entry_hash,
            }
            if audit:
                connection.execute(
                    sa.text("INSERT INTO audit VALUES (:tenant, :position, :body, :prev, :h)"), columns
                )
            else:
                connection.execute(
                    sa.text(
                        "INSERT INTO ledger VALUES (:tenant, :d, :position, 'open', :run, 0, 0, :body, :prev, :h)"
                    ),
                    {**columns, "d": dataset, "run": f"r{n}"},
                )
            heads[tenant, dataset] = (position + 1, entry.entry_hash)
            written.setdefault(tenant, []).append(entry.body_json())
    engine.dispose()
    return written


def test_the_chains_of_the_first_release_move_into_the_tree(tmp_path: Path) -> None:
    written = old_database(tmp_path / "old.db", tenants=3, entries=200)
    db = Database.open(f"sqlite:///{tmp_path / 'old.db'}")
    tlog = TransparencyLog(db, TenantSigner(TenantKeyring(LocalKeyProvider(bytes(32)), StoredKeyRows(db))))
    for tenant, bodies in written.items():
        assert list(db.read(lambda tx, t=tenant: log_rows.leaves(tx, t, 0, 1000))) == bodies
        assert opened(tlog, tenant=tenant).root == merkle.root_of([merkle.leaf_hash(b.encode()) for b in bodies])
        # and it goes on from there
        db.write(lambda tx, t=tenant: log.append(tx, t, "{}"))
        leaves = [merkle.leaf_hash(b.encode()) for b in [*bodies, "{}"]]
        assert opened(tlog, tenant=tenant).root == merkle.root_of(leaves)
    for table in ("ledger", "audit", "log_nodes"):
        with pytest.raises(Exception, match="append-only"):
            db.write(lambda tx, t=table: tx.exec_driver_sql(f"DELETE FROM {t}"))
    assert PrivacyLedger(db, clock=lambda: NOW).entries(DatasetScope("t0", "d0"))
    db.close()


def test_a_broken_old_chain_stays_broken(tmp_path: Path) -> None:
    old_database(tmp_path / "old.db", tenants=1, entries=20)
    with sa.create_engine(f"sqlite:///{tmp_path / 'old.db'}").begin() as connection:
        connection.execute(sa.text("DROP TRIGGER ledger_no_update"))
        connection.execute(sa.text("UPDATE ledger SET body_json = replace(body_json, '2026', '2025')"))
        connection.execute(
            sa.text("CREATE TRIGGER ledger_no_update BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'x'); END")
        )
    db = Database.open(f"sqlite:///{tmp_path / 'old.db'}")
    with pytest.raises(Exception, match="cannot be trusted"):
        PrivacyLedger(db, clock=lambda: NOW).spent(DatasetScope("t0", "d0"))
    db.close()
