"""A charge that was reported as paid survives a power cut that drops and tears whatever was not flushed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.power_cut import Disk, power_cuts, torn
from tests.support.recorded_disk import Op

ROOT = Path(__file__).parents[3]


def cut(folder: Path, cuts: int, synchronous: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.ledger.power_cut_loop", str(folder), str(cuts), "20260102", synchronous],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, int] = json.loads(done.stdout)
    assert seen["cuts"] == cuts
    assert seen["told"] > 10 * cuts  # the cuts came in the middle of things
    return seen


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cuts", [24, pytest.param(1500, marks=pytest.mark.slow)])
def test_no_reservation_that_was_handed_out_is_lost_when_the_power_goes(tmp_path: Path, cuts: int) -> None:
    seen = cut(tmp_path, cuts, "FULL")
    assert seen["lost"] == 0
    assert seen["most_unheard"] <= 2  # one per run: charged, and cut off before the caller heard of it


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cuts", [8, pytest.param(1500, marks=pytest.mark.slow)])
def test_without_a_flush_at_each_commit_the_same_cuts_lose_charges(tmp_path: Path, cuts: int) -> None:
    assert cut(tmp_path, cuts, "NORMAL")["cuts_that_lost"] > cuts / 4


def test_what_was_flushed_stays_and_what_was_not_can_be_there_be_missing_or_be_torn() -> None:
    flushed, after = b"a" * 2048, b"b" * 2048
    ops = [Op("create", "f"), Op("write", "f", 0, flushed), Op("sync", "f", 2), Op("sync-folder")]
    disk = Disk()
    for op in [*ops, Op("write", "f", 1024, after)]:
        disk.play(op)
    images = [disk.cut(random.Random(seed))["f"] for seed in range(300)]
    assert all(image[:1024] == flushed[:1024] for image in images)
    assert {flushed, flushed[:1024] + after} < set(images)
    assert any(b"a" in image[1024:2048] and b"b" in image[1024:2048] for image in images)
    assert disk.intact()["f"] == flushed[:1024] + after


def test_a_write_that_was_asked_for_while_a_flush_ran_is_not_covered_by_it() -> None:
    disk = Disk()
    for op in [Op("create", "f"), Op("write", "f", 0, b"1"), Op("write", "f", 1, b"2"), Op("sync", "f", 2)]:
        disk.play(op)
    disk.play(Op("sync-folder"))
    assert {disk.cut(random.Random(seed))["f"] for seed in range(100)} == {b"1", b"12"}


def test_what_a_failed_flush_did_not_bring_to_the_disk_no_later_one_does() -> None:
    ops = [Op("create", "f"), Op("write", "f", 0, b"1"), Op("sync-failed", "f", 2), Op("write", "f", 1, b"2")]
    seen = set()
    for seed in range(100):
        disk = Disk(choice=random.Random(seed))
        for op in [*ops, Op("sync", "f", 4), Op("sync-folder")]:
            disk.play(op)
        seen.add(disk.cut(random.Random(seed))["f"])
    assert seen == {b"\x002", b"12"}


def test_a_new_file_can_be_gone_and_a_deleted_one_back_until_the_folder_is_flushed() -> None:
    disk = Disk()
    for op in [Op("create", "new"), Op("write", "new", 0, b"x"), Op("sync", "new", 2)]:
        disk.play(op)
    assert {"new" in disk.cut(random.Random(seed)) for seed in range(50)} == {True, False}
    disk.play(Op("sync-folder"))
    assert all("new" in disk.cut(random.Random(seed)) for seed in range(50))
    disk.play(Op("delete", "new"))
    assert {"new" in disk.cut(random.Random(seed)) for seed in range(50)} == {True, False}
    disk.play(Op("sync-folder"))
    assert not any("new" in disk.cut(random.Random(seed)) for seed in range(50))


def test_a_torn_write_tears_at_the_disks_sectors() -> None:
    write = Op("write", "f", 700, bytes(range(256)) * 20)
    for seed in range(200):
        for piece in torn(write, random.Random(seed)):
            start, end = piece.offset, piece.offset + len(piece.data)
            assert start % 512 == 0 or start == 700
            assert end % 512 == 0 or end == 700 + len(write.data)
            assert piece.data == write.data[start - 700 : end - 700]


def test_what_was_told_is_what_was_marked_before_the_cut() -> None:
    ops = [Op("create", "f")] + [Op("mark", str(i)) for i in range(10)]
    for image, told in power_cuts(ops, 50, random.Random(1)):
        assert told == {str(i) for i in range(len(told))}
        assert set(image) <= {"f"}
