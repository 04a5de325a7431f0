"""``tg-tinker privacy report``: fetch a dataset's report, check it, and write it down with a page to read."""

from __future__ import annotations

import os
from pathlib import Path

import click

from tg_tinker.errors import TGTinkerError

JSON_NAME, PAGE_NAME = "report.json", "report.html"


@click.command("report")
@click.argument("dataset_or_run")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help=f"Folder for {JSON_NAME} and {PAGE_NAME}. [default: this one]",
)
@click.option("--key", "key_text", metavar="VKEY", help="The server's verifier key; else the one pinned here.")
def report(dataset_or_run: str, out: Path, key_text: str | None) -> None:
    """Write the signed report on a dataset, or on that of a run: report.json counts, report.html is for people.

    The server is found by TG_TINKER_BASE_URL and TG_TINKER_API_KEY. The report is checked before it is written.
    """
    from tg_tinker.reports.page import render
    from tg_tinker.service_client import ServiceClient
    from tg_tinker.wire.privacy import report_of

    _writable(out)  # before the report leaves an entry in the ledger
    try:
        with ServiceClient() as service:
            service.check_log()  # holds the server to its log, and pins it the first time
            envelope = service.get_signed_report(dataset_or_run)
        statement = report_of(envelope)
        key, checks = _check(envelope, key_text)
        page = render(statement)
    except TGTinkerError as e:
        raise click.ClickException(e.message) from e
    try:
        (out / JSON_NAME).write_bytes(envelope)
        (out / PAGE_NAME).write_text(page, encoding="utf-8")
    except OSError as e:
        raise click.ClickException(f"cannot write to {out}: {e.strerror}") from e
    click.echo(statement["guarantee"]["sentence"])
    click.echo(f"{checks} checks passed. To check it elsewhere, offline:")
    click.echo(f"  tg-tinker audit verify {JSON_NAME} --key {key}")
    click.echo(f"wrote {out / JSON_NAME} and {out / PAGE_NAME}")


def _check(envelope: bytes, key_text: str | None) -> tuple[str, int]:
    """Check the report as a stranger would. Returns the text of the key that signed, and the number of checks."""
    from tg_tinker.reports.documents import verify_document
    from tg_tinker.reports.verdicts import Trust
    from tg_tinker.transparency.folder import Folder, data_folder
    from tg_tinker.transparency.note import VerifierKey
    from tg_tinker.wire.privacy import report_of

    key = None if key_text is None else VerifierKey.parse(key_text.strip())
    checks = sum(1 for _ in verify_document(envelope, Trust.of_user(Folder(data_folder()), key)))
    return str(report_of(envelope)["integrity"]["verifier_key"]), checks


def _writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        writable = os.access(out, os.W_OK)
    except OSError as e:
        raise click.ClickException(f"cannot write to {out}: {e.strerror}") from e
    if not writable:
        raise click.ClickException(f"cannot write to {out}; name another folder with --out")
