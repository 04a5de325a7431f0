"""Run by test_crashes.py: forks spenders, kills them inside ``reserve``, compares what they were told with the disk.

Usage: python -m tests.server.ledger.kill_loop FOLDER KILLS SEED WRITERS. WRITERS processes (1 or 2) spend on one
dataset at once, and each is killed at a moment of its own; after every round the disk is asked. Prints one JSON line.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.support.log_tree import check_trees
from tg_tinker.ledger import ChainEntry, verify_chain
from tg_tinker_server.dp.accounting import cost
from tg_tinker_server.dp.events import Gaussian
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.store.database import Database

SCOPE = DatasetScope(tenant="t", dataset_id="d")
EVENT = Gaussian(noise_multiplier=50.0)
KILLS_OF_ONE_DATABASE = 50  # then a new one, or folding what is there would take most of the time


def spend(path: Path, run: str, told: int, go: int) -> None:
    """Reserve and settle for ever, and say so after each reservation that was handed out; pause after the first."""
    db = Database.open(f"sqlite:///{path}")
    ledger = PrivacyLedger(db, clock=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    ledger.open_dataset(
        SCOPE, run_id=run, target_epsilon=None, target_delta=1e-5, unit="datum", accountant="rdp", mechanism=EVENT
    )
    seq = 0
    while True:
        seq += 1
        paid = ledger.reserve(SCOPE, run_id=run, seq=seq, event=EVENT, accountant="rdp")
        os.write(told, f"{paid.seq}\n".encode())
        if seq == 1:
            os.read(go, 1)
        if seq % 4 == 0:
            db.write(lambda tx, paid=paid: ledger.settle(tx, paid, outcome="failed", update_hash="sha256:00"))


@dataclass
class Spender:
    """A child process that spends, and the end of the pipe that says what it was told."""

    run: str
    pid: int
    heard: int
    go: int
    lines: bytes = b""

    @classmethod
    def start(cls, path: Path, run: str) -> Spender:
        heard, told = os.pipe()
        wait, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(heard)
            try:
                spend(path, run, told, wait)
            finally:
                os._exit(1)  # never into the parent's code
        os.close(told)
        os.close(wait)
        return cls(run, pid, heard, go)

    def wait_for_the_first(self) -> None:
        """It has spent once, and waits."""
        self.lines = os.read(self.heard, 64)

    def let_go(self) -> None:
        """From now on it is always inside ``reserve`` or ``settle``."""
        os.write(self.go, b"!")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def told(self) -> set[int]:
        """Everything it said, once it is dead."""
        _, status = os.waitpid(self.pid, 0)
        if not os.WIFSIGNALED(status):
            raise AssertionError(f"a spender ended by itself with status {status}")
        while chunk := os.read(self.heard, 65536):
            self.lines += chunk
        os.close(self.heard)
        os.close(self.go)
        return {int(line) for line in self.lines.split(b"\n")[:-1]}


def round_of_kills(path: Path, runs: list[str], choice: random.Random) -> dict[str, set[int]]:
    """What each run was told before its process was killed."""
    spenders = [Spender.start(path, run) for run in runs]
    for spender in spenders:
        spender.wait_for_the_first()
    for spender in spenders:
        spender.let_go()
    choice.shuffle(spenders)
    for spender in spenders:
        time.sleep(choice.uniform(0.0, 0.02))
        spender.kill()
    return {spender.run: spender.told() for spender in spenders}


def charged(path: Path, run: str) -> set[int]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT seq FROM ledger WHERE kind = 'charge' AND run_id = ?", (run,))
        return {seq for (seq,) in rows}


def check_entries(path: Path) -> None:
    """The chain has no gap, and the tree is that of the entries."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT body_json, entry_hash FROM ledger ORDER BY position").fetchall()
    verify_chain([ChainEntry(json.loads(body), entry_hash) for body, entry_hash in rows])
    check_trees(path)


def main(folder: Path, kills: int, seed: int, writers: int) -> None:
    choice = random.Random(seed)
    cost(EVENT)
    seen = {"kills": 0, "told": 0, "lost": 0, "unheard": 0, "most_unheard": 0}
    while seen["kills"] < kills:
        path = folder / f"{seen['kills']}.db"
        for _ in range(0, min(KILLS_OF_ONE_DATABASE, kills - seen["kills"]), writers):
            runs = [f"run_{seen['kills'] + i}" for i in range(writers)]
            told_by_run = round_of_kills(path, runs, choice)
            check_entries(path)
            for run, told in told_by_run.items():
                there = charged(path, run)
                seen["kills"] += 1
                seen["told"] += len(told)
                seen["lost"] += len(told - there)
                seen["unheard"] += len(there - told)
                seen["most_unheard"] = max(seen["most_unheard"], len(there - told))
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
