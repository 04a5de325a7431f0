"""`tg-tinker federated`: be a coordinator or a site of a federated job, and make the keys for it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from tg_tinker.commands.plugins import COMMANDS, PluginGroup
from tg_tinker.errors import (
    AuthenticationError,
    AuthorizationError,
    ResourceNotFoundError,
    ServerError,
    TGTinkerError,
)

if TYPE_CHECKING:
    from tg_tinker.federated.coordinator import Progress
    from tg_tinker.federated.link import CoordinatorLink
    from tg_tinker.federated.result import FederatedResult
    from tg_tinker.federated.site_config import SiteConfig

_RESTARTS = 5
"""How often a coordinator starts its SuperLink again before it gives up."""
_NO_ARTIFACT = "art_of-no-run"

_config = click.option(
    "--config",
    "path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file; paths in it are relative to its folder.",
)


@click.group(
    cls=PluginGroup,
    plugins=f"{COMMANDS}.federated",
    modules={"report": "tg_tinker.commands.federation_report:report"},
)
def federated() -> None:
    """Train one model with data that stays at its owners."""


@federated.command("keygen")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
def keygen(path: Path) -> None:
    """Make an identity in a new file PATH; its public half goes to PATH.pub and to the screen."""
    from tg_tinker.federated.keys import make_identity, public_text, require_new, write_public

    with _plain_errors():
        public = path.with_name(path.name + ".pub")
        require_new(path, public)
        text = public_text(make_identity(path))
        write_public(public, f"{text}\n".encode("ascii"))
    click.echo(text)


@federated.command("node-key")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
def node_key(path: Path) -> None:
    """Make a SuperNode's key in a new file PATH. The coordinator needs PATH.pub under flower.node_keys."""
    with _plain_errors():
        from tg_tinker.federated.flower.certificates import make_node_key

        click.echo(str(make_node_key(path)))


@federated.command("certificates")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--host", "hosts", multiple=True, help="Name or IP address by which sites reach the coordinator; may be repeated."
)
def certificates(folder: Path, hosts: tuple[str, ...]) -> None:
    """Make a certificate authority and the SuperLink's certificate: ca.crt, ca.key, server.pem, server.key in FOLDER.

    Sites need ca.crt as flower.root_certificates. Keep ca.key elsewhere: whoever has it can pose as the coordinator's
    SuperLink.
    """
    with _plain_errors():
        from tg_tinker.federated.flower.certificates import checked_hosts, make_authority, make_server_certificate
        from tg_tinker.federated.keys import require_new

        own = [host for host in ("127.0.0.1", "::1", "localhost") if host not in hosts]
        checked_hosts([*hosts, *own])
        require_new(*(folder / name for name in ("ca.crt", "ca.key", "server.pem", "server.key")))
        make_authority(folder / "ca.crt", folder / "ca.key")
        make_server_certificate(
            folder / "server.pem",
            folder / "server.key",
            authority=folder / "ca.crt",
            authority_key=folder / "ca.key",
            hosts=[*hosts, *own],
        )
    click.echo(f"made ca.crt, ca.key, server.pem and server.key in {folder}")


@federated.command("site")
@_config
def site(path: Path) -> None:
    """Be a site: answer the coordinator's requests within the site's policy, until Ctrl-C or SIGTERM.

    Starts a SuperNode, and again when it ends. Messages are handled by this process, with the tg-tinker that is
    installed here; code that a coordinator sends is never run.
    """
    with _plain_errors():
        from tg_tinker.federated.flower.apps import client_app
        from tg_tinker.federated.flower.supernode import serve
        from tg_tinker.federated.site_config import ENVIRONMENT, SiteConfig, handler_from_environment

        config = SiteConfig.load(path)
        if config.flower is None:
            raise click.ClickException(f"{path} has no [flower] table: it says how to reach the coordinator")
        handler = handler_from_environment({**os.environ, ENVIRONMENT: str(path)})
        _check_own_server(config)
        click.echo(f"site {config.site}: connecting to the SuperLink at {config.flower.superlink}")
        with _stopping() as stop:
            serve(config.flower, client_app(handler), stop=stop, tell=_tell)
        click.echo("stopped")


def _check_own_server(config: SiteConfig) -> None:
    """Find out before the first message what would spoil every answer.

    A server that is not there yet is told and no more: parties may be started in any order.

    Raises:
        ClickException: the API key is not valid or lacks a role, or there is no such dataset.
    """
    try:
        with config.service() as service:
            service.get_dataset(config.dataset)
            service.get_privacy_ledger(config.dataset)  # needs the role auditor
            with contextlib.suppress(ResourceNotFoundError):
                service.pull_artifact(_NO_ARTIFACT)  # needs the role exporter
    except ResourceNotFoundError as e:
        raise click.ClickException(
            f"the server {config.server} has no dataset {config.dataset!r}: register it with service.create_dataset, "
            "or correct `dataset`"
        ) from e
    except (AuthenticationError, AuthorizationError) as e:
        raise click.ClickException(
            f"the server {config.server} does not take this site's API key: {e.message}. The key needs the roles "
            "trainer, exporter and auditor; api_key_file or api_key_env says where it is"
        ) from e
    except ServerError as e:
        _tell(f"{e.message}. Every request of the coordinator fails until it is there")


@federated.command("coordinator")
@_config
@click.option(
    "--result", "result_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the result here, as JSON."
)
@click.option(
    "--give-up",
    is_flag=True,
    help="End a job that cannot go on: ask sites what they spent, so that they take no more of it and free the rest "
    "of their budgets. What was released stays.",
)
def coordinator(path: Path, result_path: Path | None, give_up: bool) -> None:
    """Run a job to its end, or go on with it from its last released round.

    Starts a SuperLink for the sites to connect to; Ctrl-C stops both, and the same command goes on later.
    """
    with _plain_errors(), _terminated_like_interrupted():
        result = _coordinate(path, give_up=give_up)
        if result_path is not None:
            result_path.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for name, statement in sorted(result.unstated.items()):
            _tell(f"site {name} made no statement: {statement}")
        if result.status == "failed" and give_up:
            click.echo(
                f"given up after {len(result.rounds)} rounds; {len(result.statements)} sites stated what they spent"
            )
            return
        if result.status == "failed":
            raise click.ClickException(
                f"the job failed: {result.why}; the same command tries again, and with --give-up it ends the job, so "
                "that sites state what they spent and free the rest"
            )
        click.echo(f"finished: {len(result.rounds)} rounds, final adapter {result.artifact_id}")


def _coordinate(path: Path, *, give_up: bool = False) -> FederatedResult:
    from tg_tinker.federated.coordinator import Coordinator
    from tg_tinker.federated.coordinator_config import CoordinatorConfig
    from tg_tinker.federated.flower.superlink import SuperLink

    config = CoordinatorConfig.load(path)
    if config.flower is None:
        raise click.ClickException(f"{path} has no [flower] table: it says where sites connect to")
    key = config.key()
    work = Coordinator(config, config.service(), key, progress=_progress)
    job = work.prepare()

    def run(link: CoordinatorLink) -> FederatedResult:
        if not give_up:
            return work.run(link)
        # Sites need a moment to find a SuperLink that has just begun; those that are gone are not waited for long.
        deadline = time.monotonic() + config.join_timeout_s
        while not set(job.roster) <= set(link.sites()) and time.monotonic() < deadline:
            time.sleep(config.pause_s)
        return work.finish(link)

    left = _RESTARTS
    while True:
        with SuperLink(config.flower) as link:
            click.echo(f"job {job.job_id}: sites may connect to {config.flower.address}")
            try:
                return link.run(run, roster=job.roster, key=key)
            except ServerError as e:
                left -= 1
                if not link.ended() or left < 0:
                    raise
                _tell(f"{e.message}; starting it again")


def _progress(event: Progress) -> None:
    words = [f"round {event.round}" if event.round else "", event.what, event.site, event.message]
    if event.answer is not None:
        words += [event.answer.kind, event.answer.reason, event.answer.message]
    words += [f"{name} {value:.4g}" for name, value in (event.metrics or {}).items()]
    _tell("  ".join(word for word in words if word))


def _tell(text: str) -> None:
    """One line for the operator, without control characters: part of it comes from elsewhere."""
    click.echo("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


@contextlib.contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second SIGINT interrupts."""
    stop = threading.Event()

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that children are stopped."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] != "flwr":
            raise
        raise click.ClickException("this needs Flower: pip install 'tg-tinker[federation]'") from e
    except TGTinkerError as e:
        raise click.ClickException(e.message) from e
