"""The report says what the ledger holds, claims no more than that, and tells no secret."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import rfc8785

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.reports.documents import verify_document
from tg_tinker.reports.page import render
from tg_tinker.reports.verdicts import Trust
from tg_tinker.transparency.note import VerifierKey
from tg_tinker_server.dp.accounting import cost, epsilon, pld_epsilon, repeated
from tg_tinker_server.dp.events import Gaussian, ParticipationGaussian, SampledGaussian, Unnoised
from tg_tinker_server.ledger.fold import Terms
from tg_tinker_server.store.database import Database

Books = Callable[..., Any]


def report_of(b: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(rfc8785.dumps(b.writer().report(b.scope)))  # as it travels
    return found


def passes(b: Any) -> list[str]:
    """The checks that the signed report passes, in order."""
    writer = b.writer()
    key = VerifierKey.parse(writer.log.signers.signer(b.scope.tenant).verifier_key)
    return [v.check for v in verify_document(writer.signed(b.scope), Trust(keys=[key]))]


def test_two_accountants_answer_and_neither_is_the_estimate(book: Books) -> None:
    b = book().open()
    for seq in range(1, 5):
        b.reserve(seq)
    said = report_of(b)["accounting"]
    assert float(said["rdp"]) == epsilon(repeated(cost(b.event), 4), b.delta) == b.epsilon()
    assert float(said["cross_check"]["epsilon"]) == pld_epsilon([b.event] * 4, b.delta) < b.epsilon()
    assert "NOT an upper bound" in said["estimate"]["note"]


def test_a_plan_reports_its_own_accountant_beside_the_filter(book: Books) -> None:
    b = book(accountant="prv").open(planned_steps=5)
    b.reserve(1)
    report = report_of(b)
    assert report["accounting"]["accountant"] == "prv"
    assert "fixed before" in report["accounting"]["gate"]
    assert float(report["guarantee"]["epsilon"]) == b.epsilon() < float(report["accounting"]["rdp"])


def test_failed_and_lost_attempts_of_every_run_are_in_the_report(book: Books) -> None:
    b = book().open().open(run="run_b").open(run="run_idle")
    b.settle(b.reserve(1), "failed")
    b.reserve(2)
    b.settle(b.reserve(2))
    b.settle(b.reserve(1, run="run_b"))
    report = report_of(b)
    base = {"initial_weights": "base"}
    assert report["coverage"]["runs"] == [
        {"run_id": "run_a", "charged": 3, "released": 1, "failed": 1, "unsettled": 1, **base},
        {"run_id": "run_b", "charged": 1, "released": 1, "failed": 0, "unsettled": 0, **base},
        {"run_id": "run_idle", "charged": 0, "released": 0, "failed": 0, "unsettled": 0, **base},
    ]
    curve = [float(point["epsilon"]) for point in report["curve"]["points"]]
    assert curve == sorted(curve)
    assert curve[-1] == b.epsilon() == float(report["guarantee"]["epsilon"])


def test_losses_of_callers_that_a_run_attests_are_said_to_be_by_its_word(book: Books) -> None:
    b = book().open().open(run="run_b", custom_loss="independent")
    b.settle(b.reserve(1, run="run_b"))
    assert passes(b)[-1] == "receipts"
    report = report_of(b)
    plain, attested = report["coverage"]["runs"]
    assert "custom_loss" not in plain, "as in every report of before"
    assert attested["custom_loss"] == "independent"
    (said,) = [line for line in report["coverage"]["not_covered"] if "compute themselves" in line]
    assert "run_b" in said
    assert "run_a" not in said
    assert "by their word alone" in render(report)


@pytest.mark.parametrize(
    ("event", "more", "sampling", "assumption"),
    [
        (Gaussian(noise_multiplier=2.0), {}, "No amplification", "leaving a unit out leaves its place empty"),
        (
            SampledGaussian(noise_multiplier=2.0, sample_rate=0.1, vouched_by="client"),
            {},
            "attested by the client",
            "drawn on its own",
        ),
        (
            SampledGaussian(noise_multiplier=2.0, sample_rate=1.0, vouched_by="client"),
            {},
            "No amplification",
            "leaves its place empty",
        ),
        (
            ParticipationGaussian(noise_multiplier=2.0, releases=1),
            {"unit_macs": [b"a"], "max_participation": 1},
            "No amplification",
            "one unit goes by one name",
        ),
    ],
)
def test_the_report_claims_what_somebody_vouched_for_and_says_what_must_hold(
    book: Books, event: Any, more: dict[str, Any], sampling: str, assumption: str
) -> None:
    b = book(event=event).open()
    b.reserve(1, **more)
    report = report_of(b)
    assert sampling in report["sampling"]["claim"]
    assert any(assumption in text for text in report["assumptions"])


def test_an_unnoised_release_leaves_no_guarantee_to_report(book: Books) -> None:
    b = book(target=None).open()
    b.reserve(1)
    b.reserve(2, event=Unnoised())
    report = report_of(b)
    assert report["guarantee"]["epsilon"] == report["accounting"]["cross_check"]["epsilon"] == "inf"
    assert "no finite guarantee" in report["guarantee"]["sentence"]
    assert report["accounting"]["estimate"] is None


def test_the_sentence_never_rounds_epsilon_down(book: Books) -> None:
    b = book().open()
    b.reserve(1)
    sentence = report_of(b)["guarantee"]["sentence"]
    assert float(sentence.split("exp(")[1].split(")")[0]) >= b.epsilon()


def test_a_dataset_without_a_release_reports_nothing_spent(book: Books) -> None:
    report = report_of(book().open())
    assert report["guarantee"]["epsilon"] == "0.0"
    assert (report["curve"], report["assumptions"]) == ({"charges": 0, "points": []}, [])


def test_a_dataset_that_is_not_there_has_no_report(book: Books) -> None:
    with pytest.raises(ResourceNotFoundError):
        report_of(book())


def test_nothing_but_what_was_paid_is_in_ledger_or_report(book: Books) -> None:
    b = book(event=ParticipationGaussian(noise_multiplier=2.0, releases=1)).open()
    b.settle(b.reserve(1, unit_macs=[b"unit-mac-of-alice"], max_participation=1))
    text = json.dumps(report_of(b)) + "".join(e.to_json() for e in b.ledger.entries(b.scope))
    for word in ("alice", "loss_", "norm", "num_clipped"):
        assert word not in text.replace("gradient norms", "").replace("noise_multiplier", "")


def test_draws_of_the_server_are_told_from_those_of_the_client(db: Database, book: Books) -> None:
    drawn = SampledGaussian(noise_multiplier=2.0, sample_rate=0.1, vouched_by="server")
    b = book(event=drawn)
    terms = Terms(unit="datum", target_epsilon=8.0, target_delta=b.delta)
    db.write(lambda tx: b.ledger.register(tx, b.scope, terms=terms, slots=40, actor="key_1"))
    b.open().reserve(1)
    b.reserve(2, event=Gaussian(noise_multiplier=2.0))
    b.ledger.raise_target(b.scope, target_epsilon=9.0, reason="a second study", actor="key_2", request_id="r1")
    db.write(lambda tx: b.ledger.note_erasure(tx, b.scope, records=3, actor="key_1"))
    report = report_of(b)
    assert report["sampling"] == {
        "claim": "Amplification by Poisson sampling is claimed for 1 of 2 releases: 1 drawn by the server.",
        "amplified": 1,
        "by_server": 1,
        "by_client": 0,
    }
    assert [(c["kind"], c["actor"]) for c in report["coverage"]["changes"]] == [
        ("register", "key_1"),
        ("raise", "key_2"),
        ("erase", "key_1"),
    ]
    assert report["guarantee"]["target_epsilon"] == "9.0"
    assert passes(b)[-1] == "receipts"


@pytest.mark.parametrize("scenario", ["nothing", "steps", "plan", "plan and more", "counted", "unnoised", "twice"])
def test_what_the_server_signs_passes_every_check_of_a_stranger(book: Books, scenario: str) -> None:
    counted = ParticipationGaussian(noise_multiplier=2.0, releases=1)
    b = book(
        accountant="prv" if "plan" in scenario else "rdp",
        target=None if scenario == "unnoised" else 8.0,
        **({"event": counted} if scenario == "counted" else {}),
    )
    b.open(planned_steps=4) if "plan" in scenario else b.open()
    if scenario != "nothing":
        for seq in (1, 2, 3):
            more = {"unit_macs": [bytes([seq % 2])], "max_participation": 3} if scenario == "counted" else {}
            b.settle(b.reserve(seq, **more))
    if scenario == "plan and more":
        b.open("run_b", accountant="rdp")
        b.reserve(1, run="run_b", accountant="rdp", event=Gaussian(noise_multiplier=4.0))
    if scenario == "unnoised":
        b.reserve(4, event=Unnoised())
    if scenario == "twice":
        assert report_of(b)["coverage"]["earlier_reports"] == 0
        b.reserve(4)
        assert report_of(b)["coverage"]["earlier_reports"] == 1
    assert passes(b) == [
        "signature", "format", "checkpoint", "chain", "leaves", "last entry", "guarantee", "coverage", "curve",
        "epsilon", "second accountant", "receipts",
    ]  # fmt: skip


def test_a_report_repeats_the_last_charge_whatever_this_processor_would_make_of_it(
    book: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tg_tinker_server.ledger import pricing

    b = book(accountant="prv").open(planned_steps=4)
    b.reserve(1)
    charged = b.ledger.entries(b.scope)[-1].body["epsilon_after"]
    there = pricing.epsilon_now
    monkeypatch.setattr(pricing, "epsilon_now", lambda *a: there(*a) * (1 + 1e-7))
    assert passes(b)[-1] == "receipts"
    assert report_of(b)["integrity"]["entries"][-1]["body"]["epsilon"] == charged != repr(b.epsilon())


def test_a_ledger_that_cannot_be_reported_on_does_not_grow_with_every_attempt(
    book: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tg_tinker.reports import recompute

    b = book().open()
    b.reserve(1)
    before = len(b.ledger.entries(b.scope))
    writer = b.writer()
    size = len(writer.signed(b.scope))
    assert len(b.ledger.entries(b.scope)) == before + 1
    for most in (1000, size):  # the second leaves no room for the next report's own entry
        with pytest.raises(InvalidRequestError, match=r"data-1 would have about .* entries, over the"):
            replace(writer, most_bytes=most).signed(b.scope)
    other = book(scope=replace(b.scope, dataset_id="data-2")).open()
    for seq in range(2, 6):  # leaves of others between: hashes stand for them
        b.reserve(seq)
        other.reserve(seq)
    entries, size = b.ledger.weight(b.scope)
    whole = b.ledger.entries(b.scope)
    assert (entries, size) == (len(whole), sum(len(e.body_json()) for e in whole))
    without_hashes = 4 * (size + 40 * entries + 250_000) // 3
    with pytest.raises(InvalidRequestError, match="entries, over the"):
        replace(writer, most_bytes=without_hashes).signed(b.scope)
    with monkeypatch.context() as patch:
        patch.setattr(type(b.ledger), "leaves", None)  # nothing is read of what is too large
        with pytest.raises(InvalidRequestError, match="entries, over the"):
            replace(writer, most_bytes=without_hashes - 1).signed(b.scope)
    monkeypatch.setattr(recompute, "MOST_KINDS", 0)
    with pytest.raises(InvalidRequestError, match="at most 0"):
        writer.signed(b.scope)
    assert len(b.ledger.entries(b.scope)) == entries


def test_a_report_appends_its_own_entry_and_spends_nothing(book: Books) -> None:
    b = book().open()
    b.reserve(1)
    before, entries = b.epsilon(), len(b.ledger.entries(b.scope))
    report = report_of(b)
    assert b.epsilon() == before
    last = report["integrity"]["entries"][-1]["body"]
    assert (last["kind"], last["epsilon"], last["charges"]) == ("report", repr(before), 1)
    assert len(b.ledger.entries(b.scope)) == entries + 1 == len(report["integrity"]["entries"])
    b.reserve(2)  # and the dataset can be spent from afterwards


def test_a_long_history_has_a_thin_curve_with_both_ends(book: Books) -> None:
    b = book(target=None, event=Gaussian(noise_multiplier=50.0)).open()
    for seq in range(1, 601):
        b.reserve(seq)
    curve = report_of(b)["curve"]
    assert curve["charges"] == 600
    assert len(curve["points"]) == 500
    assert [curve["points"][i]["charge"] for i in (0, -1)] == [1, 600]
