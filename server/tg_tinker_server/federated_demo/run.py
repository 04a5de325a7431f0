"""The federated demo from end to end: register, federate, compare, open again, report; or show what was found."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from tg_tinker import ServiceClient
from tg_tinker.errors import ServerError
from tg_tinker.federated.keys import load_identity
from tg_tinker.federated.report_file import write_report
from tg_tinker.federated.result import FederatedResult
from tg_tinker.types import ArtifactInfo
from tg_tinker_server.demo.data import SOURCE
from tg_tinker_server.federated_demo.arms import Plan, register, train_all
from tg_tinker_server.federated_demo.data import FederatedTexts
from tg_tinker_server.federated_demo.federation import coordinate, each, measured, register_sites
from tg_tinker_server.federated_demo.findings import POOLED, Findings, arms_of, site_facts
from tg_tinker_server.federated_demo.narration import Narrator
from tg_tinker_server.federated_demo.parties import COORDINATOR, Party
from tg_tinker_server.federated_demo.progress import RoundLines, Watching, arm_line
from tg_tinker_server.federated_demo.report import render
from tg_tinker_server.federated_demo.settings import ALONE, DATASET, FederatedDemoSettings
from tg_tinker_server.federated_demo.settings import POOLED as POOLED_DATASET
from tg_tinker_server.federated_demo.stage import Stage
from tg_tinker_server.federated_demo.state import Arm, DemoRecord, Point, load_record, save_record

_VALID = timedelta(days=7)


def run(
    console: Console,
    stage: Callable[[Sequence[str]], AbstractContextManager[Stage]],
    out: Path,
    *,
    folder: Path,
    settings: FederatedDemoSettings,
    texts: FederatedTexts,
    in_process: bool,
) -> Findings:
    """Run the demo; write the page to ``out``, keep everything else in ``folder``.

    A second call with the same folder trains nothing, as the budgets are spent; an interrupted one goes on.

    Args:
        stage: starts servers of the named sites and of the coordinator, and whatever carries their messages.

    Raises:
        TGTinkerError: what any party may meet; what was spent stays spent.
    """
    started = time.monotonic()
    narrator = Narrator(console)
    record = load_record(folder, settings)
    narrator.introduce(settings, texts, folder=folder, in_process=in_process)
    again = record is not None and record.finished
    if again:
        narrator.say(
            "An earlier call spent these budgets, and budgets belong to the data, not to a run: nothing is trained "
            "again. Here is what that call found. To train anew beside it: make federated-demo ARGS=--fresh"
        )
    elif record is not None:
        narrator.say("Going on with the interrupted call; what it spent stays spent.")
    if record is None:
        expires = (datetime.now(UTC) + _VALID).isoformat(timespec="seconds")
        record = DemoRecord(
            settings=settings.to_json(),
            job_id=f"icd-10-cm-{secrets.token_hex(3)}",
            expires=expires,
            in_process=in_process,
        )
        save_record(folder, record)
    demo = _Demo(out=out, folder=folder, settings=settings, texts=texts, narrator=narrator, record=record)
    with ExitStack() as stack:
        with console.status("starting the servers …"):
            running = stack.enter_context(stage([] if again else list(texts.sites)))
        console.print(f"servers started in {time.monotonic() - started:.1f} s", style="dim", highlight=False)
        found = demo.play(running, started)
    out.write_text(render(found), encoding="utf-8")
    narrator.finished(found, out, folder, again=again)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demo:
    """One call of the demo, and what it works with."""

    out: Path
    folder: Path
    settings: FederatedDemoSettings
    texts: FederatedTexts
    narrator: Narrator
    record: DemoRecord

    def play(self, stage: Stage, started: float) -> Findings:
        """Train what is not trained yet, then look at what there is."""
        record = self.record
        if record.result is None:
            record.result = self._federate(stage)
            save_record(self.folder, record)
        if not record.finished:
            self._compare(stage)
            record.finished, record.seconds = True, time.monotonic() - started
            save_record(self.folder, record)
        return self._look(stage, record.result)

    # The federation.

    def _federate(self, stage: Stage) -> FederatedResult:
        console, settings = self.narrator.console, self.settings
        sites = {name: stage.parties[name] for name in self.texts.sites}
        with console.status("each site registers its records with its own server …"):
            register_sites(stage, settings, self.texts)
        self.narrator.federation(settings)
        job = settings.job(job_id=self.record.job_id, expires=self.record.expires)
        lines = RoundLines(console, settings, lambda: self._epsilons(sites))
        with Watching(console, "training at the sites", sites, steps=settings.steps):
            result = coordinate(stage, job, settings, self.texts, progress=lines.show)
        if result.status == "failed":
            stage.check()
            raise ServerError(f"the federated job failed: {result.why}")
        return result

    def _epsilons(self, sites: Mapping[str, Party]) -> dict[str, float]:
        """What each site's ledger shows; asked by the person at the keyboard, who plays them all."""

        def of(_name: str, party: Party) -> float:
            with party.client() as service:
                return service.get_privacy_ledger(DATASET).epsilon_spent

        found = each(of, sites)
        self.record.site_epsilons = (*self.record.site_epsilons, found)
        save_record(self.folder, self.record)
        return found

    # The comparison.

    def _compare(self, stage: Stage) -> None:
        self.narrator.comparison(self.settings)
        names = tuple(self.texts.sites)
        where: dict[str, tuple[Party, str, tuple[str, ...]]] = {
            name: (stage.parties[name], ALONE, (name,)) for name in names
        }
        where[POOLED] = (stage.parties[COORDINATOR], POOLED_DATASET, names)
        with self.narrator.console.status("registering the same records under second names …"):
            each(lambda _name, place: self._register(*place), where)
        plans = []
        for name, (party, dataset_id, _) in where.items():
            with party.client() as service:
                dataset = service.get_dataset(dataset_id)
            if name == POOLED:
                config = self.settings.pooled(dataset, sites=len(names))
            else:
                config = self.settings.alone(dataset)
            plans.append(Plan(name=name, party=party, dataset_id=dataset_id, config=config))

        def tell(arm: Arm) -> None:
            self.record.put(arm)
            save_record(self.folder, self.record)
            if line := arm_line(arm, self.settings):
                self.narrator.line(line)

        watched = {plan.name: plan.party for plan in plans}
        with Watching(self.narrator.console, "training alone", watched, steps=self.settings.steps):
            train_all(plans, self.texts.held_out, self.settings, known=self.record.arms, tell=tell, check=stage.check)

    def _register(self, party: Party, dataset_id: str, names: Sequence[str]) -> None:
        texts = [text for name in names for text in self.texts.sites[name]]
        with party.client() as service:
            register(service, dataset_id, texts, self.settings)

    # The end.

    def _look(self, stage: Stage, result: FederatedResult) -> Findings:
        record = self.record
        with stage.parties[COORDINATOR].client() as service:
            artifact = _artifact(service, result.artifact_id)
            reader = service.create_training_client(self.settings.reader())
            reopened = measured(reader, result.artifact_id, self.settings, self.texts)
            service.delete_training_client(reader.id)
        alone, pooled = arms_of(record, self.texts.sites)
        key = load_identity(stage.parties[COORDINATOR].identity)
        return self._findings(result, artifact, reopened, alone, pooled, key)

    def _findings(
        self,
        result: FederatedResult,
        artifact: ArtifactInfo,
        reopened: float,
        alone: Mapping[str, Arm],
        pooled: Arm,
        key: Ed25519PrivateKey,
    ) -> Findings:
        record = self.record
        shown = record.site_epsilons[-len(result.rounds) :]
        history = tuple(
            Point(
                step=done.round * self.settings.local_steps,
                perplexity=done.metrics["perplexity"],
                epsilon=max(epsilons.values()),
            )
            for done, epsilons in zip(result.rounds, shown, strict=True)
        )
        found = Findings(
            settings=self.settings,
            source=SOURCE,
            in_process=record.in_process,
            before=result.first_metrics["perplexity"],
            history=history,
            arms=alone,
            pooled=pooled,
            sites=site_facts(result, {name: len(texts) for name, texts in self.texts.sites.items()}),
            result=result,
            artifact=artifact,
            reopened=reopened,
            held_out=len(self.texts.held_out),
            seconds=record.seconds,
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            report=write_report(result, key, self.out.parent),
        )
        self.narrator.results(found)
        return found


def _artifact(service: ServiceClient, artifact_id: str) -> ArtifactInfo:
    return next(info for info in service.list_artifacts(limit=1000) if info.artifact_id == artifact_id)
