"""Text to token ids and back: the small interface the engine needs, and a byte-level tokenizer without files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What a session asks of a tokenizer."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        ...

    @property
    def start_token_id(self) -> int | None:
        """What to put in front of an empty prompt."""
        ...

    def encode(self, text: str) -> list[int]:
        """Text to token ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text; special tokens left out, incomplete characters as U+FFFD."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then begin, end, padding and one spare: 260 ids.

    >>> ByteTokenizer().decode(ByteTokenizer().encode("naïve"))
    'naïve'
    """

    vocab_size = 260
    start_token_id = 256
    eos_token_ids = (257,)
    pad_token_id = 258

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes to text; special ids left out, bytes that are no UTF-8 as U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")
