"""A federated demo that takes seconds: the bigram model, few records, few steps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console

from tg_tinker_server.federated_demo.data import FederatedTexts
from tg_tinker_server.federated_demo.findings import Findings
from tg_tinker_server.federated_demo.in_process import InProcessStage
from tg_tinker_server.federated_demo.run import run
from tg_tinker_server.federated_demo.settings import FederatedDemoSettings
from tg_tinker_server.federated_demo.stage import Stage

SMALL = FederatedDemoSettings(
    model_ref="bigram",
    rounds=2,
    local_steps=2,
    expected_batch_size=16,
    eval_batch_size=8,
    learning_rate=0.5,
    alone_learning_rate=0.5,
    pooled_learning_rate=0.5,
    held_out=5,
)
TEXTS = FederatedTexts(
    sites={
        "north": tuple(f"fever of unknown origin {i}" for i in range(60)),
        "south": tuple(f"fracture of left arm {i}" for i in range(50)),
        "west": tuple(f"other disorder of eye {i}" for i in range(40)),
    },
    held_out=tuple(f"fever and fracture {i}" for i in range(15)),
)


class Terminal:
    """Runs the demo and keeps what it printed."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "demo"
        self.out = home / "page.html"
        self.printed = ""

    def stage(self, sites: Sequence[str] = tuple(TEXTS.sites)) -> AbstractContextManager[Stage]:
        return InProcessStage(self.folder, sites, SMALL, backend="bigram")

    def demo(self, settings: FederatedDemoSettings = SMALL) -> Findings:
        text = io.StringIO()
        try:
            return run(
                Console(file=text, width=110),
                self.stage,
                self.out,
                folder=self.folder,
                settings=settings,
                texts=TEXTS,
                in_process=True,
            )
        finally:
            self.printed = text.getvalue()
