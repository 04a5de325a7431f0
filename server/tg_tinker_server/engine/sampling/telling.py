"""What is told of each token that a sequence chooses: the token itself, or text that can be shown."""

from __future__ import annotations

from typing import Protocol

from tg_tinker.types.tokens import SampledTokens, SampleQuery, TopkLogprobs
from tg_tinker_server.engine.sampling.choosing import Choice
from tg_tinker_server.engine.sampling.seam import SampledWeights
from tg_tinker_server.engine.sampling.text_query import FinishReason, SampledText, TextQuery
from tg_tinker_server.engine.text import TextStream


class Teller(Protocol):
    """Of one sequence."""

    def tell(self, choice: Choice, *, last: bool) -> SampledTokens:
        """The event of a token; with a stop reason if the sequence ends with it.

        Args:
            last: there may be no further one.
        """
        ...


class TokenTeller:
    """Tells tokens and log-probabilities. Whatever ends a sequence is part of it."""

    def __init__(self, weights: SampledWeights, query: SampleQuery, index: int) -> None:
        self._index, params = index, query.params
        stops = params.stop_tokens
        self._stops = frozenset(weights.eos_token_ids if stops is None else stops)
        self._text = (
            TextStream(weights.decode, stop_sequences=params.stop_texts, context=query.prompt)
            if params.stop_texts
            else None
        )

    def tell(self, choice: Choice, *, last: bool) -> SampledTokens:
        """See ``Teller``."""
        if self._text is not None:
            self._text.push(choice.token)
        stopped = choice.token in self._stops or (self._text is not None and self._text.stopped)
        topk = choice.topk
        return SampledTokens(
            index=self._index,
            tokens=(choice.token,),
            logprobs=(choice.logprob,),
            topk_logprobs=None if topk is None else TopkLogprobs(token_ids=topk[0][None], logprobs=topk[1][None]),
            stop_reason="stop" if stopped else "length" if last else None,
        )


class TextTeller:
    """Tells text. Neither a stop sequence nor the end-of-text token is part of it."""

    def __init__(self, weights: SampledWeights, query: TextQuery, index: int) -> None:
        self._index = query.first + index
        self._ends = frozenset(weights.eos_token_ids)
        self._text = TextStream(weights.decode, stop_sequences=query.options.stop_sequences, context=query.prompt)

    def tell(self, choice: Choice, *, last: bool) -> SampledText:
        """See ``Teller``."""
        if choice.token in self._ends:
            return self._event((), (), self._text.finish(), "eos")
        text = self._text.push(choice.token)
        finish: FinishReason | None = "stop" if self._text.stopped else "length" if last else None
        if finish is not None:
            text += self._text.finish()
        return self._event((choice.token,), (choice.logprob,), text, finish)

    def _event(
        self, tokens: tuple[int, ...], logprobs: tuple[float, ...], text: str, finish: FinishReason | None
    ) -> SampledText:
        return SampledText(
            index=self._index,
            tokens=tokens,
            logprobs=logprobs,
            text=text,
            finish_reason=finish,
            stop_reason="stop" if finish == "eos" else finish,
        )
