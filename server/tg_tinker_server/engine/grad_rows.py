"""Per-sample gradients of one backward pass: a matrix with one row per record and a column per trained number.

One contiguous matrix makes the norms of all records one reduction, and the clipped sum one matrix-vector product.

Shape suffixes: N records, P parameters, W columns (P and zeros up to a whole number of blocks).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

BLOCK = 128
"""Columns that one float32 partial norm covers; partial norms are joined in float64.

In whatever order a kernel adds 128 squares, the relative error of their norm is at most (128/2 + 1) 2^-24 = 3.9e-6.
"""


@dataclass(frozen=True, slots=True)
class Column:
    """Where one parameter's gradients lie."""

    name: str
    start: int
    shape: torch.Size
    transposed: bool

    @property
    def end(self) -> int:
        """First column after it."""
        return self.start + math.prod(self.shape)

    def of(self, matrix_NW: torch.Tensor) -> torch.Tensor:
        """View of a matrix [N, W], or of one row [W], in the parameter's own shape."""
        stored = (self.shape[1], self.shape[0]) if self.transposed else self.shape
        view = matrix_NW[..., self.start : self.end].view(*matrix_NW.shape[:-1], *stored)
        return view.transpose(-1, -2) if self.transposed else view


@functools.lru_cache(maxsize=16)
def _order(columns: tuple[tuple[int, torch.Size, bool], ...], device: torch.device) -> torch.Tensor:
    """Where each number of a flat gradient lies in a row [P]; one table for all runs of a shape."""
    width = max((start + math.prod(shape) for start, shape, _ in columns), default=0)
    row = torch.arange(width, dtype=torch.int32, device=device)
    return torch.cat([Column("", *column).of(row).reshape(-1) for column in columns])


class Columns:
    """The columns of one run's trained parameters, in the order of their names.

    Args:
        parameters: by name, sorted.
        transposed: names of matrices that are kept transposed: the product that makes them is faster that way.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], transposed: frozenset[str] = frozenset()) -> None:
        self.by_parameter: dict[int, Column] = {}
        start = 0
        for name, parameter in parameters.items():
            column = Column(name, start, parameter.shape, name in transposed)
            self.by_parameter[id(parameter)] = column
            start = column.end
        self._parameters = list(parameters.values())
        self.size = start
        self.width = -(-start // BLOCK) * BLOCK

    @property
    def dtype(self) -> torch.dtype:
        """Of per-sample gradients: the parameters' own, and at least float32."""
        return torch.promote_types(self._parameters[0].dtype, torch.float32)

    def flat(self, row_W: torch.Tensor) -> torch.Tensor:
        """One row [W] as a flat gradient [P] in the layout's order."""
        order_P = _order(tuple((c.start, c.shape, c.transposed) for c in self.by_parameter.values()), row_W.device)
        return row_W.index_select(-1, order_P)


class Scratch:
    """Memory for one matrix at a time, kept from one pass to the next: fresh memory costs as much as what fills it.

    What it holds is overwritten before it is read.
    """

    MOST_KEPT = 64 * 2**20
    """Bytes; a larger matrix is given back after its pass."""

    def __init__(self) -> None:
        self._kept: torch.Tensor | None = None

    def matrix(self, records: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A matrix [records, width] with whatever is in it; the one before it must no longer be used."""
        size = records * width
        if size * dtype.itemsize > self.MOST_KEPT:
            return torch.empty(records, width, dtype=dtype, device=device)
        kept = self._kept
        if kept is None or len(kept) < size or (kept.dtype, kept.device) != (dtype, device):
            self._kept = kept = torch.empty(size, dtype=dtype, device=device)
        return kept[:size].view(records, width)


class GradRows:
    """The matrix of one backward pass, filled by the layers as it reaches them.

    A parameter used several times in the forward pass is written several times; the terms add up.
    """

    def __init__(self, columns: Columns, records: int, device: torch.device, scratch: Scratch | None = None) -> None:
        self.columns = columns
        self.records = records
        self.matrix_NW = (scratch or Scratch()).matrix(records, columns.width, columns.dtype, device)
        self.matrix_NW[:, columns.size :] = 0.0
        self._written: set[str] = set()
        self.misshapen: set[str] = set()

    def wants(self, parameter: nn.Parameter) -> bool:
        """Whether it is trained, so that its gradients have a place here."""
        return id(parameter) in self.columns.by_parameter

    def add_product(self, parameter: nn.Parameter, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add the batched product ``left @ right`` [N, ...] to the gradient of a matrix, as it is stored."""
        column = self.columns.by_parameter[id(parameter)]
        if left.shape[0] != self.records:
            self.misshapen.add(column.name)
            return
        view = self.matrix_NW[:, column.start : column.end].view(self.records, left.shape[1], right.shape[2])
        left, right = left.to(view.dtype), right.to(view.dtype)
        if column.name in self._written:
            view.baddbmm_(left, right)
        else:
            torch.bmm(left, right, out=view)
            self._written.add(column.name)

    def add(self, parameter: nn.Parameter, grads: torch.Tensor) -> None:
        """Add per-sample gradients [N, ...] of any parameter."""
        column = self.columns.by_parameter[id(parameter)]
        if grads.shape != (self.records, *column.shape):
            self.misshapen.add(column.name)
            return
        view = column.of(self.matrix_NW)
        if column.name in self._written:
            view.add_(grads)
        else:
            view.copy_(grads)
            self._written.add(column.name)

    def zero(self) -> None:
        """No record has a target, so there is no backward pass: every gradient is zero."""
        self.matrix_NW.zero_()
        self._written.update(c.name for c in self.columns.by_parameter.values())

    def missing(self) -> list[str]:
        """Parameters that the backward pass did not reach or that gave something else than a row per record."""
        names = [c.name for c in self.columns.by_parameter.values() if c.name not in self._written]
        return [name for name in names if name not in self.misshapen]


def row_norms(matrix_NW: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
    """L2 norm of each row, float64 [N], with relative error at most 3.9e-6; NaN or infinite if the row is.

    Args:
        matrix_NW: float32; W is a multiple of ``BLOCK``.
        exact: square in float64 throughout, for bounds so small that float32 squares would vanish.
    """
    wide = torch.float64 if exact else matrix_NW.dtype
    blocks = matrix_NW.view(len(matrix_NW), matrix_NW.shape[1] // BLOCK, BLOCK)
    partial = torch.linalg.vector_norm(blocks, dim=2, dtype=wide)
    norms_N: torch.Tensor = torch.linalg.vector_norm(partial, dim=1, dtype=torch.float64)
    return norms_N
