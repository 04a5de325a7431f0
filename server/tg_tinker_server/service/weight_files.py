"""A checkpoint's weights as the files that PEFT reads, one by one, each encrypted if it is for somebody."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.exports import age
from tg_tinker.exports.pieces import read_file
from tg_tinker.exports.tar import ADAPTER_CONFIG
from tg_tinker_server.artifacts.package import Source, adapter_config
from tg_tinker_server.artifacts.tensors import Bytes, FormatError, state_from
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.artifacts.weights import TensorFile, take_weights
from tg_tinker_server.ledger.audit import AuditLog, AuditRecord
from tg_tinker_server.service.durability import CHECKPOINT, now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.store.artifact_rows import ArtifactRow

OPERATION = "export_artifact"
RECIPIENTS = "age_recipients"  # in a checkpoint's metadata: for whom its files are encrypted
_AGE = ".age"
_PEFT_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Hands out checkpoints as folders of files.

    Attributes:
        scratch: folder for encrypted files on their way out; they have no name there.
        hub_ids: where a base model comes from, by its name here, if that means something elsewhere.
    """

    vault: Vault
    audit: AuditLog
    executors: Executors
    scratch: Path
    hub_ids: Mapping[str, str]

    async def names(self, row: ArtifactRow) -> list[str]:
        """The files of a checkpoint."""
        source, recipients = await asyncio.to_thread(self._source, row)
        return [name + _AGE if recipients else name for name in _files(source)]

    async def open(self, row: ArtifactRow, name: str) -> Iterator[bytes]:
        """One file in pieces of at most 1 MiB; iterate it off the event loop.

        Raises:
            InvalidRequestError: the checkpoint has no such file, or was altered.
        """
        return await asyncio.to_thread(self._open, row, name)

    async def note(self, actor: str, row: ArtifactRow) -> None:
        """Write into the audit log that a checkpoint may leave the server, and for whom it is encrypted."""
        _, recipients = await asyncio.to_thread(self._source, row)
        when = now()
        fingerprints = " ".join(age.fingerprint(r) for r in recipients)
        record = AuditRecord(
            operation=OPERATION,
            run_id=row.run_id,
            request_hash="",
            request_bytes=0,
            artifact_ids=(row.artifact_id,),
            started=when,
            completed=when,
            success=True,
            error_code="",
            dp_metrics=None,
            actor=actor,
            facts={"recipients": fingerprints} if recipients else {},
        )
        await self.executors.io(self.audit.append(row.tenant, record).result)

    def _source(self, row: ArtifactRow) -> tuple[Source, list[str]]:
        size, pieces = self.vault.plaintext(tenant=row.tenant, artifact_id=row.artifact_id, kind=CHECKPOINT)
        file = TensorFile.read(pieces, size)
        state: Mapping[str, Any] = state_from(file.metadata)
        model = str(state["config"]["model_ref"])
        source = Source(
            artifact_id=row.artifact_id,
            content_hash=row.content_hash,
            state=state,
            weight_names=[e.name.removeprefix("weights/") for e in file.entries if e.name.startswith("weights/")],
            base_model=self.hub_ids.get(model, model),
            report={},
            exported=now().isoformat(),
            server_version=version("tg-tinker"),
        )
        return source, [str(r) for r in state["metadata"].get(RECIPIENTS, [])]

    def _open(self, row: ArtifactRow, name: str) -> Iterator[bytes]:
        source, recipients = self._source(row)
        plain = name.removesuffix(_AGE) if recipients else name
        if plain not in _files(source) or (recipients and not name.endswith(_AGE)):
            raise InvalidRequestError("the checkpoint has no such file", field="file", constraint="one of its files")
        pieces: Iterator[Bytes]
        if plain == ADAPTER_CONFIG:
            pieces = iter([(json.dumps(adapter_config(source), indent=2, sort_keys=True) + "\n").encode()])
        else:
            size, stored = self.vault.plaintext(tenant=row.tenant, artifact_id=row.artifact_id, kind=CHECKPOINT)
            try:
                pieces = take_weights(stored, size).pieces
            except FormatError as e:
                raise ServerError(
                    "a verified checkpoint is not in the format; was it saved by a newer server?"
                ) from e
        if not recipients:
            return (bytes(piece) for piece in pieces)
        file: IO[bytes] = tempfile.TemporaryFile(dir=self.scratch)  # noqa: SIM115 - closed when it was read, or below
        try:
            age.seal_age(tuple(recipients), pieces, file)
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return _closing(file)


def _files(source: Source) -> list[str]:
    adapter = source.state["config"].get("lora_config") is not None
    return [ADAPTER_CONFIG, _PEFT_WEIGHTS] if adapter and source.layout == "peft" else ["model.safetensors"]


def _closing(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        yield from read_file(file)
