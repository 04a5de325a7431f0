"""Runs of the NumPy model and passes over datums of random tokens, for tests through the real server."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.server.rpc.raw_client import RawClient
from tg_tinker.errors import (
    TGTinkerError,
)
from tg_tinker.types import DPConfig, TrainingConfig
from tg_tinker.types.datum import Datum, ModelInput, TensorData
from tg_tinker.types.losses import LOSSES, Loss
from tg_tinker.wire.calls import LossPass

CONFIG = TrainingConfig(model_ref="bigram", batch_size=2, seed=1, max_sequence_length=64)
CROSS_ENTROPY = Loss.of("cross_entropy")


def private(**settings: Any) -> TrainingConfig:
    values = {"dataset_id": "people", "target_epsilon": 1000.0, **settings}
    return CONFIG.model_copy(update={"dp_config": DPConfig(**values)})


def datum(length: int = 6, seed: int = 0, loss: str = "cross_entropy", **inputs: Any) -> Datum:
    rng = np.random.default_rng(seed)
    given: dict[str, Any] = {name: TensorData(rng.normal(size=length), "float32") for name in LOSSES[loss].required}
    given["target_tokens"] = TensorData(rng.integers(1, 200, length), "int64")
    return Datum(ModelInput.from_ints(rng.integers(1, 200, length).tolist()), {**given, **inputs})


def loss_pass(*data: Datum, loss: Loss = CROSS_ENTROPY, **settings: Any) -> LossPass:
    return LossPass(data=data or (datum(), datum(4, 1)), loss=loss, **settings)


def error_of(client: RawClient, run_id: str, seq: int, call: Any) -> TGTinkerError:
    error = client.call(run_id, seq, call).error
    assert error is not None
    return error
