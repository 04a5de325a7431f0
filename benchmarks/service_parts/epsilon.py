"""What epsilon after a step costs: the ledger's fold against Opacus's accountant on the same history."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from opacus.accountants import RDPAccountant

from benchmarks.service_parts.topic import Requirement, Topic
from tg_tinker_server.dp.events import SampledGaussian
from tg_tinker_server.ledger.fold import Fold, Terms
from tg_tinker_server.ledger.pricing import epsilon_now, price
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.store import ledger_rows
from tg_tinker_server.store.database import Database

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, vouched_by="client")
TERMS = Terms(unit="datum", target_epsilon=100.0, target_delta=1e-5)
SCOPE = DatasetScope(tenant="bench", dataset_id="data")
RUN = "run_bench"


def microseconds(work: Callable[[], object], *, repeats: int, number: int) -> float:
    """CPU time of one call: the median of ``repeats`` means over ``number`` calls."""
    means = []
    for _ in range(repeats):
        began_s = time.thread_time()
        for _ in range(number):
            work()
        means.append((time.thread_time() - began_s) / number)
    return 1e6 * statistics.median(means)


def charged_ledger(folder: Path, steps: int) -> tuple[Database, PrivacyLedger]:
    """A ledger with so many charges, each durable."""
    folder.mkdir(parents=True, exist_ok=True)
    db = Database.open(f"sqlite:///{folder / 'ledger.db'}")
    ledger = PrivacyLedger(db, clock=lambda: datetime.now(UTC))
    ledger.open_dataset(
        SCOPE,
        run_id=RUN,
        target_epsilon=TERMS.target_epsilon,
        target_delta=TERMS.target_delta,
        unit=TERMS.unit,
        accountant="rdp",
        mechanism=EVENT,
    )
    for seq in range(1, steps + 1):
        ledger.reserve(SCOPE, run_id=RUN, seq=seq, event=EVENT, accountant="rdp")
    return db, ledger


def epsilon_cost(folder: Path, *, quick: bool) -> Topic:
    """After 1,000 steps of sigma 1 at q = 0.01."""
    steps = 100 if quick else 1000
    db, ledger = charged_ledger(folder, steps)
    rows = db.read(lambda tx: ledger_rows.entries_from(tx, SCOPE.tenant, SCOPE.dataset_id, 0))
    before, fold = Fold().extended(rows[:-1]), Fold().extended(rows)
    peer = RDPAccountant()
    for _ in range(steps):
        peer.step(noise_multiplier=EVENT.noise_multiplier, sample_rate=EVENT.sample_rate)

    def priced() -> float:
        return price(fold, TERMS, EVENT, run_id=RUN, accountant="rdp").after

    def reserved() -> object:
        nonlocal steps
        steps += 1
        return ledger.reserve(SCOPE, run_id=RUN, seq=steps, event=EVENT, accountant="rdp")

    taken = {
        "fold in the newest entry": microseconds(lambda: before.extended(rows[-1:]), repeats=9, number=100),
        "price of the next step": microseconds(priced, repeats=9, number=100),
        "epsilon now": microseconds(lambda: epsilon_now(fold, TERMS), repeats=9, number=100),
        "Opacus get_epsilon": microseconds(lambda: peer.get_epsilon(TERMS.target_delta), repeats=5, number=3),
    }
    began_s, asked = time.perf_counter(), 50
    for _ in range(asked):
        reserved()
    durable_us = 1e6 * (time.perf_counter() - began_s) / asked
    db.close()
    ours, theirs = epsilon_now(fold, TERMS), float(peer.get_epsilon(TERMS.target_delta))
    off = abs(ours - theirs) / theirs
    step_us = taken["fold in the newest entry"] + taken["price of the next step"]
    return Topic(
        title=f"Epsilon after {fold.charges:,} steps: sigma {EVENT.noise_multiplier:g}, q = {EVENT.sample_rate:g}",
        columns=("", "CPU microseconds", "epsilon"),
        rows=[
            *(
                (name, f"{us:,.0f}", f"{ours:.9f}" if name == "epsilon now" else "")
                for name, us in list(taken.items())[:3]
            ),
            ("Opacus get_epsilon", f"{taken['Opacus get_epsilon']:,.0f}", f"{theirs:.9f}"),
            ("a durable charge, by the clock", f"{durable_us:,.0f}", ""),
        ],
        requirements=[
            Requirement(what="fold and price of a step", measured=step_us / 1e3, limit=0.1, unit="ms"),
            Requirement(what="relative difference to Opacus", measured=off, limit=1e-6, unit=""),
        ],
        notes="A durable charge is what optim_step waits for: transaction, hash, flush to disk.",
        figures={"cpu_us": taken, "durable_charge_us": durable_us, "epsilon": ours, "opacus_epsilon": theirs},
    )
