"""From tokens to text that can be shown at once: never half a character, never part of a stop sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"
_CONTEXT_TOKENS = 8


class TextStream:
    """Assembles one completion from its tokens.

    Tokens are decoded behind a window of earlier ones, because some tokenizers drop a leading space at the start
    of a text. Guarantee: the pieces returned by ``push`` and ``finish`` join to the completion, up to the first
    stop sequence.

    >>> stream = TextStream(lambda ids: bytes(ids).decode("utf-8", "replace"), stop_sequences=["END"])
    >>> "".join(stream.push(b) for b in "ä. EN".encode()), stream.finish()
    ('ä. ', 'EN')
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        stop_sequences: Sequence[str] = (),
        context: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._stops = tuple(stop_sequences)
        self._window: list[int] = list(context[-_CONTEXT_TOKENS:])
        self._shown = len(self._settled())  # characters of the window that were returned or belong to the prompt
        self._fresh = 0  # tokens of the window since the last whole character
        self._held = ""
        self.stopped = False

    def _settled(self) -> str:
        """The window's text without a character that the next token may still complete."""
        text = self._decode(self._window)
        return text[:-1] if text.endswith(_INCOMPLETE) else text

    def push(self, token: int) -> str:
        """Take one token; return the text that became certain. ``stopped`` says whether a stop was completed."""
        if self.stopped:
            return ""
        self._window.append(token)
        self._fresh += 1
        settled = self._settled()
        piece = settled[self._shown :]
        self._shown = max(self._shown, len(settled))
        if piece and len(settled) == len(self._decode(self._window)):
            self._window = self._window[-max(_CONTEXT_TOKENS, self._fresh) :]
            self._shown = len(self._settled())
            self._fresh = 0
        return self._release(self._held + piece)

    def finish(self) -> str:
        """Return what was held back. A character that stayed incomplete is dropped."""
        rest, self._held = ("" if self.stopped else self._held), ""
        return rest

    def _release(self, text: str) -> str:
        """Split text into what may be shown and what may yet turn into a stop sequence."""
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
