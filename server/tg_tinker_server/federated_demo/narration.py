"""The federated demo's words on the terminal, apart from the lines of progress."""

from __future__ import annotations

from pathlib import Path

from tg_tinker_server.demo.report import small, up
from tg_tinker_server.demo.words import Words, mark, program
from tg_tinker_server.federated_demo.data import FederatedTexts
from tg_tinker_server.federated_demo.findings import Findings
from tg_tinker_server.federated_demo.settings import FederatedDemoSettings


class Narrator(Words):
    """Prints each stage as it ends."""

    def introduce(
        self, settings: FederatedDemoSettings, texts: FederatedTexts, *, folder: Path, in_process: bool
    ) -> None:
        """Who takes part, with what, under which promise."""
        self.heading("TG-Tinker: three hospitals train one language model, and no record leaves its hospital")
        sites = ", ".join(f"{name} {len(records):,}" for name, records in texts.sites.items())
        how = (
            "in one process: four servers, Flower's messages in memory"
            if in_process
            else "as processes: four tg-tinker servers, a Flower SuperLink over TLS, three SuperNodes with keys"
        )
        self.facts(
            ("records", f"diagnosis wordings of ICD-10-CM by chapters: {sites}; no patient is in them"),
            ("", f"{len(texts.held_out):,} more are held out and declared public, to measure on"),
            (
                "promise",
                f"epsilon {settings.target_epsilon:g} at delta {small(settings.target_delta)} for each record, kept "
                "by its own site's server",
            ),
            ("leaves a site", "noised updates of a LoRA adapter, signed; no loss, no norm, no count"),
            ("model", f"{settings.model_ref}; so small that it learns the form of a diagnosis, and no medicine"),
            ("runs", how),
            ("folder", f"{folder}: each party's configuration, keys, ledger and logs in a folder of its own"),
        )

    def federation(self, settings: FederatedDemoSettings) -> None:
        """The heading above the rounds."""
        self.heading(
            f"Federation: {settings.rounds} rounds of {settings.local_steps} DP-SGD steps at each site, each charged "
            "to the site's own ledger before its noise is drawn"
        )

    def comparison(self, settings: FederatedDemoSettings) -> None:
        """The heading above the other arms."""
        self.heading(f"For comparison: each site alone, and all records in one place, {settings.steps} steps each")
        self.say(
            "These runs learn from the same texts again and spend a second budget under other names; whoever gets "
            "all models has what all epsilons allow together, so a real site would choose. Pooling is what the "
            "parties may not do: it shows the price of not sharing."
        )

    def results(self, found: Findings) -> None:
        """The table, and what was checked."""
        self.heading("Perplexity on the held-out texts, at the same epsilon for each record")
        self.facts(
            *((row.name, f"{row.perplexity:7.1f}   {_epsilon(row.epsilon)}{row.remark}") for row in found.rows())
        )
        self.say(found.verdict())
        self.heading("Epsilon")
        self.facts(
            *(
                (
                    site.name,
                    mark(
                        site.checked,
                        f"{site.epsilon} of {found.settings.target_epsilon:g}, signed by the site; noise multiplier "
                        f"{site.noise_multiplier}, {site.steps} steps at sampling rate {float(site.sample_rate):.5f}",
                    ),
                )
                for site in found.sites
            ),
            ("coordinator", found.coordinator_promise()),
        )
        self.heading("The adapter")
        artifact = found.artifact
        self.facts(
            ("artifact", artifact.artifact_id),
            ("encryption", f"{artifact.algorithm}, key {artifact.key_id}, {artifact.size_bytes:,} bytes"),
            (
                "",
                mark(found.reopened_equal, f"opened in a fresh client: perplexity {found.reopened:.1f}, as released"),
            ),
        )

    def finished(self, found: Findings, out: Path, folder: Path, *, again: bool) -> None:
        """The last lines: where to look, how to take the adapter out."""
        self.heading(
            "Done"
            if again
            else f"Done in {found.seconds:.0f} s: perplexity {found.before:.0f} → {found.federated:.0f}, and a site "
            f"alone reaches {found.alone:.0f} on average"
        )
        server = folder / "coordinator" / "server"
        self.facts(
            ("page", str(out)),
            ("report", f"{found.report.page}, to be handed out with {found.report.report.name}, which is signed;"),
            ("", f"it passed {len(found.report.verdicts)} checks, and anybody can repeat them offline:"),
            ("", f"{program()} {found.verify_arguments}"),
            ("export", "the adapter as PEFT loads it, sealed for a receiver's age key:"),
            ("", f"{program()} serve --data-dir {server}"),
            (
                "",
                f"TG_TINKER_API_KEY=$(cat {folder / 'coordinator' / 'api-key'}) {program()} checkpoints export "
                f"{found.artifact.artifact_id} -r age1...",
            ),
        )


def _epsilon(value: float | None) -> str:
    return "" if value is None else f"ε {up(value)}"
