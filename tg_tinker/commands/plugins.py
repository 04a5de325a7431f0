"""A command group whose commands live elsewhere, and are imported only when called for.

Two places: modules of this package, and entry points of whatever else is installed. The server's commands join
``tg-tinker`` through ``tg_tinker.commands``, and a subgroup ``x`` of it through ``tg_tinker.commands.x``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

COMMANDS = "tg_tinker.commands"


class PluginGroup(click.Group):
    """A group of own commands, commands by module, and commands by entry point; the first found of a name is it.

    Args:
        plugins: the entry-point group that others join by, ``tg_tinker.commands`` or a name below it.
        modules: name of a command to ``module:attribute``. The module is imported when the command is called
            for, which includes the ``--help`` of this group: keep heavy imports inside the functions.
    """

    def __init__(self, *args: Any, plugins: str = COMMANDS, modules: Mapping[str, str] | None = None, **kw: Any):
        super().__init__(*args, **kw)
        self.plugins = plugins
        self.modules = dict(modules or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Own commands, those of modules, and those of installed entry points."""
        joined = (e.name for e in entry_points(group=self.plugins))
        return sorted({*super().list_commands(ctx), *self.modules, *joined})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """An own command, or the module's, or the entry point's."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        if cmd_name in self.modules:
            return load(EntryPoint(cmd_name, self.modules[cmd_name], self.plugins))
        found = entry_points(group=self.plugins, name=cmd_name)
        return load(next(iter(found))) if found else None


def load(entry: EntryPoint) -> click.Command:
    """The command, or, where a package is missing, one that says what to install."""
    try:
        command = entry.load()
    except ModuleNotFoundError as e:
        missing = e.name or "a package"
        path = " ".join(["tg-tinker", *entry.group.split(".")[2:], entry.name])

        @click.command(entry.name, context_settings={"ignore_unknown_options": True})
        @click.argument("args", nargs=-1)
        def needs_server(args: tuple[str, ...]) -> None:  # noqa: ARG001 - takes whatever the real command takes
            """Needs the server's dependencies (pip install 'tg-tinker[server]')."""
            raise click.ClickException(
                f"`{path}` needs {missing}, which comes with the server: pip install 'tg-tinker[server]'"
            )

        return needs_server
    assert isinstance(command, click.Command)
    return command
