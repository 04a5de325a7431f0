"""`tg-tinker log`: what this computer remembers of the logs of servers. Needs no server and no network."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import click

from tg_tinker.errors import TGTinkerError
from tg_tinker.transparency.evidence import check_receipts
from tg_tinker.transparency.pins import Pin, Pins, day
from tg_tinker.transparency.receipts import Receipts


@click.group()
def log() -> None:
    """Logs of servers as this computer remembers them: pins and receipts."""


@log.command("show")
def show() -> None:
    """Each server with its log, the newest checkpoint seen, and the key that signs."""
    pins = Pins.of_user()
    with _plain_errors():
        servers = pins.servers()
        unclaimed = sorted(set(pins.origins()) - {s.origin for s in servers})
        for server in servers:
            click.echo(_plain(f"{server.address}  tenant {server.tenant or '(the key decides)'}"))
            _show_pin(server.origin, pins.get(server.origin))
        for origin in unclaimed:
            click.echo("(another log answers now where this one did)")
            _show_pin(origin, pins.get(origin))
    if not servers and not unclaimed:
        click.echo(f"no server is known in {_place(pins)}")


@log.command("forget")
@click.argument("address")
@click.option("--tenant", help="This tenant's log only.")
def forget(address: str, tenant: str | None) -> None:
    """Trust the next connection to ADDRESS (host:port, as `log show` prints it) as if it were the first.

    The pin is put aside, not deleted; receipts stay.
    """
    pins = Pins.of_user()
    with _plain_errors():
        gone = pins.forget(address, tenant)
    if not pins.all_written:
        raise click.ClickException(f"{_place(pins)} cannot be written: nothing was forgotten for good")
    if not gone:
        raise click.ClickException(f"no server is known at {address}; `tg-tinker log show` lists them")
    for server in gone:
        click.echo(_plain(f"forgot {server.address}, tenant {server.tenant or '(the key decides)'}: {server.origin}"))


@log.command("receipts")
def receipts() -> None:
    """How many receipts there are of each log and dataset."""
    kept = Receipts.of_user()
    counts: Counter[tuple[str, str]] = Counter()
    with _plain_errors():
        for found in check_receipts(kept, Pins.of_user()):
            counts[found.origin, found.dataset_id] += 1
    for (origin, dataset_id), count in sorted(counts.items()):
        click.echo(_plain(f"{origin}  {dataset_id or '(no dataset)'}  {count}"))
    if not counts:
        click.echo("no receipts")


@log.command("verify-receipts")
def verify_receipts() -> None:
    """Check every receipt: its signature, its place in the log, and that no two contradict each other."""
    counts: Counter[tuple[str, str]] = Counter()
    faults = 0
    with _plain_errors():
        for found in check_receipts(Receipts.of_user(), Pins.of_user()):
            if found.fault:
                faults += 1
                click.echo(_plain(f"REFUSED  {found.file.path}, line {found.line}: {found.fault}"))
            else:
                counts[found.origin, found.dataset_id] += 1
    for (origin, dataset_id), count in sorted(counts.items()):
        click.echo(_plain(f"true     {origin}  {dataset_id or '(no dataset)'}  {count}"))
    if faults:
        raise click.ClickException(f"{faults} of {faults + counts.total()} receipts are refused")
    click.echo(f"verified: {counts.total()} receipts")


def _show_pin(origin: str, pin: Pin | None) -> None:
    click.echo(_plain(f"  log           {origin}"))
    if pin is None:
        click.echo("  size          nothing seen yet")
        return
    click.echo(f"  size          {pin.checkpoint.size} entries, seen {day(pin.seen)}")
    click.echo(_plain(f"  verifier key  {pin.key.text}"))


def _place(pins: Pins) -> str:
    return str(pins.folder.path or "the data folder (there is no home folder)")


def _plain(text: str) -> str:
    """Without control characters: ids come from elsewhere, and a terminal obeys them."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except TGTinkerError as e:
        raise click.ClickException(e.message) from e
