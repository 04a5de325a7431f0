"""A site's answers to a coordinator: join, train, the steps of masking, finish. It raises nothing.

Each message may find a fresh process, so what must last is on disk before an answer leaves. An answer holds an
update, or why there is none; never a loss, a norm, a count, a path, or words of the server.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated import hello
from tg_tinker.federated.job import Job
from tg_tinker.federated.keys import public_key, public_text
from tg_tinker.federated.masking import ARRAY, KINDS, MaskingSite
from tg_tinker.federated.messages import Arrays, Envelope
from tg_tinker.federated.site_config import SiteConfig
from tg_tinker.federated.site_join import agreed_terms, read_job
from tg_tinker.federated.site_memory import charges_of_job, noted, rounds_noted
from tg_tinker.federated.site_state import JobRecord, SiteState, StateFolder
from tg_tinker.federated.site_statement import statement_of
from tg_tinker.federated.site_training import LocalTraining, require_all
from tg_tinker.federated.statement import SiteStatement, sign_statement
from tg_tinker.federated.updates import flatten, weights_digest
from tg_tinker.ledger.history import read_history
from tg_tinker.service_client import ServiceClient
from tg_tinker.wire.privacy import report_of

FAILED: Final = "failed"
"""Reason of a reply that is no refusal: something broke at the site. Asking again may help."""
SORRY: Final = "something failed at this site; its operator finds what in the site's log. Ask again later"
STRANGER: Final = "only the coordinator of this site is answered"
_QUIET_S: Final = 60.0  # between two notes of strangers, who could fill the audit log
_NO_JOB: Final = "0" * 64  # stands in the audit log for a message that names none
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_WAIT_S = 3600.0  # for another message of this site to be done with
_LONGEST = 2000  # characters of a refusal


class Site:
    """One site of a federation.

    Args:
        service: a client of the site's own server, with the roles trainer, exporter and auditor.
        key: the identity that the roster has the public half of.
        now: the clock.
    """

    def __init__(
        self,
        config: SiteConfig,
        service: ServiceClient,
        key: Ed25519PrivateKey,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._config, self._service, self._key, self._now = config, service, key, now
        self._coordinator = public_key(config.policy.coordinator)
        self._folder = StateFolder(config.state_dir)
        self._log = _log_file(config.state_dir)

    def handle(self, request: Envelope) -> Envelope:
        """The signed answer to a request: what was asked for, or a refusal. Strangers get an unsigned one."""
        if not self._from_coordinator(request):
            return self._to_a_stranger(request)
        try:
            if request.kind == hello.HELLO:
                return hello.answer(request, site=self._config.site, key=self._key, coordinator=self._coordinator)
            self._check(request)
            facts, arrays = self._answer(request)
        except FederationRefusedError as e:
            why = "" if e.__cause__ is None else f" ({e.__cause__})"  # for the operator alone
            self._log.warning("refused %r: %s%s", request.kind, e.message, why)
            facts, arrays = self._refusal(request, e.reason, e.message), {}
        except Exception:  # noqa: BLE001 - whatever broke is told here, and only that it did is told elsewhere
            self._log.exception("could not answer %r", request.kind)
            facts, arrays = self._refusal(request, FAILED, SORRY), {}
        return self._reply(request, facts, arrays).signed(self._key)

    def _from_coordinator(self, request: Envelope) -> bool:
        try:
            request.verify(self._coordinator)
        except Exception:  # noqa: BLE001 - a header may hold anything, and have no canonical form
            return False
        return True

    def _to_a_stranger(self, request: Envelope) -> Envelope:
        """Neither our name nor a signature, which would tell it too; and no more than a note a minute."""
        try:
            if self._first_in_a_while():
                self._log.warning("refused a message of a stranger; more of them in a minute are not noted")
                self._service.note_federation("round_refused", job=_NO_JOB, reason="bad_signature")
        except Exception:  # noqa: BLE001 - a refusal stands, whether or not it can be noted
            self._log.exception("the refusal is not in the server's audit log")
        facts = {"refused": "bad_signature", "message": STRANGER}
        return Envelope(direction="reply", site="", facts=facts, **_place(request))

    def _first_in_a_while(self) -> bool:
        path, now = self._config.state_dir / "stranger", self._now().timestamp()
        if path.exists() and abs(now - path.stat().st_mtime) < _QUIET_S:
            return False
        path.touch(0o600)
        os.utime(path, (now, now))
        return True

    def _check(self, request: Envelope) -> None:
        """Require a request to this site."""
        if request.direction != "request" or request.site != self._config.site:
            raise FederationRefusedError(
                f"this is no request to site {self._config.site!r}; requests are for one site each",
                reason="unknown_site",
            )

    def _answer(self, request: Envelope) -> tuple[Mapping[str, Any], Arrays]:
        with self._folder.open(wait_s=_WAIT_S) as state:
            if request.kind == "join":
                return self._join(request, state), {}
            record = state.job(request.job)
            if record is None:
                raise FederationRefusedError("this site did not agree to that job; ask it to join", reason="policy")
            if request.kind == "finish":
                return self._finish(record, state), {}
            self._config.policy.check(record.job, self._now())
            if record.finished:
                raise FederationRefusedError("the job is finished at this site", reason="wrong_round")
            if request.kind == "train":
                return {}, self._train(request, record, state)
            if request.kind in KINDS:
                return self._mask(request, record, state), {}
        raise FederationRefusedError(f"{str(request.kind)[:40]!r} is nothing that a site does", reason="policy")

    def _join(self, request: Envelope, state: SiteState) -> Mapping[str, Any]:
        job = read_job(request.facts, request.job)
        record = state.job(request.job)
        if record is None:
            noise, public_units = agreed_terms(
                job,
                config=self._config,
                service=self._service,
                state=state,
                public_key=public_text(self._key),
                now=self._now(),
            )
            state.accept(job, noise, public_units)
        else:
            self._config.policy.check(job, self._now())
        if record is None or not noted(self._service, request.job):  # once, however often it is asked
            self._service.note_federation("join_accepted", job=request.job)
        return {"accepted": True}

    def _train(self, request: Envelope, record: JobRecord, state: SiteState) -> Arrays:
        digest, round_ = record.digest, request.round
        masking = self._masking(record.job, state)
        if masking is not None:  # before training, which a refusal would waste
            masking.receive(round_, request.attempt, request.facts, base=weights_digest(request.arrays))
            state.set_masking(digest, masking.state)
        training = LocalTraining(self._service, state, record, self._config.dataset)
        update = training.update(round_, request.arrays)
        known = state.round(digest, round_)
        if known is not None and known.phase == "trained":
            self._service.note_federation("round_trained", job=digest, round=round_)
            state.set_phase(digest, round_, "told")
        if masking is None:
            return update
        masked_P = masking.mask(round_, request.attempt, flatten(update))
        state.set_masking(digest, masking.state)
        return {ARRAY: masked_P}

    def _mask(self, request: Envelope, record: JobRecord, state: SiteState) -> Mapping[str, Any]:
        masking = self._masking(record.job, state)
        if masking is None:
            raise FederationRefusedError("the job has no masking", reason="masking")
        stayed, least = request.facts.get("stayed"), record.job.min_sites  # which is what the policy wants, or more
        if request.kind == "mask.agree" and isinstance(stayed, list) and len(stayed) < least:
            raise FederationRefusedError(
                f"a sum over {len(stayed)} sites is asked for, and at least {least} were agreed on",
                reason="too_few_sites",
            )
        facts = masking.answer(request.kind, request.round, request.attempt, request.facts)
        state.set_masking(record.digest, masking.state)
        return facts

    def _masking(self, job: Job, state: SiteState) -> MaskingSite | None:
        if job.masking is None:
            return None
        return MaskingSite(job, self._config.site, self._key, state=state.masking(job.digest()))

    def _finish(self, record: JobRecord, state: SiteState) -> Mapping[str, Any]:
        digest = record.digest
        known = state.statement(digest)
        if known is None:
            state.close_job(digest)  # first: no later message takes a step that the report does not have
            LocalTraining(self._service, state, record, self._config.dataset).close()
            report = self._service.get_signed_report(self._config.dataset)
            statement = self._statement(record, state, report)
            state.finish(digest, sign_statement(statement, self._key), report)
            known = state.statement(digest)
        self._service.note_federation("statement_signed", job=digest)
        state.forget_masking(digest)
        return {"statement": known}

    def _statement(self, record: JobRecord, state: SiteState, report: bytes) -> SiteStatement:
        """From the report and the audit log of the server, so that they cannot differ.

        Raises:
            ServerError: they hold less than this site knows of.
        """
        integrity = report_of(report)["integrity"]
        history = read_history(self._config.dataset, (entry["body"] for entry in integrity["entries"]))
        charged = charges_of_job(self._service, state, record, history)
        if record.job.records is not None:
            require_all(len(charged), record.charges)
        rounds = rounds_noted(self._service, record.digest)
        return statement_of(
            record,
            history,
            site=self._config.site,
            charged=charged,
            rounds=sorted(rounds.union(state.rounds_trained(record.digest))),
            log=(integrity["origin"], integrity["checkpoint"]),
            report=report,
            disclose=self._config.policy.disclose_accounting,
            now=self._now(),
        )

    def _refusal(self, request: Envelope, reason: str, message: str) -> Mapping[str, Any]:
        """The facts of a refusal, which is noted in the audit log."""
        event = "round_failed" if reason == FAILED else "join_refused" if request.kind == "join" else "round_refused"
        place = _place(request)
        try:
            self._service.note_federation(
                event,
                job=place["job"] or _NO_JOB,
                round=place["round"],
                reason="" if reason == FAILED else reason,
            )
        except Exception:  # noqa: BLE001 - a refusal stands, whether or not the server can be told
            self._log.exception("the refusal is not in the server's audit log")
        return {"refused": reason, "message": message[:_LONGEST]}

    def _reply(self, request: Envelope, facts: Mapping[str, Any], arrays: Arrays) -> Envelope:
        return Envelope(direction="reply", site=self._config.site, facts=facts, arrays=arrays, **_place(request))


def _place(request: Envelope) -> dict[str, Any]:
    """Where a request belongs, as far as it makes sense: what is not signed may hold anything."""
    numbers = {name: getattr(request, name) for name in ("round", "attempt")}
    known = isinstance(request.kind, str) and request.kind in (hello.HELLO, "join", "train", "finish", *KINDS)
    return {
        "kind": request.kind if known else "",
        "job": request.job if isinstance(request.job, str) and _DIGEST.fullmatch(request.job) else "",
        **{name: n if type(n) is int and 0 <= n < 10**9 else 0 for name, n in numbers.items()},
    }


def _log_file(folder: Path) -> logging.Logger:
    """The site's own log, for its operator alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "site.log"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    log = logging.Logger("tg_tinker.federated.site")
    handler = logging.FileHandler(path, delay=True, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    return log
