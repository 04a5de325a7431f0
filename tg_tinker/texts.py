"""Texts and token ids, by the tokenizer of a run or of a sampler. What was asked once is known here."""

from __future__ import annotations

import importlib
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakKeyDictionary

from tg_tinker._transport import Transport
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError, ServerError
from tg_tinker.wire import requests

_KEPT = 4096
_FILE = re.compile(r"[A-Za-z0-9._-]{1,100}")
_lock = threading.Lock()
_known: WeakKeyDictionary[Transport, OrderedDict[tuple[Any, ...], Any]] = WeakKeyDictionary()


def encode(transport: Transport, text: str, *, run_id: str = "", sampler_id: str = "") -> list[int]:
    """Token ids of a text.

    Raises:
        InvalidRequestError: it is no text.
    """
    if not isinstance(text, str):
        raise InvalidRequestError(
            f"encode takes a text, not a {type(text).__name__}", field="text", constraint="a string"
        )

    def ask() -> tuple[int, ...]:
        reply = transport.call(requests.encode_texts(run_id, [text], sampler_id=sampler_id))
        return tuple(reply.ids[0].ids)

    return list(_remembered(transport, ("encode", run_id or sampler_id, text), ask))


def decode(transport: Transport, ids: Sequence[int], *, run_id: str = "", sampler_id: str = "") -> str:
    """Text of token ids.

    Raises:
        InvalidRequestError: they are not a list of integers.
    """
    given = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or not all(_whole(i) for i in given):
        raise InvalidRequestError("decode takes a list of token ids", field="ids", constraint="integers")
    key = tuple(int(i) for i in given)

    def ask() -> str:
        return str(transport.call(requests.decode_ids(run_id, [list(key)], sampler_id=sampler_id)).texts[0])

    return str(_remembered(transport, ("decode", run_id or sampler_id, key), ask))


class ServerTokenizer:
    """A tokenizer that the server runs: for models whose tokenizer has no files, or where transformers is missing."""

    def __init__(self, transport: Transport, *, run_id: str = "", sampler_id: str = "") -> None:
        self._transport, self._by = transport, {"run_id": run_id, "sampler_id": sampler_id}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:  # noqa: ARG002 - as transformers has it
        """Token ids of a text."""
        return encode(self._transport, text, **self._by)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:  # noqa: ARG002
        """Text of token ids."""
        return decode(self._transport, ids, **self._by)


def tokenizer(transport: Transport, base_model: str, *, run_id: str = "", sampler_id: str = "") -> Any:
    """The tokenizer of a model, from the server's own files; asked for once.

    Returns:
        As ``transformers.AutoTokenizer`` loads it; a ``ServerTokenizer`` where there are no files, or where
        transformers is not installed.
    """
    transformers = _module("transformers")

    def ask() -> Any:
        with TemporaryDirectory(prefix="tg-tinker-tokenizer-") as folder:
            try:
                names = _fetch(transport, base_model, Path(folder)) if transformers else set()
            except ResourceNotFoundError:
                names = set()
            if not names:
                return ServerTokenizer(transport, run_id=run_id, sampler_id=sampler_id)
            return transformers.AutoTokenizer.from_pretrained(folder)

    return _remembered(transport, ("tokenizer", base_model), ask)


def _fetch(transport: Transport, base_model: str, folder: Path) -> set[str]:
    names: set[str] = set()
    for piece in transport.stream(requests.tokenizer_files(base_model)):
        if not _FILE.fullmatch(piece.name) or piece.name.startswith("."):
            raise ServerError(f"the server names a file of the tokenizer {piece.name[:40]!r}")
        with (folder / piece.name).open("ab") as file:
            file.write(piece.data)
        names.add(piece.name)
    return names


def _module(name: str) -> Any:
    """A package that this one does not need; it is looked for only when somebody asks for what it makes."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _remembered(transport: Transport, key: tuple[Any, ...], ask: Any) -> Any:
    with _lock:
        known = _known.setdefault(transport, OrderedDict())
        if key in known:
            known.move_to_end(key)
            return known[key]
    answer = ask()
    with _lock:
        known[key] = answer
        while len(known) > _KEPT:
            known.popitem(last=False)
    return answer
