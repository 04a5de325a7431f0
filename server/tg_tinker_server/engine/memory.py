"""How many tokens one run through a model may hold, from what a short one keeps for its backward pass."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from tg_tinker_server.engine.forward import CausalLM
from tg_tinker_server.engine.lora import AdaptedBase

_RECORDS, _TOKENS = 2, 16
ROOM_FOR_GRADIENTS = 1.5
"""The backward pass needs about half as much again as what the forward pass keeps."""
_FEWEST = 64
_WORK = {"cpu": 5e10, "cuda": 5e13}
"""Most parameters times tokens of one run: a part of a second, so that others get their turn."""
_MOST = {"cpu": 2048, "cuda": 2**17}


def bytes_per_token(base: AdaptedBase, adapter: str | None, lm: CausalLM, *, checkpoints: bool) -> float:
    """Memory that a training pass keeps for each token until its backward pass, in bytes, by trying a short one.

    Args:
        base: the model.
        adapter: the run's, or ``None``.
        lm: how its losses are computed.
        checkpoints: layers keep their inputs alone.
    """
    parameters = list(base.module.parameters())
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids_BT = torch.ones(_RECORDS, _TOKENS, dtype=torch.int64, device=parameters[0].device)
    base.set_checkpointing(checkpoints)
    with (
        torch.enable_grad(),
        torch.random.fork_rng(),
        base.training(checkpoints),
        base.computing(adapter),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        # The loss holds the graph, so nothing that was noted is freed and its address used again.
        losses = lm.losses(ids_BT, None, ids_BT)
    del losses
    return sum(kept.values()) / (_RECORDS * _TOKENS)


def parameters_of_products(module: nn.Module) -> int:
    """How many parameters a token is multiplied with: all but a table of embeddings that is only looked up."""
    table = cast(Any, module).get_input_embeddings().weight
    head = cast(Any, module).get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is table
    return sum(p.numel() for p in module.parameters() if tied or p is not table)


def tokens_within(memory: int, per_token: float, *, parameters: int, device: str) -> int:
    """Most tokens, padding included, of one run through the model.

    Args:
        memory: bytes for activations and their gradients.
        per_token: as measured.
        parameters: that each token is multiplied with; larger models get shorter runs.
        device: "cpu", "cuda", ...
    """
    kind = "cpu" if device == "cpu" else "cuda"
    bounds = (memory / (per_token * ROOM_FOR_GRADIENTS), _WORK[kind] / parameters, _MOST[kind])
    return max(_FEWEST, int(min(bounds)))
