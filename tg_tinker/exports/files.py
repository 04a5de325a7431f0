"""Exports as files: sealed or open, an archive or a folder. Opens them, checks them, unpacks them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tg_tinker.errors import InvalidRequestError
from tg_tinker.exports import age, hpke
from tg_tinker.exports.errors import refused
from tg_tinker.exports.manifest import Manifest, parse_payload, read_json
from tg_tinker.exports.pieces import read_file
from tg_tinker.exports.reader import ExportReader, Trust
from tg_tinker.exports.tar import LARGEST_BYTES, MANIFEST, ORDER, Bytes, write_tar
from tg_tinker.transparency._encoding import from_base64
from tg_tinker.transparency.note import VerifierKey
from tg_tinker.transparency.pins import Pins


@dataclass(frozen=True, slots=True)
class ExportedArtifact:
    """A sealed export on this disk; ``digest`` is ``sha256:`` and hex of the file, as the audit log has it."""

    path: Path
    size_bytes: int
    digest: str


def write_export(path: Path, pieces: Iterable[bytes]) -> ExportedArtifact:
    """Write a sealed export as it comes; the file is there whole or not at all.

    Raises:
        InvalidRequestError: it cannot be written there.
    """
    digest, size = hashlib.sha256(), 0

    def measured() -> Iterator[bytes]:
        nonlocal size
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            yield piece

    write_whole(path, measured())
    return ExportedArtifact(path, size, f"sha256:{digest.hexdigest()}")


def write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        InvalidRequestError: it cannot be written there.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with draft.open("xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as e:
        raise InvalidRequestError(
            f"cannot write {path}: {e.strerror}", field="destination", constraint="a writable file"
        ) from e
    finally:
        draft.unlink(missing_ok=True)


def read_identities(path: Path) -> list[str]:
    """Private keys in a file, one a line; lines that begin with # are comments, as age writes them.

    Raises:
        InvalidRequestError: it cannot be read or holds none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidRequestError(
            f"cannot read the identity file {path}: {e}", field="identity", constraint="a text file"
        ) from e
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise InvalidRequestError(f"{path} holds no identity", field="identity", constraint="one a line")
    return found


@contextlib.contextmanager
def open_archive(path: Path, identities: Sequence[str] = ()) -> Iterator[Iterator[Bytes]]:
    """The archive in an export, as pieces to read once: ``.age``, ``.hpke``, ``.tar``, or an unpacked folder.

    Nothing of it is checked against a signature yet; see `ExportReader`.

    Raises:
        InvalidRequestError: no such file, or it does not open with these identities. Also while iterating.
    """
    if path.is_dir():
        yield _pack(path)
        return
    with contextlib.ExitStack() as stack:
        try:
            file: IO[bytes] = stack.enter_context(path.open("rb"))
        except OSError as e:
            raise InvalidRequestError(
                f"cannot read the export {path}: {e.strerror}", field="path", constraint="an export"
            ) from e
        start = file.read(len(age.MAGIC))
        file.seek(0)
        sealed = start == age.MAGIC or start.startswith(hpke.MAGIC)
        if sealed and not identities:
            raise InvalidRequestError(
                f"{path} is sealed for its receiver; give the private key with --identity",
                field="identity",
                constraint="the receiver's private key",
            )
        if start == age.MAGIC:
            keys = [i for i in identities if not i.startswith(hpke.IDENTITY_PREFIX)]
            opened = stack.enter_context(tempfile.TemporaryFile())
            age.open_age(keys, file, opened)
            opened.seek(0)
            yield read_file(opened)
        elif sealed:
            yield hpke.open_hpke([i for i in identities if i.startswith(hpke.IDENTITY_PREFIX)], file)
        else:
            yield read_file(file)


def check(path: Path, trust: Trust, identities: Sequence[str] = ()) -> ExportReader:
    """Check an export to its last byte; returns what it says, its weights read already.

    Raises:
        LogVerificationError: not signed by a key that is trusted.
        InvalidRequestError: not an export, altered, or not to be opened.
    """
    with open_archive(path, identities) as pieces:
        reader = ExportReader(pieces, trust)
        for _ in reader.weights():
            pass
    return reader


def unpack(path: Path, trust: Trust, out: Path, identities: Sequence[str] = ()) -> Manifest:
    """Check an export and write its files into the new folder ``out``, which is there whole or not at all.

    Raises:
        LogVerificationError, InvalidRequestError: as `check`; and if ``out`` exists.
    """
    if out.exists():
        raise InvalidRequestError(f"{out} exists and is left as it is", field="out", constraint="a new folder")
    draft = out.with_name(f".{out.name}.{secrets.token_hex(8)}.part")
    try:
        draft.mkdir(parents=True)
        with open_archive(path, identities) as pieces:
            reader = ExportReader(pieces, trust)
            for name, content in reader.files.items():
                (draft / name).write_bytes(content)
            with (draft / reader.weights_name).open("wb") as file:
                for piece in reader.weights():
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        draft.rename(out)
    except OSError as e:
        raise InvalidRequestError(f"cannot write {out}: {e.strerror}", field="out", constraint="writable") from e
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return reader.manifest


def trusted(signer: str | None, pins: Pins | None = None) -> Trust:
    """The key given, or what finds the one that this user's clients met before.

    Raises:
        LogVerificationError: ``signer`` is not a verifier key.
    """
    if signer is not None:
        return VerifierKey.parse(signer)

    def pinned(origin: str) -> VerifierKey:
        pin = (pins or Pins.of_user()).get(origin) if origin.startswith("tg-tinker/") else None
        if pin is None:
            raise InvalidRequestError(
                f"the export says that it comes from {origin[:100]}, which is not known here; ask its sender for "
                "their verifier key by another way, and give it with --signer",
                field="signer",
                constraint="known",
            )
        return pin.key

    return pinned


def _pack(folder: Path) -> Iterator[Bytes]:
    """An unpacked export as the archive it was."""
    names = sorted((p.name for p in folder.iterdir()), key=lambda n: ORDER.get(n, -1))
    if not names or names[0] not in ORDER or MANIFEST not in names:
        raise refused(f"{folder} is not an unpacked export: it lacks {MANIFEST} or holds other files")

    def sizes() -> Iterator[tuple[str, int, Iterator[bytes]]]:
        for name in names:
            path = folder / name
            if path.is_symlink() or not path.is_file():
                raise refused(f"{name} is not a file")
            with path.open("rb") as file:
                yield name, os.fstat(file.fileno()).st_size, read_file(file)

    try:
        manifest = (folder / MANIFEST).read_bytes()[: LARGEST_BYTES[MANIFEST] + 1]
        payload = from_base64(read_json(manifest, MANIFEST)["payload"])
        yield from write_tar(parse_payload(payload).predicate["artifact"]["id"], sizes())
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise refused(f"{folder} is not an unpacked export") from e
    except OSError as e:
        raise InvalidRequestError(f"cannot read {folder}: {e.strerror}", field="path", constraint="readable") from e
