"""Weights of a transformers model to sample from: an adapter on a shared base, the base, or a copy of its own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch

from tg_tinker_server.engine.backend import EngineState
from tg_tinker_server.engine.gradients import ParamLayout
from tg_tinker_server.engine.lora import AdaptedBase, fused_parameters, own_parameters
from tg_tinker_server.engine.state import checked_weights


class TorchWeights:
    """See ``seam.SampledWeights``.

    Args:
        base: the model, with the adapter on it.
        adapter: its name; ``None``: the base without adapters.
        size_bytes: what closing gives back.
        on_close: called once.
    """

    def __init__(
        self, base: AdaptedBase, adapter: str | None, *, size_bytes: int, on_close: Callable[[], None]
    ) -> None:
        self.base, self.adapter, self._on_close = base, adapter, on_close
        loaded = base.loaded
        self.vocab_size, self.max_positions = loaded.vocab_size, loaded.max_positions
        self.eos_token_ids = tuple(loaded.tokenizer.eos_token_ids)
        self.start_token_id = loaded.tokenizer.start_token_id
        self.version = 0
        self.size_bytes = size_bytes
        self.closed = False
        self._told: list[Callable[[TorchWeights], None]] = []
        own = own_parameters(base.module, adapter) if adapter is not None else {}
        fused = len(fused_parameters(base.module, adapter)) == sum(p.requires_grad for p in own.values())
        shapes = tuple((name, tuple(p.shape)) for name, p in own.items())
        self.shape: Hashable = None if adapter is None else shapes if fused else adapter
        """Weights of equal shapes on one base can go through it together."""

    def when_closed(self, tell: Callable[[TorchWeights], None]) -> None:
        """See ``seam.SampledWeights``."""
        if tell not in self._told:
            self._told.append(tell)

    def changed(self) -> None:
        """Note that whoever trains these weights has changed them."""
        self.version += 1

    def encode(self, text: str) -> list[int]:
        """See ``seam.SampledWeights``."""
        return self.base.loaded.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``seam.SampledWeights``."""
        return self.base.loaded.tokenizer.decode(ids)

    def close(self) -> None:
        """See ``seam.SampledWeights``."""
        if not self.closed:
            self.closed = True
            self._on_close()
            for tell in self._told:
                tell(self)
            self._told.clear()


@contextmanager
def computing(weights: Sequence[TorchWeights]) -> Iterator[None]:
    """Within it the base of these weights, which is one, computes with each row's own; equal ones are neighbours."""
    base = weights[0].base
    names: list[str | None] = []
    counts: list[int] = []
    for row in weights:
        if names and names[-1] == row.adapter:
            counts[-1] += 1
        else:
            names.append(row.adapter)
            counts.append(1)
    with torch.no_grad(), base.bare() if names[0] is None else base.computing(*names, counts=tuple(counts)):
        yield


def put_state(base: AdaptedBase, adapter: str | None, state: EngineState) -> int:
    """Write a saved state into the parameters that it is of; returns their bytes.

    Raises:
        InvalidRequestError: names, shapes or values do not fit.
    """
    own = own_parameters(base.module, adapter)
    arrays = checked_weights(state, ParamLayout({name: tuple(p.shape) for name, p in own.items()}))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(arrays[name]))
    return sum(p.numel() * p.element_size() for p in own.values())
