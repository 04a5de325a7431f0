"""Custom losses: a graph of torch calls as plain data, run once for each datum. None of the sender's code is run.

The graph is what torch.fx records of a Python function, written as JSON by the public training API's
``create_custom_loss`` (format 1). It is read node by node against a list of what may be called (graph_ops.py). Its
shapes are worked out before anything is computed: a graph that does not fit, or that would take too much memory, is
refused by the name of the node. As nothing in it can depend on another datum, losses stay independent.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.engine.loss_fns import graph_ops
from tg_tinker_server.engine.loss_fns.values import DatumLoss, Inputs

MAX_BYTES = 256 * 2**10
MAX_NODES = 1000
MAX_INPUTS = 16
MAX_NUMBERS = 2**25
"""Numbers in the results of all nodes of one datum."""
_MAX_DEPTH = 6
_MAX_ITEMS = 64
_FORMAT = 1
_LOGPROBS, _TARGETS = "logprobs", "target_tokens"
_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}", re.ASCII)
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)", re.ASCII)
_KEYS = {"op", "name", "target", "args", "kwargs"}


@dataclass(frozen=True, slots=True)
class _Ref:
    name: str


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    target: str
    op: graph_ops.Op
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class CompiledGraph:
    """A graph that was read and found to hold nothing but what is allowed.

    Attributes:
        inputs: names in ``loss_fn_inputs`` that it reads, in the order it takes them; log-probabilities come before.
    """

    def __init__(
        self,
        places: Mapping[str, str],
        nodes: tuple[_Node, ...],
        loss: _Ref,
        metrics: Mapping[str, _Ref],
        ranks: Mapping[str, int],
    ) -> None:
        self._places, self._nodes, self._loss, self._metrics, self._ranks = places, nodes, loss, metrics, ranks
        self.inputs = tuple(places.values())[1:]
        self._fitting: set[tuple[Any, ...]] = set()

    def check(self, datum: int, inputs: Inputs) -> None:
        """Work out every shape for one datum; nothing is computed.

        Raises:
            InvalidRequestError: an input is missing or of another rank than declared; a node does not work with these
                shapes, or makes too many numbers; the loss or a metric is no scalar.
        """
        missing = [name for name in self.inputs if name not in inputs]
        if missing:
            raise InvalidRequestError(
                f"the loss reads loss_fn_inputs[{missing[0]!r}], which datum {datum} lacks",
                field=f"loss_fn_inputs.{missing[0]}",
                constraint="present",
            )
        read = self._read(inputs)
        for name, array in read.items():
            if array.ndim != self._ranks.get(name, array.ndim):
                raise InvalidRequestError(
                    f"{name} of datum {datum} has {array.ndim} dimensions; the loss declared {self._ranks[name]}",
                    field=f"loss_fn_inputs.{name}",
                    constraint="the declared rank",
                )
        key = tuple((a.shape, a.dtype.str) for a in read.values())
        if key in self._fitting:
            return
        with torch.device("meta"), torch.no_grad():
            given = {
                name: torch.empty(a.shape, dtype=torch.from_numpy(np.empty(0, a.dtype)).dtype)
                for name, a in read.items()
            }
            given[_LOGPROBS] = torch.empty(inputs[_TARGETS].shape)
            _results_fit(self._run(given), self._loss, self._metrics)
        if len(self._fitting) > 4096:
            self._fitting.clear()
        self._fitting.add(key)

    def evaluate(self, logprobs: npt.NDArray[Any], inputs: Inputs, *, train: bool) -> DatumLoss:
        """The loss of one datum, with its derivative in training. Checked before.

        What fails now fails by values (an index out of range). It counts like a loss that is not a number: whether a
        private datum fails is nobody's business.
        """
        lp = torch.from_numpy(logprobs.astype(np.float32)).requires_grad_(train)
        given = {name: torch.from_numpy(np.array(array)) for name, array in self._read(inputs).items()}
        try:
            with torch.set_grad_enabled(train):
                found = self._run(given | {_LOGPROBS: lp})
            loss = found[self._loss.name]
            slope = None
            if train:
                (gradient,) = torch.autograd.grad(loss, lp, allow_unused=True) if loss.requires_grad else (None,)
                slope = np.zeros(lp.shape) if gradient is None else gradient.double().numpy()
            metrics = {name: float(found[ref.name].detach()) for name, ref in self._metrics.items()}
            return DatumLoss(value=float(loss.detach()), slope=slope, metrics=metrics)
        except (InvalidRequestError, IndexError, RuntimeError):
            slope = np.full(logprobs.shape, np.nan) if train else None
            return DatumLoss(value=math.nan, slope=slope, metrics=dict.fromkeys(self._metrics, math.nan))

    def _read(self, inputs: Inputs) -> dict[str, npt.NDArray[Any]]:
        """The inputs by name, with the targets for the shape of the log-probabilities."""
        return {name: np.asarray(inputs[name]) for name in (*self.inputs, _TARGETS)}

    def _run(self, given: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The result of every node by its name.

        Raises:
            InvalidRequestError: naming the node that failed.
        """
        found: dict[str, Any] = {place: given[name] for place, name in self._places.items()}
        numbers = 0
        for node in self._nodes:
            args = [_filled(arg, found) for arg in node.args]
            kwargs = {key: _filled(value, found) for key, value in node.kwargs.items()}
            try:
                result = node.op.call(*args, **kwargs)
            except (TypeError, ValueError, RuntimeError, IndexError, ArithmeticError, NotImplementedError) as e:
                raise _refuse(f"node {node.name!r} ({node.target}) does not work: {_first_line(e)}") from e
            if isinstance(result, tuple | list) and len(result) > _MAX_ITEMS:
                raise _refuse(f"node {node.name!r} ({node.target}) has more than {_MAX_ITEMS} results")
            numbers += _numbers(result)
            if numbers > MAX_NUMBERS:
                raise _refuse(
                    f"node {node.name!r} ({node.target}) brings the loss of one datum over {MAX_NUMBERS} numbers"
                )
            found[node.name] = result
        return found


@functools.lru_cache(maxsize=64)
def compiled(text: str) -> CompiledGraph:
    """``parse_graph``, remembering the last few."""
    return parse_graph(text)


def parse_graph(text: str) -> CompiledGraph:
    """Read a graph.

    Args:
        text: JSON ``{"format": 1, "nodes": [...]}``; with ``"inputs": [{"name", "rank"}, ...]`` where ranks were
            declared.

    Raises:
        InvalidRequestError: too large, no such JSON, or a node that is not allowed, by its name.
    """
    if not text:
        raise _refuse("there is no graph of the custom loss")
    if len(text.encode()) > MAX_BYTES:
        raise _refuse(f"the graph is larger than {MAX_BYTES >> 10} KiB")
    try:
        tree = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise _refuse("the graph is not JSON") from e
    if not isinstance(tree, dict) or set(tree) - {"format", "nodes", "inputs"} or tree.get("format") != _FORMAT:
        raise _refuse(f"the graph is not an object of format {_FORMAT} with nodes")
    nodes = tree.get("nodes")
    if not isinstance(nodes, list) or not 2 <= len(nodes) <= MAX_NODES:
        raise _refuse(f"a graph has 2 to {MAX_NODES} nodes")
    return _Reader(_ranks(tree.get("inputs"))).read(nodes)


class _Reader:
    """Reads nodes in order; every reference is to a node before."""

    def __init__(self, ranks: Mapping[str, int]) -> None:
        self._ranks = ranks
        self._known: set[str] = set()
        self._places: dict[str, str] = {}
        self._nodes: list[_Node] = []

    def read(self, nodes: list[Any]) -> CompiledGraph:
        *body, last = [_fields(node) for node in nodes]
        for op, name, target, args, kwargs in body:
            if name in self._known:
                raise _refuse(f"node {name!r} is there twice")
            if op == "placeholder":
                self._add_input(name, target, args, kwargs)
            else:
                self._add_call(op, name, target, args, kwargs)
            self._known.add(name)
        if self._ranks and set(self._ranks) != set(self._places.values()):
            raise _refuse("the declared inputs are not those that the graph reads")
        op, name, _, args, kwargs = last
        if op != "output" or len(args) != 1 or kwargs:
            raise _refuse(f"the last node, {name!r}, is not the output with one result")
        loss, metrics = self._output(self._decoded(args[0], name))
        if not self._places:
            raise _refuse("the graph does not read logprobs")
        return CompiledGraph(self._places, tuple(self._nodes), loss, metrics, self._ranks)

    def _add_input(self, name: str, target: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        first = not self._places
        fits = _INPUT_NAME.fullmatch(target) and (target == _LOGPROBS) == first and not args and not kwargs
        if not fits or self._nodes or target in self._places.values() or len(self._places) == MAX_INPUTS:
            raise _refuse(
                f"input {name!r} is not possible: logprobs come first, then up to {MAX_INPUTS - 1} different "
                "loss_fn_inputs without defaults, before all other nodes"
            )
        self._places[name] = target

    def _add_call(self, op: str, name: str, target: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        find: Callable[[str], graph_ops.Op | None] | None = {
            "call_function": graph_ops.function,
            "call_method": graph_ops.method,
        }.get(op)
        found = find(target) if find else None
        if found is None:
            raise _refuse(f"node {name!r} is {op} of {target[:80]!r}, which a custom loss cannot use here")
        kwargs = {
            key: value for key, value in kwargs.items() if key in found.keywords or not _says_nothing(key, value)
        }
        strange = sorted(set(kwargs) - found.keywords)
        if strange:
            raise _refuse(f"node {name!r} ({target}) has the argument {strange[0][:80]!r}, which is not offered here")
        if len(args) > found.most or len(args) + len(kwargs) < found.least:
            raise _refuse(
                f"node {name!r} ({target}) has {len(args)} arguments; it takes {found.least} to {found.most} here"
            )
        self._nodes.append(
            _Node(
                name=name,
                target=target,
                op=found,
                args=tuple(self._decoded(arg, name) for arg in args),
                kwargs={key: self._decoded(value, name) for key, value in kwargs.items()},
            )
        )

    def _output(self, result: Any) -> tuple[_Ref, Mapping[str, _Ref]]:
        if not isinstance(result, tuple | list) or len(result) != 2 or not isinstance(result[0], _Ref):
            raise _refuse("the graph does not return a loss and a dict of metrics")
        loss, metrics = result
        if not isinstance(metrics, dict) or not all(isinstance(value, _Ref) for value in metrics.values()):
            raise _refuse("the graph's metrics are not a dict of tensors")
        strange = [name for name in metrics if not _METRIC.fullmatch(name)]
        if strange:
            raise _refuse(f"the metric {strange[0][:80]!r} is not named custom/<name>:sum or custom/<name>:mean")
        return loss, metrics

    def _decoded(self, arg: Any, node: str, depth: int = 0) -> Any:
        """One argument; see the public API's ``CustomLossNode`` for the forms."""
        if depth > _MAX_DEPTH:
            raise _refuse(f"an argument of node {node!r} is nested too deeply")
        if arg is None or isinstance(arg, bool | float):
            return arg
        if isinstance(arg, int):
            return _bounded(arg, node)
        if isinstance(arg, str):
            return _short(arg, node)
        if isinstance(arg, list):
            return self._items(arg, node, depth)
        if isinstance(arg, dict) and len(arg) == 1:
            ((kind, value),) = arg.items()
            decode = {
                "ref": self._ref,
                "tuple": lambda v, n, d: tuple(self._items(v, n, d)),
                "dict": self._mapping,
                "slice": self._slice,
                "ellipsis": lambda *_: Ellipsis,
                "float": _float,
                "dtype": _dtype,
                "device": _device,
            }.get(kind)
            if decode is not None:
                return decode(value, node, depth)
        raise _refuse(f"node {node!r} has an argument of a form that is not offered here")

    def _items(self, values: Any, node: str, depth: int) -> list[Any]:
        if not isinstance(values, list) or len(values) > _MAX_ITEMS:
            raise _refuse(f"node {node!r} has a list of more than {_MAX_ITEMS}, or none where one is needed")
        return [self._decoded(value, node, depth + 1) for value in values]

    def _mapping(self, values: Any, node: str, depth: int) -> dict[str, Any]:
        if not isinstance(values, dict) or len(values) > _MAX_ITEMS:
            raise _refuse(f"node {node!r} has a dict of more than {_MAX_ITEMS}, or none where one is needed")
        return {key: self._decoded(value, node, depth + 1) for key, value in values.items()}

    def _ref(self, name: Any, node: str, _: int) -> _Ref:
        if not isinstance(name, str) or name not in self._known:
            raise _refuse(f"node {node!r} refers to a node that is not before it")
        return _Ref(name)

    def _slice(self, values: Any, node: str, depth: int) -> slice:
        parts = self._items(values, node, depth)
        if len(parts) != 3:
            raise _refuse(f"node {node!r} has a slice without start, stop and step")
        return slice(*parts)


def _says_nothing(keyword: str, value: Any) -> bool:
    """What torch's functions record beside what their caller wrote."""
    return value is None or keyword == "_stacklevel" or (keyword == "inplace" and value is False)


def _fields(node: Any) -> tuple[str, str, str, list[Any], dict[str, Any]]:
    if not isinstance(node, dict) or set(node) - _KEYS:
        raise _refuse("a node is not an object with op, name, target, args and kwargs")
    op, name, target = (node.get(key) for key in ("op", "name", "target"))
    args, kwargs = node.get("args", []), node.get("kwargs", {})
    if not isinstance(name, str) or not _NODE_NAME.fullmatch(name):
        raise _refuse("a node has no name of letters, digits and underscores")
    if (
        not isinstance(op, str)
        or not isinstance(target, str)
        or not isinstance(args, list)
        or not isinstance(kwargs, dict)
    ):
        raise _refuse(f"node {name!r} is malformed")
    return op, name, target, args, kwargs


def _ranks(inputs: Any) -> dict[str, int]:
    if inputs is None:
        return {}
    fits = (
        isinstance(inputs, list)
        and len(inputs) <= MAX_INPUTS
        and all(
            isinstance(i, dict)
            and set(i) == {"name", "rank"}
            and isinstance(i["name"], str)
            and i["rank"] in (0, 1, 2)
            for i in inputs
        )
    )
    if not fits:
        raise _refuse("the inputs of the graph are not a list of names with ranks 0, 1 or 2")
    return {i["name"]: i["rank"] for i in inputs}


def _filled(arg: Any, found: Mapping[str, Any]) -> Any:
    """An argument with results in place of references."""
    if isinstance(arg, _Ref):
        return found[arg.name]
    if isinstance(arg, list | tuple):
        return type(arg)(_filled(a, found) for a in arg)
    if isinstance(arg, dict):
        return {key: _filled(a, found) for key, a in arg.items()}
    if isinstance(arg, slice):
        return slice(*(_filled(a, found) for a in (arg.start, arg.stop, arg.step)))
    return arg


def _results_fit(found: Mapping[str, Any], loss: _Ref, metrics: Mapping[str, _Ref]) -> None:
    value = found[loss.name]
    if not isinstance(value, torch.Tensor) or value.ndim or not value.is_floating_point():
        raise _refuse(f"the loss, node {loss.name!r}, is not a scalar tensor of floats; sum it over positions")
    for name, ref in metrics.items():
        metric = found[ref.name]
        if not isinstance(metric, torch.Tensor) or metric.ndim or metric.is_complex():
            raise _refuse(f"the metric {name!r}, node {ref.name!r}, is not a scalar tensor")


def _numbers(result: Any) -> int:
    if isinstance(result, torch.Tensor):
        return result.numel()
    return sum(_numbers(r) for r in result) if isinstance(result, tuple | list) else 1


def _bounded(value: int, node: str) -> int:
    if abs(value) > graph_ops.MOST_INT:
        raise _refuse(f"node {node!r} has a number that is too large")
    return value


def _short(value: str, node: str) -> str:
    if len(value) > 64:
        raise _refuse(f"node {node!r} has a text that is too long")
    return value


def _float(value: Any, node: str, _: int) -> float:
    if value not in ("inf", "-inf", "nan"):
        raise _refuse(f"node {node!r} has a float that is neither inf, -inf nor nan")
    return float(value)


def _dtype(value: Any, node: str, _: int) -> torch.dtype:
    if not isinstance(value, str) or value not in graph_ops.DTYPES:
        raise _refuse(f"node {node!r} has a dtype that is not offered here")
    found: torch.dtype = graph_ops.DTYPES[value]
    return found


def _device(value: Any, node: str, _: int) -> str:
    if value != "cpu":
        raise _refuse(f"node {node!r} names the device {str(value)[:80]!r}; a custom loss runs on 'cpu'")
    return "cpu"


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _refuse(message: str) -> InvalidRequestError:
    return InvalidRequestError(
        message, field="loss_fn", constraint="a graph of the operations that a custom loss can use"
    )


__all__ = ["CompiledGraph", "compiled", "parse_graph"]
