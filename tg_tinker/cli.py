"""The command line: what works with the SDK alone, and the server's commands where it is installed."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import click

from tg_tinker.errors import TGTinkerError
from tg_tinker.ledger import ChainEntry, verify_chain

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
def verify(file: Path) -> None:
    """Check the hash chain of a ledger saved as JSON lines (one entry a line)."""
    try:
        entries = [ChainEntry.from_json(line) for line in file.read_text().splitlines() if line.strip()]
        head = verify_chain(entries)
    except (TGTinkerError, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise click.ClickException(str(e)) from e
    charges = sum(1 for e in entries if e.kind == "charge")
    click.echo(f"intact: {len(entries)} entries, {charges} charges, head {head.hex()}")


if __name__ == "__main__":
    main()
