"""The server's commands: serve, keys."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

import click

from tg_tinker.commands.plugins import PluginGroup
from tg_tinker.errors import TGTinkerError
from tg_tinker_server.config import DEFAULT_TINKER_PORT, ServerConfig
from tg_tinker_server.crypto.keys import create_key_file
from tg_tinker_server.foundation import DEFAULT_ROLES, Foundation
from tg_tinker_server.logs import configure_logging
from tg_tinker_server.service.policy import KeyPolicy

config_option = click.option(
    "--config", "config_path", type=click.Path(path_type=Path, dir_okay=False), help="TOML file."
)
data_dir_option = click.option("--data-dir", type=click.Path(path_type=Path), help="Database, artifacts, root key.")


@contextlib.contextmanager
def plain_errors():  # type: ignore[no-untyped-def]
    """Errors meant for people are printed, not traced."""
    try:
        yield
    except TGTinkerError as e:
        raise click.ClickException(e.message) from e


@click.command()
@config_option
@data_dir_option
@click.option("--host", help="Address to listen on (default 127.0.0.1).")
@click.option("--port", type=int, help="Port to listen on (default 50051, 0 for a free one).")
@click.option("--backend", type=click.Choice(["torch", "bigram"]), help="Model backend (default torch).")
@click.option("--sampler", type=click.Choice(["built-in", "vllm"]), help="What samples (default built-in).")
@click.option("--vllm-python", help="Interpreter of the environment that has vLLM (default this one).")
@click.option(
    "--tinker-api",
    "tinker_port",
    type=click.IntRange(0, 65535),
    is_flag=False,
    flag_value=DEFAULT_TINKER_PORT,
    metavar="[PORT]",
    help=f"Also serve the Tinker API over HTTP, on this port (default {DEFAULT_TINKER_PORT}, 0 for a free one).",
)
def serve(
    config_path: Path | None,
    data_dir: Path | None,
    host: str | None,
    port: int | None,
    backend: str | None,
    sampler: str | None,
    vllm_python: str | None,
    tinker_port: int | None,
) -> None:
    """Run a server until SIGTERM or Ctrl-C; running operations are finished first."""
    with plain_errors():
        config = ServerConfig.load(
            config_path,
            data_dir=data_dir,
            host=host,
            port=port,
            backend=backend,
            sampler=sampler,
            vllm_python=vllm_python,
            tinker_port=tinker_port,
        )
        configure_logging(level=config.log_level, style=config.log_format)
        foundation = Foundation.open(config)
        asyncio.run(_serve(config, foundation))


async def _serve(config: ServerConfig, foundation: Foundation) -> None:
    from tg_tinker_server.app import Server, build_backend  # torch takes seconds to import; `keys` does without

    server = Server(config, foundation, build_backend(config))
    await server.start()
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    tls = "TLS" if config.tls_cert else "plaintext"
    click.echo(f"tg-tinker serves on {server.address} ({tls}), data in {config.data_dir.resolve()}")
    if server.tinker_url:
        click.echo(f"the Tinker API is at {server.tinker_url}; TINKER_API_KEY is tml- and an API key")
    if not foundation.desk.list():
        click.echo("no API key exists yet: create one with `tg-tinker keys create` in another terminal")
    await stop.wait()
    click.echo("draining: running operations are finished, new ones refused")
    await server.stop()
    click.echo("stopped")


# What changes the keys that encrypt, each imported when called for.
KEY_COMMANDS = {
    name: f"tg_tinker_server.cli_keys:{name.replace('-', '_')}" for name in ("show", "rotate", "shred", "rewrap-root")
}


@click.group(cls=PluginGroup, plugins="tg_tinker.commands.keys", modules=KEY_COMMANDS)
def keys() -> None:
    """API keys of this server, and the keys that encrypt; run these where its data folder is."""


@keys.command("create")
@config_option
@data_dir_option
@click.option("--tenant", default="default", show_default=True, help="Whose key it is.")
@click.option("--role", "roles", multiple=True, default=DEFAULT_ROLES, show_default=True, help="Repeatable.")
@click.option("--label", default="", help="To recognise the key by.")
@click.option(
    "--policy",
    "policy_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file: the one dataset and the privacy that the key is bound to.",
)
def create(
    config_path: Path | None,
    data_dir: Path | None,
    tenant: str,
    roles: tuple[str, ...],
    label: str,
    policy_path: Path | None,
) -> None:
    """Create a key. It is shown once and stored nowhere."""
    with plain_errors():
        policy = None if policy_path is None else KeyPolicy.of_toml(policy_path)
        foundation = Foundation.open(ServerConfig.load(config_path, data_dir=data_dir))
        text = foundation.desk.mint(tenant, tuple(roles), label, policy=policy)
        foundation.db.close()
    click.echo(f"# tenant {tenant}, roles {', '.join(roles)}; shown once, keep it", err=True)
    click.echo(f"export TG_TINKER_API_KEY={text}")


@keys.command("init")
@config_option
@data_dir_option
def init(config_path: Path | None, data_dir: Path | None) -> None:
    """Create the root key file that the configuration names. An existing one is never overwritten."""
    with plain_errors():
        uri = ServerConfig.load(config_path, data_dir=data_dir).resolved_root_key
        scheme, _, path = uri.partition(":")
        if scheme != "file":
            raise click.ClickException(f"the root key is {scheme}:..., which is made where it is kept")
        create_key_file(Path(path))
    click.echo(f"created {path}; keep a copy: without it nothing this server stored can be read")


@keys.command("list")
@config_option
@data_dir_option
def list_keys(config_path: Path | None, data_dir: Path | None) -> None:
    """List keys by id; secrets are not stored."""
    with plain_errors():
        foundation = Foundation.open(ServerConfig.load(config_path, data_dir=data_dir))
        for row in foundation.desk.list():
            state = f"revoked {row.revoked:%Y-%m-%d}" if row.revoked else "valid"
            click.echo(f"{row.key_id}  {row.tenant}  {','.join(row.roles)}  {state}  {row.label}")
        foundation.db.close()


@keys.command("revoke")
@config_option
@data_dir_option
@click.argument("key_id")
def revoke(config_path: Path | None, data_dir: Path | None, key_id: str) -> None:
    """Revoke a key; running servers obey within a second."""
    with plain_errors():
        foundation = Foundation.open(ServerConfig.load(config_path, data_dir=data_dir))
        found = foundation.desk.revoke(key_id)
        foundation.db.close()
    if not found:
        raise click.ClickException(f"no valid key has the id {key_id}; see `tg-tinker keys list`")
    click.echo(f"revoked {key_id}")
