"""The four optimizers as pure NumPy functions: parameter, gradient, state in; parameter and state out.

Same formulas as torch.optim's, so that both backends answer alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import OptimizerConfig

Floats = npt.NDArray[np.float32]
State = Mapping[str, Floats]


def update(
    config: OptimizerConfig, param: Floats, grad: Floats, state: State, *, learning_rate: float
) -> tuple[Floats, dict[str, Floats]]:
    """One step on one parameter; ``state`` is empty before the first.

    Raises:
        InvalidRequestError: an unknown optimizer.
    """
    if config.name in ("adam", "adamw"):
        return _adam(config, param, grad, state, learning_rate)
    if config.name == "sgd":
        return _sgd(config, param, grad, state, learning_rate)
    if config.name == "adafactor":
        return _adafactor(config, param, grad, state, learning_rate)
    raise InvalidRequestError(
        f"unknown optimizer {config.name!r}; known: adamw, adam, sgd, adafactor",
        field="optimizer.name",
        constraint="one of: adamw, adam, sgd, adafactor",
    )


def _count(state: State) -> tuple[float, Floats]:
    step = float(state["step"]) + 1 if "step" in state else 1.0
    return step, np.array(step, dtype=np.float32)


def _adam(
    config: OptimizerConfig, param: Floats, grad: Floats, state: State, lr: float
) -> tuple[Floats, dict[str, Floats]]:
    """Kingma and Ba 2015; with decoupled decay (Loshchilov and Hutter 2019) as "adamw"."""
    beta1, beta2 = config.betas
    step, count = _count(state)
    if config.name == "adamw":
        param = param * np.float32(1 - lr * config.weight_decay)
    elif config.weight_decay:
        grad = grad + np.float32(config.weight_decay) * param
    mean = np.float32(beta1) * state.get("exp_avg", np.zeros_like(param)) + np.float32(1 - beta1) * grad
    square = np.float32(beta2) * state.get("exp_avg_sq", np.zeros_like(param)) + np.float32(1 - beta2) * grad * grad
    size = np.sqrt(square) / np.float32(np.sqrt(1 - beta2**step)) + np.float32(config.eps)
    moved = param - np.float32(lr / (1 - beta1**step)) * mean / size
    return moved.astype(np.float32), {"step": count, "exp_avg": mean, "exp_avg_sq": square}


def _sgd(
    config: OptimizerConfig, param: Floats, grad: Floats, state: State, lr: float
) -> tuple[Floats, dict[str, Floats]]:
    """Momentum as torch has it: the first buffer is the gradient itself."""
    if config.weight_decay:
        grad = grad + np.float32(config.weight_decay) * param
    if config.momentum == 0:
        return (param - np.float32(lr) * grad).astype(np.float32), {}
    momentum = np.float32(config.momentum)
    buffer = momentum * state["momentum_buffer"] + grad if "momentum_buffer" in state else grad
    direction = grad + momentum * buffer if config.nesterov else buffer
    return (param - np.float32(lr) * direction).astype(np.float32), {"momentum_buffer": buffer.astype(np.float32)}


def _adafactor(
    config: OptimizerConfig, param: Floats, grad: Floats, state: State, lr: float
) -> tuple[Floats, dict[str, Floats]]:
    """Shazeer and Stern 2018, with torch's constants: second moments factored for a matrix, whole for a vector."""
    eps1, eps2, clip = float(np.finfo(np.float32).eps), 1e-3, 1.0
    step, count = _count(state)
    keep = 1.0 - step**-0.8
    rho = min(lr, 1.0 / np.sqrt(step))
    alpha = max(eps2, float(np.sqrt(np.mean(np.square(param, dtype=np.float64))))) * rho
    param = param * np.float32(1 - lr * config.weight_decay)
    square = np.square(grad, dtype=np.float64)
    zero = np.zeros(1)
    if grad.ndim == 1:
        variance = keep * state.get("variance", zero) + (1 - keep) * square
        moments = {"variance": variance.astype(np.float32)}
    else:
        row = keep * state.get("row_var", zero) + (1 - keep) * square.mean(axis=-1, keepdims=True)
        column = keep * state.get("col_var", zero) + (1 - keep) * square.mean(axis=-2, keepdims=True)
        variance = row @ column / max(float(row.mean()), eps1)
        moments = {"row_var": row.astype(np.float32), "col_var": column.astype(np.float32)}
    direction = grad / np.sqrt(np.maximum(variance, eps1 * eps1))
    direction = direction / max(1.0, float(np.sqrt(np.mean(np.square(direction)))) / clip)
    moved = param - np.float32(alpha) * direction
    return moved.astype(np.float32), {"step": count, **moments}
