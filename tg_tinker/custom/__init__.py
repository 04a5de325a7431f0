"""Losses of one's own: computed here on log-probabilities that the server returns, or traced for the server."""

from tg_tinker.custom.linear import LossGradientError, per_datum_loss
from tg_tinker.custom.trace import LossHandle, trace_loss

__all__ = ["LossGradientError", "LossHandle", "per_datum_loss", "trace_loss"]
