"""What operations return, on the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message

from tg_tinker.proto.v1 import sampling_pb2, training_pb2
from tg_tinker.types import (
    DPMetrics,
    EncryptionInfo,
    ForwardBackwardOutput,
    LoadStateResult,
    OptimStepOutput,
    Sample,
    SampleResult,
    SavedState,
    StreamChunk,
)
from tg_tinker.wire.datums import tensors_from_proto, tensors_to_proto
from tg_tinker.wire.json_text import json_from_text, json_to_text
from tg_tinker.wire.log import receipt_from_proto, receipt_to_proto
from tg_tinker.wire.times import time_from_proto, time_to_proto

Result = ForwardBackwardOutput | OptimStepOutput | SampleResult | SavedState | LoadStateResult


def forward_backward_to_proto(result: ForwardBackwardOutput) -> training_pb2.ForwardBackwardReply:
    """A pass's result as a message."""
    return training_pb2.ForwardBackwardReply(
        loss=result.loss,
        batch_hash=result.batch_hash,
        gradient_hash=result.gradient_hash,
        num_tokens=result.num_tokens,
        latency_ms=result.latency_ms,
        metrics=result.metrics,
        loss_fn_output_type=result.loss_fn_output_type,
        loss_fn_outputs=[
            training_pb2.LossOutputs(outputs=tensors_to_proto(outputs)) for outputs in result.loss_fn_outputs
        ],
    )


def forward_backward_from_proto(reply: training_pb2.ForwardBackwardReply) -> ForwardBackwardOutput:
    """A pass's result from a message."""
    return ForwardBackwardOutput(
        loss=reply.loss,
        batch_hash=reply.batch_hash,
        gradient_hash=reply.gradient_hash,
        num_tokens=reply.num_tokens,
        latency_ms=reply.latency_ms,
        metrics=dict(reply.metrics),
        loss_fn_output_type=reply.loss_fn_output_type,
        loss_fn_outputs=[tensors_from_proto(outputs.outputs) for outputs in reply.loss_fn_outputs],
    )


def optim_step_to_proto(result: OptimStepOutput) -> training_pb2.OptimStepReply:
    """A step's result as a message."""
    dp = result.dp_metrics
    return training_pb2.OptimStepReply(
        grad_norm=result.grad_norm,
        learning_rate=result.learning_rate,
        step=result.step,
        dp_metrics=None if dp is None else dp_metrics_to_proto(dp),
        latency_ms=result.latency_ms,
        metrics=result.metrics,
        receipt=None if result.receipt is None else receipt_to_proto(result.receipt),
    )


def optim_step_from_proto(reply: training_pb2.OptimStepReply) -> OptimStepOutput:
    """A step's result from a message."""
    return OptimStepOutput(
        grad_norm=reply.grad_norm,
        learning_rate=reply.learning_rate,
        step=reply.step,
        dp_metrics=dp_metrics_from_proto(reply.dp_metrics) if reply.HasField("dp_metrics") else None,
        latency_ms=reply.latency_ms,
        metrics=dict(reply.metrics),
        receipt=receipt_from_proto(reply.receipt) if reply.HasField("receipt") else None,
    )


def dp_metrics_to_proto(dp: DPMetrics) -> training_pb2.DPMetrics:
    """What a step cost, as a message."""
    return training_pb2.DPMetrics(
        noise_applied=dp.noise_applied,
        epsilon_spent=dp.epsilon_spent,
        total_epsilon=dp.total_epsilon,
        delta=dp.delta,
        grad_norm_before_clip=dp.grad_norm_before_clip,
        grad_norm_after_clip=dp.grad_norm_after_clip,
        num_clipped=dp.num_clipped,
    )


def dp_metrics_from_proto(message: training_pb2.DPMetrics) -> DPMetrics:
    """What a step cost, from a message."""
    return DPMetrics(
        noise_applied=message.noise_applied,
        epsilon_spent=message.epsilon_spent,
        total_epsilon=message.total_epsilon,
        delta=message.delta,
        grad_norm_before_clip=message.grad_norm_before_clip,
        grad_norm_after_clip=message.grad_norm_after_clip,
        num_clipped=message.num_clipped,
    )


def sample_to_proto(result: SampleResult) -> sampling_pb2.SampleReply:
    """Completions as a message."""
    samples = [
        sampling_pb2.SampleText(
            prompt=s.prompt,
            completion=s.completion,
            num_tokens=s.num_tokens,
            finish_reason=s.finish_reason,
            latency_ms=s.latency_ms,
        )
        for s in result.samples
    ]
    return sampling_pb2.SampleReply(samples=samples, total_tokens=result.total_tokens, latency_ms=result.latency_ms)


def sample_from_proto(reply: sampling_pb2.SampleReply) -> SampleResult:
    """Completions from a message."""
    samples = [
        Sample(
            prompt=s.prompt,
            completion=s.completion,
            num_tokens=s.num_tokens,
            finish_reason=s.finish_reason,
            latency_ms=s.latency_ms,
        )
        for s in reply.samples
    ]
    return SampleResult(samples=samples, total_tokens=reply.total_tokens, latency_ms=reply.latency_ms)


def chunk_to_proto(chunk: StreamChunk) -> sampling_pb2.SampleChunk:
    """A piece of streamed text as a message."""
    return sampling_pb2.SampleChunk(
        text=chunk.text,
        index=chunk.index,
        token_ids=chunk.token_ids,
        finish_reason=chunk.finish_reason or "",
    )


def chunk_from_proto(message: sampling_pb2.SampleChunk) -> StreamChunk:
    """A piece of streamed text from a message."""
    return StreamChunk(
        text=message.text,
        index=message.index,
        token_ids=list(message.token_ids),
        finish_reason=message.finish_reason or None,
    )


def save_to_proto(result: SavedState) -> training_pb2.SaveStateReply:
    """A checkpoint's description as a message."""
    return training_pb2.SaveStateReply(
        artifact_id=result.artifact_id,
        size_bytes=result.size_bytes,
        encryption_algorithm=result.encryption.algorithm,
        encryption_key_id=result.encryption.key_id,
        metadata_json=json_to_text(result.metadata, field="metadata"),
        timestamp=time_to_proto(result.timestamp),
        content_hash=result.content_hash,
        path=result.path,
    )


def save_from_proto(reply: training_pb2.SaveStateReply) -> SavedState:
    """A checkpoint's description from a message."""
    return SavedState(
        artifact_id=reply.artifact_id,
        size_bytes=reply.size_bytes,
        encryption=EncryptionInfo(algorithm=reply.encryption_algorithm, key_id=reply.encryption_key_id),
        metadata=json_from_text(reply.metadata_json, field="metadata"),
        timestamp=time_from_proto(reply.timestamp),
        content_hash=reply.content_hash,
        path=reply.path,
    )


def load_to_proto(result: LoadStateResult) -> training_pb2.LoadStateReply:
    """A restored checkpoint as a message."""
    return training_pb2.LoadStateReply(
        artifact_id=result.artifact_id,
        step=result.step,
        metadata_json=json_to_text(result.metadata, field="metadata"),
        timestamp=time_to_proto(result.timestamp),
    )


def load_from_proto(reply: training_pb2.LoadStateReply) -> LoadStateResult:
    """A restored checkpoint from a message."""
    return LoadStateResult(
        artifact_id=reply.artifact_id,
        step=reply.step,
        metadata=json_from_text(reply.metadata_json, field="metadata"),
        timestamp=time_from_proto(reply.timestamp),
    )


# Name of the operation, which is also the field of FutureReply -> (result class, writer, reader).
RESULTS: dict[str, tuple[type[Any], Callable[[Any], Message], Callable[[Any], Any]]] = {
    "forward_backward": (ForwardBackwardOutput, forward_backward_to_proto, forward_backward_from_proto),
    "optim_step": (OptimStepOutput, optim_step_to_proto, optim_step_from_proto),
    "sample": (SampleResult, sample_to_proto, sample_from_proto),
    "save_state": (SavedState, save_to_proto, save_from_proto),
    "load_state": (LoadStateResult, load_to_proto, load_from_proto),
}
