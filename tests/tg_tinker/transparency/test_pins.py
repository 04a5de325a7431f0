"""Pins only move forward, survive the process, and a damaged one is never passed over."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.tg_tinker.transparency.logs import Log, entry, log_of
from tg_tinker.errors import InvalidRequestError, LogVerificationError
from tg_tinker.transparency.folder import Folder, data_folder
from tg_tinker.transparency.note import ORIGIN_PREFIX, VerifierKey, sign_note
from tg_tinker.transparency.pins import KnownServer, Pin, Pins

DAY = datetime(2026, 3, 1, 12, 30, 5, tzinfo=UTC)


def pin(log: Log, size: int | None = None) -> Pin:
    return Pin(log.key, log.note(size), DAY)


def pins(folder: Path) -> Pins:
    return Pins(Folder(folder))


def pin_file(folder: Path) -> Path:
    (file,) = (folder / "pins").glob("*.json")
    return file


def test_the_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder({}) == tmp_path / ".local" / "share" / "tg-tinker"
    assert data_folder({"XDG_DATA_HOME": "/x"}) == Path("/x/tg-tinker")
    assert data_folder({"XDG_DATA_HOME": "relative"}) == tmp_path / ".local" / "share" / "tg-tinker"
    assert data_folder({"XDG_DATA_HOME": "/x", "TG_TINKER_DATA_DIR": "/y"}) == Path("/y")


def test_a_user_without_a_home_has_no_folder_and_pins_in_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert data_folder({}) is None
    p = Pins(Folder(None))
    p.put(pin(log_of(3)))
    assert p.get(log_of(0).key.name) == pin(log_of(3))
    assert "no home folder" in caplog.text


def test_a_pin_comes_back_and_is_the_owners_alone(tmp_path: Path) -> None:
    log = log_of(7)
    pins(tmp_path).put(pin(log))
    back = pins(tmp_path).get(log.key.name)
    assert back == pin(log)
    assert back.checkpoint.size == 7
    assert pins(tmp_path).get(log_of(0, seed=2).key.name) is None
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_pin_only_moves_forward(tmp_path: Path) -> None:
    log = log_of(20)
    for size, kept in ((5, 5), (12, 12), (5, 12), (12, 12), (20, 20), (0, 20)):
        pins(tmp_path).put(pin(log, size))
        found = pins(tmp_path).get(log.key.name)
        assert found is not None
        assert found.checkpoint.size == kept


def test_another_root_at_the_same_size_is_a_fork(tmp_path: Path) -> None:
    pins(tmp_path).put(pin(log_of(5)))
    with pytest.raises(LogVerificationError) as caught:
        pins(tmp_path).put(pin(Log([entry(i) for i in range(1, 6)])))
    assert caught.value.kind == "forked"
    assert pins(tmp_path).get(log_of(0).key.name) == pin(log_of(5))


def test_every_damage_of_a_pin_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    log = log_of(5)
    pins(tmp_path).put(pin(log))
    file = pin_file(tmp_path)
    good = file.read_bytes()
    seen = json.loads(good)["seen"].encode()
    harmless = range(good.index(seen) * 8, (good.index(seen) + len(seen)) * 8)  # a date: only told to the user
    for i in set(range(0, (len(good) - 1) * 8, 11)) - set(harmless):
        changed = bytearray(good)
        changed[i // 8] ^= 1 << i % 8
        file.write_bytes(changed)
        with pytest.raises(InvalidRequestError, match=r"is damaged .*Put back a copy") as caught:
            pins(tmp_path).get(log.key.name)
        assert caught.value.details["file"] == str(file)
    for text in ("", "{}", "[]", "null", good.decode()[:-20], good.decode().replace('"version":1', '"version":2')):
        file.write_text(text)
        with pytest.raises(InvalidRequestError, match="is damaged"):
            pins(tmp_path).put(pin(log_of(9)))
    file.write_text(pin(log_of(5, seed=2)).to_json())  # a good pin of another log
    with pytest.raises(InvalidRequestError, match="another log"):
        pins(tmp_path).get(log.key.name)
    file.unlink()
    assert pins(tmp_path).get(log.key.name) is None


def test_a_pin_that_may_not_be_read_is_an_error_and_a_folder_that_may_not_be_entered_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pins(tmp_path).put(pin(log_of(5)))

    def denied(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(InvalidRequestError, match="is damaged"):
        pins(tmp_path).get(log_of(0).key.name)
    assert caplog.text == ""
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert pins(tmp_path).get(log_of(0).key.name) is None
    assert "Permission denied" in caplog.text


def test_a_pin_that_is_a_folder_is_an_error(tmp_path: Path) -> None:
    pins(tmp_path).put(pin(log_of(5)))
    file = pin_file(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(InvalidRequestError, match="is damaged"):
        pins(tmp_path).get(log_of(0).key.name)


def test_a_folder_that_cannot_be_written_is_said_once_and_pins_stay_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    p = pins(tmp_path / "file" / "below")
    log = log_of(9)
    with caplog.at_level(logging.WARNING, "tg_tinker"):
        p.put(pin(log, 3))
        p.put(pin(log, 9))
        p.put(pin(log, 5))
        p.know(KnownServer("a:1", "t", log.key.name))
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "TG_TINKER_DATA_DIR" in caplog.text
    assert p.get(log.key.name) == pin(log)
    assert p.origin_at("a:1", "t") == log.key.name
    assert not p.all_written
    assert p.forget("a:1") == [KnownServer("a:1", "t", log.key.name)]
    assert p.get(log.key.name) is None


def test_a_pin_that_cannot_be_put_aside_is_forgotten_by_the_process_at_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log, p = log_of(5), pins(tmp_path)
    p.put(pin(log))
    p.know(KnownServer("a:1", "t", log.key.name))
    assert p.all_written

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    write = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: denied() if a.parent.name == "pins" else write(a, b))
    p.forget("a:1")
    assert "Permission denied" in caplog.text
    assert not p.all_written
    assert p.get(log.key.name) is None
    assert pins(tmp_path).get(log.key.name) == pin(log)


def test_a_disk_that_fails_leaves_the_old_pin_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = log_of(9)
    pins(tmp_path).put(pin(log, 3))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    p = pins(tmp_path)
    p.put(pin(log, 9))
    assert "No space left" in caplog.text
    assert p.get(log.key.name) == pin(log, 9)
    assert pins(tmp_path).get(log.key.name) == pin(log, 3)
    assert [f.name for f in (tmp_path / "pins").iterdir()] == [pin_file(tmp_path).name]  # and nothing lies about


def test_a_pin_under_a_name_that_does_not_follow_from_its_key_is_damaged(tmp_path: Path) -> None:
    ours, theirs = log_of(5), log_of(5, seed=2)
    false = VerifierKey(ours.key.name, theirs.key.public_key)
    note = sign_note(pin(ours).checkpoint.body(), false, theirs.private.sign)
    pins(tmp_path).put(pin(ours))
    pin_file(tmp_path).write_text(Pin(false, note, DAY).to_json())
    with pytest.raises(InvalidRequestError, match="another log"):
        pins(tmp_path).get(ours.key.name)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.put(pin(log_of(9))),
        lambda p: p.know(KnownServer("b:1", "t", log_of(0).key.name)),
        lambda p: p.forget("a:1"),
    ],
)
def test_whoever_writes_waits_for_the_process_that_is_writing(
    tmp_path: Path, change: Callable[[Pins], object]
) -> None:
    pins(tmp_path).put(pin(log_of(5)))
    pins(tmp_path).know(KnownServer("a:1", "t", log_of(0).key.name))

    def state() -> tuple[list[KnownServer], Pin | None]:
        return pins(tmp_path).servers(), pins(tmp_path).get(log_of(0).key.name)

    before = state()
    with (tmp_path / ".lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=change, args=(pins(tmp_path),))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        assert state() == before
    waiting.join(30)
    assert state() != before


def test_servers_are_known_by_address_and_tenant(tmp_path: Path) -> None:
    p = pins(tmp_path)
    x, y, z = (ORIGIN_PREFIX + digit * 32 for digit in "abc")
    rows = [KnownServer("a:1", "t", x), KnownServer("a:1", "u", y), KnownServer("b:1", "t", x)]
    for row in rows:
        p.know(row)
    p.know(KnownServer("a:1", "t", z))
    p.know(KnownServer("a:1", "t", z))
    assert pins(tmp_path).servers() == [KnownServer("a:1", "t", z), *rows[1:]]
    assert p.origin_at("a:1", "u") == y
    assert p.origin_at("a:1", "v") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version":1}',
        '{"version":1,"servers":[{"address":"a"}]}',
        '{"servers":[]}',
        '{"version":1,"servers":["x"]}',
        '{"version":1,"servers":[{"address":"a","tenant":"t","origin":"nonsense"}]}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_damaged_servers_are_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "known_servers.json").write_text(text)
    with pytest.raises(InvalidRequestError, match=r"known_servers.json is damaged"):
        pins(tmp_path).servers()


def test_to_forget_an_address_puts_its_pin_aside(tmp_path: Path) -> None:
    one, two = log_of(5), log_of(5, seed=2)
    p = pins(tmp_path)
    for log, tenant in ((one, "t"), (two, "u")):
        p.put(pin(log))
        p.know(KnownServer("a:1", tenant, log.key.name))
    text = pin(one).to_json()
    assert p.forget("a:1", "t") == [KnownServer("a:1", "t", one.key.name)]
    assert p.get(one.key.name) is None
    assert p.get(two.key.name) == pin(two)
    assert [f.read_text() for f in (tmp_path / "pins").glob("*.forgotten")] == [text]
    assert p.forget("elsewhere:1") == []
    assert p.servers() == [KnownServer("a:1", "u", two.key.name)]


def test_processes_that_pin_at_once_lose_nothing(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from datetime import UTC, datetime
from tests.tg_tinker.transparency.logs import log_of
from tg_tinker.transparency.folder import Folder
from tg_tinker.transparency.pins import KnownServer, Pin, Pins
me, log = int(sys.argv[2]), log_of(60)
pins = Pins(Folder(Path(sys.argv[1])))
for i in range(me, 60, 3):
    pins.put(Pin(log.key, log.note(i), datetime.now(UTC)))
    pins.know(KnownServer(f"host-{i}:1", "t", log.key.name))
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(i)], cwd=Path(__file__).parents[3])
        for i in range(3)
    ]
    assert [r.wait(60) for r in running] == [0, 0, 0]
    found = pins(tmp_path).get(log_of(0).key.name)
    assert found is not None
    assert found.checkpoint.size == 59
    assert len(pins(tmp_path).servers()) == 60


@pytest.mark.parametrize("origin", ["tg-tinker/../../etc/passwd", "tg-tinker/", "x", "tg-tinker/" + "g" * 32])
def test_a_name_that_is_none_never_becomes_a_path(tmp_path: Path, origin: str) -> None:
    with pytest.raises(LogVerificationError):
        pins(tmp_path).get(origin)
