"""`tg-tinker audit run`: attacks this installation's own training and says what leaks."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import get_args

import click
from rich.console import Console

from tg_tinker.errors import TGTinkerError
from tg_tinker_server.empirical.settings import MODELS, AuditSettings, Mode

_FULL = AuditSettings(canaries=5000, noise_steps=64, draws=128)


@click.command()
@click.option(
    "--quick/--full", default=True, help="1,000 canaries in under a minute (default), or 5,000 and more noise."
)
@click.option("--canaries", type=int, help="How many canaries; each is in the data with probability 1/2.")
@click.option("--epsilon", type=float, default=AuditSettings().epsilon, show_default=True, help="Budget of the run.")
@click.option("--delta", type=float, default=AuditSettings().delta, show_default=True, help="Of claim and bound.")
@click.option(
    "--mode",
    type=click.Choice(get_args(Mode)),
    default="gradient",
    show_default=True,
    help="Canaries as planted gradients (strong), or as records whose losses are compared (plain).",
)
@click.option(
    "--model", type=click.Choice(MODELS), default=MODELS[0], show_default=True, help="bigram: no torch model."
)
@click.option("--seed", type=int, help="Repeat canaries and coins; noise can never be repeated.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the result as JSON, for a report to embed."
)
def run(
    quick: bool,
    canaries: int | None,
    epsilon: float,
    delta: float,
    mode: Mode,
    model: str,
    seed: int | None,
    out: Path | None,
) -> None:
    """Audit this installation empirically: canaries through the real service, in a server of its own.

    Exits with 1 if anything contradicts the privacy that the ledger claims.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=UserWarning)
    try:
        base = AuditSettings() if quick else _FULL
        settings = replace(
            base,
            model=model,
            mode=mode,
            epsilon=epsilon,
            delta=delta,
            seed=seed,
            canaries=base.canaries if canaries is None else canaries,
        )
        alarm = _run(settings, out)
    except TGTinkerError as e:
        raise click.ClickException(e.message) from e
    if alarm:
        raise SystemExit(1)


def _run(settings: AuditSettings, out: Path | None) -> bool:
    from tg_tinker_server.empirical import narration

    console = Console()
    narration.introduce(console, settings)
    with console.status("starting the server …") as status:
        from tg_tinker_server.empirical.audit import attach, audit

        result = audit(settings, lambda instrument, what: status.update(f"{instrument}: {what} …"))
    narration.conclude(console, result)
    if out is not None:
        attach(result, out)
        console.print(f"The result is in {out}.", highlight=False)
    return bool(result.alarms)
