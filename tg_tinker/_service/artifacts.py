"""Checkpoints in the store: fetching, listing, exporting, bringing in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy.typing as npt

from tg_tinker._service.connection import Connection
from tg_tinker.adapters import read_adapter
from tg_tinker.exports.files import (
    ExportedArtifact,
    check,
    open_archive,
    read_identities,
    trusted,
    unpack,
    write_export,
    write_whole,
)
from tg_tinker.exports.hpke import Identity
from tg_tinker.exports.manifest import Manifest
from tg_tinker.types import ArtifactInfo, LoRAConfig, WeightsSource
from tg_tinker.wire import federation, requests
from tg_tinker.wire.artifacts import artifact_from_proto


class Artifacts(Connection):
    """Wherever an artifact is asked for, its path will do."""

    def pull_artifact(self, artifact_id: str, destination: str | Path | None = None) -> bytes:
        """The encrypted bytes of a checkpoint.

        Args:
            destination: also write them to this file; it appears whole or not at all.
        """
        stream = self._transport.stream(requests.pull_artifact(artifact_id))
        data = b"".join(chunk.data for chunk in stream)
        if destination is not None:
            write_whole(Path(destination), [data])
        return data

    def list_artifacts(self, training_client_id: str | None = None, limit: int = 100) -> list[ArtifactInfo]:
        """The newest checkpoints, of one run or of all."""
        reply = self._transport.call(requests.list_artifacts(training_client_id, limit))
        return [artifact_from_proto(a) for a in reply.artifacts]

    def get_artifact(self, artifact_id: str) -> ArtifactInfo:
        """One checkpoint, by id or path."""
        return artifact_from_proto(self._transport.call(requests.get_artifact(artifact_id)))

    def set_artifact_ttl(self, artifact_id: str, ttl_seconds: int | None) -> ArtifactInfo:
        """Say how long from now a checkpoint is kept; ``None``: until it is deleted."""
        return artifact_from_proto(self._transport.call(requests.set_artifact_ttl(artifact_id, ttl_seconds)))

    def download_adapter(self, artifact_id: str, folder: str | Path, *, signer: str | None = None) -> Manifest:
        """Bring a checkpoint's weights here, decrypted and checked, as a folder that PEFT loads.

        ``adapter_model.safetensors`` and ``adapter_config.json``, with the signed manifest and the privacy report. On
        the way they are sealed for a key that lives as long as this call. The server notes it in the audit log.

        Args:
            artifact_id: or a path.
            folder: new; there whole or not at all.
            signer: verifier key of the server's log; default: the one that clients here met before.

        Raises:
            AuthorizationError: the key's roles do not allow exports.
            InvalidRequestError: the folder exists.
        """
        self._handshake()
        identity = Identity.generate()
        with TemporaryDirectory(prefix="tg-tinker-adapter-") as draft:
            sealed = Path(draft) / "export.hpke"
            self.export_artifact(artifact_id, destination=sealed, pq_recipients=identity.recipient.text)
            return unpack(sealed, trusted(signer), Path(folder), [identity.text])

    def import_adapter(
        self,
        folder: str | Path,
        *,
        base_model: str,
        source: WeightsSource | None = None,
        step: int = 0,
    ) -> ArtifactInfo:
        """Make an encrypted checkpoint of a PEFT adapter; ``load_state`` takes it like any other.

        Read are ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``adapter.safetensors``); never a
        pickle. Runs with the same adapter settings load it: ``get_artifact`` names it.

        Args:
            source: where it comes from and what that promises, on your word. Without one nothing is promised: a run
                with privacy then refuses it, unless it was created with ``DPConfig(initial_weights="public")``.

        Raises:
            InvalidRequestError: files that are missing or cannot be, or a kind of adapter that is not offered.
        """
        tensors, adapter, digest = read_adapter(Path(folder))
        unknown = WeightsSource(job=digest, round=0, epsilon=float("inf"), delta=1e-5)
        return self.import_weights(
            tensors, base_model=base_model, lora_config=adapter, step=step, source=source or unknown
        )

    def delete_artifact(self, artifact_id: str) -> None:
        """Delete a checkpoint. What it cost stays in the ledger."""
        self._transport.call(requests.delete_artifact(artifact_id))

    def export_artifact(
        self,
        artifact_id: str,
        recipients: str | Sequence[str] = (),
        destination: str | Path = "export.age",
        *,
        pq_recipients: str | Sequence[str] = (),
    ) -> ExportedArtifact:
        """Write a checkpoint to a file that its receivers open with tools of their own: weights, signed, sealed.

        The file holds what PEFT loads, a signed manifest and the privacy report; never the optimizer. The server
        notes it, with its receivers, in the audit log.

        Args:
            recipients: public age keys, ``age1...``; ``age -d`` opens the file.
            destination: appears whole or not at all; replaced if it is there.
            pq_recipients: instead, post-quantum ones (``tg-tinker checkpoints keygen --pq``).

        Raises:
            ResourceNotFoundError: there is no such checkpoint of this tenant.
            AuthorizationError: the key's roles do not allow exports.
        """
        named = [[r] if isinstance(r, str) else list(r) for r in (recipients, pq_recipients)]
        stream = self._transport.stream(requests.export_artifact(artifact_id, *named))
        return write_export(Path(destination), (chunk.data for chunk in stream))

    def import_artifact(
        self,
        path: str | Path,
        *,
        signer: str | None = None,
        identity: str | Path | Sequence[str] = (),
    ) -> ArtifactInfo:
        """Take an export in as a checkpoint of this tenant; it keeps where it came from and what that promised.

        It is opened and checked here first: a private key never leaves this machine.

        Args:
            path: of an export, sealed or opened, or of the folder it was unpacked into.
            signer: verifier key of who exported it. Without one, it must be a log that clients here met before.
            identity: file with the receiver's private key, or the keys themselves, where it is sealed.

        Raises:
            LogVerificationError: not signed by ``signer``.
            InvalidRequestError: altered, not an export, or of an unknown signer.
        """
        keys = list(identity) if isinstance(identity, list | tuple) else read_identities(Path(str(identity)))
        checked = check(Path(path), trusted(signer), keys)
        with open_archive(Path(path), keys) as archive:
            reply = self._transport.upload(requests.import_artifact(checked.key.text, map(bytes, archive)))
        return artifact_from_proto(reply.artifact)

    def import_weights(
        self,
        tensors: Mapping[str, npt.NDArray[Any]],
        *,
        base_model: str,
        lora_config: LoRAConfig | None,
        step: int = 0,
        source: WeightsSource,
    ) -> ArtifactInfo:
        """Make an encrypted checkpoint of plain weights, e.g. of an average; ``load_state`` takes it like any other.

        It is sent once: after a lost connection, call again and delete the checkpoint that the first call may have
        made. Names and shapes are checked when it is loaded.

        Args:
            tensors: finite float32, under the names that ``pull_weights`` gives.
            lora_config: the adapter they are of; ``None`` where every parameter is trained.
            step: optimizer steps that made them.
            source: where they come from and what that promises, on your word. It stays with everything that is
                trained from them. Where nothing is promised, a run with privacy refuses to load them, unless it
                was created with ``DPConfig(initial_weights="public")``.

        Raises:
            InvalidRequestError: naming what is wrong with them. Nothing is left of them then.
        """
        stream = federation.import_weights(
            tensors, base_model=base_model, lora_config=lora_config, step=step, source=source
        )
        return artifact_from_proto(self._transport.upload(stream).artifact)
