"""`tg-tinker log` over a data folder: what is shown, forgotten, counted and refused."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.tg_tinker.transparency.logs import Log, entry, log_of
from tg_tinker.cli import main
from tg_tinker.errors import LogVerificationError
from tg_tinker.transparency.folder import Folder
from tg_tinker.transparency.pins import Pins
from tg_tinker.transparency.receipts import Receipts
from tg_tinker.transparency.watch import Watch

DAY = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TG_TINKER_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["log", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def watch(folder: Path, address: str = "host:1", tenant: str = "acme", loopback: bool = False) -> Watch:
    pins, receipts = Pins(Folder(folder)), Receipts(Folder(folder))
    return Watch(pins, address=address, tenant=tenant, loopback=loopback, receipts=receipts, now=lambda: DAY)


def followed(folder: Path, log: Log, **where: str) -> None:
    """As training would leave it: every entry with a receipt."""
    w = watch(folder, **where)
    assert w.advance(*log.answer(w.known_size))
    for index in range(log.size):
        w.check_receipt(log.receipt(index))


def test_an_empty_folder_says_so_and_stays_empty(folder: Path) -> None:
    assert run("show") == (0, f"no server is known in {folder}\n")
    assert run("receipts") == (0, "no receipts\n")
    assert run("verify-receipts") == (0, "verified: 0 receipts\n")
    assert not folder.exists()


def test_what_was_seen_is_shown(folder: Path) -> None:
    followed(folder, log_of(5))
    followed(folder, log_of(3, seed=2), address="b:2", tenant="")
    code, said = run("show")
    assert code == 0
    assert said.splitlines()[:4] == [
        "b:2  tenant (the key decides)",
        f"  log           {log_of(0, seed=2).key.name}",
        "  size          3 entries, seen 2026-03-01 12:30 UTC",
        f"  verifier key  {log_of(0, seed=2).key.text}",
    ]
    assert "host:1  tenant acme" in said
    assert "  size          5 entries, seen 2026-03-01 12:30 UTC" in said


def test_a_log_whose_address_another_took_is_still_shown(folder: Path) -> None:
    for seed in (1, 2):
        w = watch(folder, "localhost:1", loopback=True)
        if not w.advance(*log_of(4, seed=seed).answer(w.known_size)):
            assert w.advance(*log_of(4, seed=seed).answer(w.known_size))
    said = run("show")[1]
    assert (
        said.index(log_of(0, seed=2).key.name)
        < said.index("another log answers now")
        < said.index(log_of(0).key.name)
    )


def test_after_forgetting_the_next_connection_is_like_the_first(folder: Path) -> None:
    followed(folder, log_of(25))
    with pytest.raises(LogVerificationError):
        watch(folder).advance(*log_of(10).answer(25))
    code, said = run("forget", "host:1")
    assert code == 0
    assert said == f"forgot host:1, tenant acme: {log_of(0).key.name}\n"
    again = watch(folder)
    assert again.known_size == 0
    assert again.advance(*log_of(10).answer(0))
    code, said = run("verify-receipts")  # the receipts are still evidence
    assert code == 1
    assert "the log signed for 25 entries, and the pin has 10: the log was rolled back" in said
    assert "25 of 25 receipts are refused" in said


def test_only_the_named_tenant_is_forgotten(folder: Path) -> None:
    followed(folder, log_of(5))
    followed(folder, log_of(5, seed=2), tenant="other")
    assert run("forget", "host:1", "--tenant", "other")[0] == 0
    assert "tenant acme" in run("show")[1]
    assert "tenant other" not in run("show")[1]
    code, said = run("forget", "host:1", "--tenant", "other")
    assert code == 1
    assert "no server is known at host:1" in said


def test_forgetting_that_would_not_last_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    followed(folder, log_of(5))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, said = run("forget", "host:1")
    assert code == 1
    assert "nothing was forgotten for good" in said
    monkeypatch.undo()
    monkeypatch.setenv("TG_TINKER_DATA_DIR", str(folder))
    assert watch(folder).known_size == 5


def test_true_receipts_are_counted_and_verified(folder: Path) -> None:
    log = Log([entry(0), entry(1, "data-2"), entry(2), entry(3, "")])
    followed(folder, log)
    name = log.key.name
    assert run("receipts") == (0, f"{name}  (no dataset)  1\n{name}  data-1  2\n{name}  data-2  1\n")
    code, said = run("verify-receipts")
    assert code == 0
    assert said.endswith("verified: 4 receipts\n")
    assert f"true     {name}  data-1  2" in said


def test_two_true_receipts_of_two_histories_convict_the_log(folder: Path) -> None:
    one, two = log_of(4), Log([entry(i) if i != 2 else entry(50) for i in range(4)])
    for log in (one, two):
        Receipts(Folder(folder)).append(log.receipt(3))
    code, said = run("verify-receipts")
    assert code == 1
    assert "line 2: the log signed for two histories of 4 entries: it was forked" in said
    assert "1 of 2 receipts are refused" in said


def test_two_entries_at_one_place_convict_the_log(folder: Path) -> None:
    for log in (log_of(4), Log([entry(i) if i != 2 else entry(50) for i in range(5)])):
        Receipts(Folder(folder)).append(log.receipt(2))
    assert "two entries at place 2" in run("verify-receipts")[1]


def test_a_receipt_against_the_pin_convicts_the_log(folder: Path) -> None:
    w = watch(folder)
    assert w.advance(*log_of(4).answer(0))
    Receipts(Folder(folder)).append(Log([entry(i + 1) for i in range(4)]).receipt(2))
    assert "two histories of 4 entries" in run("verify-receipts")[1]


def test_altered_lines_and_files_are_refused_by_line(folder: Path) -> None:
    followed(folder, log_of(4))
    (file,) = Receipts(Folder(folder)).files()
    good = file.path.read_text().splitlines()
    altered = replace(log_of(4).receipt(1), entry=entry(7)).to_json()
    file.path.write_text("\n".join([good[0], altered, good[2][:50], good[3], log_of(4, seed=2).receipt(0).to_json()]))
    code, said = run("verify-receipts")
    assert code == 1
    assert f"REFUSED  {file.path}, line 2: entry 1 is not in the log of 4 that was signed" in said
    assert "line 3: this line is not a receipt" in said
    assert "line 5: it is of another log" in said
    assert "3 of 5 receipts are refused" in said


def test_a_damaged_pin_stops_every_command_with_its_name(folder: Path) -> None:
    followed(folder, log_of(4))
    (pin,) = (folder / "pins").glob("*.json")
    pin.write_text("{}")
    for words in (["show"], ["receipts"], ["verify-receipts"]):
        code, said = run(*words)
        assert code == 1
        assert f"{pin} is damaged" in said


def test_nothing_that_a_terminal_obeys_is_printed(folder: Path) -> None:
    log = Log([entry(0, "red\x1b[31m\r\n")])
    followed(folder, log, address="host:1", tenant="\x1b]0;title\x07")
    for words in (["show"], ["receipts"], ["verify-receipts"], ["forget", "host:1"]):
        code, said = run(*words)
        assert code == 0
        assert not set(said) & set("\x1b\x07\r")
