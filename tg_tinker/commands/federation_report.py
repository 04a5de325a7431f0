"""``tg-tinker federated report``: write down what a federated job promised to whom, signed by its coordinator."""

from __future__ import annotations

from pathlib import Path

import click
from pydantic import ValidationError

from tg_tinker.errors import TGTinkerError

_file = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("report")
@click.argument("result", type=_file)
@click.option("--key", "key_file", type=_file, required=True, help="The coordinator's identity.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="[default: here]")
@click.option(
    "--site-level-report",
    "level",
    type=_file,
    help="Where the job protects whole sites: report.json on their ledger, as `privacy report` writes it.",
)
def report(result: Path, key_file: Path, out: Path, level: Path | None) -> None:
    """Write the signed report on a job: federation-report.json counts, federation-report.html is for people.

    RESULT is what `federated coordinator --result` wrote. The report is checked before it is written.
    """
    from tg_tinker.federated.keys import load_identity
    from tg_tinker.federated.report_file import write_report
    from tg_tinker.federated.result import FederatedResult

    try:
        found = FederatedResult.model_validate_json(result.read_bytes())
    except ValidationError as e:
        raise click.ClickException(f"{result} is not what `federated coordinator --result` writes") from e
    try:
        site_level_report = None if level is None else level.read_bytes()
        written = write_report(found, load_identity(key_file), out, site_level_report=site_level_report)
    except TGTinkerError as e:
        raise click.ClickException(e.message) from e
    click.echo(written.sentence)
    click.echo(f"{len(written.verdicts)} checks passed. To check it elsewhere, offline:")
    click.echo(f"  tg-tinker audit verify {written.report.name} --key {written.verifier_key}")
    click.echo(f"wrote {written.report} and {written.page}")
