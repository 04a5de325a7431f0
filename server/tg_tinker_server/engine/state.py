"""Checks a saved state against the run that is to take it over, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.engine.backend import EngineState
from tg_tinker_server.engine.gradients import ParamLayout

WEIGHTS, OPTIMIZER, ANCHOR = "weights/", "optimizer/", "anchor/"
Arrays = dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"]


def _refuse(what: str, *, optimizer: bool = False) -> InvalidRequestError:
    alone = ", or its weights alone with optimizer=False" if optimizer else ""
    return InvalidRequestError(
        f"this checkpoint does not fit the run: {what}; load it into a run with the same model_ref, lora_config and "
        f"optimizer{alone}",
        field="artifact_id",
        constraint="a checkpoint of a run with the same shape",
    )


def checked_weights(state: EngineState, layout: ParamLayout) -> Arrays:
    """The weights by parameter name.

    Raises:
        InvalidRequestError: names or shapes differ, or a value is not finite.
    """
    return _checked(state, WEIGHTS, layout)


def checked_anchor(state: EngineState, layout: ParamLayout) -> npt.NDArray[np.float32] | None:
    """What the run is anchored to, flat [P]; ``None`` where that is the state's own weights.

    Raises:
        InvalidRequestError: as ``checked_weights``.
    """
    if not any(key.startswith(ANCHOR) for key in state.tensors):
        return None
    arrays = _checked(state, ANCHOR, layout)
    return np.concatenate([arrays[name].reshape(-1) for name in layout.shapes])


def checkpoint_of(state: EngineState) -> EngineState:
    """A state for others to load: without the anchor, so that who loads it is anchored to its weights."""
    tensors = {key: value for key, value in state.tensors.items() if not key.startswith(ANCHOR)}
    return EngineState(tensors=tensors, scalars=state.scalars)


def _checked(state: EngineState, prefix: str, layout: ParamLayout) -> Arrays:
    found = {k.removeprefix(prefix): v for k, v in state.tensors.items() if k.startswith(prefix)}
    missing, extra = sorted(set(layout.shapes) - set(found)), sorted(set(found) - set(layout.shapes))
    if missing or extra:
        raise _refuse(f"{len(missing)} parameters are missing and {len(extra)} unknown, e.g. {(missing + extra)[0]}")
    for name, shape in layout.shapes.items():
        if found[name].shape != shape:
            raise _refuse(f"{name} has shape {list(found[name].shape)}, here it is {list(shape)}")
        if not np.isfinite(found[name]).all():
            raise _refuse(f"{name} holds values that are not finite")
    return {name: np.asarray(found[name], dtype=np.float32) for name in layout.shapes}


def checked_optimizer(state: EngineState, layout: ParamLayout, *, optimizer: str) -> Mapping[str, Arrays]:
    """The optimizer's arrays by parameter name and quantity; empty when it had not stepped yet.

    Raises:
        InvalidRequestError: saved without an optimizer, by another one, for other parameters, or with values that are
            not finite.
    """
    saved = state.scalars.get("optimizer")
    if saved is None:
        raise _refuse("it was saved without its optimizer", optimizer=True)
    if saved != optimizer:
        raise _refuse(f"its optimizer was {saved}, here it is {optimizer}", optimizer=True)
    out: dict[str, Arrays] = {}
    for key, value in state.tensors.items():
        if not key.startswith(OPTIMIZER):
            continue
        name, _, quantity = key.removeprefix(OPTIMIZER).rpartition("/")
        if name not in layout.shapes:
            raise _refuse(f"its optimizer knows {name}, which is not trained here", optimizer=True)
        if not np.isfinite(value).all():
            raise _refuse(f"its optimizer holds values that are not finite for {name}", optimizer=True)
        out.setdefault(name, {})[quantity] = np.asarray(value, dtype=np.float32)
    unknown = sorted(set(layout.shapes) - set(out)) if out else []
    if unknown:
        raise _refuse(f"its optimizer does not know {unknown[0]}, which is trained here", optimizer=True)
    return out
