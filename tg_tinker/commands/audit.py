"""``tg-tinker audit``: check what somebody handed you. ``audit run`` joins where the server is installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tg_tinker.commands.plugins import COMMANDS, PluginGroup
from tg_tinker.errors import InvalidRequestError, TGTinkerError

if TYPE_CHECKING:
    from tg_tinker.reports.verdicts import Trust
    from tg_tinker.transparency.note import VerifierKey


@click.group(cls=PluginGroup, plugins=f"{COMMANDS}.audit")
def audit() -> None:
    """Check claims: of a report that somebody handed you, or of the training itself."""


@audit.command("verify")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--key",
    "key_text",
    metavar="VKEY",
    help="The signer's verifier key, or a coordinator's public key; else one must be pinned here.",
)
@click.option(
    "--receipts",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Data folder whose pins and receipts to compare with. [default: this user's]",
)
@click.option(
    "--site-report",
    "site_reports",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A site's full report, to check with a federation report; may be repeated.",
)
def verify(file: Path, key_text: str | None, folder: Path | None, site_reports: tuple[Path, ...]) -> None:
    """Check a signed document offline: who signed it, that its log holds it, and every number in it."""
    try:
        trust = replace(_trust(key_text, folder), beside=[_read(path) for path in site_reports])
        from tg_tinker.federated import report_verify as _federation  # noqa: F401 - registers its type
        from tg_tinker.reports.documents import verify_document
        from tg_tinker.reports.verdicts import refused

        seen = set()
        for verdict in verify_document(_read(file), trust):
            seen.add(verdict.check)
            click.echo(_plain(f"ok       {verdict.check}: {verdict.shows}"))
        if site_reports and "site report" not in seen:
            raise refused("site report", "a site's report goes with a federation report, and this is none")
    except TGTinkerError as e:
        click.echo(_plain(f"REFUSED  {e.message}"))
        click.echo(f"do not rely on {file}")
        raise click.exceptions.Exit(1) from e
    click.echo(f"verified: {file}")


@audit.command("attach")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("dataset_id")
def attach(file: Path, dataset_id: str) -> None:
    """Note in a dataset's ledger what `audit run --out FILE` found, so that its reports say it.

    The server is found by TG_TINKER_BASE_URL and TG_TINKER_API_KEY; the key needs the role auditor.
    """
    from tg_tinker.service_client import ServiceClient
    from tg_tinker.wire.json_text import json_from_text

    try:
        result = json_from_text(file.read_text(encoding="utf-8"), field="result")
        with ServiceClient() as service:
            service.check_log()
            service.attach_audit(dataset_id, result)
    except UnicodeDecodeError as e:
        raise click.ClickException(f"{file} is not a text file") from e
    except TGTinkerError as e:
        raise click.ClickException(e.message) from e
    click.echo(_plain(f"noted in the ledger of {dataset_id}; its next report says it"))


def _plain(text: str) -> str:
    """The text without what a terminal would obey: parts of it come out of the document."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _trust(key_text: str | None, folder: Path | None) -> Trust:
    from tg_tinker.reports.verdicts import Trust
    from tg_tinker.transparency.folder import Folder, data_folder

    key = None if key_text is None else _key(key_text.strip())
    return Trust.of_user(Folder(folder or data_folder()), key)


def _key(text: str) -> VerifierKey:
    """A verifier key, or that of the coordinator whose public key this is."""
    from tg_tinker.federated.keys import public_key
    from tg_tinker.federated.report import coordinator_key
    from tg_tinker.transparency.note import VerifierKey

    try:
        public = public_key(text)
    except InvalidRequestError:
        return VerifierKey.parse(text)
    return coordinator_key(public)


def _read(file: Path) -> bytes:
    from tg_tinker.reports.verdicts import MAX_BYTES, refused

    with file.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise refused("json", f"{file} is larger than {MAX_BYTES // 2**20} MiB")
    return data
