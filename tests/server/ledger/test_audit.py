"""The audit log: one chain per tenant, no content, and every edit is found."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.ledger import verify_audit_chain
from tg_tinker.wire.privacy import audit_from_lines
from tg_tinker_server.ledger.audit import AuditLog, AuditRecord
from tg_tinker_server.store.database import Database

START_TIME = datetime(2026, 1, 2, tzinfo=UTC)


def record(n: int = 0, **more: Any) -> AuditRecord:
    fields: dict[str, Any] = {
        "operation": "optim_step",
        "run_id": "run_a",
        "request_hash": "hmac-sha256:" + "0" * 64,
        "request_bytes": 100 + n,
        "artifact_ids": (),
        "started": START_TIME + timedelta(seconds=n),
        "completed": START_TIME + timedelta(seconds=n + 1),
        "success": True,
        "error_code": "",
        "dp_metrics": {"noise_applied": True, "epsilon_spent": "0.1", "total_epsilon": "1.5", "delta": "1e-05"},
    }
    return AuditRecord(**{**fields, **more})


def fill(log: AuditLog, tenant: str = "t", n: int = 6) -> None:
    for future in [log.append(tenant, record(i, run_id=f"run_{'ab'[i % 2]}")) for i in range(n)]:
        future.result(10)


def test_records_are_chained_in_order_for_each_tenant(db: Database) -> None:
    log = AuditLog(db)
    fill(log, "t")
    fill(log, "u", n=2)
    logs = audit_from_lines([e.to_json() for e in log.query("t")])
    assert [r.entry_id for r in logs] == list(range(6))
    assert all(logs[i].prev_hash == logs[i - 1].record_hash for i in range(1, 6))
    assert verify_audit_chain(logs) == verify_audit_chain(log.query("t"))
    assert [e.position for e in log.query("u")] == [0, 1]
    assert log.query("nobody") == []


def test_the_client_reads_back_what_was_recorded(db: Database) -> None:
    log = AuditLog(db)
    log.append(
        "t",
        record(
            3,
            artifact_ids=("ckpt_1",),
            success=False,
            error_code="INVALID_REQUEST",
            actor="k1",
            facts={"recipients": "age1x"},
        ),
    ).result(10)
    log.append("t", record(4)).result(10)
    got, plain = audit_from_lines([e.to_json() for e in log.query("t")])
    assert (got.operation, got.training_client_id, got.artifact_ids) == ("optim_step", "run_a", ["ckpt_1"])
    assert (got.success, got.error_code, got.request_bytes) == (False, "INVALID_REQUEST", 103)
    assert verify_audit_chain([got, plain]) == bytes.fromhex(plain.record_hash)
    assert (plain.actor, plain.facts) == ("", {})
    assert got.started == START_TIME + timedelta(seconds=3)
    assert (got.actor, got.facts) == ("k1", {"recipients": "age1x"})
    assert got.dp_metrics is not None
    assert got.dp_metrics["total_epsilon"] == "1.5"


def test_a_query_returns_the_newest_that_fit_oldest_first(db: Database) -> None:
    log = AuditLog(db)
    fill(log, n=10)
    assert [e.position for e in log.query("t", limit=3)] == [7, 8, 9]
    assert [e.position for e in log.query("t", run_id="run_a")] == [0, 2, 4, 6, 8]
    assert [e.position for e in log.query("t", run_id="run_a", limit=2)] == [6, 8]
    assert log.query("t", operation="save_state") == []
    window = log.query("t", start=START_TIME + timedelta(seconds=2), end=START_TIME + timedelta(seconds=5))
    assert [e.position for e in window] == [2, 3, 4, 5]
    verify_audit_chain(log.query("t", run_id="run_b"))


def test_the_log_survives_a_restart_and_goes_on(db: Database, url: str) -> None:
    fill(AuditLog(db), n=3)
    again = Database.open(url)
    AuditLog(again).append("t", record(9)).result(10)
    entries = AuditLog(again).query("t")
    assert verify_audit_chain(entries) == entries[-1].entry_hash
    assert len(entries) == 4
    again.close()


@pytest.mark.parametrize("position", [0, 2, 5])
def test_an_edited_row_is_found_at_its_index(db: Database, position: int) -> None:
    log = AuditLog(db)
    fill(log)

    def tamper(tx: sa.Connection) -> None:
        tx.exec_driver_sql("DROP TRIGGER audit_no_update")
        tx.exec_driver_sql(
            f"UPDATE audit SET body_json = replace(body_json, 'true', 'false') WHERE position = {position}"
        )

    db.write(tamper)
    with pytest.raises(InvalidRequestError) as caught:
        verify_audit_chain(log.query("t"))
    assert caught.value.details["position"] == position


def test_a_removed_row_is_found_in_a_query_without_filters(db: Database) -> None:
    log = AuditLog(db)
    fill(log)

    def tamper(tx: sa.Connection) -> None:
        tx.exec_driver_sql("DROP TRIGGER audit_no_delete")
        tx.exec_driver_sql("DELETE FROM audit WHERE position = 3")

    db.write(tamper)
    with pytest.raises(InvalidRequestError, match="position 3: this record is missing"):
        verify_audit_chain(log.query("t"), gapless=True)


def test_a_row_that_cannot_be_read_stops_the_query(db: Database) -> None:
    log = AuditLog(db)
    fill(log)

    def tamper(tx: sa.Connection) -> None:
        tx.exec_driver_sql("DROP TRIGGER audit_no_update")
        tx.exec_driver_sql("UPDATE audit SET body_json = 'gone' WHERE position = 2")

    db.write(tamper)
    with pytest.raises(ServerError, match="position 2"):
        log.query("t")


@pytest.mark.parametrize("private", ["grad_norm_before_clip", "num_clipped", "loss"])
def test_diagnostics_never_enter_the_log(private: str) -> None:
    with pytest.raises(ValueError, match=private):
        record(dp_metrics={"total_epsilon": "1.0", private: "3.2"})


def test_a_fact_that_is_not_known_to_be_public_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt"):
        record(facts={"prompt": "the patient"})


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="timezone"):
        record(started=datetime(2026, 1, 2))


def test_a_record_has_no_field_that_could_hold_content() -> None:
    assert {f.name for f in dataclasses.fields(AuditRecord)} == {
        "operation", "run_id", "request_hash", "request_bytes", "artifact_ids", "started", "completed", "success",
        "error_code", "dp_metrics", "actor", "facts",
    }  # fmt: skip


def test_a_record_that_cannot_be_written_makes_the_database_unhealthy(db: Database) -> None:
    log = AuditLog(db)
    log.append("t", record()).result(10)

    def full(dbapi_connection: Any, _record: object) -> None:
        dbapi_connection.execute("PRAGMA max_page_count=1")

    sa.event.listen(db._writer_engine, "connect", full)
    with pytest.raises(ZeroDivisionError):
        db.write(lambda tx: 1 / 0)  # the writer's next connection finds the disk full
    failed = [log.append("t", record(i, error_code="x" * 5000)) for i in range(10)]
    assert isinstance(failed[-1].exception(10), ServerError)
    with pytest.raises(ServerError, match="lost a write"):
        db.check_healthy()
