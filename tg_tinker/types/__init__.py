"""The vocabulary of the SDK: batches, configurations, results. Values are valid once they exist."""

from tg_tinker.types.batch import IGNORE_INDEX, BatchData, batch_digest, hash_batch
from tg_tinker.types.configs import DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker.types.federation import AdapterWeights, WeightsSource
from tg_tinker.types.info import ArtifactInfo, AuditLogEntry, Capabilities, ServiceConfig, TrainingClientInfo
from tg_tinker.types.results import (
    DPMetrics,
    EncryptionInfo,
    ForwardBackwardOutput,
    ForwardBackwardResult,
    LoadStateResult,
    OptimStepOutput,
    OptimStepResult,
    Sample,
    SampleResult,
    SavedState,
    SaveStateResult,
    StreamChunk,
)

__all__ = [
    "IGNORE_INDEX",
    "AdapterWeights",
    "ArtifactInfo",
    "AuditLogEntry",
    "BatchData",
    "Capabilities",
    "DPConfig",
    "DPMetrics",
    "EncryptionInfo",
    "ForwardBackwardOutput",
    "ForwardBackwardResult",
    "LoRAConfig",
    "LoadStateResult",
    "OptimStepOutput",
    "OptimStepResult",
    "OptimizerConfig",
    "Sample",
    "SampleResult",
    "SaveStateResult",
    "SavedState",
    "ServiceConfig",
    "StreamChunk",
    "TrainingClientInfo",
    "TrainingConfig",
    "WeightsSource",
    "batch_digest",
    "hash_batch",
]
