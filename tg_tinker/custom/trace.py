"""A loss of one datum, traced: what it calls, as plain data that a server can check and run without running our code.

The format is that of ``create_custom_loss`` of the public training API (format 1): the nodes that torch.fx records of
the function, in order. A node's arguments are JSON; what JSON has no word for is an object of one key, as
``{"ref": "exp"}`` for an earlier node.
"""

from __future__ import annotations

import builtins
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tg_tinker.errors import InvalidRequestError
from tg_tinker.regularizers.tensors import torch_module

FORMAT: Final = 1
MOST_INPUTS: Final = 16
_INPUT: Final = re.compile(r"[a-z_][a-z0-9_]{0,63}", re.ASCII)
_METRIC: Final = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)", re.ASCII)
_LEAVES_TORCH: Final = frozenset({"item", "numpy", "tolist"})
_MODULES: Final = ("torch", "math", "operator", "_operator")


@dataclass(frozen=True, slots=True)
class LossHandle:
    """A traced loss, which may also be called: ``handle(logprobs, advantages=...)`` to (loss, metrics).

    Attributes:
        name: of the function.
        inputs: parameters and their ranks: ``logprobs``, then the ``loss_fn_inputs`` that it reads.
        graph_json: what the server gets.
        loss_id: under which the server has it; empty: nowhere yet.
    """

    name: str
    inputs: tuple[tuple[str, int], ...]
    graph_json: str = field(repr=False)
    graph: Any = field(repr=False, compare=False)
    loss_id: str = ""

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of a datum that it reads, in the order it takes them."""
        return tuple(name for name, _ in self.inputs[1:])

    def __call__(self, logprobs: Any, **inputs: Any) -> tuple[Any, dict[str, Any]]:
        """Run what was traced."""
        loss, metrics = self.graph(logprobs, *(inputs[name] for name in self.input_names))
        return loss, dict(metrics)


def trace_loss(fn: Callable[..., Any], input_ranks: Mapping[str, int]) -> LossHandle:
    """Trace ``fn(logprobs, *inputs)``, which returns a scalar tensor and a dict of scalar tensors.

    It may use torch's functions and math, and must not branch on values, nor use tensors or modules from outside.

    Args:
        input_ranks: of each parameter: 0 for a scalar, 1 for [N], 2 for [N, K]; ``logprobs`` as target_tokens.

    Raises:
        InvalidRequestError: saying what of the function cannot be.

    >>> trace_loss(lambda logprobs, weights: (-(logprobs * weights).sum(), {}), {"logprobs": 1, "weights": 1}).inputs
    (('logprobs', 1), ('weights', 1))
    """
    fx = torch_module().fx
    inputs = _inputs(fn, input_ranks)
    try:
        graph = fx.symbolic_trace(fn)
    except Exception as e:
        raise _refuse(
            f"it cannot be traced ({type(e).__name__}: {e}); it must not branch on values, nor call anything but "
            "torch and math"
        ) from e
    nodes = [_node(node) for node in graph.graph.nodes]
    document = {
        "format": FORMAT,
        "nodes": nodes,
        "inputs": [{"name": name, "rank": rank} for name, rank in inputs],
    }
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return LossHandle(getattr(fn, "__name__", type(fn).__name__), inputs, text, graph)


def _inputs(fn: Callable[..., Any], ranks: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    parameters = list(inspect.signature(fn).parameters.values())
    names = [p.name for p in parameters]
    if not names or names[0] != "logprobs":
        raise _refuse("its first parameter must be logprobs, then the loss_fn_inputs it reads")
    if len(names) > MOST_INPUTS:
        raise _refuse(f"it takes {len(names)} parameters; the most are {MOST_INPUTS}")
    for p in parameters:
        if p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) or p.default is not p.empty:
            raise _refuse(f"{p.name} must be a plain parameter without a default")
        if not _INPUT.fullmatch(p.name):
            raise _refuse(f"{p.name} must be lower-case letters, digits and _")
    if set(ranks) != set(names) or not all(r in (0, 1, 2) for r in ranks.values()) or ranks["logprobs"] == 0:
        raise _refuse(
            f"input_ranks must give 0, 1 or 2 for each of {', '.join(names)}, and 1 or 2 for logprobs",
            where="input_ranks",
        )
    return tuple((name, int(ranks[name])) for name in names)


def _node(node: Any) -> dict[str, Any]:
    """One node, held to what a loss may do."""
    target = str(node.target)
    if node.op == "call_function":
        target = _qualified(node.target)
    elif node.op == "call_method":
        if target == "backward":
            raise _refuse("it calls backward(); return the loss, and the pass does that")
        if target in _LEAVES_TORCH:
            raise _refuse(f"it calls {target}(), which leaves torch; keep every value a tensor")
        if not hasattr(torch_module().Tensor, target):
            raise _refuse(f"tensors have no method {target}()")
    elif node.op == "call_module":
        raise _refuse(f"it calls the module {target}; use functions, as those of torch.nn.functional")
    elif node.op == "get_attr":
        raise _refuse(f"it uses a tensor from outside ({target}); it may read logprobs and its inputs only")
    elif node.op == "output":
        _check_output(node.args[0])
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": [_plain(a) for a in node.args],
        "kwargs": {key: _plain(a) for key, a in node.kwargs.items()},
    }


def _qualified(function: Any) -> str:
    name = getattr(function, "__name__", "")
    if function is getattr(builtins, name, None):
        if name != "getattr":
            raise _refuse(f"it calls {name}(); it may call torch and math only")
        return name
    torch = torch_module()
    module = getattr(function, "__module__", None)
    if module is None:  # of torch's own C functions
        homes = {
            "torch": torch,
            "torch.special": torch.special,
            "torch.linalg": torch.linalg,
            "torch.nn.functional": torch.nn.functional,
        }
        module = next((home for home, found in homes.items() if getattr(found, name, None) is function), "")
    if str(module).partition(".")[0] not in _MODULES:
        raise _refuse(
            f"it calls {name or function!r} of {module or 'an unknown module'}; it may call torch and math only"
        )
    # fx's own name for functions that Python files under torch._ops and the like is not one of torch's.
    return f"{'operator' if module == '_operator' else module}.{name}"


def _plain(value: Any) -> Any:  # noqa: PLR0911 - one for each kind
    torch = torch_module()
    if isinstance(value, torch.fx.Node):
        return {"ref": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {"tuple": _each(value)}
    if isinstance(value, list):
        return _each(value)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _plain(v) for key, v in value.items()}}
    if isinstance(value, slice):
        return {"slice": _each((value.start, value.stop, value.step))}
    if value is Ellipsis:
        return {"ellipsis": True}
    for kind in ("dtype", "device", "layout", "memory_format"):
        if isinstance(value, getattr(torch, kind)):
            return {kind: str(value).removeprefix("torch.")}
    raise _refuse(f"it passes a {type(value).__name__}, which cannot be sent")


def _each(values: Iterable[Any]) -> list[Any]:
    return [_plain(v) for v in values]


def _check_output(output: Any) -> None:
    node = torch_module().fx.Node
    if not isinstance(output, tuple | list) or len(output) != 2 or not isinstance(output[0], node):
        raise _refuse("it must return (loss, metrics), the loss a tensor")
    if not isinstance(output[1], dict):
        raise _refuse("its metrics must be a dict")
    for name, value in output[1].items():
        if not isinstance(name, str) or not _METRIC.fullmatch(name):
            raise _refuse(f"the metric {name!r} must be named custom/<name>:sum or custom/<name>:mean")
        if not isinstance(value, node):
            raise _refuse(f"the metric {name!r} must be a tensor, not {value!r}")


def _refuse(message: str, *, where: str = "loss_fn") -> InvalidRequestError:
    return InvalidRequestError(f"the loss cannot be made: {message}", field=where, constraint="a traceable loss")
