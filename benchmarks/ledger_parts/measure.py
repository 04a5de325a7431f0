"""Measures one database in a process of its own, so that memory is this ledger's alone.

Usage: python -m benchmarks.ledger_parts.measure DATABASE STEPS. Works on the file itself; prints one JSON line. Times
are wall times in milliseconds unless their name says seconds; memory is resident, in MB.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ledger_parts.build import EVENT, SCOPE, TERMS
from tg_tinker.ledger import LEDGER_DOMAIN, START
from tg_tinker.transparency import merkle
from tg_tinker_server.dp.accounting import cost, epsilon
from tg_tinker_server.ledger.log import MAX_LEAVES, TransparencyLog
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.store import log_rows
from tg_tinker_server.store.database import Database

TENANT = SCOPE.tenant


def resident_mb(field: str = "VmRSS") -> float:
    """Memory of this process now, or its peak so far ("VmHWM")."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


class Clock:
    """Wall time and CPU time (of all threads) of whatever runs in its ``with`` blocks, in seconds."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __enter__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall.append(time.perf_counter() - self._started[0])
        self.cpu.append(time.process_time() - self._started[1])


def quantiles(times_s: list[float]) -> dict[str, float]:
    """Median and 99th percentile in ms."""
    p50, p99 = np.quantile(times_s, [0.5, 0.99])
    return {"p50_ms": round(float(p50) * 1e3, 3), "p99_ms": round(float(p99) * 1e3, 3)}


def both(name: str, clock: Clock) -> dict[str, Any]:
    return {name: quantiles(clock.wall), f"{name}_cpu": quantiles(clock.cpu)}


def flush_times(folder: Path, times: int) -> dict[str, Any]:
    """What the disk alone takes to keep 32 KB, about what a charge writes."""
    path, data, clock = folder / "flush.tmp", os.urandom(32768), Clock()
    with path.open("wb") as file:
        for _ in range(times):
            file.seek(0)
            file.write(data)
            file.flush()
            with clock:
                os.fdatasync(file.fileno())
    path.unlink()
    return {"flush": quantiles(clock.wall)}


def charge_times(db: Database, ledger: PrivacyLedger, steps: int) -> dict[str, Any]:
    """``reserve``, each followed by its settlement, which is not in the figures."""
    run, clock = f"run_{time.time_ns()}", Clock()
    ledger.open_dataset(SCOPE, run_id=run, **TERMS)
    for seq in range(1, steps + 1):
        with clock:
            paid = ledger.reserve(SCOPE, run_id=run, seq=seq, event=EVENT, accountant="rdp")
        db.write(lambda tx, paid=paid: ledger.settle(tx, paid, outcome="released", update_hash="sha256:" + 64 * "0"))
    return both("reserve", clock)


def proof_times(db: Database, log: TransparencyLog, proofs: int) -> dict[str, Any]:
    """Inclusion and consistency proofs of a server, and what checking them costs the client."""
    choice = random.Random(20260102)
    size = db.read(lambda tx: log_rows.size(tx, TENANT))
    root = db.read(lambda tx: merkle.root_from(size, log_rows.nodes(tx, TENANT, merkle.root_nodes(size))))
    made, checked, grown = Clock(), Clock(), Clock()
    for _ in range(proofs):
        index, old = choice.randrange(size), choice.randrange(1, size)
        body = db.read(lambda tx, index=index: log.leaves(tx, TENANT, index, 1))[0]
        with made:
            proof = db.read(lambda tx, index=index: log.inclusion(tx, TENANT, index, size))
        with checked:
            merkle.verify_inclusion(merkle.leaf_hash(body.encode()), index, size, proof, root)
        with grown:
            db.read(lambda tx, old=old: log.consistency(tx, TENANT, old, size))
    return both("inclusion_proof", made) | both("inclusion_check", checked) | both("consistency_proof", grown)


def bodies(tx: Any, log: TransparencyLog, size: int) -> Iterator[str]:
    """Every entry's canonical body, in the order of the tree."""
    for start in range(0, size, MAX_LEAVES):
        yield from log.leaves(tx, TENANT, start, MAX_LEAVES)


def full_check(tx: Any, log: TransparencyLog, size: int) -> bytes:
    """What an auditor who has everything does in one pass: every link of the dataset's chain, and the tree's root."""
    head, position = START, 0

    def leaves() -> Iterator[bytes]:
        nonlocal head, position
        for text in bodies(tx, log, size):
            body = json.loads(text)
            if body["position"] != position or body["prev_hash"] != head.hex():
                raise AssertionError(f"the chain breaks at position {position}")
            head, position = hashlib.sha256(LEDGER_DOMAIN + text.encode()).digest(), position + 1
            yield merkle.leaf_hash(text.encode())

    return merkle.root_of(leaves())


def main(path: Path, steps: int) -> None:
    cost(EVENT), epsilon(cost(EVENT), 1e-5)
    db = Database.open(f"sqlite:///{path}")
    ledger = PrivacyLedger(db, clock=lambda: datetime.now(UTC))
    log = TransparencyLog(db, None)  # type: ignore[arg-type]  # nothing is signed here
    gc.collect()
    opened_mb = resident_mb()
    first = Clock()
    with first:
        entries = ledger.spent(SCOPE).entries
    folded_peak_mb = resident_mb("VmHWM")
    seen: dict[str, Any] = {"entries": entries, "database_mb": round(path.stat().st_size / 2**20, 1)}
    seen |= {"first_fold_s": round(first.wall[0], 2), "first_fold_cpu_s": round(first.cpu[0], 2)}
    seen |= charge_times(db, ledger, steps)
    seen["memory_mb"] = {
        "opened": round(opened_mb, 1),
        "peak_of_first_fold": round(folded_peak_mb, 1),
        "after_charges": round(resident_mb(), 1),
    }
    seen |= flush_times(path.parent, steps)
    seen |= proof_times(db, log, steps)
    size = db.read(lambda tx: log_rows.size(tx, TENANT))
    whole = Clock()
    with whole:
        root = db.read(lambda tx: full_check(tx, log, size))
    seen |= {"full_check_s": round(whole.wall[0], 2), "full_check_cpu_s": round(whole.cpu[0], 2)}
    stored = db.read(lambda tx: merkle.root_from(size, log_rows.nodes(tx, TENANT, merkle.root_nodes(size))))
    if root != stored:
        raise AssertionError("the stored tree is not that of the entries")
    seen["memory_mb"]["peak"] = round(resident_mb("VmHWM"), 1)
    db.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
