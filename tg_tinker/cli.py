"""The command line: what works with the SDK alone, and the server's commands where it is installed."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import click

from tg_tinker.errors import TGTinkerError
from tg_tinker.ledger import PrivacyLedger

GROUP = "tg_tinker.commands"


class PluginGroup(click.Group):
    """A group whose further commands are entry points, imported only when called for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Own commands and those of installed entry points."""
        return sorted({*super().list_commands(ctx), *(e.name for e in entry_points(group=GROUP))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """An own command, or the entry point's."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        found = entry_points(group=GROUP, name=cmd_name)
        return _load(next(iter(found))) if found else None


def _load(entry: EntryPoint) -> click.Command:
    try:
        command = entry.load()
    except ModuleNotFoundError as e:
        missing = e.name or "a package"

        @click.command(entry.name, context_settings={"ignore_unknown_options": True})
        @click.argument("args", nargs=-1)
        def needs_server(args: tuple[str, ...]) -> None:  # noqa: ARG001 - takes whatever the real command takes
            """Needs the server's dependencies (pip install 'tg-tinker[server]')."""
            raise click.ClickException(
                f"`tg-tinker {entry.name}` needs {missing}, which comes with the server: "
                "pip install 'tg-tinker[server]'"
            )

        return needs_server
    assert isinstance(command, click.Command)
    return command


@click.group(cls=PluginGroup)
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
