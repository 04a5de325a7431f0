"""Generates with a transformers model: left-padded batches and a KV cache.

Shape suffixes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn


class TorchDecoder:
    """A KV cache for one group of sequences.

    Args:
        model: the base model; its forward is called inside ``ready`` only.
        ready: a context in which the session's adapter is active and nothing records gradients. It is entered anew
            for every token, because other sessions use the model in between.
    """

    def __init__(self, model: nn.Module, ready: Callable[[], AbstractContextManager[None]]) -> None:
        self._model = model
        self._ready = ready
        self._cache: Any = None
        self._mask_BT = torch.zeros(0, 0, dtype=torch.long)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._device = next(model.parameters()).device

    def start(self, prompts: Sequence[Sequence[int]]) -> npt.NDArray[Any]:
        """Read the prompts, padded on the left so that every next token is the last column."""
        width = max(len(p) for p in prompts)
        ids_BT = np.zeros((len(prompts), width), dtype=np.int64)
        mask_BT = np.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, width - len(prompt) :] = prompt
            mask_BT[row, width - len(prompt) :] = 1
        self._mask_BT = torch.from_numpy(mask_BT).to(self._device)
        return self._forward(torch.from_numpy(ids_BT).to(self._device))

    def advance(self, tokens: Sequence[int], keep: Sequence[int]) -> npt.NDArray[Any]:
        """Drop the rows not kept, append one token to each of the others."""
        if len(keep) != len(self._mask_BT):
            rows = torch.tensor(list(keep), device=self._device)
            self._cache.batch_select_indices(rows)
            self._mask_BT = self._mask_BT[rows]
        self._mask_BT = torch.cat([self._mask_BT, self._mask_BT.new_ones(len(keep), 1)], dim=1)
        return self._forward(torch.tensor(list(tokens), device=self._device).unsqueeze(1))

    def _forward(self, ids_BT: torch.Tensor) -> npt.NDArray[Any]:
        options = dict(self._options)
        if self._takes_positions:
            positions_BT = (self._mask_BT.cumsum(dim=1) - 1).clamp(min=0)
            options["position_ids"] = positions_BT[:, -ids_BT.shape[1] :]
        with self._ready():
            out = self._model(
                input_ids=ids_BT,
                attention_mask=self._mask_BT,
                past_key_values=self._cache,
                use_cache=True,
                **options,
            )
        self._cache = out.past_key_values
        logits: npt.NDArray[Any] = out.logits[:, -1].float().cpu().numpy()
        return logits
