"""`tg-tinker demo`: starts a server in this process and runs the demo against it."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError, ResourceNotFoundError, TGTinkerError
from tg_tinker_server.demo.state import put_aside

TENANT = "demo"
ROLES = ("trainer", "exporter", "auditor")
FRESH_HINT = "To start over in a new folder: make demo ARGS=--fresh  (or: tg-tinker demo --fresh)"


@dataclass(frozen=True, slots=True)
class OwnServer:
    """The embedded server's address, and a key for it."""

    address: str
    api_key: str


@click.command()
@click.option("--fresh", is_flag=True, help="Put the old folder aside (never deleted) and train in a new one.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("demo-report.html"),
    show_default=True,
    help="Where the report goes.",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".tg-tinker/demo"),
    show_default=True,
    help="Home of the demo's database, checkpoints and keys.",
)
def demo(fresh: bool, out: Path, folder: Path) -> None:
    """Train a private model end to end on this machine, in about two minutes; then show it again in seconds."""
    console = Console()
    if fresh:
        aside = put_aside(folder)
        if aside is not None:
            console.print(
                f"The old folder is now {aside}. Both models learned from the same texts, so whoever gets both has "
                "what both epsilons allow together: a real dataset keeps one ledger.",
                highlight=False,
            )
    try:
        _run(console, out, folder)
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; call again and it goes on. What was spent stays spent.") from None
    except (DPBudgetExceededError, ResourceNotFoundError, InvalidRequestError) as e:
        raise click.ClickException(f"{e.message}\n{FRESH_HINT}") from e
    except TGTinkerError as e:
        raise click.ClickException(str(e)) from e


def _run(console: Console, out: Path, folder: Path) -> None:
    # One thread: for a model this small two are a quarter faster on idle cores, and ten times slower on busy ones.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model and the texts are on this machine
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=UserWarning)  # torch's advice to programmers, not to readers
    started = time.monotonic()
    with console.status("starting the server …"):
        from tg_tinker_server.app import EmbeddedServer
        from tg_tinker_server.config import ServerConfig
        from tg_tinker_server.demo.run import run

        server = EmbeddedServer(ServerConfig(port=0, data_dir=folder, log_level="error"))
    with server:
        console.print(f"server started in {time.monotonic() - started:.1f} s", style="dim", highlight=False)
        own = OwnServer(server.address, server.mint_key(TENANT, ROLES))
        run(console, own, out, folder=folder)
