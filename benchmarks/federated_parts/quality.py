"""Does a federation beat its lone sites at the same epsilon, and which factors should it train?

Cells are runs through the real service: four servers, real sites and a real coordinator in one process, Flower's Grid
in memory. A cell is a method at a learning rate, an epsilon and a seed; finished ones are kept in a file, so that an
interrupted benchmark goes on. Learning rates are chosen at a seed that is not in the table.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tg_tinker import ServiceClient
from tg_tinker.federated.coordinator import Coordinator
from tg_tinker.federated.coordinator_config import CoordinatorConfig
from tg_tinker.types import TrainingConfig
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.demo.measure import perplexity
from tg_tinker_server.federated_demo.arms import register
from tg_tinker_server.federated_demo.data import FederatedTexts, load_texts
from tg_tinker_server.federated_demo.in_process import InProcessStage
from tg_tinker_server.federated_demo.settings import ALONE, DATASET, FederatedDemoSettings

FEDERATED = ("both", "freeze_a", "alternate")
SEARCHED = {
    "both": (0.03, 0.06),
    "freeze_a": (0.1, 0.2),
    "alternate": (0.06, 0.1),
    "alone": (0.0075, 0.015),
    "pooled": (0.015, 0.03),
}
"""Learning rates that are tried for each method, at `SEARCH_SEED` and `SEARCH_EPSILON`."""
SEARCH_SEED, SEARCH_EPSILON = 100, 8.0
EPSILONS, SEEDS = (3.0, 8.0), (0, 1, 2)
ROUNDS, LOCAL_STEPS = 6, 5


@dataclass(frozen=True, slots=True)
class Cell:
    """One run. ``site`` is whose texts are learned from: one site's, or all."""

    method: str
    site: str
    epsilon: float
    learning_rate: float
    seed: int

    def settings(self) -> FederatedDemoSettings:
        """What the demo would train."""
        return replace(
            FederatedDemoSettings(rounds=ROUNDS, local_steps=LOCAL_STEPS),
            target_epsilon=self.epsilon,
            learning_rate=self.learning_rate,
            alone_learning_rate=self.learning_rate,
            pooled_learning_rate=self.learning_rate,
            seed=self.seed,
        )


def search_cells(sites: Sequence[str]) -> Iterator[Cell]:
    """Runs that choose the learning rates; lone sites are searched on the first one."""
    for method, rates in SEARCHED.items():
        for rate in rates:
            yield Cell(method, sites[0] if method == "alone" else "all", SEARCH_EPSILON, rate, SEARCH_SEED)


def table_cells(sites: Sequence[str], rates: dict[str, float]) -> Iterator[Cell]:
    """Runs of the table, every method at its own best learning rate."""
    for seed in SEEDS:
        for epsilon in EPSILONS:
            for method in (*FEDERATED, "pooled"):
                yield Cell(method, "all", epsilon, rates[method], seed)
            for site in sites:
                yield Cell("alone", site, epsilon, rates["alone"], seed)


def measure(cell: Cell, texts: FederatedTexts) -> float:
    """Perplexity on the held-out texts after the run of a cell."""
    with tempfile.TemporaryDirectory() as folder:
        if cell.method in FEDERATED:
            return _federated(cell, texts, Path(folder))
        return _in_one_place(cell, texts, Path(folder))


def _federated(cell: Cell, texts: FederatedTexts, folder: Path) -> float:
    settings = cell.settings()
    with InProcessStage(folder, list(texts.sites), settings) as stage:
        for name, records in texts.sites.items():
            with stage.parties[name].client() as service:
                register(service, DATASET, records, settings)
        expires = (datetime.now(UTC) + timedelta(days=1)).isoformat(timespec="seconds")
        stage.open_sites({**settings.job(job_id="quality", expires=expires), "federated_lora": cell.method})
        config = CoordinatorConfig.load(stage.parties["coordinator"].config)
        with config.service() as service:
            result = stage.run(Coordinator(config, service, config.key()).run)
            if result.status != "finished" or len(result.statements) != len(texts.sites):
                raise RuntimeError(f"{cell}: {result.why or result.unstated}")
            reader = service.create_training_client(settings.reader())
            reader.load_state(result.artifact_id, optimizer=False)
            return perplexity(reader, texts.held_out, batch_size=settings.eval_batch_size)


def _in_one_place(cell: Cell, texts: FederatedTexts, folder: Path) -> float:
    settings = cell.settings()
    with EmbeddedServer(ServerConfig(port=0, data_dir=folder, log_level="error")) as server:
        service = ServiceClient(api_key=server.mint_key("quality"), base_url=server.address)
        pooled = cell.method == "pooled"
        register(service, ALONE, texts.pooled if pooled else texts.sites[cell.site], settings)
        dataset = service.get_dataset(ALONE)
        config: TrainingConfig = (
            settings.pooled(dataset, sites=len(texts.sites)) if pooled else settings.alone(dataset)
        )
        tc = service.create_training_client(config)
        for _ in range(settings.steps):
            tc.forward_backward(dataset=ALONE)
            tc.optim_step().result()
        return perplexity(tc, texts.held_out, batch_size=settings.eval_batch_size)


class Kept:
    """Finished cells, in a file of one line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.found: dict[Cell, float] = {Cell(**row["cell"]): row["perplexity"] for row in map(json.loads, lines)}

    def of(self, cells: Sequence[Cell], texts: FederatedTexts, *, workers: int) -> dict[Cell, float]:
        """The figures of cells; those that are not there are measured, so many at once."""
        missing = [cell for cell in cells if cell not in self.found]
        if missing:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                running = {pool.submit(measure, cell, texts): cell for cell in missing}
                for done in as_completed(running):
                    self._keep(running[done], done.result())
        return {cell: self.found[cell] for cell in cells}

    def _keep(self, cell: Cell, found: float) -> None:
        self.found[cell] = found
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"cell": asdict(cell), "perplexity": found}) + "\n")
        print(f"{cell.method} {cell.site} epsilon {cell.epsilon:g} seed {cell.seed}: {found:.1f}", flush=True)


def run(path: Path, *, workers: int = 2) -> dict[str, Any]:
    """Measure whatever is missing in the file; the figures of the table."""
    texts = load_texts(held_out=FederatedDemoSettings().held_out)
    kept, sites = Kept(path), list(texts.sites)
    searched = kept.of(list(search_cells(sites)), texts, workers=workers)
    rates = {
        method: min((p, cell.learning_rate) for cell, p in searched.items() if cell.method == method)[1]
        for method in SEARCHED
    }
    return document(searched, rates, kept.of(list(table_cells(sites, rates)), texts, workers=workers))


def document(searched: dict[Cell, float], rates: dict[str, float], found: dict[Cell, float]) -> dict[str, Any]:
    """Figures by epsilon and method: of each seed, for lone sites the mean over sites."""
    table = []
    for epsilon in EPSILONS:
        for method in (*FEDERATED, "alone", "pooled"):
            by_seed = [
                statistics.mean(
                    p for c, p in found.items() if (c.method, c.epsilon, c.seed) == (method, epsilon, seed)
                )
                for seed in SEEDS
            ]
            table.append(
                {"epsilon": epsilon, "method": method, "learning_rate": rates[method], "perplexities": by_seed}
            )
    return {
        "rounds": ROUNDS,
        "local_steps": LOCAL_STEPS,
        "search": [{**asdict(cell), "perplexity": p} for cell, p in searched.items()],
        "table": table,
    }


def page(quality: dict[str, Any]) -> list[str]:
    """The table as Markdown, and what it says."""
    lines = [
        f"Perplexity on 510 held-out texts after {quality['rounds']} rounds of {quality['local_steps']} steps, "
        "median (smallest to largest) of 3 seeds. Lone sites: mean over the three.",
        "",
        "| epsilon of each site | method | learning rate | perplexity | over lone sites | over pooled |",
        "|---|---|---|---|---|---|",
    ]
    by = {(row["epsilon"], row["method"]): row for row in quality["table"]}
    for (epsilon, method), row in by.items():
        seen, mid = row["perplexities"], statistics.median(row["perplexities"])
        alone, pooled = (statistics.median(by[epsilon, m]["perplexities"]) for m in ("alone", "pooled"))
        beaten = ", **does not beat training alone**" if method in FEDERATED and mid >= alone else ""
        lines.append(
            f"| {epsilon:g} | {method}{beaten} | {row['learning_rate']:g} "
            f"| {mid:.1f} ({min(seen):.1f} to {max(seen):.1f}) | {mid / alone:.2f} | {mid / pooled:.2f} |"
        )
    tried = "; ".join(
        f"{method} "
        + ", ".join(
            f"{c['learning_rate']:g}: {c['perplexity']:.1f}" for c in quality["search"] if c["method"] == method
        )
        for method in SEARCHED
    )
    return [*lines, "", f"Learning rates were chosen at another seed, epsilon {SEARCH_EPSILON:g}: {tried}."]
