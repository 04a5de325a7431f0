"""Regularizers of custom losses: written by the caller, or built in. They run at the caller and need torch."""

from tg_tinker.regularizers.distributions import KL, Consistency, Entropy
from tg_tinker.regularizers.geometry import GradientPenalty, Orthogonality
from tg_tinker.regularizers.norms import L1, L2, ElasticNet
from tg_tinker.regularizers.outputs import BaseLoss, CustomLossOutput, RegularizerOutput
from tg_tinker.regularizers.pipeline import Composed, compute
from tg_tinker.regularizers.spec import RegularizerFailedError, RegularizerSpec, RegularizerTimeoutError

__all__ = [
    "KL",
    "L1",
    "L2",
    "BaseLoss",
    "Composed",
    "Consistency",
    "CustomLossOutput",
    "ElasticNet",
    "Entropy",
    "GradientPenalty",
    "Orthogonality",
    "RegularizerFailedError",
    "RegularizerOutput",
    "RegularizerSpec",
    "RegularizerTimeoutError",
    "compute",
]
