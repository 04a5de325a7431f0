"""`tg-tinker checkpoints`: list them, export them to a receiver, open, verify and import what others exported."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tg_tinker.errors import InvalidRequestError, TGTinkerError

if TYPE_CHECKING:
    from tg_tinker.exports.reader import ExportReader
    from tg_tinker.service_client import ServiceClient

export_file = click.argument("export", type=click.Path(exists=True, path_type=Path))
identity_option = click.option(
    "--identity", "-i", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Your private key's file."
)
signer_option = click.option(
    "--signer", metavar="VKEY", help="The sender's verifier key; else it must be a log that you met before."
)


@click.group()
def checkpoints() -> None:
    """Checkpoints of a server, and exports of them.

    The server is that of TG_TINKER_BASE_URL, the key that of TG_TINKER_API_KEY. `open`, `verify` and `keygen` need
    neither.
    """


@checkpoints.command("list")
@click.option("--run", help="Of this run only.")
def list_checkpoints(run: str | None) -> None:
    """The newest checkpoints of the tenant."""
    with _plain_errors(), _service() as service:
        for info in service.list_artifacts(run):
            click.echo(
                f"{info.artifact_id}  step {info.step}  {info.size_bytes:,} bytes  {info.timestamp:%Y-%m-%d %H:%M}"
                f"  {info.training_client_id}  {_printable(info.name)}"
            )


@checkpoints.command("export")
@click.argument("checkpoint_id")
@click.option(
    "--recipient", "-r", "recipients", multiple=True, help="A receiver's public age key, age1... Repeatable."
)
@click.option(
    "--pq-recipient",
    "pq_files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with a receiver's post-quantum public key. Repeatable. Writes a file of its own.",
)
@click.option(
    "--out", "-o", type=click.Path(dir_okay=False, path_type=Path), help="[default: export.age, export.hpke]"
)
def export(checkpoint_id: str, recipients: tuple[str, ...], pq_files: tuple[Path, ...], out: Path | None) -> None:
    """Write a checkpoint to a file that only its receivers open: weights as PEFT loads them, signed, with the report.

    A receiver needs nothing of ours: age -d -i key.txt export.age | tar x
    """
    if not recipients and not pq_files:
        raise click.UsageError("name a receiver: --recipient age1..., or --pq-recipient FILE")
    with _plain_errors(), _service() as service:
        kinds = []
        if recipients:
            kinds.append((".age", {"recipients": list(recipients)}))
        if pq_files:
            texts = [text for path in pq_files for text in _recipients(path)]
            kinds.append((".hpke", {"pq_recipients": texts}))
        for suffix, named in kinds:
            path = out or Path("export")
            path = path if out is not None and len(kinds) == 1 else path.with_suffix(suffix)
            written = service.export_artifact(checkpoint_id, destination=path, **named)
            click.echo(f"{written.path}  {written.size_bytes:,} bytes  {written.digest}")


@checkpoints.command("verify")
@export_file
@signer_option
@identity_option
def verify(export: Path, signer: str | None, identity: Path | None) -> None:
    """Check EXPORT, a file or the folder it was unpacked into: who signed it, every byte, what it promises."""
    from tg_tinker.exports.files import check, trusted

    with _plain_errors():
        try:
            reader = check(export, trusted(signer), _identities(identity))
            _show_verdicts(reader)
        except TGTinkerError:
            click.echo(f"do not use {export}")
            raise
    click.echo(f"verified: {export}")


@checkpoints.command("open")
@export_file
@signer_option
@identity_option
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), help="New folder. [default: named after the checkpoint]"
)
def open_export(export: Path, signer: str | None, identity: Path | None, out: Path | None) -> None:
    """Open a sealed EXPORT, check it, and unpack it into a folder that PEFT loads."""
    from tg_tinker.exports.files import check, trusted, unpack

    with _plain_errors():
        keys = _identities(identity)
        reader = check(export, trusted(signer), keys)
        _show_verdicts(reader)
        folder = out or Path(reader.folder)
        unpack(export, reader.key, folder, keys)
    click.echo(f"unpacked into {folder}")


@checkpoints.command("import")
@export_file
@signer_option
@identity_option
def import_export(export: Path, signer: str | None, identity: Path | None) -> None:
    """Take EXPORT in as a checkpoint of this tenant; it keeps where it came from and what was promised there."""
    with _plain_errors(), _service() as service:
        info = service.import_artifact(export, signer=signer, identity=_identities(identity))
    click.echo(f"{info.artifact_id}  step {info.step}  {info.size_bytes:,} bytes")


@checkpoints.command("keygen")
@click.option("--pq", is_flag=True, required=True, help="Post-quantum (X-Wing); for age keys there is age-keygen.")
@click.option(
    "--out", "-o", type=click.Path(dir_okay=False, path_type=Path), required=True, help="New file, private."
)
def keygen(pq: bool, out: Path) -> None:  # noqa: ARG001 - said so that nobody takes these for age keys
    """Make a key pair to receive exports with. FILE stays with you; FILE.pub is for the sender."""
    from tg_tinker.exports.hpke import Identity

    identity, public = Identity.generate(), out.with_name(out.name + ".pub")
    with _plain_errors():
        for path, text, mode in ((out, identity.text, 0o600), (public, identity.recipient.text, 0o644)):
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            except OSError as e:
                raise InvalidRequestError(
                    f"cannot create {path}: {e.strerror}; a key is never overwritten", field="out", constraint="new"
                ) from e
            with os.fdopen(fd, "w") as file:
                file.write(text + "\n")
    click.echo(f"{out} is your private key: whoever has it opens what is sealed for you")
    click.echo(f"{public} is for the sender")


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Errors meant for people are printed, not traced."""
    try:
        yield
    except TGTinkerError as e:
        raise click.ClickException(_printable(e.message)) from e


def _service() -> ServiceClient:
    from tg_tinker.service_client import ServiceClient

    return ServiceClient()


def _identities(path: Path | None) -> list[str]:
    from tg_tinker.exports.files import read_identities

    return [] if path is None else read_identities(path)


def _recipients(path: Path) -> list[str]:
    from tg_tinker.exports.files import read_identities

    return read_identities(path)  # the same form: one a line, # for comments


def _show_verdicts(reader: ExportReader) -> None:
    from tg_tinker.reports.exported import check_export, check_words
    from tg_tinker.reports.verdicts import Trust
    from tg_tinker.transparency.folder import Folder, data_folder

    trust = Trust.of_user(Folder(data_folder()))
    for verdict in itertools.chain(check_export(reader, trust), check_words(reader)):
        click.echo(_printable(f"ok       {verdict.check}: {verdict.shows}"))


def _printable(text: str) -> str:
    """The text without what a terminal would obey: parts of it come from elsewhere."""
    return "".join(c if c.isprintable() else "?" for c in text)
