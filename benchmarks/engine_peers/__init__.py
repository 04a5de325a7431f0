"""The contenders of ``benchmarks.engine``, by name; a module is imported when its contender is built."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.engine_peers.contender import Contender, Recipe
    from benchmarks.engine_peers.shapes import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where a contender lives.

    Attributes:
        title: for people.
        private: takes a DP-SGD step.
        needs: a module of others that may be missing here.
    """

    title: str
    module: str
    cls: str
    private: bool = True
    needs: str | None = None

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, or ``None``."""
        if self.needs is None or importlib.util.find_spec(self.needs) is not None:
            return None
        return f"{self.title} is left out: the module {self.needs} is not installed"


CONTENDERS = {
    "plain": Entry(title="PEFT, not private", module="plain", cls="PlainPeft", private=False),
    "ours-plain": Entry(title="TG-Tinker, not private", module="ours", cls="OursPlain", private=False),
    "ours": Entry(title="TG-Tinker, private", module="ours", cls="Ours"),
    "hooks": Entry(title="Opacus hooks", module="opacus_peers", cls="OpacusHooks"),
    "functorch": Entry(title="Opacus functorch", module="opacus_peers", cls="OpacusFunctorch"),
    "ghost": Entry(title="Opacus ghost clipping", module="opacus_peers", cls="OpacusGhost"),
    "fastdp": Entry(title="FastDP", module="fastdp", cls="FastDP", needs="fastDP"),
}
BASE = "plain"


def build(name: str, shape: Shape, recipe: Recipe) -> Contender:
    """A contender in memory, with the weights that all of them begin with."""
    entry = CONTENDERS[name]
    contender: Contender = getattr(importlib.import_module(f"{__name__}.{entry.module}"), entry.cls)(shape, recipe)
    return contender
