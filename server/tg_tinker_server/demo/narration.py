"""The demo's words on the terminal, apart from the live training line."""

from __future__ import annotations

from pathlib import Path

from tg_tinker_server.demo.data import DemoTexts
from tg_tinker_server.demo.report import Findings, small, up
from tg_tinker_server.demo.settings import DemoSettings
from tg_tinker_server.demo.state import Checkpoint, Measured
from tg_tinker_server.demo.words import Words, mark, program


class Narrator(Words):
    """Prints each stage as it ends."""

    def introduce(self, settings: DemoSettings, texts: DemoTexts, *, address: str, folder: Path) -> None:
        """What is going to happen, to which texts, under which promise."""
        self.heading("TG-Tinker: a language model learns from sensitive text, under a stated epsilon")
        everything = len(texts.train) + len(texts.held_out)
        self.facts(
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

    def measured(self, when: str, measured: Measured, settings: DemoSettings) -> None:
        """Perplexity and samples before or after training."""
        self.heading(f"{when}: perplexity {measured.perplexity:.1f} on the held-out texts")
        self.facts(*((f"{p} …", s or "(ends)") for p, s in zip(settings.prompts, measured.samples, strict=True)))

    def training(self, settings: DemoSettings) -> None:
        """The heading above the live line."""
        self.heading(
            f"Training: {settings.steps} steps of {settings.expected_batch_size} records on average, "
            "each charged to the ledger before its noise is drawn"
        )

    def saved(self, checkpoint: Checkpoint) -> None:
        """The encrypted checkpoint."""
        self.heading("Checkpoint")
        self.facts(
            ("artifact", checkpoint.artifact_id),
            ("size", f"{checkpoint.size_bytes:,} bytes"),
            ("encryption", f"{checkpoint.algorithm}, key {checkpoint.key_id}"),
        )

    def verified(self, found: Findings) -> None:
        """What was checked at the end."""
        ledger = found.ledger
        self.heading("Checked")
        self.facts(
            (
                "checkpoint",
                mark(found.ciphertext_matches, "pulled; the ciphertext has the hash it was announced with"),
            ),
            (
                "",
                mark(
                    found.reopened_equal,
                    f"opened in a fresh client: perplexity {found.reopened_perplexity:.1f}, as trained",
                ),
            ),
            (
                "ledger",
                mark(True, f"{ledger.entries} entries form one chain, and no release came before its charge"),
            ),
            ("", mark(True, f"epsilon {up(ledger.epsilon)} of {ledger.target_epsilon:g} recomputed from the file")),
            ("", f"  second accountant (privacy loss distributions): {up(ledger.pld_epsilon)}"),
        )

    def finished(self, found: Findings, out: Path, report: Path, checks: int, *, seconds: float) -> None:
        """The last lines: results, and where to look."""
        factor = found.before.perplexity / found.after.perplexity
        self.heading(
            f"Perplexity {found.before.perplexity:.0f} → {found.after.perplexity:.0f} ({factor:.1f} times lower) "
            f"at epsilon {up(found.ledger.epsilon)}, in {seconds:.0f} s"
        )
        self.facts(
            ("page", f"{out}, for the owner of the data: it shows un-noised losses"),
            ("report", f"{report.with_suffix('.html')}, to be handed out with {report.name}, which is signed;"),
            ("", f"it passed {checks} checks, and anybody can repeat them offline:"),
            ("", f"{program()} audit verify {report}"),
            ("ledger", f"{found.ledger.file}: {program()} ledger verify {found.ledger.file}"),
        )
