"""Uploads become datasets whole or not at all; keys of datasets; leftovers are swept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tg_tinker.errors import InvalidRequestError, RateLimitedError, ResourceNotFoundError, ServerError
from tg_tinker.types.records import NewDataset, Record
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.foundation import Foundation
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.service import datasets as module
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.dataset_keys import DatasetKeys
from tg_tinker_server.service.datasets import DatasetService
from tg_tinker_server.service.durability import now
from tg_tinker_server.store import dataset_rows as rows

OWNER = Caller(tenant="t", key_id="k", scopes=frozenset())
RECORDS = [(Record(text=f"record {i}").to_bytes(), i) for i in range(6)]
NEW = NewDataset(
    upload_id="upload-1", dataset_id="notes", privacy_unit="datum", target_epsilon=8.0, target_delta=1e-3,
    truncate=False, num_records=6, num_slots=6,
)  # fmt: skip


@pytest.fixture
def foundation(tmp_path: Path) -> Iterator[Foundation]:
    found = Foundation.open(ServerConfig(data_dir=tmp_path))
    yield found
    found.db.close()


@pytest.fixture
def service(foundation: Foundation) -> DatasetService:
    ledger = PrivacyLedger(foundation.db, clock=now)
    return DatasetService(foundation.db, ledger, DatasetKeys(foundation.keyring), max_bytes=1000, max_records=100)


def register(service: DatasetService, **change: Any) -> None:
    new = replace(NEW, **change)
    service.begin("t", new)
    service.append("t", new.upload_id, 0, RECORDS)
    service.seal("t", new.upload_id, "key_1")


def store(service: DatasetService) -> rows.StoreRow:
    return service.row("t", "notes")


def kept(service: DatasetService) -> list[rows.RecordRow]:
    row = store(service)
    return service.db.read(lambda tx: rows.records_from(tx, "t", row.upload_id, 0, 1000))


def test_nothing_is_there_until_the_upload_is_sealed(service: DatasetService) -> None:
    assert service.begin("t", NEW) == 0
    assert service.append("t", "upload-1", 0, RECORDS[:4]) == 4
    with pytest.raises(ResourceNotFoundError):
        service.get(OWNER, "notes")
    with pytest.raises(InvalidRequestError, match="4 of 6 records"):
        service.seal("t", "upload-1", "key_1")
    assert service.ledger.entries(DatasetScope("t", "notes")) == []
    service.append("t", "upload-1", 4, RECORDS[4:])
    assert service.seal("t", "upload-1", "key_1").num_records == 6
    entry = service.ledger.entries(DatasetScope("t", "notes"))[0].body
    assert (entry["kind"], entry["slots"], entry["actor"]) == ("register", 6, "key_1")


def test_every_call_of_an_upload_can_be_repeated(service: DatasetService) -> None:
    for _ in range(2):
        service.begin("t", NEW)
        service.append("t", "upload-1", 0, RECORDS[:4])
    assert service.begin("t", NEW) == 4
    for _ in range(2):
        assert service.append("t", "upload-1", 4, RECORDS[4:]) == 6
    first = service.seal("t", "upload-1", "key_1")
    assert service.append("t", "upload-1", 4, RECORDS[4:]) == 6
    assert service.seal("t", "upload-1", "key_1") == first
    assert len(service.ledger.entries(DatasetScope("t", "notes"))) == 1
    with pytest.raises(InvalidRequestError, match="began another dataset"):
        service.begin("t", replace(NEW, dataset_id="other"))


@pytest.mark.parametrize(
    ("position", "records", "match"),
    [
        (3, RECORDS[3:], "does not follow"),
        (0, [RECORDS[1], RECORDS[0]], "does not follow"),
        (1, RECORDS[1:4], "does not follow"),
        (2, [(RECORDS[2][0], 5)], "in order of first appearance"),
        (2, [(RECORDS[2][0], 0)], "in order of first appearance"),
        (2, [(b"\x09", 2)], "no record"),
        (2, [*RECORDS[2:], (RECORDS[0][0], 6)], "6 records that were announced"),
        (2, [(Record(text="x" * 999).to_bytes(), 2)], "1000 bytes"),
    ],
)
def test_records_out_of_place_are_refused_and_nothing_of_them_is_kept(
    service: DatasetService, position: int, records: list[tuple[bytes, int]], match: str
) -> None:
    service.begin("t", NEW)
    service.append("t", "upload-1", 0, RECORDS[:2])
    with pytest.raises(InvalidRequestError, match=match):
        service.append("t", "upload-1", position, records)
    assert service.begin("t", NEW) == 2
    service.append("t", "upload-1", 2, RECORDS[2:])
    service.seal("t", "upload-1", "key_1")


def test_a_dataset_has_as_many_units_as_were_announced(service: DatasetService) -> None:
    service.begin("t", replace(NEW, privacy_unit="user", num_slots=3))
    service.append("t", "upload-1", 0, [(data, slot % 2) for data, slot in RECORDS])
    with pytest.raises(InvalidRequestError, match="2 of 3 privacy units"):
        service.seal("t", "upload-1", "key_1")


def test_of_two_uploads_under_one_name_the_first_to_be_sealed_wins(service: DatasetService) -> None:
    for upload in ("upload-1", "upload-2"):
        service.begin("t", replace(NEW, upload_id=upload))
        service.append("t", upload, 0, RECORDS)
    service.seal("t", "upload-2", "key_1")
    with pytest.raises(InvalidRequestError, match="has a ledger already"):
        service.seal("t", "upload-1", "key_1")
    assert store(service).upload_id == "upload-2"


def test_limits_are_said_before_anything_is_sent(service: DatasetService) -> None:
    with pytest.raises(InvalidRequestError, match="100 records"):
        service.begin("t", replace(NEW, num_records=101, num_slots=101))
    for n in range(module.MAX_UPLOADS):
        service.begin("t", replace(NEW, upload_id=f"upload-{n:02}", dataset_id=f"d{n}"))
    with pytest.raises(RateLimitedError, match="are not finished"):
        service.begin("t", NEW)
    service.begin("another tenant", NEW)


def test_an_upload_that_nobody_goes_on_with_is_swept_away(
    service: DatasetService, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(service, upload_id="upload-0", dataset_id="kept")
    service.begin("t", NEW)
    service.append("t", "upload-1", 0, RECORDS[:2])
    service.sweep()
    assert service.append("t", "upload-1", 2, RECORDS[2:4]) == 4
    monkeypatch.setattr(module, "now", lambda: now() + timedelta(hours=25))
    service.sweep()
    with pytest.raises(ResourceNotFoundError):
        service.append("t", "upload-1", 4, RECORDS[4:])
    assert service.db.read(lambda tx: rows.count_records(tx, "t", "upload-1"))[0] == 0
    assert service.get(OWNER, "kept").num_records == 6


def test_an_upload_that_is_being_swept_cannot_be_sealed_half_empty(
    service: DatasetService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.begin("t", NEW)
    service.append("t", "upload-1", 0, RECORDS)
    monkeypatch.setattr(module, "now", lambda: now() + timedelta(hours=25))

    def crash(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(DatasetService, "_purge", crash)
    with pytest.raises(OSError, match="power cut"):
        service.sweep()
    with pytest.raises(ResourceNotFoundError):
        service.seal("t", "upload-1", "key_1")


def test_a_deletion_that_a_crash_cut_short_left_no_key_and_is_finished_at_the_next_start(
    service: DatasetService, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(service)

    def crash(*_: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(DatasetService, "_purge", crash)
        with pytest.raises(OSError, match="power cut"):
            service.delete("t", "notes", "key_1")
    gone = service.find("t", "notes")
    assert gone is not None
    assert (gone.status, gone.wrapped_key) == (rows.DELETED, None)
    assert service.db.read(lambda tx: rows.count_records(tx, "t", "upload-1"))[0] == 6
    with pytest.raises(ServerError, match="was destroyed"):
        service.keys.open(gone)
    service.sweep()
    assert service.db.read(lambda tx: rows.count_records(tx, "t", "upload-1"))[0] == 0
    assert service.find("t", "notes") is not None  # the name stays taken


def test_ids_are_keyed_by_the_dataset_and_the_place(service: DatasetService) -> None:
    same = [(RECORDS[0][0], i) for i in range(6)]
    ids = []
    for upload, name in (("upload-1", "notes"), ("upload-2", "more")):
        service.begin("t", replace(NEW, upload_id=upload, dataset_id=name))
        service.append("t", upload, 0, same)
        service.seal("t", upload, "key_1")
        ids += service.record_ids(OWNER, name, 0)[0]
    assert len(set(ids)) == 12


def test_record_ids_come_in_pages(service: DatasetService, monkeypatch: pytest.MonkeyPatch) -> None:
    register(service)
    whole, end = service.record_ids(OWNER, "notes", 0)
    assert (len(whole), end) == (6, 0)
    monkeypatch.setattr(module, "LISTED_IDS", 4)
    first, following = service.record_ids(OWNER, "notes", 0)
    assert first + service.record_ids(OWNER, "notes", following)[0] == whole


@pytest.mark.parametrize("what", ["moved", "other unit", "altered", "other dataset"])
def test_a_record_that_was_tampered_with_is_never_used(service: DatasetService, what: str) -> None:
    register(service)
    register(service, upload_id="upload-2", dataset_id="other")
    key, row = service.keys.open(store(service)), kept(service)[0]
    assert Record.from_bytes(key.open(row)).text == "record 0"
    bent = {
        "moved": replace(row, position=1),
        "other unit": replace(row, slot=1),
        "altered": replace(row, sealed=row.sealed[:-1] + bytes([row.sealed[-1] ^ 1])),
        "other dataset": row,
    }[what]
    if what == "other dataset":
        key = service.keys.open(service.row("t", "other"))
    with pytest.raises(ServerError, match="failed verification"):
        key.open(bent)


def test_a_rotation_wraps_the_key_anew_and_leaves_the_records(
    service: DatasetService, foundation: Foundation
) -> None:
    register(service)
    before = store(service)
    foundation.keyring.rotate("t")
    wrapped = service.keys.rewrap(before)
    assert wrapped.key_id != before.key_id
    service.db.write(
        lambda tx: rows.update_store(tx, "t", "upload-1", key_id=wrapped.key_id, wrapped_key=wrapped.wrapped)
    )
    foundation.keyring.destroy_old_versions("t")
    assert Record.from_bytes(service.keys.open(store(service)).open(kept(service)[0])).text == "record 0"
    with pytest.raises(ServerError, match="failed verification"):
        service.keys.open(before)


def test_no_plain_text_is_in_the_database(service: DatasetService, tmp_path: Path) -> None:
    register(service)
    there = b"".join(p.read_bytes() for p in tmp_path.glob("tg-tinker.db*"))
    assert b"upload-1" in there
    assert b"record 0" not in there


def test_an_empty_log_is_what_forgetting_leaves(service: DatasetService, tmp_path: Path) -> None:
    register(service)
    log = tmp_path / "tg-tinker.db-wal"
    assert log.stat().st_size > 0
    service.db.forget_deleted()
    assert log.stat().st_size == 0
    with service.db._writer_engine.connect() as connection:
        assert connection.execute(sa.text("PRAGMA secure_delete")).scalar() == 1
