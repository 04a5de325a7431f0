"""The records of one pass as rows for the model: those of a batch, padded already, or datums, each of its length.

Shape suffixes: B records of the call, N records of a slice, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tg_tinker.types import IGNORE_INDEX
from tg_tinker_server.engine.backend import Ints, LossRequest, PassRequest, Request
from tg_tinker_server.engine.microbatch import used_lengths
from tg_tinker_server.engine.requests import without_leading_padding


class BatchRows:
    """The records of a batch.

    Attributes:
        lengths_B: columns that each record needs.
        masked_B: which have masked tokens that a later one could see, or that predict something.
        num_tokens: real tokens of all.
    """

    def __init__(self, request: PassRequest) -> None:
        request = without_leading_padding(request)
        self._request = request
        self.lengths_B = used_lengths(request)
        self.masked_B = _needs_mask(request)
        self.num_tokens = int(request.attention_mask_BT.sum())

    def tokens(self, index: Ints, width: int) -> tuple[Ints, Ints]:
        """Token ids and mask of some records [N, width], padded behind."""
        request = self._request
        return _columns(request.input_ids_BT[index], width, 0), _columns(request.attention_mask_BT[index], width, 0)

    def labels(self, index: Ints, width: int) -> Ints:
        """Labels of some records, as ``tokens``."""
        return _columns(self._request.labels_BT[index], width, IGNORE_INDEX)


class DatumRows:
    """Datums. Every token is real, and none of the padding predicts anything. Attributes as of ``BatchRows``."""

    def __init__(self, request: LossRequest) -> None:
        self.request = request
        self.lengths_B: Ints = np.array([len(tokens) for tokens in request.tokens], dtype=np.int64)
        self.masked_B: npt.NDArray[np.bool_] = np.zeros(len(request.tokens), dtype=np.bool_)
        self.num_tokens = int(self.lengths_B.sum())

    def tokens(self, index: Ints, width: int) -> tuple[Ints, Ints]:
        """As of ``BatchRows``."""
        ids_NT = np.zeros((len(index), width), dtype=np.int64)
        for row, datum in enumerate(index):
            own = self.request.tokens[datum]
            ids_NT[row, : len(own)] = own
        return ids_NT, (np.arange(width) < self.lengths_B[index][:, None]).astype(np.int64)

    def targets(self, index: Ints) -> Sequence[Ints]:
        """Target tokens of some datums, each [n, K]: its own length and alternatives."""
        return [
            self.request.inputs[datum]["target_tokens"].astype(np.int64).reshape(int(self.lengths_B[datum]), -1)
            for datum in index
        ]


def rows_of(request: Request) -> BatchRows | DatumRows:
    """The rows of a request."""
    return DatumRows(request) if isinstance(request, LossRequest) else BatchRows(request)


def _columns(array_NT: Ints, width: int, padding: int) -> Ints:
    """The first columns, filled up to ``width`` with padding."""
    fill = width - array_NT.shape[1]
    if fill <= 0:
        return array_NT[:, :width]
    return np.pad(array_NT, ((0, 0), (0, fill)), constant_values=padding)


def _needs_mask(request: PassRequest) -> npt.NDArray[np.bool_]:
    """Which records have masked tokens that a later one could see, or that predict something [B]."""
    mask_BT, labels_BT = request.attention_mask_BT, request.labels_BT
    holes_B = (mask_BT[:, 1:] > mask_BT[:, :-1]).any(axis=1)
    predicts_B = ((labels_BT[:, 1:] != IGNORE_INDEX) & (mask_BT[:, :-1] == 0)).any(axis=1)
    needed: npt.NDArray[np.bool_] = holes_B | predicts_B
    return needed
