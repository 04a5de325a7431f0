"""`tg-tinker federated demo`: three sites, a coordinator, and everything between them, on this machine."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
from rich.console import Console

from tg_tinker.errors import TGTinkerError
from tg_tinker_server.demo.state import put_aside

FRESH_HINT = "To start over in a new folder: make federated-demo ARGS=--fresh  (or: tg-tinker federated demo --fresh)"


@click.command()
@click.option("--in-process", is_flag=True, help="Run the same apps in this process: no SuperLink, no SuperNodes.")
@click.option("--fresh", is_flag=True, help="Put the old folder aside (never deleted) and train in a new one.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".tg-tinker/federated-demo"),
    show_default=True,
    help="Home of every party's database, keys, configuration and logs.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("federated-report.html"),
    show_default=True,
    help="Where the page goes.",
)
def demo(in_process: bool, fresh: bool, folder: Path, out: Path) -> None:
    """Train one model at three sites that share no record, beside each alone and beside pooled data."""
    console = Console()
    if fresh:
        aside = put_aside(folder)
        if aside is not None:
            console.print(
                f"The old folder is now {aside}. All models learned from the same texts, so whoever gets them has "
                "what all epsilons allow together: a real dataset keeps one ledger.",
                highlight=False,
            )
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _run(console, in_process, folder, out)
    except KeyboardInterrupt:
        raise click.ClickException(
            "interrupted, and everything is stopped; call again and it goes on. What was spent stays spent."
        ) from None
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] != "flwr":
            raise
        raise click.ClickException("this needs Flower: pip install 'tg-tinker[federation]'") from e
    except TGTinkerError as e:
        raise click.ClickException(f"{e.message}\n{FRESH_HINT}") from e


def _run(console: Console, in_process: bool, folder: Path, out: Path) -> None:
    # One thread each: for a model this small two are a quarter faster on idle cores, and much slower on busy ones.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model and the texts are on this machine
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    for category in (UserWarning, FutureWarning):  # advice to programmers, not to readers
        warnings.filterwarnings("ignore", category=category)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    from tg_tinker_server.federated_demo.data import load_texts
    from tg_tinker_server.federated_demo.run import run
    from tg_tinker_server.federated_demo.settings import FederatedDemoSettings
    from tg_tinker_server.federated_demo.stage import Stage

    settings = FederatedDemoSettings()
    with console.status("reading the texts …"):
        texts = load_texts(held_out=settings.held_out, train_limit=settings.train_limit)

    def stage(sites: Sequence[str]) -> AbstractContextManager[Stage]:
        if in_process or not sites:
            from tg_tinker_server.federated_demo.in_process import InProcessStage

            return InProcessStage(folder, sites, settings)
        from tg_tinker_server.federated_demo.processes import ProcessStage

        return ProcessStage(folder, sites, settings)

    run(console, stage, out, folder=folder, settings=settings, texts=texts, in_process=in_process)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
