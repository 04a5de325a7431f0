"""Federated jobs that ended, for reports: real statements over real ledgers, and results that may be anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.tg_tinker.federated.jobs import key_of, make_job, names
from tests.tg_tinker.reports.conftest import Forge
from tg_tinker.errors import InvalidRequestError
from tg_tinker.federated.job import Job
from tg_tinker.federated.report import coordinator_key, document, read_statements, sign_report, site_level_epsilon
from tg_tinker.federated.report_facts import Facts
from tg_tinker.federated.report_verify import verify_federation_report
from tg_tinker.federated.result import FederatedResult, SiteLevel, ledger_of, promise_of, trust_of
from tg_tinker.federated.rounds import Answer, RoundRecord
from tg_tinker.federated.statement import Accounting, SiteStatement, sign_statement
from tg_tinker.privacy import gate_epsilon
from tg_tinker.reports.statement import number, rounded_up
from tg_tinker.reports.verdicts import REGISTRY, Trust, Verdict

COORDINATOR = key_of("coordinator")
Edit = Callable[[dict[str, Any]], object]
ALL = (1, 2, 3)
RECORDS = {"target_epsilon": 6.0, "target_delta": 1e-5, "people": "shared"}
SITES = {"population": 1000, "sample_rate": 0.1, "noise_multiplier": 1.0, "target_epsilon": 4.0, "target_delta": 1e-5}
DRAWN = {"kind": "sampled_gaussian", "noise_multiplier": "1.0", "sample_rate": "0.1", "vouched_by": "client"}
MASKING = {"clip": 0.25, "bits": 20}
ENDED = datetime(2026, 5, 6, 7, 8, 9, tzinfo=UTC)
UPDATE = Answer(kind="update")
assert verify_federation_report in REGISTRY.checks.values()


@cache
def site_forge(site: str, steps: int) -> Forge:
    """The ledger of a site's data, with a report on it."""
    secret = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"log of {site}".encode()).digest())
    return Forge(secret=secret, dataset_id=f"notes-of-{site}").elsewhere(2).open().spend(steps).close()


@cache
def site_report(site: str, steps: int) -> bytes:
    """The site's full report."""
    return site_forge(site, steps).sign()


def statement_of(job: Job, site: str, rounds: Iterable[int], /, **changes: Any) -> SiteStatement:
    """What an honest site states that trained in these rounds and in nothing before; anything may be changed."""
    rounds = tuple(rounds)
    steps = len(rounds) * job.local_steps
    forge = site_forge(site, steps)
    spent = gate_epsilon({(1.0, 0.1): steps}, 1e-5) if steps else 0.0
    fields: dict[str, Any] = {
        "job": job.digest(),
        "site": site,
        "time": "2026-05-06T07:08:00+00:00",
        "rounds": rounds,
        "unit": "datum",
        "epsilon": rounded_up(spent, 2),
        "delta": "1e-05",
        "target_epsilon": "inf" if job.records is None else number(job.records.target_epsilon),
        "dataset_epsilon": rounded_up(spent, 2),
        "dataset_delta": "1e-05",
        "dataset_target_epsilon": "8.0",
        "public_units": 1000,
        "log_origin": forge.key.name,
        "log_checkpoint": forge.integrity()["checkpoint"],
        "report_sha256": hashlib.sha256(site_report(site, steps)).hexdigest(),
        "accounting": Accounting(noise_multiplier="1.0", sample_rate="0.1", steps=steps),
    }
    return SiteStatement(**{**fields, **changes})


def signed(job: Job, site: str, rounds: Iterable[int], /, **changes: Any) -> dict[str, Any]:
    """The statement in its envelope."""
    return sign_statement(statement_of(job, site, rounds, **changes), key_of(site))


def took_part(round_: int, answers: dict[str, Answer] | None, **more: Any) -> RoundRecord:
    """A released round."""
    updates = None if answers is None else sum(a.kind == "update" for a in answers.values())
    return RoundRecord(
        **{
            "round": round_,
            "attempts": 1,
            "answers": answers,
            "updates": updates,
            "artifact_id": f"artifact-{round_}",
            "weights_digest": hashlib.sha256(round_.to_bytes(1 + round_ // 256)).hexdigest(),
            **more,
        }
    )


def result_of(job: Job, rounds: Iterable[RoundRecord], **parts: Any) -> FederatedResult:
    """A result; every site of the roster is a member unless it is said otherwise."""
    rounds = tuple(rounds)
    fields: dict[str, Any] = {
        "job": job,
        "job_digest": job.digest(),
        "status": "finished" if len(rounds) == job.rounds else "failed",
        "why": "" if len(rounds) == job.rounds else "too few sites",
        "members": tuple(sorted(job.roster)),
        "left": {},
        "unheard": (),
        "rounds": rounds,
        "first_metrics": {},
        "ignored": 0,
        "artifact_id": rounds[-1].artifact_id if rounds else "artifact-0",
        "weights_digest": rounds[-1].weights_digest if rounds else job.adapter_digest,
        "records": promise_of(job),
        "sites": None,
        "trust": trust_of(job),
        "ended": ENDED,
    }
    return FederatedResult(**{**fields, **parts})


@dataclass
class Reported:
    """A job's result, and the report on its sites' ledger; anything can be changed before it is signed."""

    result: FederatedResult
    level: bytes | None = None
    beside: list[bytes] = field(default_factory=list)

    def facts(self) -> Facts:
        return Facts.of(self.result, writer="0.1.0", site_level_report=self.level)

    def document(self, change: Callable[[dict[str, Any]], object] = lambda _: None) -> dict[str, Any]:
        """What an honest coordinator writes, then changed."""
        facts = self.facts()
        key = coordinator_key(COORDINATOR.public_key())
        made = document(facts, read_statements(facts), site_level_epsilon(facts), key)
        parsed: dict[str, Any] = json.loads(rfc8785.dumps(made))
        change(parsed)
        return parsed

    def sign(self, change: Callable[[dict[str, Any]], object] = lambda _: None) -> bytes:
        """The file, with the coordinator's own signature on the lie."""
        return sign_report(self.document(change), COORDINATOR)

    def verdicts(self, change: Callable[[dict[str, Any]], object] = lambda _: None) -> list[Verdict]:
        return verify(self.sign(change), *self.beside)


def verify(data: bytes, *beside: bytes) -> list[Verdict]:
    return list(REGISTRY.verify(data, Trust(keys=[coordinator_key(COORDINATOR.public_key())], beside=beside)))


def shared_job(**settings: Any) -> Job:
    """Three sites, three rounds of two local steps, records protected."""
    return make_job(**{"rounds": 3, "local_steps": 2, "records": RECORDS, **settings})


def honest(**settings: Any) -> Reported:
    """All three sites took part in all three rounds and stated what they spent."""
    job = shared_job(**settings)
    sites = names(3)
    rounds = [took_part(r, dict.fromkeys(sites, UPDATE)) for r in (1, 2, 3)]
    return Reported(result_of(job, rounds, statements={s: signed(job, s, (1, 2, 3)) for s in sites}))


def uneven(**settings: Any) -> Reported:
    """site-0 in all rounds; site-1 was late once and gave no statement; site-2 refused after two rounds, site-3 was
    never heard of.
    """
    job = shared_job(sites=4, **settings)
    late, left = Answer.none("no reply in time"), Answer.refused("policy", "<b>not</b> any more")
    rounds = [
        took_part(1, {"site-0": UPDATE, "site-1": UPDATE, "site-2": UPDATE}),
        took_part(2, {"site-0": UPDATE, "site-1": late, "site-2": UPDATE}, attempts=2),
        took_part(3, {"site-0": UPDATE, "site-1": UPDATE, "site-2": left}),
    ]
    return Reported(
        result_of(
            job,
            rounds,
            members=("site-0", "site-1"),
            left={"site-2": left},
            unheard=("site-3",),
            statements={"site-0": signed(job, "site-0", (1, 2, 3)), "site-2": signed(job, "site-2", (1, 2))},
            unstated={"site-1": "no reply in time"},
        )
    )


def population(*, charges: int = 3, **level: Any) -> Reported:
    """Whole sites are protected: three rounds, and the ledger that they were charged to; ``level`` changes that."""
    job = shared_job(sites_privacy=SITES)
    forge = site_level_forge(job, charges=charges, **level)
    rounds = [took_part(r, None) for r in (1, 2, 3)]
    spent = float(forge.chain[-1][0]["epsilon"])
    sites = SiteLevel(dataset_id=ledger_of(job), epsilon=spent, delta=1e-5, bound=1.0, numbers={})
    return Reported(result_of(job, rounds, sites=sites), level=forge.sign())


def site_level_forge(job: Job, *, charges: int = 3, unit: str = "site", **more: Any) -> Forge:
    """The ledger of whole sites at the coordinator's server."""
    event, closed = more.pop("event", DRAWN), more.pop("closed", True)
    forge = Forge(**{"dataset_id": ledger_of(job), "target": "4.0", **more}).open(event=event, unit=unit)
    for seq in range(1, charges + 1):
        forge.settle(forge.charge(seq, unit=unit, event=event))
    return forge.close() if closed else forge


@cache
def document_of(made: Callable[[], Reported]) -> bytes:
    return rfc8785.dumps(made().document())


def lied(made: Callable[[], Reported], edit: Edit) -> bytes:
    """An honest report, changed and signed again with the coordinator's own key."""
    document = json.loads(document_of(made))
    edit(document)
    return sign_report(document, COORDINATOR)


def refusal(data: bytes, *beside: bytes) -> str:
    """The check that refuses, and why; fails if nothing does."""
    with pytest.raises(InvalidRequestError) as caught:
        verify(data, *beside)
    assert caught.value.details["check"] == caught.value.message.split(":")[0]
    return caught.value.message


def resigned(site: str, rounds: tuple[int, ...] = ALL, /, by: str = "", **changes: Any) -> Edit:
    """A statement with another text, signed by the site or, as here, by whoever the coordinator has the key of."""

    def edit(d: dict[str, Any]) -> None:
        statement = statement_of(shared_job(), site, rounds, **changes)
        d["statements"][site] = sign_statement(statement, key_of(by or site))

    return edit
