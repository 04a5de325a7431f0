"""A report that was damaged, or that its coordinator lies in with its own key, is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.tg_tinker.federated.jobs import names
from tests.tg_tinker.federated.reported import (
    ALL,
    MASKING,
    RECORDS,
    UPDATE,
    Edit,
    Reported,
    document_of,
    honest,
    lied,
    refusal,
    resigned,
    result_of,
    shared_job,
    signed,
    site_forge,
    statement_of,
    took_part,
    uneven,
    verify,
)
from tg_tinker.errors import InvalidRequestError
from tg_tinker.federated.report import SECTIONS, coordinator_key, sign_report
from tg_tinker.federated.report_sites import second_opinion
from tg_tinker.federated.rounds import Answer
from tg_tinker.federated.statement import Accounting
from tg_tinker.reports.verdicts import REGISTRY, Trust

# Damage.


def specimen() -> bytes:
    job = shared_job(rounds=1, local_steps=1)
    return Reported(
        result_of(
            job,
            [took_part(1, {"site-0": UPDATE, "site-1": Answer.none("late")})],
            statements={"site-0": signed(job, "site-0", (1,))},
        )
    ).sign()


def refused_flips(stride: int, bits: Callable[[int], list[int]]) -> None:
    data = specimen()
    assert verify(data)
    accepted = []
    for at in range(0, len(data), stride):
        for bit in bits(at):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            try:
                verify(bytes(damaged))
                accepted.append((at, bit))
            except InvalidRequestError:
                pass
    assert accepted == []


def test_no_byte_of_a_report_can_be_damaged() -> None:
    refused_flips(7, lambda at: [at % 8])


@pytest.mark.slow
def test_no_bit_of_a_report_can_be_flipped() -> None:
    refused_flips(1, lambda at: list(range(8)))


def test_only_the_jobs_own_coordinator_can_sign() -> None:
    other = Ed25519PrivateKey.generate()
    data = sign_report(honest().document(), other)
    assert refusal(data).startswith("signer: its signer, key")
    key = coordinator_key(other.public_key())
    named = sign_report(honest().document(lambda d: d["integrity"].update(verifier_key=key.text)), other)
    with pytest.raises(InvalidRequestError, match=r"^signer: this is not the key of the job's coordinator"):
        list(REGISTRY.verify(named, Trust(keys=[key])))


# Lies of a coordinator that has the key: the report says what its statements, its job or its ledger do not.


def of_guarantee(**change: Any) -> Edit:
    return lambda d: d["guarantee"]["records"].update(change)


def swapped(d: dict[str, Any]) -> None:
    s = d["statements"]
    s["site-0"], s["site-1"] = s["site-1"], s["site-0"]


def both(*edits: Edit) -> Edit:
    return lambda d: [edit(d) for edit in edits]


def dropped(d: dict[str, Any]) -> None:
    """As if the site had never been there: in every table, and not in the job."""
    d["sites"].pop(2)
    d["statements"].pop("site-2")
    d["course"]["members"].remove("site-2")
    for r in d["course"]["rounds"]:
        r["updates"].remove("site-2")
    d["guarantee"]["records"].update(epsilon="6.06", delta="2e-5", stated=2)


def silenced(d: dict[str, Any]) -> None:
    """A site that trained, and of which there is no update, as if nobody had ever heard of it."""
    d["course"]["members"].remove("site-1")
    d["course"]["silent"].append("site-1")
    for r in d["course"]["rounds"]:
        r["updates"].remove("site-1")


def missing(d: dict[str, Any]) -> None:
    d["statements"].pop("site-2")


LOG = site_forge("site-1", 6)
UNSIGNED = LOG.integrity()["checkpoint"].replace(f"— {LOG.key.name}", "— somebody")
LIES: list[tuple[str, Edit, str]] = [
    ("understated epsilon of a site", lambda d: d["sites"][1].update(epsilon="1"), r"^site epsilon: sites\[1\].epsi"),
    ("understated sum", of_guarantee(epsilon="8"), r"^guarantee: guarantee.records.epsilon is '8'"),
    ("sum given as max", of_guarantee(epsilon="3.03", over_sites="max"), r"^guarantee: .*over_sites is 'max'"),
    ("declared disjoint", of_guarantee(people="disjoint"), r"^guarantee: guarantee.records.people"),
    ("smaller delta", of_guarantee(delta="1e-9"), r"^guarantee: guarantee.records.delta is '1e-9'"),
    ("kinder words", lambda d: d["guarantee"].update(sentence="Nothing can leak."), r"^guarantee: .*sentence"),
    ("a promise to sites", lambda d: d["guarantee"].update(sites={"epsilon": "1"}), r"^guarantee: guarantee.sites"),
    ("dropped site", dropped, r"^course: its members, .* are not the roster"),
    ("dropped from the job too", both(dropped, lambda d: d["job"]["roster"].pop("site-2")), r"^job: job_digest is"),
    ("dropped from the table", lambda d: d["sites"].pop(2), r"^site epsilon: sites has 2 items, and 3 follow"),
    ("dropped statement", missing, r"^statement: a site of the roster is left out"),
    (
        "dropped statement, said so, sum as before",
        both(missing, lambda d: d["unstated"].update({"site-2": ""})),
        r"^site epsilon: sites\[2\]",
    ),
    ("swapped statements", swapped, r"^statement: site-0: the document has no signature"),
    (
        "a statement made up by the coordinator",
        resigned("site-1", by="coordinator", epsilon="3.03"),
        r"^statement: site-1: the document has no signature",
    ),
    ("statement of another job", resigned("site-1", job="1" * 64), r"^statement: that of site-1 is on another job"),
    ("a site in league, understated", resigned("site-1", epsilon="2.00"), r"^site epsilon: .* 2.00, and the steps"),
    (
        "in league, undisclosed, nothing spent",
        resigned("site-1", epsilon="0.00", accounting=None),
        r"^site epsilon: site-1 trained, and states that it spent nothing",
    ),
    ("in league, another target", resigned("site-1", target_epsilon="9.0"), r"^statement: site-1 states target"),
    ("in league, another delta", resigned("site-1", delta="0.1"), r"^site epsilon: sites\[1\].delta is '1e-05'"),
    ("in league, another unit", resigned("site-1", unit="user"), r"^statement: site-1 states .*'user'"),
    (
        "in league, over the target",
        resigned("site-1", epsilon="6.01", dataset_epsilon="6.01"),
        r"^site epsilon: sites\[1\].epsilon is '3.03' in the report, and '6.01' follows",
    ),
    (
        "in league, over its budget",
        resigned("site-1", dataset_epsilon="8.01"),
        r"^site epsilon: site-1 spent epsilon 8.01 of its data in all, over its budget",
    ),
    (
        "in league, all less than one job",
        resigned("site-1", dataset_epsilon="2.00"),
        r"^site epsilon: site-1 spent more by the job than",
    ),
    (
        "in league, fewer steps than rounds",
        resigned("site-1", epsilon="3.03", accounting=Accounting(noise_multiplier="1.0", sample_rate="0.1", steps=5)),
        r"^site epsilon: site-1 discloses 5 steps, and its rounds took 6",
    ),
    (
        "in league, no training",
        resigned("site-1", accounting=Accounting(noise_multiplier="0.0", sample_rate="0.1", steps=6)),
        r"^site epsilon: what site-1 discloses is no training",
    ),
    ("in league, fewer rounds", resigned("site-1", (1, 2)), r"^statement: the report has an update of site-1 in rou"),
    ("in league, later rounds", resigned("site-1", (1, 2, 3, 4)), r"^statement: site-1 trained in round 4, and 3 is"),
    ("in league, no checkpoint", resigned("site-1", log_checkpoint="x\n"), r"^statement: site-1: this is not a sign"),
    ("in league, another log", resigned("site-1", log_origin="tg-tinker/0"), r"^statement: site-1 names another log"),
    ("in league, unsigned", resigned("site-1", log_checkpoint=UNSIGNED), r"^statement: site-1 names another log"),
    ("in another's name", resigned("site-1", site="site-2"), r"^statement: that of site-1 is by site-2"),
    (
        "a stranger's statement",
        lambda d: d["statements"].update({"site-9": signed(shared_job(), "site-9", ALL)}),
        r"^statement: site-9 is not on the job's roster",
    ),
    ("said never to have said a word", silenced, r"^statement: site-1 trained in round 1, and the report says it n"),
    ("other rounds", lambda d: d["course"]["rounds"].pop(), r"^course: 2 of 3 rounds were released"),
    ("another round", lambda d: d["course"]["rounds"][1].update(round=3), r"^course: its rounds are not 1 to 3"),
    (
        "an update that no site sent",
        both(lambda d: d["statements"].update({"site-1": signed(shared_job(), "site-1", (1, 3))})),
        r"^statement: the report has an update of site-1 in round 2",
    ),
    (
        "an update left out",
        lambda d: d["course"]["rounds"][0]["updates"].remove("site-1"),
        r"^site epsilon: sites\[1\].rounds_used is '3' in the report, and '2'",
    ),
    ("nobody took part", lambda d: d["course"]["rounds"][0]["updates"].clear(), r"^course: round 1 was released wit"),
    ("twice in a round", lambda d: d["course"]["rounds"][0]["updates"].append("site-1"), r"^course: round 1 has a s"),
    ("a stranger", lambda d: d["course"]["rounds"][0]["updates"].append("site-9"), r"^course: round 1 has a site"),
    ("not told", lambda d: d["course"]["rounds"][0].update(updates=None), r"^course: it does not tell who took part"),
    (
        "silent and yet trained",
        lambda d: (d["course"]["members"].remove("site-1"), d["course"]["silent"].append("site-1")),
        r"^course: round 1 has a site twice, or one that never joined",
    ),
    ("failed and finished", lambda d: d["course"].update(status="failed", why="x"), r"^course: 3 of 3 rounds were r"),
    ("skipped", lambda d: d["course"]["rounds"][0].update(skipped="lost"), r"^course: .* under masks only"),
    ("masking claimed", lambda d: d.update(masking=honest(masking=MASKING).document()["masking"]), r"^masking: mask"),
    ("trust", lambda d: d["trust_model"][1].update(what="Sees nothing."), r"^trust model: trust_model\[1\].what"),
    ("less not covered", lambda d: d["coverage"]["not_covered"].pop(), r"^coverage: coverage.not_covered has"),
    ("another strategy", lambda d: d["method"].update(strategy="the best"), r"^method: method.strategy"),
    ("other weights", lambda d: d["model"].update(weights_digest="0" * 64), r"^model: model.weights_digest"),
    ("another artifact", lambda d: d["model"].update(artifact_id="artifact-9"), r"^model: its artifact is not that"),
    ("larger target", lambda d: d["job"]["records"].update(target_epsilon=9), r"^job: job_digest is"),
    (
        "larger target, and its digest",
        both(
            lambda d: d["job"]["records"].update(target_epsilon=9),
            lambda d: d.update(job_digest=shared_job(records={**RECORDS, "target_epsilon": 9.0}).digest()),
        ),
        r"^statement: that of site-0 is on another job",
    ),
    ("a ledger of sites", lambda d: d.update(site_level_report={}), r"^sites: it holds a report on a ledger of site"),
    ("another key", lambda d: d["integrity"].update(verifier_key="x"), r"^signer: integrity.verifier_key"),
    ("extra field", lambda d: d.update(certified=True), r"^format: it has too many .*certified"),
    ("extra field below", lambda d: d["course"].update(certified=True), r"^format: .*course.certified"),
    ("field removed", lambda d: d.pop("coverage"), r"^format: .*coverage"),
    ("version 2", lambda d: d.update(format="tg-tinker/federation-report/v2"), r"^format: it says it is"),
    ("no time", lambda d: d.update(time="yesterday"), r"^format: a field is missing"),
    ("a count as text", lambda d: d["course"]["rounds"][0].update(attempts="1"), r"^course: course.rounds\[0\].atte"),
    ("a count as a boolean", lambda d: d["course"]["rounds"][0].update(attempts=True), r"^(course|format): "),
    ("a job with more", lambda d: d["job"].update(certified=True), r"^format: .*job.certified"),
    (
        "a job in another spelling",
        lambda d: d["job"].update(expires="2100-01-01T00:00:00+00:00"),
        r"^job: job_digest is",
    ),
    ("a job with text for a count", lambda d: d["job"].update(rounds="3"), r"^job: job_digest is"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "why"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_a_lie_of_the_coordinator_is_named(edit: Edit, why: str) -> None:
    found = refusal(lied(honest, edit))
    assert re.search(why, found), found


def test_a_job_spelt_otherwise_is_refused_even_with_the_digest_of_that_spelling() -> None:
    def edit(d: dict[str, Any]) -> None:
        import hashlib

        d["job"]["rounds"] = "3"
        d["job_digest"] = hashlib.sha256(rfc8785.dumps(d["job"])).hexdigest()

    assert refusal(lied(honest, edit)).startswith("job: it is not spelt as sites agree to a job")


def test_a_job_from_before_a_setting_was_added_still_verifies() -> None:
    """Whoever reads it knows the setting and its default; the digest is of what was agreed."""
    import hashlib

    job = json.loads(rfc8785.dumps(shared_job().model_dump(mode="json")))
    del job["optimizer"]["proximal_mu"]
    digest = hashlib.sha256(rfc8785.dumps(job)).hexdigest()

    def edit(d: dict[str, Any]) -> None:
        d["job"], d["job_digest"] = job, digest
        d["statements"] = {s: signed(shared_job(), s, ALL, job=digest) for s in names(3)}

    assert verify(lied(honest, edit))


ODD: list[Any] = [None, "x", -1, 10**15, [], {}, [[]], [None], {"x": None}]
FREE = {"writer", "course.rounds.0.skipped", "course.rounds.0.attempts", "course.rounds.0.artifact_id"}
"""What stands for itself; a reader checks its form alone."""


@pytest.mark.parametrize("where", ["", "course", "course.rounds.0", "course.left", "model", "guarantee.records"])
@pytest.mark.parametrize("value", ODD)
def test_a_field_of_another_shape_is_refused(where: str, value: Any) -> None:
    def part_of(d: Any) -> Any:
        for step in filter(None, where.split(".")):
            d = d[int(step)] if isinstance(d, list) else d[step]
        return d

    honest_part = part_of(json.loads(document_of(uneven)))
    assert set(honest_part) >= set(SECTIONS if not where else honest_part)
    accepted = []
    for name in honest_part:
        if honest_part[name] != value:
            try:
                verify(lied(uneven, lambda d, name=name: part_of(d).update({name: value})))
                accepted.append(".".join(filter(None, [where, name])))
            except InvalidRequestError:
                pass
    assert set(accepted) <= FREE


def test_masking_with_too_few_in_the_sum_is_refused() -> None:
    edit = lambda d: d["course"]["rounds"][0].update(updates=["site-0", "site-1"])  # noqa: E731
    assert re.search(r"^course: round 1 was released with 2 updates, and the job needs 3",
                     refusal(honest(masking=MASKING).sign(edit)))  # fmt: skip
    less = lambda d: d["masking"].update(quantisation_error="1e-9")  # noqa: E731
    assert refusal(honest(masking=MASKING).sign(less)).startswith("masking: masking.quantisation_error is '1e-9'")
    assert refusal(honest(masking=MASKING).sign(lambda d: d.update(masking=None))).startswith("masking: ")


def test_the_second_accountant_refuses_what_the_gate_would_have_let_pass() -> None:
    """It shares nothing with the gate; no statement that passes the gate fails it unless the gate is broken."""
    true, false = statement_of(shared_job(), "site-0", ALL), statement_of(shared_job(), "site-1", ALL, epsilon="2.40")
    assert "1 sites disclose" in second_opinion({"site-0": true})
    with pytest.raises(InvalidRequestError, match=r"^site epsilon: site-1 states epsilon 2.40, .* at least 2\.4"):
        second_opinion({"site-0": true, "site-1": false})
