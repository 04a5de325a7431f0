"""The demo from end to end: measure, train, save, open again, verify, report; or show what an earlier call found."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from rich.console import Console

from tg_tinker import SavedState, ServiceClient, TrainingClient
from tg_tinker.reports.documents import verify_document
from tg_tinker.reports.page import render as privacy_page
from tg_tinker.reports.verdicts import Trust
from tg_tinker.transparency.folder import Folder, data_folder
from tg_tinker.wire.privacy import report_of
from tg_tinker_server.demo.data import SOURCE, DemoTexts, load_texts
from tg_tinker_server.demo.ledger_file import check_ledger, write_ledger
from tg_tinker_server.demo.loop import train
from tg_tinker_server.demo.measure import measure
from tg_tinker_server.demo.narration import Narrator
from tg_tinker_server.demo.progress import TrainingProgress
from tg_tinker_server.demo.reopen import reopen
from tg_tinker_server.demo.report import Findings, render
from tg_tinker_server.demo.settings import DemoSettings
from tg_tinker_server.demo.state import Checkpoint, DemoRecord, StepPoint, load_record, save_record

LEDGER_FILE = "ledger.jsonl"


class RunningServer(Protocol):
    """Where to reach a server, and a key for it that may train, sample, export and audit."""

    @property
    def address(self) -> str:
        """host:port."""

    @property
    def api_key(self) -> str:
        """The key's text."""


def run(
    console: Console,
    server: RunningServer,
    out: Path,
    *,
    folder: Path,
    settings: DemoSettings | None = None,
    texts: DemoTexts | None = None,
) -> Findings:
    """Run the demo against ``server``; write the page to ``out``, keep the state and the ledger in ``folder``.

    Beside the page, which is for the owner, lies the server's signed privacy report, which may be handed out.

    A second call with the same folder trains nothing: the budget is the dataset's and is spent. It opens the
    checkpoint of the first call, or goes on with a run that was interrupted.

    Raises:
        TGTinkerError: as any client may meet; what was spent stays spent.
    """
    settings = settings or DemoSettings()
    demo = Demo(
        service=ServiceClient(api_key=server.api_key, base_url=server.address),
        folder=folder,
        settings=settings,
        texts=texts or load_texts(settings),
        narrator=Narrator(console),
    )
    started = time.monotonic()
    demo.narrator.introduce(settings, demo.texts, address=server.address, folder=folder)
    found = demo.findings()
    out.write_text(render(found), encoding="utf-8")
    report, checks = hand_out(demo.service, settings.dataset_id, out.parent)
    demo.narrator.finished(found, out, report, checks, seconds=time.monotonic() - started)
    return found


def hand_out(service: ServiceClient, dataset_id: str, folder: Path) -> tuple[Path, int]:
    """Write the signed privacy report and its page; the file, and how many checks a stranger's verifier passed."""
    envelope = service.get_signed_report(dataset_id)
    checks = sum(1 for _ in verify_document(envelope, Trust.of_user(Folder(data_folder()))))
    report = folder / "privacy-report.json"
    report.write_bytes(envelope)
    report.with_suffix(".html").write_text(privacy_page(report_of(envelope)), encoding="utf-8")
    return report, checks


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """One call of the demo, and what it works with."""

    service: ServiceClient
    folder: Path
    settings: DemoSettings
    texts: DemoTexts
    narrator: Narrator

    def findings(self) -> Findings:
        """Train if there is nothing to show yet, then check what there is."""
        record = load_record(self.folder, self.settings)
        if record is not None and record.finished:
            self.narrator.say(
                "An earlier call spent this dataset's budget, and the budget belongs to the data, not to a run: "
                "nothing is trained again. Here is what that call found, and its checkpoint opened once more. "
                "To train anew beside it: make demo ARGS=--fresh"
            )
            self._show_measured(record)
        else:
            record = self._train(record)
        return self._check(record)

    def _train(self, record: DemoRecord | None) -> DemoRecord:
        if record is None:
            config = self.settings.training_config(dataset_size=len(self.texts.train))
            tc = self.service.create_training_client(config)
            record = DemoRecord(settings=self.settings.to_json(), run_id=tc.id, dataset_size=len(self.texts.train))
            save_record(self.folder, record)
        else:
            tc = self.service.get_training_client(record.run_id)
            self.narrator.say(f"Going on with the interrupted run after step {tc.step}; what it spent stays spent.")
        if record.before is None:
            record.before = measure(tc, self.texts.held_out, self.settings)
            save_record(self.folder, record)
        self.narrator.measured("Before training", record.before, self.settings)
        self._learn(tc, record)
        record.after = measure(tc, self.texts.held_out, self.settings)
        self.narrator.measured("After training", record.after, self.settings)
        record.checkpoint = self._save(tc)
        save_record(self.folder, record)
        return record

    def _learn(self, tc: TrainingClient, record: DemoRecord) -> None:
        record.history = [point for point in record.history if point.step <= tc.step]
        self.narrator.training(self.settings)
        with TrainingProgress(self.narrator.console, self.settings, start=tc.step) as progress:

            def on_step(point: StepPoint) -> None:
                progress.show(point)
                record.history.append(point)
                save_record(self.folder, record)

            planned = train(tc, self.texts.train, self.settings, on_step=on_step)
        if not planned:
            self.narrator.say(
                f"The budget ended after step {tc.step} of {self.settings.steps}: a step that was charged and then "
                "interrupted stays charged."
            )

    def _save(self, tc: TrainingClient) -> Checkpoint:
        saved = tc.save_state(metadata={"demo": self.settings.dataset_id})
        assert isinstance(saved, SavedState)
        return Checkpoint(
            artifact_id=saved.artifact_id,
            size_bytes=saved.size_bytes,
            algorithm=saved.encryption.algorithm,
            key_id=saved.encryption.key_id,
            content_hash=saved.content_hash,
            saved=saved.timestamp.isoformat(),
        )

    def _show_measured(self, record: DemoRecord) -> None:
        for when, measured in (("Before training", record.before), ("After training", record.after)):
            assert measured is not None
            self.narrator.measured(when, measured, self.settings)

    def _check(self, record: DemoRecord) -> Findings:
        assert record.before is not None
        assert record.after is not None
        assert record.checkpoint is not None
        self.narrator.saved(record.checkpoint)
        reopened = reopen(self.service, record.checkpoint, self.texts.held_out, self.settings)
        ledger = self.service.get_privacy_ledger(self.settings.dataset_id)
        write_ledger(ledger, self.folder / LEDGER_FILE)
        found = Findings(
            settings=self.settings,
            source=SOURCE,
            dataset_size=record.dataset_size,
            trainable_parameters=reopened.trainable_parameters,
            before=record.before,
            after=record.after,
            history=tuple(record.history),
            checkpoint=record.checkpoint,
            reopened_perplexity=reopened.perplexity,
            ciphertext_matches=reopened.ciphertext_matches,
            ledger=check_ledger(self.folder / LEDGER_FILE, ledger),
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
        self.narrator.verified(found)
        return found
