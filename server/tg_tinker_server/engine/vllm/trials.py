"""A short text that vLLM and the model here must agree on before any request is answered with some weights.

Two implementations of one model may differ silently: a layer whose adapter is ignored, a scale read otherwise.
Shape suffixes: N tokens of the text, V vocabulary.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tg_tinker_server.engine.sampling.choosing import log_softmax
from tg_tinker_server.engine.sampling.torch_weights import TorchWeights, computing
from tg_tinker_server.engine.vllm.process import Message

_PREFIXES = (3, 7, 12)
_ALTERNATIVES = 8
_ALLOWED = {torch.float32: 1e-3}
_ALLOWED_OTHERWISE = 0.2  # nats; bfloat16 rounds every product, differently in each of them


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """What the model here makes of a text and of its beginnings.

    Attributes:
        tokens: the text.
        logprobs_NV: row i is of what follows token i.
        allowed: largest difference of a log-probability, in nats.
    """

    tokens: tuple[int, ...]
    logprobs_NV: npt.NDArray[np.float32]  # noqa: N815 - shape suffix
    allowed: float

    @classmethod
    def of(cls, weights: TorchWeights) -> Trial:
        """One run of a text of random tokens, always the same, through the model as it is now."""
        generator = torch.Generator().manual_seed(7)
        tokens = torch.randint(weights.vocab_size, (min(_PREFIXES[-1], weights.max_positions),), generator=generator)
        base = weights.base
        device = next(base.module.parameters()).device
        with computing([weights]):
            logits_NV = base.language_model.logits(tokens[None].to(device))[0].float().cpu().numpy()
        allowed = _ALLOWED.get(base.loaded.dtype, _ALLOWED_OTHERWISE)
        return cls(tokens=tuple(tokens.tolist()), logprobs_NV=log_softmax(logits_NV), allowed=allowed)

    def questions(self, name: str, adapter: int | None) -> list[Message]:
        """What follows beginnings of the text, for vLLM. Their names are ``name``, a dot and how long each is."""
        salt, most = secrets.token_hex(16), self.logprobs_NV.shape[1]
        return [
            {
                "do": "sample",
                "id": f"{name}.{length}",
                "prompt": self.tokens[:length],
                "params": {
                    "max_tokens": 1,
                    "temperature": 0,
                    "logprobs": min(_ALTERNATIVES, most),
                    "stop_token_ids": [],
                },
                "adapter": adapter,
                "salt": salt,
            }
            for length in sorted({min(n, len(self.tokens)) for n in _PREFIXES})
        ]

    def agrees(self, answer: Message) -> bool:
        """Whether vLLM found the same of the most likely tokens after one of the beginnings."""
        length = int(answer["id"].rpartition(".")[2])
        logprobs_V = self.logprobs_NV[length - 1]
        if "error" in answer or len(answer["logprobs"]) != 1:
            return False
        found = [(int(token), value) for token, value in answer["logprobs"][0]]
        if len(found) < min(_ALTERNATIVES, logprobs_V.size):
            return False
        return all(
            0 <= token < logprobs_V.size and abs(value - logprobs_V[token]) <= self.allowed for token, value in found
        )
