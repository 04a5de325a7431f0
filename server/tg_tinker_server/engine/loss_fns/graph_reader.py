"""Reads the graph of a custom loss, node by node, against the list of what may be called (graph_ops.py).

What is read is plain data: names, numbers and references to nodes before. See the public API's ``CustomLossNode``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.engine.loss_fns import graph_ops

MAX_BYTES = 256 * 2**10
MAX_NODES = 1000
MAX_INPUTS = 16
MAX_ITEMS = 64
"""Of a list, and results of a node."""
LOGPROBS = "logprobs"
_MAX_DEPTH = 6
_FORMAT = 1
_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}", re.ASCII)
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)", re.ASCII)
_KEYS = {"op", "name", "target", "args", "kwargs"}


@dataclass(frozen=True, slots=True)
class Ref:
    """The result of another node."""

    name: str


@dataclass(frozen=True, slots=True)
class Node:
    """One call; in its arguments ``Ref`` stands for results."""

    name: str
    target: str
    op: graph_ops.Op
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadGraph:
    """A graph that holds nothing but what is allowed.

    Attributes:
        places: the input that each placeholder stands for; log-probabilities first.
        nodes: calls, in order.
        loss: what is returned.
        metrics: by name.
        ranks: dimensions of each input, if they were declared.
    """

    places: Mapping[str, str]
    nodes: tuple[Node, ...]
    loss: Ref
    metrics: Mapping[str, Ref]
    ranks: Mapping[str, int]


def read_graph(text: str) -> ReadGraph:
    """Read a graph.

    Args:
        text: JSON ``{"format": 1, "nodes": [...]}``; with ``"inputs": [{"name", "rank"}, ...]`` where ranks were
            declared.

    Raises:
        InvalidRequestError: too large, no such JSON, or a node that is not allowed, by its name.
    """
    if not text:
        raise refuse("there is no graph of the custom loss")
    if len(text.encode()) > MAX_BYTES:
        raise refuse(f"the graph is larger than {MAX_BYTES >> 10} KiB")
    try:
        tree = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise refuse("the graph is not JSON") from e
    if not isinstance(tree, dict) or set(tree) - {"format", "nodes", "inputs"} or tree.get("format") != _FORMAT:
        raise refuse(f"the graph is not an object of format {_FORMAT} with nodes")
    nodes = tree.get("nodes")
    if not isinstance(nodes, list) or not 2 <= len(nodes) <= MAX_NODES:
        raise refuse(f"a graph has 2 to {MAX_NODES} nodes")
    return _Reader(_ranks(tree.get("inputs"))).read(nodes)


class _Reader:
    """Reads nodes in order; every reference is to a node before."""

    def __init__(self, ranks: Mapping[str, int]) -> None:
        self._ranks = ranks
        self._known: set[str] = set()
        self._places: dict[str, str] = {}
        self._nodes: list[Node] = []

    def read(self, nodes: list[Any]) -> ReadGraph:
        *body, last = [_fields(node) for node in nodes]
        for op, name, target, args, kwargs in body:
            if name in self._known:
                raise refuse(f"node {name!r} is there twice")
            if op == "placeholder":
                self._add_input(name, target, args, kwargs)
            else:
                self._add_call(op, name, target, args, kwargs)
            self._known.add(name)
        if self._ranks and set(self._ranks) != set(self._places.values()):
            raise refuse("the declared inputs are not those that the graph reads")
        op, name, _, args, kwargs = last
        if op != "output" or len(args) != 1 or kwargs:
            raise refuse(f"the last node, {name!r}, is not the output with one result")
        loss, metrics = self._output(self._decoded(args[0], name))
        if not self._places:
            raise refuse("the graph does not read logprobs")
        return ReadGraph(places=self._places, nodes=tuple(self._nodes), loss=loss, metrics=metrics, ranks=self._ranks)

    def _add_input(self, name: str, target: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        first = not self._places
        fits = _INPUT_NAME.fullmatch(target) and (target == LOGPROBS) == first and not args and not kwargs
        if not fits or self._nodes or target in self._places.values() or len(self._places) == MAX_INPUTS:
            raise refuse(
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
            raise refuse(f"node {name!r} is {op} of {target[:80]!r}, which a custom loss cannot use here")
        kwargs = {
            key: value for key, value in kwargs.items() if key in found.keywords or not _says_nothing(key, value)
        }
        strange = sorted(set(kwargs) - found.keywords)
        if strange:
            raise refuse(f"node {name!r} ({target}) has the argument {strange[0][:80]!r}, which is not offered here")
        if len(args) > found.most or len(args) + len(kwargs) < found.least:
            raise refuse(
                f"node {name!r} ({target}) has {len(args)} arguments; it takes {found.least} to {found.most} here"
            )
        self._nodes.append(
            Node(
                name=name,
                target=target,
                op=found,
                args=tuple(self._decoded(arg, name) for arg in args),
                kwargs={key: self._decoded(value, name) for key, value in kwargs.items()},
            )
        )

    def _output(self, result: Any) -> tuple[Ref, Mapping[str, Ref]]:
        if not isinstance(result, tuple | list) or len(result) != 2 or not isinstance(result[0], Ref):
            raise refuse("the graph does not return a loss and a dict of metrics")
        loss, metrics = result
        if not isinstance(metrics, dict) or not all(isinstance(value, Ref) for value in metrics.values()):
            raise refuse("the graph's metrics are not a dict of tensors")
        strange = [name for name in metrics if not _METRIC.fullmatch(name)]
        if strange:
            raise refuse(f"the metric {strange[0][:80]!r} is not named custom/<name>:sum or custom/<name>:mean")
        return loss, metrics

    def _decoded(self, arg: Any, node: str, depth: int = 0) -> Any:
        """One argument."""
        if depth > _MAX_DEPTH:
            raise refuse(f"an argument of node {node!r} is nested too deeply")
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
        raise refuse(f"node {node!r} has an argument of a form that is not offered here")

    def _items(self, values: Any, node: str, depth: int) -> list[Any]:
        if not isinstance(values, list) or len(values) > MAX_ITEMS:
            raise refuse(f"node {node!r} has a list of more than {MAX_ITEMS}, or none where one is needed")
        return [self._decoded(value, node, depth + 1) for value in values]

    def _mapping(self, values: Any, node: str, depth: int) -> dict[str, Any]:
        if not isinstance(values, dict) or len(values) > MAX_ITEMS:
            raise refuse(f"node {node!r} has a dict of more than {MAX_ITEMS}, or none where one is needed")
        return {key: self._decoded(value, node, depth + 1) for key, value in values.items()}

    def _ref(self, name: Any, node: str, _: int) -> Ref:
        if not isinstance(name, str) or name not in self._known:
            raise refuse(f"node {node!r} refers to a node that is not before it")
        return Ref(name)

    def _slice(self, values: Any, node: str, depth: int) -> slice:
        parts = self._items(values, node, depth)
        if len(parts) != 3:
            raise refuse(f"node {node!r} has a slice without start, stop and step")
        return slice(*parts)


def _says_nothing(keyword: str, value: Any) -> bool:
    """What torch's functions record beside what their caller wrote."""
    return value is None or keyword == "_stacklevel" or (keyword == "inplace" and value is False)


def _fields(node: Any) -> tuple[str, str, str, list[Any], dict[str, Any]]:
    if not isinstance(node, dict) or set(node) - _KEYS:
        raise refuse("a node is not an object with op, name, target, args and kwargs")
    op, name, target = (node.get(key) for key in ("op", "name", "target"))
    args, kwargs = node.get("args", []), node.get("kwargs", {})
    if not isinstance(name, str) or not _NODE_NAME.fullmatch(name):
        raise refuse("a node has no name of letters, digits and underscores")
    if (
        not isinstance(op, str)
        or not isinstance(target, str)
        or not isinstance(args, list)
        or not isinstance(kwargs, dict)
    ):
        raise refuse(f"node {name!r} is malformed")
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
        raise refuse("the inputs of the graph are not a list of names with ranks 0, 1 or 2")
    return {i["name"]: i["rank"] for i in inputs}


def _bounded(value: int, node: str) -> int:
    if abs(value) > graph_ops.MOST_INT:
        raise refuse(f"node {node!r} has a number that is too large")
    return value


def _short(value: str, node: str) -> str:
    if len(value) > 64:
        raise refuse(f"node {node!r} has a text that is too long")
    return value


def _float(value: Any, node: str, _: int) -> float:
    if value not in ("inf", "-inf", "nan"):
        raise refuse(f"node {node!r} has a float that is neither inf, -inf nor nan")
    return float(value)


def _dtype(value: Any, node: str, _: int) -> torch.dtype:
    if not isinstance(value, str) or value not in graph_ops.DTYPES:
        raise refuse(f"node {node!r} has a dtype that is not offered here")
    found: torch.dtype = graph_ops.DTYPES[value]
    return found


def _device(value: Any, node: str, _: int) -> str:
    if value != "cpu":
        raise refuse(f"node {node!r} names the device {str(value)[:80]!r}; a custom loss runs on 'cpu'")
    return "cpu"


def _no_constant(name: str) -> None:
    raise ValueError(name)


def refuse(message: str) -> InvalidRequestError:
    """The error of a graph that cannot be run."""
    return InvalidRequestError(
        message, field="loss_fn", constraint="a graph of the operations that a custom loss can use"
    )
