"""The demo's words on the terminal, apart from the live training line."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tg_tinker_server.demo.data import DemoTexts
from tg_tinker_server.demo.report import Findings, small, up
from tg_tinker_server.demo.settings import DemoSettings
from tg_tinker_server.demo.state import Checkpoint, Measured


class Narrator:
    """Prints each stage as it ends; plain text when the output is not a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def introduce(self, settings: DemoSettings, texts: DemoTexts, *, address: str, folder: Path) -> None:
        """What is going to happen, to which texts, under which promise."""
        self._heading("TG-Tinker: a language model learns from sensitive text, under a stated epsilon")
        everything = len(texts.train) + len(texts.held_out)
        self._facts(
            ("texts", f"{everything:,} diagnosis wordings of ICD-10-CM; no patient is in them"),
            ("", f"{len(texts.train):,} to train on, {len(texts.held_out):,} held out and declared public"),
            (
                "promise",
                f"epsilon {settings.target_epsilon:g} at delta {small(settings.target_delta)} for each record",
            ),
            ("model", f"{settings.model_ref}, with a LoRA adapter of rank {settings.rank}"),
            ("", "so small that it learns the form of a diagnosis, and no medicine"),
            ("server", f"gRPC on {address}; its data is in {folder}"),
        )

    def say(self, text: str) -> None:
        """One paragraph."""
        self.console.print()
        self.console.print(Text(text), soft_wrap=not self.console.is_terminal)

    def measured(self, when: str, measured: Measured, settings: DemoSettings) -> None:
        """Perplexity and samples before or after training."""
        self._heading(f"{when}: perplexity {measured.perplexity:.1f} on the held-out texts")
        self._facts(*((f"{p} …", s or "(ends)") for p, s in zip(settings.prompts, measured.samples, strict=True)))

    def training(self, settings: DemoSettings) -> None:
        """The heading above the live line."""
        self._heading(
            f"Training: {settings.steps} steps of {settings.expected_batch_size} records on average, "
            "each charged to the ledger before its noise is drawn"
        )

    def saved(self, checkpoint: Checkpoint) -> None:
        """The encrypted checkpoint."""
        self._heading("Checkpoint")
        self._facts(
            ("artifact", checkpoint.artifact_id),
            ("size", f"{checkpoint.size_bytes:,} bytes"),
            ("encryption", f"{checkpoint.algorithm}, key {checkpoint.key_id}"),
        )

    def verified(self, found: Findings) -> None:
        """What was checked at the end."""
        ledger = found.ledger
        self._heading("Checked")
        self._facts(
            (
                "checkpoint",
                _mark(found.ciphertext_matches, "pulled; the ciphertext has the hash it was announced with"),
            ),
            (
                "",
                _mark(
                    found.reopened_equal,
                    f"opened in a fresh client: perplexity {found.reopened_perplexity:.1f}, as trained",
                ),
            ),
            (
                "ledger",
                _mark(True, f"{ledger.entries} entries form one chain, and no release came before its charge"),
            ),
            ("", _mark(True, f"epsilon {up(ledger.epsilon)} of {ledger.target_epsilon:g} recomputed from the file")),
            ("", f"  second accountant (privacy loss distributions): {up(ledger.pld_epsilon)}"),
        )

    def finished(self, found: Findings, out: Path, report: Path, checks: int, *, seconds: float) -> None:
        """The last lines: results, and where to look."""
        factor = found.before.perplexity / found.after.perplexity
        self._heading(
            f"Perplexity {found.before.perplexity:.0f} → {found.after.perplexity:.0f} ({factor:.1f} times lower) "
            f"at epsilon {up(found.ledger.epsilon)}, in {seconds:.0f} s"
        )
        self._facts(
            ("page", f"{out}, for the owner of the data: it shows un-noised losses"),
            ("report", f"{report.with_suffix('.html')}, to be handed out with {report.name}, which is signed;"),
            ("", f"it passed {checks} checks, and anybody can repeat them offline:"),
            ("", f"tg-tinker audit verify {report}"),
            ("ledger", f"{found.ledger.file}: tg-tinker ledger verify {found.ledger.file}"),
        )

    def _heading(self, text: str) -> None:
        self.console.print()
        self.console.print(Text(text, style="bold"), soft_wrap=not self.console.is_terminal)

    def _facts(self, *rows: tuple[str, str]) -> None:
        """Names and values in two columns; unwrapped where a log or a pipe reads them."""
        width = max(len(name) for name, _ in rows)
        if not self.console.is_terminal:
            for name, value in rows:
                self.console.print(Text(f"  {name:<{width}}  {value}"), soft_wrap=True)
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(Text(f"  {name:<{width}}"), Text(value))
        self.console.print(table)


def _mark(good: bool, text: str) -> str:
    return f"✓ {text}" if good else f"✗ NOT SO: {text}"
