"""Run by test_crashes.py: lets the kernel refuse the ledger's file more space, and counts what is handed out.

Usage: full_disk.py DATABASE_FILE. Prints one JSON line with what it saw.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import UTC, datetime
from pathlib import Path

from tg_tinker.errors import ServerError
from tg_tinker_server.dp.events import Gaussian
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.store.database import Database

SCOPE = DatasetScope(tenant="t", dataset_id="d")
EVENT = Gaussian(noise_multiplier=50.0)


def main(path: str) -> None:
    db = Database.open(f"sqlite:///{path}")
    ledger = PrivacyLedger(db, clock=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    ledger.open_dataset(
        SCOPE, run_id="r", target_epsilon=None, target_delta=1e-5, unit="datum", accountant="rdp", mechanism=EVENT
    )
    told: list[int] = []
    refused = 0

    def attempt(seq: int) -> None:
        nonlocal refused
        try:
            told.append(ledger.reserve(SCOPE, run_id="r", seq=seq, event=EVENT, accountant="rdp").seq)
        except ServerError:
            refused += 1

    for seq in range(1, 11):
        attempt(seq)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for a handful more pages in the write-ahead log, then EFBIG from the kernel in the middle of a write.
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path(f"{path}-wal").stat().st_size + 10_000, unlimited[1]))
    for seq in range(11, 31):
        attempt(seq)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    before_space_came_back = refused
    for seq in range(31, 41):
        attempt(seq)
    charged = {e.body["seq"] for e in ledger.entries(SCOPE) if e.kind == "charge"}
    print(
        json.dumps(
            {
                "refused": before_space_came_back,
                "refused_later": refused - before_space_came_back,
                "told": len(told),
                "lost": len(set(told) - charged),
                "charged": len(charged),
            }
        )
    )
    db.close()


if __name__ == "__main__":
    main(sys.argv[1])
