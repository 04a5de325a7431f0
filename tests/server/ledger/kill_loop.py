"""Run by test_crashes.py: forks a spender, kills it inside ``reserve``, and compares what it was told with the disk.

Usage: kill_loop.py DATABASE_FILE KILLS SEED. Prints one JSON line with what it saw.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import sys
import time
from datetime import UTC, datetime

from tg_tinker.ledger import ChainEntry, verify_chain
from tg_tinker_server.dp.accounting import cost
from tg_tinker_server.dp.events import Gaussian
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.store.database import Database

SCOPE = DatasetScope(tenant="t", dataset_id="d")
EVENT = Gaussian(noise_multiplier=50.0)


def spend(path: str, run: str, told: int) -> None:
    """Reserve for ever, and say so after each reservation that was handed out."""
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


def killed_run(path: str, run: str, delay_s: float) -> set[int]:
    """What a spender was told before it was killed ``delay_s`` after its first reservation."""
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        spend(path, run, told)
    os.close(told)
    lines = os.read(heard, 64)  # the first reservation came back: from now on it is always inside reserve
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while chunk := os.read(heard, 65536):
        lines += chunk
    os.close(heard)
    return {int(line) for line in lines.split()}


def main(path: str, kills: int, seed: int) -> None:
    random_delay = random.Random(seed)
    cost(EVENT)
    told: dict[str, set[int]] = {}
    for i in range(kills):
        told[f"run_{i}"] = killed_run(path, f"run_{i}", random_delay.uniform(0.0, 0.02))
    connection = sqlite3.connect(path)
    charged: dict[str, set[int]] = {}
    for run, seq in connection.execute("SELECT run_id, seq FROM ledger WHERE kind = 'charge'"):
        charged.setdefault(run, set()).add(seq)
    rows = connection.execute("SELECT body_json, entry_hash FROM ledger ORDER BY position").fetchall()
    verify_chain([ChainEntry(json.loads(body), entry_hash) for body, entry_hash in rows])
    print(
        json.dumps(
            {
                "told": sum(map(len, told.values())),
                "lost": sum(len(seqs - charged.get(run, set())) for run, seqs in told.items()),
                "unheard": max(len(seqs - told[run]) for run, seqs in charged.items()),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
