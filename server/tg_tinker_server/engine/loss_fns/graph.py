"""Custom losses: a graph of torch calls as plain data, run once for each datum. None of the sender's code is run.

The graph is what torch.fx records of a Python function, written as JSON by the public training API's
``create_custom_loss`` (format 1). graph_reader.py holds it against a list of what may be called. Its shapes are
worked out before anything is computed: a graph that does not fit, or that would take too much memory, is refused by
the name of the node. As nothing in it can depend on another datum, losses stay independent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.engine.loss_fns.graph_reader import LOGPROBS, MAX_ITEMS, ReadGraph, Ref, read_graph, refuse
from tg_tinker_server.engine.loss_fns.values import DatumLoss, Inputs

MAX_NUMBERS = 2**25
"""Numbers in the results of all nodes of one datum."""
MOST_OF_CALL = 2**28
"""The same for all datums of a call together: some seconds of the thread that all runs share."""
_TARGETS = "target_tokens"


class CompiledGraph:
    """A graph that was read and found to hold nothing but what is allowed.

    Attributes:
        inputs: names in ``loss_fn_inputs`` that it reads, in the order it takes them; log-probabilities come before.
    """

    def __init__(self, graph: ReadGraph) -> None:
        self._graph = graph
        self.inputs = tuple(graph.places.values())[1:]
        self._fitting: dict[tuple[Any, ...], int] = {}

    def check(self, datum: int, inputs: Inputs) -> int:
        """Work out every shape for one datum; nothing is computed.

        Returns:
            Numbers in the results of its nodes: what it costs.

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
        for name, array in (*read.items(), (LOGPROBS, read[_TARGETS])):
            rank = self._graph.ranks.get(name, array.ndim)
            if array.ndim != rank:
                raise InvalidRequestError(
                    f"{name} of datum {datum} has {array.ndim} dimensions; the loss declared {rank}",
                    field=f"loss_fn_inputs.{name}",
                    constraint="the declared rank",
                )
        key = tuple((a.shape, a.dtype.str) for a in read.values())
        if key in self._fitting:
            return self._fitting[key]
        with torch.device("meta"), torch.no_grad():
            given = {
                name: torch.empty(a.shape, dtype=torch.from_numpy(np.empty(0, a.dtype)).dtype)
                for name, a in read.items()
            }
            given[LOGPROBS] = torch.empty(inputs[_TARGETS].shape)
            found = self._run(given)
            _results_fit(found, self._graph.loss, self._graph.metrics)
        if len(self._fitting) > 4096:
            self._fitting.clear()
        self._fitting[key] = sum(_numbers(found[node.name]) for node in self._graph.nodes)
        return self._fitting[key]

    def evaluate(self, logprobs: npt.NDArray[Any], inputs: Inputs, *, train: bool) -> DatumLoss:
        """The loss of one datum, with its derivative in training. Checked before.

        What fails now fails by values (an index out of range). It counts like a loss that is not a number: whether a
        private datum fails is nobody's business.
        """
        lp = torch.from_numpy(logprobs.astype(np.float32)).requires_grad_(train)
        given = {name: torch.from_numpy(np.array(array)) for name, array in self._read(inputs).items()}
        try:
            with torch.set_grad_enabled(train):
                found = self._run(given | {LOGPROBS: lp})
            loss = found[self._graph.loss.name]
            slope = None
            if train:
                (gradient,) = torch.autograd.grad(loss, lp, allow_unused=True) if loss.requires_grad else (None,)
                slope = np.zeros(lp.shape) if gradient is None else gradient.double().numpy()
            metrics = {name: float(found[ref.name].detach()) for name, ref in self._graph.metrics.items()}
            return DatumLoss(value=float(loss.detach()), slope=slope, metrics=metrics)
        except (InvalidRequestError, IndexError, RuntimeError):
            slope = np.full(logprobs.shape, np.nan) if train else None
            return DatumLoss(value=math.nan, slope=slope, metrics=dict.fromkeys(self._graph.metrics, math.nan))

    def _read(self, inputs: Inputs) -> dict[str, npt.NDArray[Any]]:
        """The inputs by name, with the targets for the shape of the log-probabilities."""
        return {name: np.asarray(inputs[name]) for name in (*self.inputs, _TARGETS)}

    def _run(self, given: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The result of every node by its name.

        Raises:
            InvalidRequestError: naming the node that failed.
        """
        found: dict[str, Any] = {place: given[name] for place, name in self._graph.places.items()}
        numbers = 0
        for node in self._graph.nodes:
            args = [_filled(arg, found) for arg in node.args]
            kwargs = {key: _filled(value, found) for key, value in node.kwargs.items()}
            try:
                result = node.op.call(*args, **kwargs)
            except (TypeError, ValueError, RuntimeError, IndexError, ArithmeticError, NotImplementedError) as e:
                raise refuse(f"node {node.name!r} ({node.target}) does not work: {_first_line(e)}") from e
            if isinstance(result, tuple | list) and len(result) > MAX_ITEMS:
                raise refuse(f"node {node.name!r} ({node.target}) has more than {MAX_ITEMS} results")
            numbers += _numbers(result)
            if numbers > MAX_NUMBERS:
                raise refuse(
                    f"node {node.name!r} ({node.target}) brings the loss of one datum over {MAX_NUMBERS} numbers"
                )
            found[node.name] = result
        return found


@functools.lru_cache(maxsize=64)
def compiled(text: str) -> CompiledGraph:
    """``parse_graph``, remembering the last few."""
    return parse_graph(text)


def parse_graph(text: str) -> CompiledGraph:
    """Read a graph; see ``read_graph``."""
    return CompiledGraph(read_graph(text))


def _filled(arg: Any, found: Mapping[str, Any]) -> Any:
    """An argument with results in place of references."""
    if isinstance(arg, Ref):
        return found[arg.name]
    if isinstance(arg, list | tuple):
        return type(arg)(_filled(a, found) for a in arg)
    if isinstance(arg, dict):
        return {key: _filled(a, found) for key, a in arg.items()}
    if isinstance(arg, slice):
        return slice(*(_filled(a, found) for a in (arg.start, arg.stop, arg.step)))
    return arg


def _results_fit(found: Mapping[str, Any], loss: Ref, metrics: Mapping[str, Ref]) -> None:
    value = found[loss.name]
    if not isinstance(value, torch.Tensor) or value.ndim or not value.is_floating_point():
        raise refuse(f"the loss, node {loss.name!r}, is not a scalar tensor of floats; sum it over positions")
    for name, ref in metrics.items():
        metric = found[ref.name]
        if not isinstance(metric, torch.Tensor) or metric.ndim or metric.is_complex():
            raise refuse(f"the metric {name!r}, node {ref.name!r}, is not a scalar tensor")


def _numbers(result: Any) -> int:
    if isinstance(result, torch.Tensor):
        return result.numel()
    return sum(_numbers(r) for r in result) if isinstance(result, tuple | list) else 1


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


__all__ = ["CompiledGraph", "compiled", "parse_graph"]
