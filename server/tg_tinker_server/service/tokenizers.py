"""Tokenizers of the base models: where a client finds one, and the files of those on this machine's disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tg_tinker.errors import ResourceNotFoundError

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What makes a tokenizer. Nothing else of a model's folder is shown."""
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Tokenizers:
    """Knows them by the names of base models; ``sources`` are folders or hub ids."""

    sources: Mapping[str, str | Path]

    def id_of(self, model_ref: str) -> str:
        """A hub id, or the model's own name where `files` has the tokenizer; empty: neither."""
        source = self.sources.get(model_ref)
        if source is None:
            return ""
        return model_ref if Path(source).is_dir() else str(source)

    def folder_of(self, model_ref: str) -> Path | None:
        """The folder on this machine that holds the tokenizer; only for callers on the same machine."""
        source = self.sources.get(model_ref)
        if source is None or not (Path(source) / FILES[0]).is_file():
            return None
        return Path(source).resolve()

    def files(self, model_ref: str) -> Iterator[tuple[str, bytes]]:
        """Names and bytes of the tokenizer's files, in pieces of at most 1 MiB; iterate it off the event loop.

        Raises:
            ResourceNotFoundError: no such model, or its tokenizer is not on this machine's disk.
        """
        source = self.sources.get(model_ref)
        if source is None or not Path(source).is_dir():
            hub = "" if source is None else f"; load it from the hub as {source}"
            raise ResourceNotFoundError(
                f"the server has no tokenizer files for that model{hub}",
                resource_type="tokenizer",
                resource_id=model_ref[:200],
            )
        return _pieces(Path(source))


def _pieces(folder: Path) -> Iterator[tuple[str, bytes]]:
    for name in FILES:
        if not (folder / name).is_file():
            continue
        with (folder / name).open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield name, piece
