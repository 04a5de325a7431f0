"""Charges on a disk that refuses one operation, or everything from one on; used by test_failing_disk.py.

Usage: python -m tests.server.ledger.failing_disk FOLDER. Goes through all of them, prints one JSON line.
"""

from __future__ import annotations

import json
import random
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.server.ledger.power_cut_loop import DELTA, EVENT, SCOPE, open_ledger, open_run
from tests.support.log_tree import check_trees
from tests.support.power_cut import Disk, Image, put
from tests.support.recorded_disk import Fault, RecordedDisk
from tg_tinker.errors import ServerError
from tg_tinker.ledger import verify_chain
from tg_tinker_server.dp.accounting import cost, epsilon, repeated
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger

FAULTS: list[tuple[Fault, bool]] = [(fault, for_ever) for fault in ("EIO", "ENOSPC") for for_ever in (False, True)]


def reserve(ledger: PrivacyLedger, seq: int) -> int:
    return ledger.reserve(SCOPE, run_id="a", seq=seq, event=EVENT, accountant="rdp").seq


def charged(ledger: PrivacyLedger) -> list[int]:
    entries = ledger.entries(SCOPE)
    verify_chain(entries)
    return [int(e.body["seq"]) for e in entries if e.kind == "charge"]


@cache
def before_a_charge(*, checkpoint: bool) -> tuple[Image, int]:
    """Files right before a charge, and its number.

    An ordinary charge goes into the write-ahead log alone; now and then one makes SQLite carry the log over.
    """
    with TemporaryDirectory() as name, RecordedDisk(Path(name)) as disk:
        db, ledger = open_ledger(Path(name))
        open_run(ledger, "a")
        for seq in range(1, 1000):
            before = len(disk.ops)
            reserve(ledger, seq)
            carried_over = any(op.kind == "write" and op.name == "l.db" for op in disk.ops[before:])
            if carried_over if checkpoint else seq == 5:
                break
        image = Disk()
        for op in disk.ops[:before]:
            image.play(op)
        db.close()
        return image.intact(), seq


@dataclass
class Outcome:
    """Of one charge: was it handed out; how many operations were asked of the disk, and how many failed?"""

    handed_out: bool
    asked: int
    failed: int


def attempt(folder: Path, image: Image, seq: int, fault: Fault, choose: Callable[[int], bool]) -> Outcome:
    """One charge under faults, then everything that is promised about it."""
    with RecordedDisk(put(image, folder)) as disk, closing(sqlite3.connect(folder / "l.db")) as other:
        other.execute("SELECT * FROM ledger").fetchone()  # else opening a ledger carries the log over
        db, ledger = open_ledger(folder)
        assert charged(ledger) == list(range(1, seq))
        disk.fail(fault, choose)
        try:
            handed_out = reserve(ledger, seq) == seq
        except ServerError:
            handed_out = False
        outcome = Outcome(handed_out, len(disk.asked), len(disk.failed))
        disk.heal()
        if handed_out:
            held_after_power_cuts(folder.with_name("cut"), image, disk, seq)
        go_on(ledger, seq)
        held_after_power_cuts(folder.with_name("cut"), image, disk, seq)
        db.close()
    db, ledger = open_ledger(folder)  # and so it does after a restart
    go_on(ledger, seq + 1)
    db.close()
    check_trees(folder / "l.db")
    return outcome


def held_after_power_cuts(folder: Path, image: Image, disk: RecordedDisk, seq: int) -> None:
    for seed in range(2):
        choice = random.Random(seed)
        played = Disk(image, choice)
        for op in disk.ops:
            played.play(op)
        db, ledger = open_ledger(put(played.cut(choice), folder))
        assert seq in charged(ledger)
        db.close()


def go_on(ledger: PrivacyLedger, seq: int) -> None:
    """The next charge goes through, and the sum is that of the entries."""
    there = charged(ledger)
    assert there[: seq - 1] == list(range(1, seq))
    reserve(ledger, seq)
    after = charged(ledger)
    assert after == [*there, seq]
    assert ledger.spent(SCOPE).epsilon == epsilon(repeated(cost(EVENT), len(after)), DELTA)


def every_operation(
    folder: Path, image: Image, seq: int, fault: Fault, for_ever: bool, stride: int = 1
) -> list[bool]:
    """Was the charge handed out when its 1st, 2nd, ... operation failed, or that one and all after it?"""
    whole = attempt(folder, image, seq, fault, lambda k: False)
    assert whole.handed_out
    assert whole.failed == 0
    outcomes = []
    for first in range(1, whole.asked + 1, stride):
        chosen = range(first, sys.maxsize) if for_ever else (first,)
        outcome = attempt(folder, image, seq, fault, chosen.__contains__)
        assert outcome.failed > 0
        outcomes.append(outcome.handed_out)
    return outcomes


def main(folder: Path) -> None:
    seen = {"faults": 0, "refused": 0, "handed_out_and_on_disk": 0}
    for checkpoint in (False, True):
        image, seq = before_a_charge(checkpoint=checkpoint)
        for fault, for_ever in FAULTS:
            outcomes = every_operation(folder / "disk", image, seq, fault, for_ever)
            seen["faults"] += len(outcomes)
            seen["refused"] += outcomes.count(False)
            seen["handed_out_and_on_disk"] += outcomes.count(True)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
