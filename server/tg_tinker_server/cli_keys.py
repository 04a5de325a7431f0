"""`tg-tinker keys show|rotate|shred|rewrap-root`: the keys that encrypt. (API keys are in cli.py.)"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click

from tg_tinker_server.cli import config_option, data_dir_option, plain_errors
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.crypto.keys import key_provider
from tg_tinker_server.crypto.signing import TenantSigner
from tg_tinker_server.foundation import SYSTEM_TENANT, Foundation
from tg_tinker_server.service.rotation import KeyRotation


@click.command("show")
@config_option
@data_dir_option
def show(config_path: Path | None, data_dir: Path | None) -> None:
    """Where the root key is, every tenant's key versions, and the verifier key to hand to whoever gets exports."""
    config = _load(config_path, data_dir)
    with _rotation(config) as rotation:
        click.echo(f"root key  {config.resolved_root_key.partition(':')[0]}:")
        for tenant in rotation.tenants():
            rows = rotation.versions(tenant)
            versions = ", ".join(f"v{r.version}" + (" (destroyed)" if r.destroyed else "") for r in rows)
            click.echo(f"{tenant}  {versions}")
            if tenant != SYSTEM_TENANT:
                click.echo(f"  verifier key  {TenantSigner(rotation.keyring).signer(tenant).verifier_key}")


@click.command("rotate")
@config_option
@data_dir_option
@click.option("--tenant", "tenants", multiple=True, help="Whose; repeatable. [default: everybody's]")
@click.option("--resume", is_flag=True, help="Finish a rotation that was interrupted, without another version.")
@click.option("--destroy-old", is_flag=True, help="Then destroy older versions; the server must be stopped.")
def rotate(
    config_path: Path | None, data_dir: Path | None, tenants: tuple[str, ...], resume: bool, destroy_old: bool
) -> None:
    """Give tenants a new key and put everything of theirs under it; artifacts keep their bytes and hashes.

    Safe while a server runs. Interrupted, it is finished by running it again.
    """
    with _rotation(_load(config_path, data_dir), alone=destroy_old) as rotation:
        for tenant in tenants or rotation.tenants():
            renewed = rotation.renew(tenant) if resume else rotation.rotate(tenant)
            click.echo(
                f"{renewed.key_id}  {renewed.artifacts} artifacts, {renewed.datasets} datasets, "
                f"{renewed.values} values"
            )
            for artifact_id in renewed.damaged:
                click.echo(f"  {artifact_id} does not open and stays as it is", err=True)
            if destroy_old:
                rotation.destroy_old(tenant)
                click.echo(f"  older versions of {tenant} are destroyed")


@click.command("shred")
@config_option
@data_dir_option
@click.argument("tenant")
@click.option("--confirm", help="The tenant's name, typed again; asked for if it is not given.")
def shred(config_path: Path | None, data_dir: Path | None, tenant: str, confirm: str | None) -> None:
    """Destroy every key of TENANT: nothing of it can be read again, here or from copies of the artifacts.

    Its API keys are revoked. The ledger and the audit log stay: they hold no content. Backups of the database from
    before, and blocks or snapshots that the file system or the disk keeps of it, still open everything together with
    the root key; erase those as well. The server must be stopped.
    """
    if tenant == SYSTEM_TENANT:
        raise click.ClickException(f"{SYSTEM_TENANT} is the server's own; without its key no API key works")
    with _rotation(_load(config_path, data_dir), alone=True) as rotation:
        with plain_errors():
            rotation.require(tenant)
        typed = (
            click.prompt(f"This cannot be undone. Type {tenant} to destroy its keys") if confirm is None else confirm
        )
        if typed != tenant:
            raise click.ClickException("that is not the tenant's name; nothing was changed")
        revoked = rotation.shred(tenant)
    click.echo(f"the keys of {tenant} are destroyed, {revoked} API keys revoked")


@click.command("rewrap-root")
@config_option
@data_dir_option
@click.option("--to", "uri", required=True, help="The new root key: file:/path, env:NAME or vault:https://...")
def rewrap_root(config_path: Path | None, data_dir: Path | None, uri: str) -> None:
    """Put every tenant's key under another root key, all or none. The server must be stopped.

    Then set root_key to the new URI. The old root key opens nothing any more but backups, snapshots and blocks that a
    file system or disk keeps of the database from before.
    """
    config = _load(config_path, data_dir)
    with _rotation(config, alone=True) as rotation:
        count = rotation.rewrap_root(key_provider(config.resolved_root_key), key_provider(uri))
    click.echo(f"{count} keys are under the new root key; set root_key to it before you start the server")


def _load(config_path: Path | None, data_dir: Path | None) -> ServerConfig:
    with plain_errors():
        return ServerConfig.load(config_path, data_dir=data_dir)


@contextlib.contextmanager
def _rotation(config: ServerConfig, *, alone: bool = False) -> Iterator[KeyRotation]:
    """The keys of a data folder; ``alone`` refuses while a server runs there."""
    with plain_errors(), contextlib.ExitStack() as stack:
        foundation = Foundation.open(config)
        stack.callback(foundation.db.close)
        if alone:
            for file in foundation.lock(config):
                stack.callback(file.close)
        yield KeyRotation(foundation.db, foundation.keyring, foundation.vault)
