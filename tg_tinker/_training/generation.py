"""Texts from the run's own weights, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tg_tinker import texts
from tg_tinker._arguments import generation, sampling_params, stops
from tg_tinker._training.base import RunHandle
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import SampleResult, StreamChunk
from tg_tinker.wire import requests
from tg_tinker.wire.results import chunk_from_proto


class Generation(RunHandle):
    """Texts in, texts out. For token ids and log-probabilities there is the SamplingClient."""

    def sample(
        self,
        prompts: str | Sequence[str],
        max_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop_sequences: Sequence[str] | None = None,
        num_completions: int = 1,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        *,
        seed: int | None = None,
    ) -> SampleResult:
        """Generate ``num_completions`` texts for each prompt, after every call made before.

        Args:
            temperature: 0 is greedy.
            stop_sequences: texts that end a completion; they are not part of it.
            seed: makes the choices repeatable, up to float rounding: see ``types.sampling.GenerationOptions``.

        Raises:
            InvalidRequestError: naming the option that is out of range.
        """
        call = generation(
            prompts,
            num_completions,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop_sequences=stops(stop_sequences),
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
        )
        result: SampleResult = self._submit(call).result()
        return result

    def sample_stream(
        self, prompts: str, max_tokens: int = 128, temperature: float = 1.0, **kwargs: Any
    ) -> Iterator[StreamChunk]:
        """Stream one completion as it is generated, from the weights of the last step that has ended.

        Args:
            prompts: one prompt; lists are refused.
            kwargs: the other options of ``sample``, except num_completions.

        Raises:
            InvalidRequestError: a list of prompts, or an option that is unknown or out of range.
        """
        if not isinstance(prompts, str):
            raise InvalidRequestError(
                f"sample_stream takes one prompt, not a {type(prompts).__name__}; use sample() for several",
                field="prompts",
                constraint="one string",
            )
        if kwargs.pop("num_completions", 1) != 1:
            raise InvalidRequestError(
                "sample_stream streams one completion; use sample() for several",
                field="num_completions",
                constraint="1",
            )
        options = {"max_tokens": max_tokens, "temperature": temperature, **kwargs}
        options["stop_sequences"] = stops(kwargs.get("stop_sequences"))
        request = requests.sample_stream(self.id, prompts, sampling_params(options))
        return map(chunk_from_proto, self._transport.stream(request))

    async def sample_async(
        self,
        prompts: str | Sequence[str],
        max_tokens: int = 128,
        temperature: float = 1.0,
        num_completions: int = 1,
        **kwargs: Any,
    ) -> SampleResult:
        """Like ``sample``, with its other options as keywords."""
        options = {"max_tokens": max_tokens, "temperature": temperature, **kwargs}
        options["stop_sequences"] = stops(kwargs.get("stop_sequences"))
        result: SampleResult = await self._submit(generation(prompts, num_completions, **options))
        return result

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, by the run's tokenizer; no chat template. A text asked for before makes no call.

        Raises:
            InvalidRequestError: it is no text.
        """
        return texts.encode(self._transport, text, run_id=self.id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, by the run's tokenizer.

        Raises:
            InvalidRequestError: they are not integers.
        """
        return texts.decode(self._transport, ids, run_id=self.id)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts in one round trip."""
        reply = self._transport.call(requests.encode_texts(self.id, list(texts)))
        return [list(tokens.ids) for tokens in reply.ids]

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Texts of many token lists in one round trip."""
        reply = self._transport.call(requests.decode_ids(self.id, [[int(i) for i in one] for one in ids]))
        return list(reply.texts)

    def get_tokenizer(self) -> Any:
        """The model's tokenizer, from the server's files and without a download from anywhere else.

        Returns:
            What ``transformers.AutoTokenizer`` makes of them. Where transformers is not installed, or the model has
            no such files: an object with ``encode`` and ``decode`` that asks the server.
        """
        return texts.tokenizer(self._transport, self._config.model_ref, run_id=self.id)
