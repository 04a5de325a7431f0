"""The command line: what works with the SDK alone, and the server's commands where it is installed."""

from __future__ import annotations

from pathlib import Path

import click

from tg_tinker.commands.plugins import PluginGroup
from tg_tinker.errors import TGTinkerError
from tg_tinker.ledger import PrivacyLedger

# Command groups of the SDK, each imported when called for.
MODULES: dict[str, str] = {
    "audit": "tg_tinker.commands.audit:audit",
    "checkpoints": "tg_tinker.commands.checkpoints:checkpoints",
    "federated": "tg_tinker.commands.federated:federated",
    "log": "tg_tinker.commands.log:log",
    "privacy": "tg_tinker.commands.privacy:privacy",
}


@click.group(cls=PluginGroup, modules=MODULES)
@click.version_option(package_name="tg-tinker")
def main() -> None:
    """Fine-tune language models on data they must not leak."""


@main.group()
def ledger() -> None:
    """Ledgers as files; needs no server and no network."""


@ledger.command("verify")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--head", help="A head noted earlier (hex); it must be in this ledger, or its history was cut or replaced."
)
def verify(file: Path, head: str | None) -> None:
    """Check a ledger saved as JSON lines: its hash chain, its budget, and that every release was paid for first."""
    try:
        ledger = PrivacyLedger.from_file_lines(file.read_text(encoding="utf-8").splitlines())
        ledger.verify(head=_head(head))
    except UnicodeDecodeError as e:
        raise click.ClickException(f"{file} is not a text file") from e
    except TGTinkerError as e:
        raise click.ClickException(e.message) from e
    click.echo(f"intact: {len(ledger.entries)} entries, {len(ledger.charges)} charges, head {ledger.head.hex()}")
    click.echo(
        f"dataset {ledger.dataset_id}: {ledger.epsilon_spent:.4f} of {ledger.target_epsilon:g} epsilon, as charged"
    )


def _head(text: str | None) -> bytes | None:
    try:
        return None if text is None else bytes.fromhex(text)
    except ValueError as e:
        raise click.UsageError("--head is a hash in hexadecimal") from e


if __name__ == "__main__":
    main()
