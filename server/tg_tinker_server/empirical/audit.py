"""The whole audit: five instruments, one error probability, one result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tg_tinker_server.empirical.bench import bench
from tg_tinker_server.empirical.bounds import most_provable
from tg_tinker_server.empirical.charges import examine_charges
from tg_tinker_server.empirical.distinguisher import distinguish
from tg_tinker_server.empirical.draws import TESTS as DRAW_TESTS
from tg_tinker_server.empirical.draws import examine_draws
from tg_tinker_server.empirical.findings import AuditResult
from tg_tinker_server.empirical.neighbours import probe_neighbours
from tg_tinker_server.empirical.noise_run import TESTS as NOISE_TESTS
from tg_tinker_server.empirical.noise_run import examine_noise
from tg_tinker_server.empirical.settings import AuditSettings

Tell = Callable[[str, str], None]
"""Told what is going on: the instrument, and what it is at."""


def audit(settings: AuditSettings, tell: Tell = lambda *_: None) -> AuditResult:
    """Audit the service of this installation, in this process.

    Guarantee: on a service whose noise, clipping and accounting are as claimed, an alarm is raised with probability
    at most ``settings.false_alarm_rate``. Neighbours and charges have no chance in them and take no part of it.
    """
    started = time.monotonic()
    half = settings.false_alarm_rate / 2
    with bench(settings) as tools:
        probes = probe_neighbours(tools, lambda what: tell("neighbours", what))
        share = half / (NOISE_TESTS + DRAW_TESTS)
        noise = examine_noise(tools, smallest_p=share, tell=lambda what: tell("noise", what))
        draws = examine_draws(tools, smallest_p=share, tell=lambda what: tell("draws", what))
        found = distinguish(tools, smallest_p=half, tell=lambda what: tell("distinguisher", what))
        charges = examine_charges(tools, found.claim, lambda what: tell("charges", what))
    return AuditResult(
        version=version("tg-tinker"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=settings.model,
        parameters=found.parameters,
        mode=settings.mode,
        canaries=settings.canaries,
        seed=settings.seed,
        claim=found.claim,
        bound=found.bound,
        power_of_one_count=most_provable(settings.canaries, delta=settings.delta, confidence=settings.confidence),
        findings=(*probes, *noise, *draws, found.finding, *charges),
        false_alarm_rate=settings.false_alarm_rate,
        seconds=time.monotonic() - started,
    )


def attach(result: AuditResult, path: Path) -> None:
    """Write the result where a report can embed it."""
    path.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
