"""Commands that live elsewhere: listed without being imported, and clear about what they need."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import click
import pytest
from click.testing import CliRunner

from tg_tinker import cli
from tg_tinker.commands import plugins


@pytest.mark.parametrize(
    ("group", "path"), [(plugins.COMMANDS, "tg-tinker run"), (f"{plugins.COMMANDS}.audit", "tg-tinker audit run")]
)
def test_without_the_server_its_commands_say_what_to_install(group: str, path: str) -> None:
    missing = EntryPoint("run", "a_package_that_is_not_here:run", group)
    done = CliRunner().invoke(plugins.load(missing), ["--port", "0"])
    assert done.exit_code == 1
    assert "pip install 'tg-tinker[server]'" in done.output
    assert f"`{path}` needs a_package_that_is_not_here" in done.output


def test_the_servers_commands_are_listed_without_being_imported() -> None:
    listed = cli.main.list_commands(click.Context(cli.main))
    assert {"ledger", "serve", "keys", "demo", "privacy"} <= set(listed)


def test_every_module_of_the_command_line_has_its_command() -> None:
    for name in cli.MODULES:
        command = cli.main.get_command(click.Context(cli.main), name)
        assert command is not None
        assert command.name == name
        assert command.callback.__module__ == cli.MODULES[name].partition(":")[0]


def test_a_group_asks_only_its_own_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {
        "tg_tinker.commands.audit": [EntryPoint("run", "click:Command", "tg_tinker.commands.audit")],
        "tg_tinker.commands": [EntryPoint("serve", "click:Command", "tg_tinker.commands")],
    }

    def found(*, group: str, name: str | None = None) -> list[EntryPoint]:
        return [e for e in there.get(group, []) if name in (None, e.name)]

    monkeypatch.setattr(plugins, "entry_points", found)
    group = plugins.PluginGroup("audit", plugins="tg_tinker.commands.audit", modules={"verify": "os:path"})
    assert group.list_commands(click.Context(group)) == ["run", "verify"]
    assert group.get_command(click.Context(group), "serve") is None


def test_the_sdks_commands_are_named_without_the_heavy_packages() -> None:
    program = (
        "import sys, click\n"
        "from tg_tinker import cli\n"
        "for name in cli.MODULES: cli.main.get_command(click.Context(cli.main), name)\n"
        "heavy = {'torch', 'opacus', 'dp_accounting', 'scipy', 'sqlalchemy', 'tg_tinker_server'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "[]", done.stderr
