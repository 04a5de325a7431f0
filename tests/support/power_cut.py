"""What a disk may hold after the power went: pure arithmetic over recorded operations.

A flush of a file fixes what was written to it before the flush began. Of everything since, each write may be there,
be missing, or be there in some of its sectors, whatever became of its neighbours; each truncation may have happened
or not; and until the folder is flushed, a new file may be gone and a deleted one back. After a flush that failed, no
later one makes up for it: Linux takes those pages for clean.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.recorded_disk import Op

SECTORS = (512, 4096)  # bytes that a disk writes as one
Image = dict[str, bytes]


@dataclass
class _File:
    """One file: what is on disk for sure, and what was asked for since."""

    durable: bytearray = field(default_factory=bytearray)
    waiting: list[tuple[int, Op]] = field(default_factory=list)

    def flushed(self, before: int, fate: Callable[[Op], list[Op]]) -> None:
        """What ``fate`` leaves of the operations numbered below ``before`` is on disk now, the rest never will be."""
        for number, op in self.waiting:
            if number < before:
                for piece in fate(op):
                    apply(self.durable, piece)
        self.waiting = [(number, op) for number, op in self.waiting if number >= before]


def apply(content: bytearray, op: Op) -> None:
    """Do a write or a truncation."""
    end = op.offset + len(op.data)
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    if op.kind == "truncate":
        del content[op.offset :]
    else:
        content[op.offset : end] = op.data


def torn(op: Op, choice: random.Random) -> list[Op]:
    """The pieces of a write that made it, if it did not make it whole: any of its sectors."""
    sector = choice.choice(SECTORS)
    pieces, start, end = [], op.offset, op.offset + len(op.data)
    while start < end:
        stop = min(end, (start // sector + 1) * sector)
        if choice.random() < 0.5:
            pieces.append(Op("write", op.name, start, op.data[start - op.offset : stop - op.offset]))
        start = stop
    return pieces


def _whole(op: Op) -> list[Op]:
    return [op]


def _temper(choice: random.Random) -> Callable[[Op], list[Op]]:
    """What becomes of operations that were not flushed; each cut keeps them with a likelihood of its own."""
    keep = choice.choice((0.1, 0.5, 0.9))

    def fate(op: Op) -> list[Op]:
        dice = choice.random()
        if dice < keep:
            return [op]
        return torn(op, choice) if op.kind == "write" and dice < keep + (1 - keep) / 2 else []

    return fate


class Disk:
    """A folder's files while operations are played, one by one, on top of an image that is on disk for sure.

    ``choice`` decides what a failed flush leaves on disk; an intact view is then no longer to be had.
    """

    def __init__(self, start: Image | None = None, choice: random.Random | None = None) -> None:
        self._choice = choice or random.Random(0)
        self._files = {name: _File(bytearray(content)) for name, content in (start or {}).items()}
        self._names = dict(self._files)  # which names are on disk for sure
        self._played = 0

    def play(self, op: Op) -> None:
        """The next operation was asked for."""
        match op.kind:
            case "create":
                self._files[op.name] = _File()
            case "write" | "truncate":
                self._files[op.name].waiting.append((self._played, op))
            case "sync":
                self._files[op.name].flushed(op.offset, _whole)
            case "sync-failed":
                self._files[op.name].flushed(op.offset, _temper(self._choice))
            case "delete":
                del self._files[op.name]
            case "sync-folder":
                self._names = dict(self._files)
        self._played += 1

    def intact(self) -> Image:
        """What a program that looks now would see."""
        return {name: _after(file, _whole) for name, file in self._files.items()}

    def cut(self, choice: random.Random) -> Image:
        """One of the images that a power cut now may leave."""
        fate = _temper(choice)
        image = {}
        for name in sorted({*self._files, *self._names}):
            now, sure = self._files.get(name), self._names.get(name)
            file = now if now is sure else choice.choice((now, sure))
            if file is not None:
                image[name] = _after(file, fate)
        return image


def _after(file: _File, fate: Callable[[Op], list[Op]]) -> bytes:
    content = bytearray(file.durable)
    for _, op in file.waiting:
        for piece in fate(op):
            apply(content, piece)
    return bytes(content)


def put(image: Image, folder: Path) -> Path:
    """Write an image into a folder that it then is all of."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in image.items():
        (folder / name).write_bytes(content)
    return folder


def power_cuts(ops: Sequence[Op], cuts: int, choice: random.Random) -> Iterator[tuple[Image, set[str]]]:
    """Images of ``cuts`` power cuts at random moments, each with what had been told (marked) by then."""
    moments = sorted(choice.randint(0, len(ops)) for _ in range(cuts))
    disk, told, played = Disk(), set[str](), 0
    for moment in moments:
        for op in ops[played:moment]:
            disk.play(op)
            if op.kind == "mark":
                told.add(op.name)
        played = moment
        yield disk.cut(choice), set(told)
