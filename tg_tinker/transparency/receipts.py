"""Receipts: what a log signed for, kept by the one it concerns.

A receipt is an entry, its place in the log, a signed checkpoint, and the proof that the one is under the other. It
stands by itself: the name of the log in the checkpoint follows from the key that signed it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import rfc8785

from tg_tinker.errors import InvalidRequestError, LogVerificationError
from tg_tinker.transparency._encoding import from_base64, to_base64
from tg_tinker.transparency.folder import Folder, data_folder
from tg_tinker.transparency.merkle import leaf_hash, verify_inclusion
from tg_tinker.transparency.note import Checkpoint, VerifierKey, origin_of
from tg_tinker.transparency.pins import name_of

VERSION = 1
RECEIPTS = "receipts"
_LOOK_AT = 20  # files
_TAIL_BYTES = 1 << 16
_MAX_NAME = 120  # characters of a file's name before its ending; file systems take 255 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """One entry of a log and what proves it.

    Attributes:
        entry: the entry's body as it was hashed, RFC 8785.
        checkpoint: the signed note.
        proof: the audit path of the entry, hashes of 32 bytes.
        verifier_key: the C2SP text of the log's key.
    """

    entry: str
    leaf_index: int
    checkpoint: str
    proof: tuple[bytes, ...]
    verifier_key: str

    def verify(self, key: VerifierKey | None = None) -> Checkpoint:
        """Check it, and return the checkpoint it leads to.

        Args:
            key: the key that must have signed; by default the one in the receipt, which the log's name vouches for.

        Raises:
            LogVerificationError: ``"bad_signature"`` or ``"bad_proof"``.
        """
        own = VerifierKey.parse(self.verifier_key)
        if key is not None and own != key:
            raise LogVerificationError(
                f"the receipt is of the log {own.name}, not of {key.name}", kind="bad_signature"
            )
        if origin_of(own.public_key) != own.name:
            raise LogVerificationError(
                f"{own.name} is not the name that follows from the key in the receipt", kind="bad_signature"
            )
        checkpoint = Checkpoint.open(self.checkpoint, own)
        try:
            hashed = leaf_hash(self.entry.encode())
        except UnicodeEncodeError as e:
            raise LogVerificationError("the entry in a receipt is not text", kind="bad_proof") from e
        verify_inclusion(hashed, self.leaf_index, checkpoint.size, self.proof, checkpoint.root)
        return checkpoint

    @property
    def body(self) -> Mapping[str, Any]:
        """The entry.

        Raises:
            LogVerificationError: ``"bad_proof"``: it is not a JSON object.
        """
        try:
            value = json.loads(self.entry)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise LogVerificationError("the entry in a receipt is not a JSON object", kind="bad_proof")
        return value

    @property
    def dataset_id(self) -> str:
        """The dataset that the entry is about; empty for one about none."""
        return str(self.body.get("dataset_id", ""))

    def to_json(self) -> str:
        """One line, RFC 8785."""
        fields: dict[str, Any] = {
            "checkpoint": self.checkpoint,
            "entry": self.entry,
            "leaf_index": self.leaf_index,
            "proof": [to_base64(h) for h in self.proof],
            "verifier_key": self.verifier_key,
            "version": VERSION,
        }
        return rfc8785.dumps(fields).decode()

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read a line, unverified.

        Raises:
            InvalidRequestError: it is not a receipt.
        """
        try:
            fields = json.loads(line)
            receipt = cls(
                entry=fields["entry"],
                leaf_index=fields["leaf_index"],
                checkpoint=fields["checkpoint"],
                proof=tuple(from_base64(h) for h in fields["proof"]),
                verifier_key=fields["verifier_key"],
            )
            texts = (receipt.entry, receipt.checkpoint, receipt.verifier_key)
            if fields["version"] != VERSION or type(receipt.leaf_index) is not int or not all(map(_is_text, texts)):
                raise ValueError("a field is not what it should be")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InvalidRequestError(
                "this line is not a receipt: it was cut off or altered",
                field="receipt",
                constraint="a line as docs/formats/log.md describes it",
            ) from e
        return receipt


@dataclass(frozen=True, slots=True)
class ReceiptFile:
    """The receipts of one log for one dataset, oldest first."""

    origin_digits: str
    path: Path

    def lines(self) -> Iterator[tuple[int, Receipt | InvalidRequestError]]:
        """Each line with its number from 1: the receipt, unverified, or why it is none."""
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield number, Receipt.from_json(line)
                except InvalidRequestError as e:
                    yield number, e


class Receipts:
    """Every receipt in a data folder: ``receipts/<log>/<dataset>.jsonl``."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    @classmethod
    def of_user(cls) -> Self:
        """Those in the user's data folder."""
        return cls(Folder(data_folder()))

    def append(self, receipt: Receipt) -> bool:
        """Keep a receipt that was verified; whether it was written (a warning has said why not)."""
        origin = name_of(VerifierKey.parse(receipt.verifier_key).name)
        return self.folder.append(f"{RECEIPTS}/{origin}/{_file_name(receipt.dataset_id)}", receipt.to_json())

    def files(self) -> list[ReceiptFile]:
        """What there is, sorted by log and dataset."""
        return [ReceiptFile(path.parent.name, path) for path in self.folder.files(RECEIPTS, "*/*.jsonl")]

    def newest(self, origin: str) -> Receipt | None:
        """The receipt with the largest tree among the last lines of the files written last, unverified."""
        if self.folder.path is None:
            return None
        try:
            files = list((self.folder.path / RECEIPTS / name_of(origin)).glob("*.jsonl"))
            files = sorted(files, key=lambda f: f.stat().st_mtime, reverse=True)[:_LOOK_AT]
            lines = [line for f in files for line in _last_lines(f)]
        except OSError:
            return None
        found: list[tuple[int, Receipt]] = []
        for line in lines:
            with contextlib.suppress(InvalidRequestError, LogVerificationError):
                receipt = Receipt.from_json(line)
                body, _, _ = receipt.checkpoint.partition("\n\n")
                found.append((Checkpoint.parse(body + "\n").size, receipt))
        return max(found, key=lambda f: f[0])[1] if found else None

    def read_all(self, origin: str, dataset_id: str) -> list[Receipt]:
        """The receipts of one log for one dataset, oldest first, unverified.

        Raises:
            InvalidRequestError: a line is damaged; ``details`` has the file and the line.
        """
        wanted = _file_name(dataset_id)
        receipts = []
        for file in self.files():
            if file.origin_digits != name_of(origin) or file.path.name != wanted:
                continue
            for number, found in file.lines():
                if not isinstance(found, Receipt):
                    raise InvalidRequestError(
                        f"{file.path}, line {number}: {found.message}",
                        field="receipt",
                        constraint=found.constraint,
                        details={"file": str(file.path), "line": number},
                    ) from found
                if found.dataset_id == dataset_id:  # very long names share a file
                    receipts.append(found)
        return receipts


def _last_lines(path: Path) -> list[str]:
    """The last whole lines of a file, a few."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        return file.read().decode(errors="replace").split("\n")[-3:-1]


def _file_name(dataset_id: str) -> str:
    """Readable for usual ids; never a path, never too long. Receipts name their dataset themselves."""
    return quote(dataset_id, safe="", errors="replace")[:_MAX_NAME] + ".jsonl"


def _is_text(value: object) -> bool:
    return isinstance(value, str)
