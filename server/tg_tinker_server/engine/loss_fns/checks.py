"""Do datums fit this run and their loss? Checked before any model work."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import TrainingConfig
from tg_tinker.types.losses import CUSTOM, LOSSES
from tg_tinker_server.engine.backend import LossRequest
from tg_tinker_server.engine.loss_fns.values import Array, Inputs

_TARGETS = "target_tokens"


def check_datums(request: LossRequest, config: TrainingConfig, *, vocab_size: int, max_positions: int) -> None:
    """Raise InvalidRequestError with field and constraint unless the datums fit. Messages hold counts, no content.

    No datum at all fits only where Poisson sampling may draw none.
    """
    datums = len(request.tokens)
    dp = config.dp_config
    if datums == 0 and not (config.private and dp is not None and dp.sampling == "poisson"):
        raise _refuse("there is no datum", "data", "at least one datum")
    if len(request.inputs) != datums:
        raise _refuse(f"{len(request.inputs)} sets of loss_fn_inputs for {datums} datums", "data", "one for each")
    if request.units is not None and len(request.units) != datums:
        raise _refuse(
            f"{len(request.units)} privacy unit ids for {datums} datums", "privacy_unit_ids", "one id per datum"
        )
    for i, (tokens, inputs) in enumerate(zip(request.tokens, request.inputs, strict=True)):
        _check_tokens(i, tokens, max_positions)
        _check_ids(i, "model_input", tokens, "data.model_input", vocab_size)
        _check_inputs(i, request.loss.name, tokens, inputs)
        _check_ids(i, _TARGETS, inputs[_TARGETS], f"loss_fn_inputs.{_TARGETS}", vocab_size)
        if request.loss.name != CUSTOM:
            _check_thresholds(i, inputs, request.loss.config)
    if request.loss.name == CUSTOM:
        _check_graph(request)
    elif request.graph:
        raise _refuse(f"a graph belongs to loss_fn 'custom', not to {request.loss.name!r}", "loss_fn", CUSTOM)


def _refuse(message: str, field: str, constraint: str) -> InvalidRequestError:
    return InvalidRequestError(message, field=field, constraint=constraint)


def _check_tokens(datum: int, tokens: Array, max_positions: int) -> None:
    field = "data.model_input"
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise _refuse(f"the tokens of datum {datum} are {tokens.dtype} {list(tokens.shape)}", field, "int64 [N]")
    if not tokens.size:
        raise _refuse(f"datum {datum} holds no token", field, "at least one token")
    if tokens.size > max_positions:
        raise _refuse(
            f"datum {datum} has {tokens.size} tokens, more than this run's {max_positions}; shorten or split it "
            "(nothing is cut silently)",
            field,
            f"at most {max_positions} tokens",
        )


def _check_ids(datum: int, name: str, ids: Array, field: str, vocab_size: int) -> None:
    outside = int(((ids < 0) | (ids >= vocab_size)).sum())
    if outside:
        raise _refuse(
            f"{name} of datum {datum} holds {outside} id(s) outside the model's vocabulary of {vocab_size}; where "
            "nothing is predicted give any id, as 0, with weight or advantage 0",
            field,
            f"0 <= id < {vocab_size}",
        )


def _check_inputs(datum: int, loss: str, tokens: Array, inputs: Inputs) -> None:
    kind = LOSSES.get(loss)
    required = (_TARGETS,) if kind is None else kind.required
    missing = [name for name in required if name not in inputs]
    if missing:
        raise _refuse(
            f"{loss} needs loss_fn_inputs[{missing[0]!r}], which datum {datum} lacks",
            f"loss_fn_inputs.{missing[0]}",
            "present",
        )
    targets = inputs[_TARGETS]
    dimensions = (1,) if kind is not None and not kind.alternatives else (1, 2)
    fits = np.issubdtype(targets.dtype, np.integer) and targets.ndim in dimensions and len(targets) == len(tokens)
    if not fits or not targets.size:
        wanted = "int64 [N] or [N, K]" if 2 in dimensions else "int64 [N]"
        raise _refuse(
            f"target_tokens of datum {datum} are {targets.dtype} {list(targets.shape)} for {len(tokens)} tokens; "
            f"they are {wanted}",
            f"loss_fn_inputs.{_TARGETS}",
            f"{wanted}, one row for each token",
        )
    for name in () if kind is None else (*kind.required, *kind.optional):
        if name in inputs and inputs[name].shape != targets.shape:
            raise _refuse(
                f"{name} of datum {datum} has the shape {list(inputs[name].shape)}, target_tokens "
                f"{list(targets.shape)}",
                f"loss_fn_inputs.{name}",
                "same shape as target_tokens",
            )


def _check_thresholds(datum: int, inputs: Inputs, config: Mapping[str, float]) -> None:
    names = ("clip_low_threshold", "clip_high_threshold")
    if names[0] not in config or not any(name in inputs for name in names):
        return
    low, high = (np.asarray(inputs.get(name, config[name])) for name in names)
    if not ((low >= 0) & (low <= high) & (high < np.inf)).all():
        raise _refuse(
            f"a ratio of datum {datum} cannot be clipped to its thresholds",
            "loss_fn_inputs.clip_low_threshold",
            "0 <= low <= high, finite",
        )


def _check_graph(request: LossRequest) -> None:
    from tg_tinker_server.engine.loss_fns.graph import MOST_OF_CALL, compiled  # torch: not where NumPy is enough

    graph, numbers = compiled(request.graph), 0
    for i, inputs in enumerate(request.inputs):
        numbers += graph.check(i, inputs)
        if numbers > MOST_OF_CALL:
            raise _refuse(
                f"the custom loss would compute over {MOST_OF_CALL} numbers by datum {i} of {len(request.inputs)}; "
                "send fewer datums in one call, or take a smaller loss",
                "loss_fn",
                f"at most {MOST_OF_CALL} numbers for all datums of a call",
            )
