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
from tg_tinker.rest_client import RestClient
from tg_tinker.sampling_client import RetryConfig, SampleFuture, SamplingClient
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
from tg_tinker.types.datum import Datum, EncodedTextChunk, ModelInput, TensorData
from tg_tinker.types.optim import AdamParams
from tg_tinker.types.tokens import SampledSequence, SampleResponse, SamplingParams

__version__ = version("tg-tinker")

__all__ = [
    "AdamParams",
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
    "Datum",
    "EncodedTextChunk",
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
    "ModelInput",
    "OptimStepOutput",
    "OptimStepResult",
    "OptimizerConfig",
    "PoissonSampler",
    "PrivacyLedger",
    "PrivacyView",
    "RateLimitedError",
    "ResourceNotFoundError",
    "RestClient",
    "RetryConfig",
    "Sample",
    "SampleFuture",
    "SampleResponse",
    "SampleResult",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "SaveStateResult",
    "SavedState",
    "ServerError",
    "ServiceClient",
    "ServiceConfig",
    "StreamChunk",
    "TGTinkerError",
    "TensorData",
    "TrainingClient",
    "TrainingClientInfo",
    "TrainingConfig",
    "collate",
    "hash_batch",
]
