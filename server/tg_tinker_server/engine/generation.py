"""The generation loop, the same for every backend: batches of sequences, slices, stops, text."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.engine.backend import FinishReason, GenerationOptions, TokenEvent
from tg_tinker_server.engine.sampler import TokenCounts, choose
from tg_tinker_server.engine.text import TextStream
from tg_tinker_server.engine.tokenizers import Tokenizer

PREFILL_TOKENS = 2048
"""Most prompt tokens, padding included, that one group reads: the longest turn of a sampling run. Only a single
prompt may be longer."""


class Decoder(Protocol):
    """A model with a cache for one group of sequences. Shape suffixes: B sequences, V vocabulary."""

    def start(self, prompts: Sequence[Sequence[int]]) -> npt.NDArray[Any]:
        """Read the prompts; logits of each one's next token, float32 [B, V]."""
        ...

    def advance(self, tokens: Sequence[int], keep: Sequence[int]) -> npt.NDArray[Any]:
        """Drop all rows but ``keep``, append one token to each of those; their next logits [len(keep), V]."""
        ...


class DecoderFactory(Protocol):
    """Makes a decoder for the next group."""

    def __call__(self) -> Decoder:
        """A decoder with an empty cache."""
        ...


def check_prompts(
    prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, *, vocab_size: int, max_positions: int
) -> list[list[int]]:
    """Prompts as lists, an empty one replaced by the start token.

    Raises:
        InvalidRequestError: no prompt, an unknown token id, or no room for one more token.
    """
    if not prompts:
        raise InvalidRequestError("no prompt was given", field="prompts", constraint="at least one")
    checked = []
    for prompt in prompts:
        ids = [int(i) for i in prompt]
        if not ids and tokenizer.start_token_id is not None:
            ids = [tokenizer.start_token_id]
        if not ids:
            raise InvalidRequestError(
                "a prompt is empty and this model has no start token", field="prompts", constraint="not empty"
            )
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise InvalidRequestError(
                f"a prompt holds token ids outside the model's vocabulary of {vocab_size}",
                field="prompts",
                constraint=f"0 <= id < {vocab_size}",
            )
        if len(ids) >= max_positions:
            raise InvalidRequestError(
                f"a prompt of {len(ids)} tokens leaves no room to generate; this model takes {max_positions} in all",
                field="prompts",
                constraint=f"fewer than {max_positions} tokens",
            )
        checked.append(ids)
    return checked


class _Sequence:
    """One completion in progress."""

    def __init__(
        self, index: int, prompt: list[int], params: GenerationOptions, tokenizer: Tokenizer, room: int
    ) -> None:
        self.index = index
        self.left = min(params.max_tokens, room)
        self.text = TextStream(tokenizer.decode, stop_sequences=params.stop_sequences, context=prompt)
        self.new_tokens: list[int] = []
        self.new_text = ""
        self.finish: FinishReason | None = None
        self._told_finish = False

    @property
    def has_news(self) -> bool:
        """Whether an event is due: new tokens, or an end that was not told yet."""
        return bool(self.new_tokens) or (self.finish is not None and not self._told_finish)

    def take(self, token: int, eos: tuple[int, ...]) -> None:
        if token in eos:
            self.finish = "eos"
        else:
            self.left -= 1
            self.new_tokens.append(token)
            self.new_text += self.text.push(token)
            if self.text.stopped:
                self.finish = "stop"
            elif self.left == 0:
                self.finish = "length"
        if self.finish:
            self.new_text += self.text.finish()

    def event(self) -> TokenEvent:
        event = TokenEvent(
            index=self.index, token_ids=tuple(self.new_tokens), text=self.new_text, finish_reason=self.finish
        )
        self.new_tokens, self.new_text, self._told_finish = [], "", self.finish is not None
        return event


def generate(
    make_decoder: DecoderFactory,
    prompts: Sequence[Sequence[int]],
    params: GenerationOptions,
    *,
    tokenizer: Tokenizer,
    vocab_size: int,
    max_positions: int,
    slice_tokens: int,
    group_size: int,
    prefill_tokens: int = PREFILL_TOKENS,
) -> Iterator[list[TokenEvent]]:
    """Generate in groups of at most ``group_size`` sequences, yielding after each slice. See ``Session.generate``.

    The first slice of a group reads its prompts and chooses one token of each; ``prefill_tokens`` bounds it.
    """
    checked = check_prompts(prompts, tokenizer, vocab_size=vocab_size, max_positions=max_positions)
    seed = secrets.randbits(63) if params.seed is None else params.seed
    rngs = [np.random.default_rng([seed & (2**64 - 1), i]) for i in range(len(checked))]

    def run() -> Iterator[list[TokenEvent]]:
        for group in _groups([len(p) for p in checked], most_rows=group_size, most_tokens=prefill_tokens):
            sequences = [_Sequence(i, checked[i], params, tokenizer, max_positions - len(checked[i])) for i in group]
            yield from _run_group(
                make_decoder(),
                sequences,
                [checked[i] for i in group],
                params,
                [rngs[i] for i in group],
                eos=tokenizer.eos_token_ids,
                slice_tokens=max(1, slice_tokens),
                vocab_size=vocab_size,
            )

    return run()


def _groups(lengths: Sequence[int], *, most_rows: int, most_tokens: int) -> Iterator[list[int]]:
    """Indices in order, cut so that no group has too many rows, nor too many tokens once padded to its longest."""
    group: list[int] = []
    for index, length in enumerate(lengths):
        longest = max([length, *(lengths[i] for i in group)])
        if group and (len(group) == most_rows or (len(group) + 1) * longest > most_tokens):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _run_group(
    decoder: Decoder,
    sequences: list[_Sequence],
    prompts: list[list[int]],
    params: GenerationOptions,
    rngs: list[np.random.Generator],
    *,
    eos: tuple[int, ...],
    slice_tokens: int,
    vocab_size: int,
) -> Iterator[list[TokenEvent]]:
    counts = TokenCounts(prompts, vocab_size, params)
    rows = list(range(len(sequences)))
    logits = decoder.start(prompts)
    since_yield = slice_tokens - 1  # reading the prompts was work enough for one turn
    while True:
        tokens = choose(logits, counts, rows, params, [rngs[row] for row in rows])
        keep = []
        for position, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            counts.add(row, token)
            sequences[row].take(token, eos)
            if sequences[row].finish is None:
                keep.append(position)
        since_yield += 1
        if since_yield == slice_tokens or not keep:
            yield [sequence.event() for sequence in sequences if sequence.has_news]
            since_yield = 0
        if not keep:
            return
        rows = [rows[position] for position in keep]
        logits = decoder.advance([int(tokens[position]) for position in keep], keep)
