"""Receipts stand by themselves, and what was kept is found again."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tg_tinker.transparency.logs import Log, entry, log_of
from tg_tinker.errors import InvalidRequestError, LogVerificationError, TGTinkerError
from tg_tinker.transparency.folder import Folder
from tg_tinker.transparency.note import Checkpoint, VerifierKey, sign_note
from tg_tinker.transparency.receipts import Receipt, Receipts

LOG = log_of(13)


def receipts(folder: Path) -> Receipts:
    return Receipts(Folder(folder))


def test_a_receipt_leads_to_its_checkpoint() -> None:
    for index in range(13):
        receipt = Receipt.from_json(LOG.receipt(index).to_json())
        assert receipt == LOG.receipt(index)
        assert receipt.verify() == receipt.verify(LOG.key) == Checkpoint.open(LOG.note(), LOG.key)
        assert receipt.body["position"] == index
        assert receipt.dataset_id == "data-1"


def test_every_flipped_bit_of_a_receipt_is_refused() -> None:
    data = LOG.receipt(5).to_json().encode()
    for i in range(len(data) * 8):
        changed = bytearray(data)
        changed[i // 8] ^= 1 << i % 8
        with pytest.raises(TGTinkerError):
            Receipt.from_json(changed.decode(errors="surrogateescape")).verify(LOG.key)


def test_a_receipt_of_another_log_or_under_a_false_name_is_refused() -> None:
    other = log_of(13, seed=2)
    with pytest.raises(LogVerificationError, match="not of"):
        other.receipt(5).verify(LOG.key)
    false = VerifierKey(LOG.key.name, other.key.public_key)
    note = sign_note(Checkpoint.open(LOG.note(), LOG.key).body(), false, other.private.sign)
    with pytest.raises(LogVerificationError, match="not the name that follows"):
        replace(LOG.receipt(5), verifier_key=false.text, checkpoint=note).verify()


@pytest.mark.parametrize("text", ["7", "[]", "x", ""])
def test_an_entry_that_is_no_object_has_no_body(text: str) -> None:
    receipt = Log([text]).receipt(0)
    receipt.verify()
    with pytest.raises(LogVerificationError, match="not a JSON object"):
        _ = receipt.body


@pytest.mark.parametrize(
    "changed",
    [{"version": 2}, {"leaf_index": "5"}, {"leaf_index": True}, {"entry": 7}, {"proof": ["x"]}, {"proof": None}],
)
def test_a_line_that_is_no_receipt_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match="not a receipt"):
        Receipt.from_json(json.dumps({**json.loads(LOG.receipt(5).to_json()), **changed}))
    for text in ("", "[]", "null", "{}"):
        with pytest.raises(InvalidRequestError):
            Receipt.from_json(text)


def test_receipts_are_found_by_log_and_dataset(tmp_path: Path) -> None:
    other = Log([entry(0, "data-2"), entry(1, "")], seed=2)
    kept = [(LOG, LOG.receipt(3)), (LOG, LOG.receipt(4)), (other, other.receipt(0)), (other, other.receipt(1))]
    for _, receipt in kept:
        assert receipts(tmp_path).append(receipt)
    assert receipts(tmp_path).read_all(LOG.key.name, "data-1") == [LOG.receipt(3), LOG.receipt(4)]
    assert receipts(tmp_path).read_all(other.key.name, "data-2") == [other.receipt(0)]
    assert receipts(tmp_path).read_all(other.key.name, "") == [other.receipt(1)]
    assert receipts(tmp_path).read_all(LOG.key.name, "data-2") == []
    assert len(receipts(tmp_path).files()) == 3
    assert all(stat.S_IMODE(f.path.stat().st_mode) == 0o600 for f in receipts(tmp_path).files())


@pytest.mark.parametrize(
    "dataset", ["../../x", "a/b", "..", ".", "ü" * 400, "x" * 500, "a\x00b", "a\nb", "CON", "%2F"]
)
def test_any_dataset_id_is_a_file_inside_the_folder(tmp_path: Path, dataset: str) -> None:
    twin = dataset + "!" if len(dataset) > 200 else "else"  # a very long one shares its file
    log = Log([entry(0, dataset), entry(1, twin)])
    for index in (0, 1):
        assert receipts(tmp_path / "data").append(log.receipt(index))
    assert receipts(tmp_path / "data").read_all(log.key.name, dataset) == [log.receipt(0)]
    assert receipts(tmp_path / "data").read_all(log.key.name, twin) == [log.receipt(1)]
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.parent.parent for p in written} == {tmp_path / "data" / "receipts"}


def test_a_line_cut_off_by_a_crash_is_named_and_spoils_no_other(tmp_path: Path) -> None:
    for index in (3, 4):
        receipts(tmp_path).append(LOG.receipt(index))
    (file,) = receipts(tmp_path).files()
    file.path.write_bytes(file.path.read_bytes()[:-40])
    receipts(tmp_path).append(LOG.receipt(5))
    lines = dict(file.lines())
    assert lines[1] == LOG.receipt(3)
    assert isinstance(lines[2], InvalidRequestError)
    assert lines[3] == LOG.receipt(5)
    with pytest.raises(InvalidRequestError, match="line 2") as caught:
        receipts(tmp_path).read_all(LOG.key.name, "data-1")
    assert caught.value.details["line"] == 2


def test_a_folder_that_cannot_be_written_is_said_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    r = receipts(tmp_path / "file")
    assert not r.append(LOG.receipt(3))
    assert not r.append(LOG.receipt(4))
    assert len(caplog.records) == 1
    assert not Receipts(Folder(None)).append(LOG.receipt(3))
    assert Receipts(Folder(None)).files() == r.files() == []
