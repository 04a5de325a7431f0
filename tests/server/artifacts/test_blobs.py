"""A name holds a whole blob or nothing, whatever fails; one suite for every kind of store."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tg_tinker.errors import ServerError
from tg_tinker_server.artifacts.blobs import (
    CHUNK_BYTES,
    DRAFT_PREFIX,
    BlobNotFoundError,
    BlobStore,
    LocalBlobs,
    MemoryBlobs,
)

NAME = "ck_0123456789abcdef01234567"
BAD_NAMES = [
    "", ".", "..", "../ck_01234567", "/etc/passwd", "a/../../ck_01234567", "ck_01234567/", "ck_0123456",
    "CK_01234567", "ck_0123456G", "ck_01234567\n", "ck_01234567\0", "\0", "ck_01234567.slots/x",
    "ck_01234567.slots.slots", ".draft-01234567", "ck_" + "0" * 65, "ck-01234567", "ck_٠١٢٣٤٥٦٧", "ck_01234567 ",
    "C:\\ck_01234567", "~", "ck_01234567.tmp",
]  # fmt: skip


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return LocalBlobs(tmp_path / "blobs") if request.param == "local" else MemoryBlobs()


def test_what_was_put_is_read(store: BlobStore) -> None:
    store.put(NAME, [b"one ", bytearray(b"two "), memoryview(b"three"), b""])
    assert b"".join(store.read(NAME)) == b"one two three"
    assert store.size(NAME) == 13
    assert store.names() == [NAME]


def test_chunks_have_at_most_a_mebibyte(store: BlobStore) -> None:
    content = os.urandom(2 * CHUNK_BYTES + 5)
    store.put(NAME, [content])
    chunks = list(store.read(NAME))
    assert max(map(len, chunks)) <= CHUNK_BYTES
    assert b"".join(chunks) == content


def test_pieces_may_be_overwritten_once_the_next_is_asked_for(store: BlobStore) -> None:
    def pieces() -> Iterator[memoryview]:
        buffer = bytearray(1)
        for i in range(5):
            buffer[0] = i
            yield memoryview(buffer)

    store.put(NAME, pieces())
    assert b"".join(store.read(NAME)) == bytes(range(5))


def test_a_name_is_not_taken_twice_unless_asked(store: BlobStore) -> None:
    store.put(NAME, [b"first"])
    with pytest.raises(ServerError, match="never reused"):
        store.put(NAME, [b"second"])
    assert b"".join(store.read(NAME)) == b"first"
    store.put(NAME, [b"third"], replace=True)
    assert b"".join(store.read(NAME)) == b"third"


def test_a_deleted_blob_is_gone_and_deleting_again_is_no_error(store: BlobStore) -> None:
    store.put(NAME, [b"x"])
    store.delete(NAME)
    store.delete(NAME)
    assert store.names() == []
    with pytest.raises(BlobNotFoundError):
        store.read(NAME)
    with pytest.raises(BlobNotFoundError):
        store.size(NAME)


def test_a_reader_that_began_before_a_deletion_reads_to_the_end(store: BlobStore) -> None:
    content = os.urandom(3 * CHUNK_BYTES)
    store.put(NAME, [content])
    chunks = store.read(NAME)
    first = next(chunks)
    store.delete(NAME)
    assert first + b"".join(chunks) == content


@pytest.mark.parametrize("name", BAD_NAMES)
def test_only_names_a_server_mints_are_taken(store: BlobStore, name: str, tmp_path: Path) -> None:
    with pytest.raises(BlobNotFoundError):
        store.put(name, [b"x"])
    for call in (store.read, store.size, store.delete):
        with pytest.raises(BlobNotFoundError):
            call(name)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_when_the_source_fails_its_error_passes_on_and_nothing_is_stored(store: BlobStore, tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put(NAME, pieces())
    assert store.names() == []
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "open"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failing_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    store = LocalBlobs(tmp_path)
    real = getattr(os, call)
    calls = 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        # A disk fills after some writes; the others fail at once.
        if call == "write" and calls == 1:
            return real(*args)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(ServerError, match=os.strerror(code)):
            store.put(NAME, [b"one", b"two"])
    assert list(tmp_path.iterdir()) == []
    store.put(NAME, [b"one", b"two"])


def test_when_the_folder_cannot_be_flushed_the_blob_does_not_count_as_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real = LocalBlobs(tmp_path), os.fsync

    def fail(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ServerError):
        store.put(NAME, [b"x"])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalBlobs(tmp_path)
    store.put(NAME, [b"old"])

    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(ServerError):
        store.put(NAME, [b"new"], replace=True)
    assert b"".join(store.read(NAME)) == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("after", ["write", "fsync", "rename"])
def test_a_process_that_dies_leaves_a_whole_blob_or_none(tmp_path: Path, after: str) -> None:
    store = LocalBlobs(tmp_path)
    child = os.fork()
    if child == 0:  # dies for real, without a finally or an exit handler
        real = getattr(os, after)

        def last(*args: Any) -> None:
            real(*args)
            os._exit(9)

        setattr(os, after, last)
        store.put(NAME, [b"whole"])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert store.names() == ([NAME] if after == "rename" else [])
    if after == "rename":
        assert b"".join(store.read(NAME)) == b"whole"
    else:
        assert [p.name.startswith(DRAFT_PREFIX) for p in tmp_path.iterdir()] == [True]
        assert store.remove_drafts(older_than_s=3600) == 0
        assert store.remove_drafts(older_than_s=0) == 1
        assert list(tmp_path.iterdir()) == []


def test_bytes_are_on_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, order = LocalBlobs(tmp_path), []

    def note(call: str) -> None:
        real = getattr(os, call)

        def noted(*args: Any) -> Any:
            is_folder = call == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            order.append("fsync folder" if is_folder else call)
            return real(*args)

        monkeypatch.setattr(os, call, noted)

    for call in ("write", "fsync", "rename"):
        note(call)
    store.put(NAME, [b"x"])
    assert order == ["write", "fsync", "rename", "fsync folder"]


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, real = LocalBlobs(tmp_path), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    store.put(NAME, [b"longer than three"])
    assert b"".join(store.read(NAME)) == b"longer than three"


def test_files_and_folder_are_for_the_server_alone(tmp_path: Path) -> None:
    store = LocalBlobs(tmp_path / "blobs")
    store.put(NAME, [b"x"])
    assert stat.S_IMODE((tmp_path / "blobs").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "blobs" / NAME).stat().st_mode) == 0o600


def test_a_read_error_is_a_servers_error(tmp_path: Path) -> None:
    store = LocalBlobs(tmp_path)
    (tmp_path / NAME).mkdir()
    with pytest.raises(ServerError, match="could not be read"):
        list(store.read(NAME))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ServerError, match="artifacts"):
        LocalBlobs(tmp_path / "file" / "blobs")


def test_strange_files_in_the_folder_are_not_blobs(tmp_path: Path) -> None:
    store = LocalBlobs(tmp_path)
    (tmp_path / "README").write_bytes(b"")
    (tmp_path / f"{DRAFT_PREFIX}00").write_bytes(b"")
    assert store.names() == []
    assert store.remove_drafts(older_than_s=0) == 1
    assert (tmp_path / "README").exists()
