"""Run by test_power_cuts.py: spends on a recorded disk, cuts the power in thought, and opens what a cut may leave.

Usage: python -m tests.server.ledger.power_cut_loop FOLDER CUTS SEED [FULL|NORMAL]. Prints one JSON line with what it
saw. NORMAL is the control: the same ledger without a flush at each commit.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.support.log_tree import check_trees
from tests.support.power_cut import Disk, Image, power_cuts, put
from tests.support.recorded_disk import Op, RecordedDisk
from tg_tinker.ledger import verify_chain
from tg_tinker_server.dp.accounting import cost, epsilon, repeated
from tg_tinker_server.dp.events import Gaussian
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.store import database as database_module
from tg_tinker_server.store.database import Database

SCOPE = DatasetScope(tenant="t", dataset_id="d")
EVENT = Gaussian(noise_multiplier=50.0)
DELTA = 1e-5
CUTS_OF_ONE_RECORDING = 300
STEPS = 60  # of each of two runs, before and after a restart


def open_ledger(folder: Path) -> tuple[Database, PrivacyLedger]:
    db = Database.open(f"sqlite:///{folder}/l.db")
    return db, PrivacyLedger(db, clock=lambda: datetime(2026, 1, 2, tzinfo=UTC))


def open_run(ledger: PrivacyLedger, run: str) -> None:
    ledger.open_dataset(
        SCOPE, run_id=run, target_epsilon=None, target_delta=DELTA, unit="datum", accountant="rdp", mechanism=EVENT
    )


def spend(disk: RecordedDisk, db: Database, ledger: PrivacyLedger, run: str, seqs: range) -> None:
    """Charge, say so, settle; as a run does."""
    for seq in seqs:
        paid = ledger.reserve(SCOPE, run_id=run, seq=seq, event=EVENT, accountant="rdp")
        disk.mark(f"{run}:{seq}")
        if seq % 3:
            db.write(lambda tx, paid=paid: ledger.settle(tx, paid, outcome="released", update_hash="sha256:00"))


def record(folder: Path) -> list[Op]:
    """Everything from an empty folder on: the migrations, two runs at once, a restart, and no orderly end."""
    folder.mkdir()
    with RecordedDisk(folder) as disk:
        for seqs in (range(1, STEPS + 1), range(STEPS + 1, 2 * STEPS + 1)):
            db, ledger = open_ledger(folder)
            threads = []
            for run in ("a", "b"):
                open_run(ledger, run)
                threads.append(threading.Thread(target=spend, args=(disk, db, ledger, run, seqs)))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if seqs.start == 1:
                db.close()
        ops = list(disk.ops)
        seen = Disk()
        for op in ops:
            seen.play(op)
        there = {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.endswith("-shm")}
        if seen.intact() != there:
            raise AssertionError("the recording does not add up to the files: something was written past it")
        db.close()
    return ops


def examine(folder: Path, image: Image, told: set[str]) -> dict[str, int]:
    """Open an image with the real code and count what is missing."""
    db, ledger = open_ledger(put(image, folder))
    try:
        entries = ledger.entries(SCOPE)
        verify_chain(entries)
        charged = {f"{e.body['run_id']}:{e.body['seq']}" for e in entries if e.kind == "charge"}
        open_run(ledger, "after")
        paid = ledger.reserve(SCOPE, run_id="after", seq=1, event=EVENT, accountant="rdp")
        spent = ledger.spent(SCOPE).epsilon
        assert spent == paid.epsilon_after == epsilon(repeated(cost(EVENT), len(charged) + 1), DELTA)
    finally:
        db.close()
    check_trees(folder / "l.db")
    return {"told": len(told), "lost": len(told - charged), "unheard": len(charged - told)}


def ask_for_normal(dbapi_connection: Any, *, read_only: bool) -> None:
    """What :func:`make_durable` must not be: the setting that SQLite calls safe in WAL mode."""
    dbapi_connection.execute("PRAGMA journal_mode=WAL")
    dbapi_connection.execute("PRAGMA synchronous=NORMAL")


def main(folder: Path, cuts: int, seed: int, synchronous: str = "FULL") -> None:
    durable = database_module.make_durable
    seen = {"cuts": 0, "operations": 0, "told": 0, "lost": 0, "cuts_that_lost": 0, "most_unheard": 0}
    choice = random.Random(seed)
    for start in range(0, cuts, CUTS_OF_ONE_RECORDING):
        database_module.make_durable = durable if synchronous == "FULL" else ask_for_normal
        ops = record(folder / f"recorded-{start}")
        database_module.make_durable = durable
        seen["operations"] += len(ops)
        for image, told in power_cuts(ops, min(CUTS_OF_ONE_RECORDING, cuts - start), choice):
            found = examine(folder / "image", image, told)
            seen["cuts"] += 1
            seen["told"] += found["told"]
            seen["lost"] += found["lost"]
            seen["cuts_that_lost"] += found["lost"] > 0
            seen["most_unheard"] = max(seen["most_unheard"], found["unheard"])
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
