"""The requests that are plain questions: a few words each, and no order among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from tg_tinker.proto.v1 import artifacts_pb2, privacy_pb2, runs_pb2, sampling_pb2, training_pb2
from tg_tinker.types import TrainingConfig
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker.wire.call_messages import sampling_to_proto
from tg_tinker.wire.json_text import json_to_text
from tg_tinker.wire.runs import config_to_json
from tg_tinker.wire.times import time_to_proto

_PIECE_BYTES = 2**20


def create_run(
    request_id: str, config: TrainingConfig, checkpoint_id: str | None, *, optimizer: bool | None = None
) -> runs_pb2.CreateTrainingClientRequest:
    """Make a run; the same ``request_id`` again gets the same run."""
    return runs_pb2.CreateTrainingClientRequest(
        request_id=request_id,
        config_json=config_to_json(config, as_asked=True),
        checkpoint_id=checkpoint_id or "",
        optimizer=optimizer,
    )


def create_run_like(
    request_id: str, path: str, *, optimizer: bool, base_model: str = "", metadata: Mapping[str, Any]
) -> runs_pb2.CreateTrainingClientRequest:
    """Make a run from a checkpoint, configured as the run that saved it."""
    return runs_pb2.CreateTrainingClientRequest(
        request_id=request_id,
        like=path,
        optimizer=optimizer,
        base_model=base_model,
        metadata_json=json_to_text(metadata, field="user_metadata") if metadata else "",
    )


def get_run(run_id: str, *, summary: bool = False) -> runs_pb2.GetTrainingClientRequest:
    """Describe a run; ``summary``: without bringing it back into memory."""
    return runs_pb2.GetTrainingClientRequest(run_id=run_id, summary=summary)


def list_runs(status: str | None, limit: int, offset: int = 0) -> runs_pb2.ListTrainingClientsRequest:
    """The newest ``limit`` runs after the first ``offset``, of one status or of all."""
    return runs_pb2.ListTrainingClientsRequest(status=status or "", limit=limit, offset=offset)


def delete_run(run_id: str) -> runs_pb2.DeleteTrainingClientRequest:
    """Delete a run."""
    return runs_pb2.DeleteTrainingClientRequest(run_id=run_id)


def unload_run(run_id: str) -> runs_pb2.UnloadModelRequest:
    """Free a run's memory and complete it."""
    return runs_pb2.UnloadModelRequest(run_id=run_id)


def capabilities(client_version: str) -> runs_pb2.GetCapabilitiesRequest:
    """What can the server do?"""
    return runs_pb2.GetCapabilitiesRequest(client_version=client_version)


def encode_texts(run_id: str, texts: list[str], *, sampler_id: str = "") -> sampling_pb2.EncodeRequest:
    """Texts to token ids, by the tokenizer of a run or of a sampler."""
    return sampling_pb2.EncodeRequest(run_id=run_id, texts=texts, sampler_id=sampler_id)


def decode_ids(run_id: str, ids: list[list[int]], *, sampler_id: str = "") -> sampling_pb2.DecodeRequest:
    """Token ids to texts, by the tokenizer of a run or of a sampler."""
    return sampling_pb2.DecodeRequest(
        run_id=run_id, ids=[sampling_pb2.TokenIds(ids=i) for i in ids], sampler_id=sampler_id
    )


def create_sampler(sampler_id: str, *, base_model: str = "", path: str = "") -> sampling_pb2.CreateSamplerRequest:
    """Name frozen weights to sample from; the same ``sampler_id`` again gets the same."""
    return sampling_pb2.CreateSamplerRequest(sampler_id=sampler_id, base_model=base_model, path=path)


def tokenizer_files(base_model: str) -> runs_pb2.GetTokenizerRequest:
    """Stream the files of a model's tokenizer."""
    return runs_pb2.GetTokenizerRequest(base_model=base_model)


def sample_stream(run_id: str, prompt: str, params: GenerationOptions) -> sampling_pb2.SampleStreamRequest:
    """Stream one completion."""
    return sampling_pb2.SampleStreamRequest(
        run_id=run_id, prompt=prompt, params=sampling_to_proto(params, num_completions=1)
    )


def pull_artifact(artifact_id: str) -> artifacts_pb2.PullArtifactRequest:
    """Stream a checkpoint's ciphertext."""
    return artifacts_pb2.PullArtifactRequest(artifact_id=artifact_id)


def list_artifacts(
    run_id: str | None, limit: int, offset: int = 0, *, kind: str = ""
) -> artifacts_pb2.ListArtifactsRequest:
    """The newest ``limit`` checkpoints after the first ``offset``, of one run or of all, of one kind or of any."""
    return artifacts_pb2.ListArtifactsRequest(run_id=run_id or "", limit=limit, offset=offset, kind=kind)


def get_artifact(artifact_id: str) -> artifacts_pb2.GetArtifactRequest:
    """Describe a checkpoint, by id or path."""
    return artifacts_pb2.GetArtifactRequest(artifact_id=artifact_id)


def set_artifact_ttl(artifact_id: str, ttl_seconds: int | None) -> artifacts_pb2.SetArtifactTTLRequest:
    """Say how long from now a checkpoint is kept; ``None``: until it is deleted."""
    return artifacts_pb2.SetArtifactTTLRequest(artifact_id=artifact_id, ttl_seconds=ttl_seconds)


def create_custom_loss(graph_json: str) -> training_pb2.CreateCustomLossRequest:
    """Have the server keep a traced loss."""
    return training_pb2.CreateCustomLossRequest(graph_json=graph_json)


def delete_artifact(artifact_id: str) -> artifacts_pb2.DeleteArtifactRequest:
    """Delete a checkpoint."""
    return artifacts_pb2.DeleteArtifactRequest(artifact_id=artifact_id)


def export_artifact(
    artifact_id: str, recipients: Sequence[str], pq_recipients: Sequence[str]
) -> artifacts_pb2.ExportArtifactRequest:
    """Stream an export, sealed for its receivers."""
    return artifacts_pb2.ExportArtifactRequest(
        artifact_id=artifact_id, recipients=recipients, pq_recipients=pq_recipients
    )


def import_artifact(signer: str, archive: Iterable[bytes]) -> Iterator[artifacts_pb2.ImportArtifactRequest]:
    """Send the archive of an export, in pieces of at most 1 MiB."""
    yield artifacts_pb2.ImportArtifactRequest(signer=signer)
    for piece in archive:
        for i in range(0, len(piece), _PIECE_BYTES):
            yield artifacts_pb2.ImportArtifactRequest(data=piece[i : i + _PIECE_BYTES])


def forecast(run_id: str, steps: int) -> privacy_pb2.ForecastPrivacyRequest:
    """What would so many more steps cost?"""
    return privacy_pb2.ForecastPrivacyRequest(run_id=run_id, steps=steps)


def ledger(dataset_id: str) -> privacy_pb2.GetLedgerRequest:
    """The whole ledger of a dataset."""
    return privacy_pb2.GetLedgerRequest(dataset_id=dataset_id)


def report(dataset_id: str) -> privacy_pb2.GetPrivacyReportRequest:
    """The privacy report on a dataset."""
    return privacy_pb2.GetPrivacyReportRequest(dataset_id=dataset_id)


def attach_audit(dataset_id: str, result: Mapping[str, Any]) -> privacy_pb2.AttachAuditRequest:
    """Note what an empirical audit found.

    Raises:
        InvalidRequestError: it is not JSON.
    """
    return privacy_pb2.AttachAuditRequest(dataset_id=dataset_id, result_json=json_to_text(result, field="result"))


def audit_log(
    run_id: str | None,
    operation: str | None,
    start_time: datetime | None,
    end_time: datetime | None,
    limit: int,
) -> privacy_pb2.GetAuditLogRequest:
    """The newest ``limit`` audit records that fit."""
    return privacy_pb2.GetAuditLogRequest(
        run_id=run_id or "",
        operation=operation or "",
        start_time=None if start_time is None else time_to_proto(start_time),
        end_time=None if end_time is None else time_to_proto(end_time),
        limit=limit,
    )
