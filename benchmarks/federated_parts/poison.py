"""Two of ten sites send poison: what the plain average, the trimmed mean, the median and Krum make of it.

Each poisoned site trains honestly and then sends something else, signed by its own key: noise, its update turned
round and enlarged, or numbers of a million. Bigram model on ICD-10-CM wordings; perplexity is over bytes.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks.federated_parts.kept import Kept
from benchmarks.federated_parts.lab import (
    Party,
    Reader,
    Timeline,
    bigram_server,
    coordinator_config,
    dealt,
    federate,
    policy_for,
)
from tg_tinker import LoRAConfig, TrainingConfig
from tg_tinker.federated.link import Handler
from tg_tinker.federated.messages import Envelope
from tg_tinker_server.demo.data import diagnosis_texts, split

SITES, BAD, ROUNDS, LOCAL_STEPS = 10, 2, 3, 2
LEARNING_RATE = 300.0  # a record's gradient has norm 1 at most, over a table of 67,600 numbers
TEXTS = 4000
"""Records of each site."""
EPSILON = 8.0
SHARE = 8
"""One record in so many is drawn for a step."""
NOTES = (
    "noise: normal numbers ten times as large as the update; turned: the update times -8; huge: signs of a million.",
    "The rules are by themselves here: a coordinator's max_update_norm, 10,000 by default, is lifted. With it huge",
    "updates are refused before any rule sees them.",
)
ALLOWED = 1.05
"""A robust rule keeps perplexity within this factor of the clean run."""
STRATEGIES: Mapping[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg"},
    "fedtrimmedavg": {"name": "fedtrimmedavg", "trimmed_fraction": 0.2},
    "fedmedian": {"name": "fedmedian"},
    "krum": {"name": "krum", "num_malicious": BAD},
    "multikrum": {"name": "multikrum", "num_malicious": BAD},
}

Arrays = dict[str, np.ndarray[Any, Any]]
Attack = Callable[[Arrays, np.random.Generator], Arrays]


def noise(update: Arrays, rng: np.random.Generator) -> Arrays:
    """Normal numbers, ten times as large as the update's."""
    return {n: (10 * float(np.std(a)) * rng.standard_normal(a.shape)).astype(np.float32) for n, a in update.items()}


def turned(update: Arrays, rng: np.random.Generator) -> Arrays:  # noqa: ARG001 - an attack without chance
    """The update backwards, enlarged so that two of ten undo what eight learn, and more."""
    return {n: np.float32(-8.0) * a for n, a in update.items()}


def huge(update: Arrays, rng: np.random.Generator) -> Arrays:
    """Signs of a million."""
    return {n: np.where(rng.random(a.shape) < 0.5, -1e6, 1e6).astype(np.float32) for n, a in update.items()}


ATTACKS: Mapping[str, Attack | None] = {"clean": None, "noise": noise, "turned": turned, "huge": huge}


def poisoned(party: Party, honest: Handler, attack: Attack) -> Handler:
    """A site that answers "train" with poison. The same request gets the same poison."""

    def handle(request: Envelope) -> Envelope:
        reply = honest(request)
        if reply.kind != "train" or not reply.arrays:
            return reply
        seed = hashlib.sha256(f"{party.name}/{request.round}".encode()).digest()
        rng = np.random.default_rng(list(seed))
        return replace(reply, arrays=attack(dict(reply.arrays), rng)).signed(party.key)

    return handle


def run(cells: Path) -> dict[str, Any]:
    """Every strategy under every attack; what stands in the file is not measured again."""
    kept = Kept(cells)
    with Lab(texts=TEXTS) as lab:
        for strategy in STRATEGIES:
            for attack in ATTACKS:
                if kept.get(strategy, attack) is None:
                    kept.put(lab.perplexity(strategy, attack), strategy, attack)
                print(f"{strategy:<14} {attack:<7} perplexity {kept.get(strategy, attack):.1f}", flush=True)
    return {
        "sites": SITES,
        "poisoned": BAD,
        "rounds": ROUNDS,
        "local_steps": LOCAL_STEPS,
        "records_per_site": TEXTS,
        "batch": TEXTS // SHARE,
        "learning_rate": LEARNING_RATE,
        "epsilon": EPSILON,
        "perplexity": {strategy: dict(kept.cells[strategy]) for strategy in STRATEGIES},
    }


class Lab:
    """Ten sites and a coordinator, as tenants of one server.

    Args:
        texts: records of each site.
        held_out: public records to measure on.
        epsilon: of each site.
    """

    def __init__(self, *, texts: int, held_out: int = 300, epsilon: float = EPSILON) -> None:
        self._epsilon = epsilon
        self._public = split(diagnosis_texts(), held_out=held_out, train_limit=SITES * texts)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = stack.enter_context(bigram_server(self._home / "server"))
            self._coordinator = Party("coordinator", server, self._home / "coordinator")
            config = TrainingConfig(model_ref="bigram", lora_config=LoRAConfig(), batch_size=128)
            self._reader = Reader(self._coordinator, config, self._public.held_out)
            stack.callback(self._reader.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def perplexity(self, strategy: str, attack: str) -> float:
        """After the last round."""
        shares = dealt(self._public.train, SITES)
        name = f"{strategy}-{attack}"
        return _one(
            name,
            self._coordinator,
            shares,
            self._home,
            self._reader,
            STRATEGIES[strategy],
            ATTACKS[attack],
            self._epsilon,
        )


def _one(
    name: str,
    coordinator: Party,
    shares: Sequence[Sequence[str]],
    home: Path,
    reader: Reader,
    strategy: Mapping[str, Any],
    attack: Attack | None,
    epsilon: float,
) -> float:
    server = coordinator.server
    own = Party("coordinator", server, home / name / "coordinator", coordinator.key, coordinator.api_key)
    sites = [Party(f"site-{i}", server, home / name / f"site-{i}") for i in range(SITES)]
    policy = policy_for(coordinator, "bigram")
    handlers: dict[str, Handler] = {}
    for i, (site, records) in enumerate(zip(sites, shares, strict=True)):
        with site.service() as service:
            service.create_dataset(name, list(records), target_epsilon=epsilon, target_delta=1e-5)
        honest = site.handler(name, policy)
        handlers[site.name] = honest if attack is None or i >= BAD else poisoned(site, honest, attack)
    job = {
        "job_id": name,
        "base_model": "bigram",
        "rounds": ROUNDS,
        "local_steps": LOCAL_STEPS,
        "batch_size": len(shares[0]) // SHARE,
        "max_sequence_length": 256,
        "optimizer": {
            "name": "sgd",
            "learning_rate": LEARNING_RATE,
            "momentum": 0.0,
            "nesterov": False,
            "lr_scheduler": "linear",
        },
        "records": {"target_epsilon": epsilon, "target_delta": 1e-5, "people": "disjoint"},
        "strategy": dict(strategy),
        "min_sites": SITES - BAD,
    }
    config = coordinator_config(own, sites, job, max_update_norm=None, join_timeout_s=600.0)
    timeline = Timeline()
    result = federate(config, own, handlers, timeline=timeline, evaluate=reader)
    if result.status != "finished":
        raise AssertionError(f"{name} failed: {result.why}")
    value = timeline.metrics[ROUNDS]["perplexity"]
    return value if math.isfinite(value) else math.inf


def within(perplexity: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, bool]]:
    """Whether each strategy stays within 5 % of its own clean run, by attack."""
    return {
        strategy: {attack: value <= ALLOWED * found["clean"] for attack, value in found.items() if attack != "clean"}
        for strategy, found in perplexity.items()
    }


def page(figures: Mapping[str, Any]) -> list[str]:
    """The table as Markdown."""
    attacks = [attack for attack in ATTACKS if attack != "clean"]
    lines = [
        f"{figures['poisoned']} of {figures['sites']} sites send poison in each of {figures['rounds']} rounds; "
        f"bigram model, {figures['records_per_site']:,} records a site at epsilon {figures['epsilon']:g}.",
        f"Perplexity after the last round; bold is within {ALLOWED - 1:.0%} of the same rule's clean run.",
        "",
        f"| rule | clean | {' | '.join(attacks)} |",
        "|---|---|" + "---|" * len(attacks),
    ]
    for rule, found in figures["perplexity"].items():
        shown = [_shown(float(found[attack]), ALLOWED * float(found["clean"])) for attack in attacks]
        lines.append(f"| {rule} | {float(found['clean']):.1f} | {' | '.join(shown)} |")
    return [*lines, "", *NOTES]


def _shown(value: float, most: float) -> str:
    text = f"{value:.1f}" if value < 1e6 else "over 1e6"
    return f"**{text}**" if value <= most else text
