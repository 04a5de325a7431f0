"""Runs a causal language model up to each record's loss, by the cheapest way that was tried and found equal.

Two shortcuts apply to most models and fail on some (logits that are scaled or capped, attention that is not causal),
so each base model is tried once, on random tokens, before they are taken:

* the last layer joins the cross-entropy (chunked_head.py) instead of making all logits;
* a mask that only cuts off the end of records is left out: no token sees what follows it, and what follows has no
  target. Attention without a mask has the faster kernels.

Shape suffixes: B records, T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from tg_tinker_server.engine.chunked_head import chunked_cross_entropy, chunked_log_probabilities
from tg_tinker_server.engine.losses import RecordLosses, Targets, log_probabilities, record_losses


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortcuts:
    """What was found about a base model.

    Attributes:
        split_head: logits are its last layer on its body's last hidden state, nothing more.
        maskless: the mask of records that end early may be left out.
        random: it draws random numbers in training mode, as dropout does.
        by_length: its positions are coded by how wide the whole batch is.
    """

    split_head: bool = False
    maskless: bool = False
    random: bool = True
    by_length: bool = False


_LARGE_LOGITS = 300.0


class CausalLM:
    """One base model, with whatever adapters are active when it is called.

    Args:
        model: a transformers model with ``get_output_embeddings`` and a body, or any that returns ``logits``.
        vocab_size: token ids to try shortcuts with.
        adapters: names of those that compute now; ``None``: not known.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        vocab_size: int,
        adapters: Callable[[], tuple[str, ...] | None] = lambda: None,
    ) -> None:
        self.model = model
        self._adapters = adapters
        self.shortcuts = _try_shortcuts(model, vocab_size)

    def logits(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
        """The model's own logits [B, T, V]."""
        logits: torch.Tensor = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        return logits

    def losses(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None, labels_BT: torch.Tensor) -> RecordLosses:
        """Loss of each record.

        Args:
            ids_BT: token ids.
            mask_BT: 1 for real tokens; ``None`` where all tokens before a record's end are real.
            labels_BT: targets, ``IGNORE_INDEX`` after a record's end.
        """
        head = _plain_head(self.model, self._adapters())
        if not self.shortcuts.split_head or head is None:
            return record_losses(self.logits(ids_BT, mask_BT), labels_BT)
        targets = Targets.of(labels_BT)
        hidden_ND = targets.select(_hidden(self.model, ids_BT, mask_BT))
        losses_N = chunked_cross_entropy(hidden_ND, head.weight, head.bias, targets.token_N)
        return RecordLosses.of_tokens(losses_N, targets, len(labels_BT))

    def logprobs(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None, targets: Targets) -> torch.Tensor:
        """Log-probability of each alternative of each target, at least float32 [N, K].

        Args:
            ids_BT, mask_BT: as for ``losses``.
            targets: with K alternatives; its position is the one that predicts.
        """
        head = _plain_head(self.model, self._adapters())
        if not self.shortcuts.split_head or head is None:
            return log_probabilities(self.logits(ids_BT, mask_BT), targets)
        hidden_ND = targets.select(_hidden(self.model, ids_BT, mask_BT))
        return chunked_log_probabilities(hidden_ND, head.weight, head.bias, targets.token_N)


def _plain_head(model: nn.Module, adapters: tuple[str, ...] | None = None) -> nn.Linear | None:
    """The last layer, if it is a frozen linear one.

    Adapters that others put on it change nothing for those who have none there.
    """
    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, LoraLayer) and adapters is not None:
        adapted = {name for part in (head.lora_A, head.lora_embedding_A) for name in part}
        if not adapted.intersection(adapters):
            head = head.base_layer
    if type(head) is not nn.Linear or "forward" in head.__dict__ or any(p.requires_grad for p in head.parameters()):
        return None
    return head


def _hidden(model: nn.Module, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """The last hidden state [B, T, D] of the model's body."""
    body = cast(Any, model).base_model
    hidden: torch.Tensor = body(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
    return hidden


def _try_shortcuts(model: nn.Module, vocab_size: int) -> Shortcuts:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(5)
    ids_BT = torch.randint(vocab_size, (3, 7), generator=generator).to(device)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 4:] = 0
    real = mask_BT == 1
    with torch.no_grad():
        model.eval()
        expected = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[real]
        scale = float(expected.float().abs().max()) or 1.0
        half = expected.dtype in (torch.bfloat16, torch.float16)

        def equal(found: torch.Tensor) -> bool:
            error = float((found.float() - expected.float()).abs().max())
            return found.shape == expected.shape and error <= (3e-2 if half else 1e-5) * scale

        maskless = equal(model(input_ids=ids_BT, attention_mask=None, use_cache=False).logits[real])
        head = _plain_head(model)
        split_head = False
        if head is not None and getattr(model, "base_model", model) is not model:
            kept = head.weight.clone()
            try:
                # Large logits, so that whatever caps or bends them shows.
                head.weight *= _LARGE_LOGITS / scale
                large = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[real]
                found = head(_hidden(model, ids_BT, mask_BT))[real]
                error, most = (float((a).float().abs().max()) for a in (found - large, large))
                split_head = found.shape == large.shape and error <= (3e-2 if half else 1e-5) * max(most, 1.0)
            except (AttributeError, TypeError, ValueError):
                split_head = False  # a body of another form; the model's own logits are always right
            finally:
                head.weight.copy_(kept)
        return Shortcuts(
            split_head=split_head,
            maskless=maskless,
            random=_draws(model, ids_BT),
            by_length=bool(position_codings(model) & {"dynamic", "longrope"}),
        )


def position_codings(model: nn.Module) -> set[str]:
    """Names of the rotary codings in a model's configuration."""
    config: Any = getattr(model, "config", None)
    stack: list[Any] = [config.to_dict()] if hasattr(config, "to_dict") else []
    found = set()
    while stack:
        for key, value in stack.pop().items():
            if isinstance(value, dict):
                stack.append(value)
            elif key in ("rope_type", "type") and isinstance(value, str):
                found.add(value)
    return found


def _draws(model: nn.Module, ids_BT: torch.Tensor) -> bool:
    """Whether a pass in training mode moves the random generator."""
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    with torch.random.fork_rng():
        states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if ids_BT.is_cuda else [])
        model.train()
        try:
            model(input_ids=ids_BT, use_cache=False)
        finally:
            model.eval()
        after = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if ids_BT.is_cuda else [])
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
    return any(not torch.equal(a, b) for a, b in zip(states, after, strict=True))
