"""Passes over datums: what a run refuses of them, and the request for the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import DPUnsupportedError, InvalidRequestError
from tg_tinker.types.datum import Datum, TensorData
from tg_tinker.types.losses import LOSSES
from tg_tinker.wire.calls import LossPass
from tg_tinker.wire.datums import data_digest
from tg_tinker_server.engine.backend import LossRequest
from tg_tinker_server.service.pass_checks import may_be_empty
from tg_tinker_server.service.run import Run

VALUES_PER_TOKEN = 16  # of one input, on average over a call: alternatives of a position
_SMALLER_THAN_A_GROUP = ("datum", "sequence", "pair")


def tokens_of(data: Sequence[Datum]) -> int:
    """How many tokens datums have together."""
    return sum(datum.model_input.length for datum in data)


def check_datums(run: Run, request: LossPass, *, max_tokens: int) -> None:
    """Refuse datums that no pass of this run can take. No model work.

    Raises:
        InvalidRequestError: naming the argument.
        DPUnsupportedError: the loss couples privacy units.
    """
    refuse_coupled(run, request)
    lengths = [datum.model_input.length for datum in request.data]
    if (not lengths and not may_be_empty(run, request)) or 0 in lengths:
        raise InvalidRequestError(
            "there are no datums, or one without tokens; only a Poisson draw (DPConfig.sampling='poisson') may be "
            "empty",
            field="data",
            constraint="at least one datum of one token",
        )
    if sum(lengths) > max_tokens:
        raise InvalidRequestError(
            f"the datums have {sum(lengths)} tokens, over the {max_tokens} of one call; split them into several "
            "forward_backward calls, they add up",
            field="data",
            constraint=f"at most {max_tokens} tokens",
        )
    longest = max(lengths, default=0)
    if longest > run.config.max_sequence_length:
        raise InvalidRequestError(
            f"datums of {longest} tokens are longer than max_sequence_length={run.config.max_sequence_length}; cut "
            "them yourself, nothing is cut silently",
            field="data",
            constraint=f"at most {run.config.max_sequence_length} tokens",
        )
    # Of the dense shape: a sparse tensor takes no bytes to announce what fills the memory.
    names = {name for datum in request.data for name in datum.loss_fn_inputs}
    most = VALUES_PER_TOKEN * max_tokens
    for name in sorted(names):
        values = sum(
            math.prod(datum.loss_fn_inputs[name].shape) for datum in request.data if name in datum.loss_fn_inputs
        )
        if values > most:
            raise InvalidRequestError(
                f"{name} has {values} values, over the {most} of one call; split the datums, or keep fewer "
                "alternatives",
                field=f"loss_fn_inputs.{name}"[:100],
                constraint=f"at most {most} values",
            )


def refuse_coupled(run: Run, request: LossPass) -> None:
    """Refuse a private pass in which one unit's gradient depends on another unit: clipping would bound neither.

    Raises:
        DPUnsupportedError: with the reason and what to do.
    """
    private = run.private
    if private is None or not request.train:
        return
    name, unit = request.loss.name, private.config.privacy_unit
    if request.coupling == "batch":
        raise DPUnsupportedError(
            f"the inputs of {name} look as if they were computed from the whole batch, across privacy units: weights "
            "below zero, or others than at their forward pass (right after a restart: uneven ones)",
            feature="loss_fn",
            reason="removing one unit would change the gradients of the others, which no clipping bounds",
            alternative="take one privacy unit after the other, forward and then backward; or create_custom_loss, "
            "which the server runs for each datum alone, on inputs of that datum alone; or, where each unit's loss "
            "is of that unit alone, attest it: DPConfig(custom_loss='independent'), or custom_loss='independent' in "
            "the key's policy",
        )
    kind = LOSSES.get(name)
    grouped = kind.coupling == "group" if kind is not None else _is_centred(request)
    if kind is None and private.config.custom_loss == "independent":
        grouped = False
    if grouped and (unit in _SMALLER_THAN_A_GROUP or request.units is None):
        raise DPUnsupportedError(
            f"{name} is usually computed on advantages centred over a group, and privacy_unit={unit!r} protects "
            "less than a group",
            feature="loss_fn",
            reason=f"removing one {unit} would change the advantages of its whole group",
            alternative="create the run with DPConfig(privacy_unit='group') and give the group of each datum",
        )


def _is_centred(request: LossPass) -> bool:
    """Whether a custom loss reads what looks like advantages: by that name, or with values on both sides of zero.

    Weights have one sign, log-probabilities the other.
    """
    for name in sorted({n for datum in request.data for n in datum.loss_fn_inputs} - {"target_tokens"}):
        tensors = [d.loss_fn_inputs[name] for d in request.data if name in d.loss_fn_inputs]
        values = [t.to_numpy() for t in tensors if t.dtype == "float32" and t.shape]
        below, above = any((v < 0).any() for v in values), any((v > 0).any() for v in values)
        if name == "advantages" or (below and above):
            return True
    return False


def prepare_datums(run: Run, request: LossPass, graph: str) -> tuple[bytes, LossRequest]:
    """What takes time in proportion to the datums: their digest, and the request for the engine."""
    kind = LOSSES.get(request.loss.name)
    known = None if kind is None else {*kind.required, *kind.optional}
    inputs = tuple(
        {
            name: _array(name, tensor, own=known is None)
            for name, tensor in datum.loss_fn_inputs.items()
            if known is None or name in known
        }
        for datum in request.data
    )
    tokens = tuple(np.array(datum.model_input.to_ints(), dtype=np.int64) for datum in request.data)
    engine_request = LossRequest(
        tokens=tokens,
        inputs=inputs,
        loss=request.loss,
        graph=graph,
        units=request.units,
        train=request.train,
        seed=run.dropout_seed(),
    )
    return data_digest(request.data), engine_request


def _array(name: str, tensor: TensorData, *, own: bool) -> npt.NDArray[Any]:
    dense = tensor.to_numpy()
    # A copy: what came over the wire is read-only, and belongs to the request.
    return np.array(dense, dtype=None if own or name == "target_tokens" else np.float32)


def outputs_of(request: LossPass, logprobs: Sequence[npt.NDArray[np.float32]] | None) -> list[dict[str, TensorData]]:
    """What each datum's targets' log-probabilities are; NaN of the right shape where they are not shown."""
    if logprobs is None:
        shapes = [datum.loss_fn_inputs["target_tokens"].shape for datum in request.data]
        logprobs = [np.full(shape, np.nan, dtype=np.float32) for shape in shapes]
    return [{"logprobs": TensorData(array, dtype="float32")} for array in logprobs]
