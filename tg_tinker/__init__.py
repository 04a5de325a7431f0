"""TG-Tinker: fine-tune language models on data they must not leak."""

from importlib.metadata import version

from tg_tinker.data import PoissonSampler, collate
from tg_tinker.datasets import Dataset
from tg_tinker.errors import (
    AuthenticationError,
    AuthorizationError,
    DPBudgetExceededError,
    DPUnsupportedError,
    FederationRefusedError,
    FutureCancelledError,
    FutureTimeoutError,
    InvalidRequestError,
    LogVerificationError,
    RateLimitedError,
    ResourceNotFoundError,
    ServerError,
    TGTinkerError,
)
from tg_tinker.futures import FutureHandle
from tg_tinker.ledger import LedgerEntry, PrivacyLedger
from tg_tinker.privacy_view import PrivacyView
from tg_tinker.service_client import ServiceClient
from tg_tinker.training_client import TrainingClient
from tg_tinker.types import (
    ArtifactInfo,
    AuditLogEntry,
    BatchData,
    Capabilities,
    DPConfig,
    DPMetrics,
    EncryptionInfo,
    ForwardBackwardOutput,
    ForwardBackwardResult,
    LoadStateResult,
    LoRAConfig,
    OptimizerConfig,
    OptimStepOutput,
    OptimStepResult,
    Sample,
    SampleResult,
    SavedState,
    SaveStateResult,
    ServiceConfig,
    StreamChunk,
    TrainingClientInfo,
    TrainingConfig,
    hash_batch,
)

__version__ = version("tg-tinker")

__all__ = [
    "ArtifactInfo",
    "AuditLogEntry",
    "AuthenticationError",
    "AuthorizationError",
    "BatchData",
    "Capabilities",
    "DPBudgetExceededError",
    "DPConfig",
    "DPMetrics",
    "DPUnsupportedError",
    "Dataset",
    "EncryptionInfo",
    "FederationRefusedError",
    "ForwardBackwardOutput",
    "ForwardBackwardResult",
    "FutureCancelledError",
    "FutureHandle",
    "FutureTimeoutError",
    "InvalidRequestError",
    "LedgerEntry",
    "LoRAConfig",
    "LoadStateResult",
    "LogVerificationError",
    "OptimStepOutput",
    "OptimStepResult",
    "OptimizerConfig",
    "PoissonSampler",
    "PrivacyLedger",
    "PrivacyView",
    "RateLimitedError",
    "ResourceNotFoundError",
    "Sample",
    "SampleResult",
    "SaveStateResult",
    "SavedState",
    "ServerError",
    "ServiceClient",
    "ServiceConfig",
    "StreamChunk",
    "TGTinkerError",
    "TrainingClient",
    "TrainingClientInfo",
    "TrainingConfig",
    "collate",
    "hash_batch",
]
