"""A report is believed as far as its entries go: damage, and lies signed with the real key, are refused by name."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.tg_tinker.reports.conftest import EVENT, Forge, Refusal, settled_forge
from tg_tinker.errors import InvalidRequestError
from tg_tinker.ledger.history import read_history
from tg_tinker.reports.documents import verify_document
from tg_tinker.reports.statement import Figures, statement
from tg_tinker.reports.verdicts import Trust
from tg_tinker.transparency import dsse, merkle, note
from tg_tinker.transparency.folder import Folder
from tg_tinker.transparency.pins import KnownServer, Pin, Pins
from tg_tinker.transparency.receipts import Receipt, Receipts

Edit = Callable[[dict[str, Any]], object]


def small() -> Forge:
    forge = Forge().open()
    forge.charge(1)
    return forge.close()


def refused_flips(bits: Callable[[int], list[int]]) -> None:
    forge = small()
    data, trust = forge.sign(), forge.trust()
    assert list(verify_document(data, trust))
    accepted = []
    for at in range(len(data)):
        for bit in bits(at):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            try:
                list(verify_document(bytes(damaged), trust))
                accepted.append((at, bit))
            except InvalidRequestError:
                pass
    assert accepted == []


def test_no_byte_of_a_report_can_be_damaged() -> None:
    refused_flips(lambda at: [at % 8])


@pytest.mark.slow
def test_no_bit_of_a_report_can_be_flipped() -> None:
    refused_flips(lambda at: list(range(8)))


def test_a_report_cut_short_or_with_more_after_it_is_refused(refusal: Refusal) -> None:
    forge = small()
    data = forge.sign()
    assert list(verify_document(data + b"\n", forge.trust()))
    for end in range(0, len(data), 97):
        assert refusal(data[:end], forge.trust()).startswith("json")
    for more in (b" ", b"\n\n", b"{}", b"\x00"):
        assert refusal(data + more, forge.trust()).startswith("json")


# Lies of whoever has the key: the document says what its entries do not.

DOCUMENT_LIES: list[tuple[str, Edit, str]] = [
    (
        "understated epsilon",
        lambda d: d["guarantee"].update(epsilon="1.5"),
        r"^guarantee: guarantee.epsilon is '1.5'",
    ),
    ("other delta", lambda d: d["guarantee"].update(delta="1e-06"), r"^guarantee: guarantee.delta is '1e-06'"),
    ("other unit", lambda d: d["guarantee"].update(privacy_unit="user"), r"^guarantee: guarantee.privacy_unit"),
    ("larger target", lambda d: d["guarantee"].update(target_epsilon="inf"), r"^guarantee: guarantee.target_epsilon"),
    (
        "kinder words",
        lambda d: d["guarantee"].update(sentence="Nothing can leak."),
        r"^guarantee: guarantee.sentence",
    ),
    ("edited coverage", lambda d: d["coverage"]["runs"][0].update(failed=0, released=3), r"^coverage: .*runs\[0\]"),
    ("a run left out", lambda d: d["coverage"]["runs"].pop(), r"^coverage: coverage.runs has 1 items, and 2 follow"),
    ("swapped runs", lambda d: d["coverage"]["runs"].reverse(), r"^coverage: coverage.runs\[0\].run_id is 'run_b'"),
    ("more covered", lambda d: d["coverage"]["not_covered"].pop(), r"^coverage: coverage.not_covered has"),
    (
        "a count as a boolean",
        lambda d: d["coverage"]["runs"][0].update(failed=True),
        r"^coverage: .*failed is 'True'",
    ),
    (
        "drawn by the server",
        lambda d: d["sampling"].update(by_client=0, by_server=5),
        r"^coverage: sampling.by_server is '5'",
    ),
    (
        "vouched for by the server",
        lambda d: d["mechanism"]["releases"][0]["event"].update(vouched_by="server"),
        r"^coverage: mechanism.releases\[0\].event.vouched_by is 'server'",
    ),
    ("no assumption", lambda d: d["assumptions"].clear(), r"^coverage: assumptions has 0 items"),
    ("flatter curve", lambda d: d["curve"]["points"][2].update(epsilon="0.1"), r"^curve: curve.points\[2\].epsilon"),
    (
        "smaller cross-check",
        lambda d: d["accounting"]["cross_check"].update(epsilon="1.0"),
        r"^accounting: the cross-c",
    ),
    ("smaller rdp", lambda d: d["accounting"].update(rdp="1.0"), r"^accounting: rdp is 1.0"),
    ("a bound of an estimate", lambda d: d["accounting"]["estimate"].update(note="a bound"), r"^accounting: .*note"),
    ("smaller estimate", lambda d: d["accounting"]["estimate"].update(epsilon="0.5"), r"^accounting: the estimate"),
    ("promise for adaptive runs", lambda d: d["accounting"].update(adaptivity="Any."), r"^accounting: .*adaptivity"),
    ("no estimate", lambda d: d["accounting"].update(estimate=None), r"^accounting: the estimate"),
    ("profile", lambda d: d["privacy_profile"][0].update(rdp="0.5"), r"^accounting: rdp at delta 0.001 is 0.5"),
    ("profile, pld", lambda d: d["privacy_profile"][7].update(pld="0.5"), r"^accounting: pld at delta 1e-10 is 0.5"),
    ("profile cut", lambda d: d["privacy_profile"].pop(), r"^accounting: its privacy profile is not at"),
    ("an audit that nobody ran", lambda d: d["empirical_audit"].update(status="passed"), r"^empirical audit: "),
    ("another dataset", lambda d: d.update(dataset_id="data-2"), r"^chain: .* is of another dataset than the report"),
    ("another time", lambda d: d.update(time="2030-01-01T00:00:00+00:00"), r"^format: time is '2030"),
    ("endorsed", lambda d: d.update(prepared="Certified by NIST."), r"^format: prepared is 'Certified"),
    ("trust", lambda d: d["trust_model"].append("Nobody needs to be trusted."), r"^format: trust_model has 3 items"),
    ("extra field", lambda d: d.update(certified=True), r"^format: it has too many .*certified"),
    ("extra field below", lambda d: d["guarantee"].update(certified=True), r"^guarantee: .*certified"),
    ("field removed", lambda d: d.pop("sampling"), r"^format: it has too many or too few fields: sampling"),
    ("a number as a number", lambda d: d["accounting"].update(rdp=2), r"^format: a number of its accounting"),
    ("not a number", lambda d: d["accounting"].update(rdp="nan"), r"^format: a number of its accounting"),
    ("version 3", lambda d: d.update(format="tg-tinker/privacy-report/v3"), r"^format: it says it is .*v3'"),
    ("entry with a comment", lambda d: d["integrity"]["entries"][0].update(note="x"), r"^format: an entry or a hash"),
    ("index as text", lambda d: d["integrity"]["entries"][0].update(leaf_index="2"), r"^format: an entry or a hash"),
    ("no entries", lambda d: d["integrity"]["entries"].clear(), r"^format: an entry or a hash"),
    ("integrity extra", lambda d: d["integrity"].update(x=1), r"^format: its integrity section"),
    (
        "other origin",
        lambda d: d["integrity"].update(origin="tg-tinker/" + 32 * "0"),
        r"^checkpoint: it names another",
    ),
    (
        "entry dropped",
        lambda d: d["integrity"]["entries"].pop(3),
        r"^chain: .*position 3: an entry says it stands at 4",
    ),
    ("first dropped", lambda d: d["integrity"]["entries"].pop(0), r"^chain: its first entry is not the first"),
    ("end cut off", lambda d: d["integrity"]["entries"].pop(), r"^checkpoint: .*entries after it may be missing"),
    (
        "capitals",
        lambda d: d["integrity"].update(proof=[h.upper() for h in d["integrity"]["proof"]]),
        r"^format: .*hash",
    ),
    ("proof cut", lambda d: d["integrity"]["proof"].pop(), r"^leaves: "),
    ("index moved", lambda d: d["integrity"]["entries"][0].update(leaf_index=1), r"^leaves: "),
    (
        "order",
        lambda d: d["integrity"]["entries"][1].update(leaf_index=2),
        r"^leaves: .* in the order of the dataset",
    ),
]


@pytest.mark.parametrize(("edit", "why"), [lie[1:] for lie in DOCUMENT_LIES], ids=[lie[0] for lie in DOCUMENT_LIES])
def test_a_lie_in_the_document_is_named(forge: Forge, refusal: Refusal, edit: Edit, why: str) -> None:
    document = forge.close().document()
    honest = copy.deepcopy(document)
    edit(document)
    assert rfc8785.dumps(document) != rfc8785.dumps(honest)
    assert re.search(why, refusal(forge.sign(document), forge.trust()))


@pytest.mark.parametrize("section", ["guarantee", "curve", "coverage", "mechanism", "sampling", "accounting"])
@pytest.mark.parametrize("value", [None, "x", 3, [], {}])
def test_a_section_of_another_shape_is_refused(forge: Forge, refusal: Refusal, section: str, value: Any) -> None:
    document = forge.close().document()
    document[section] = value
    assert refusal(forge.sign(document), forge.trust())


# Lies in the entries themselves, with chain, tree, checkpoint and document made to fit.


def lied(change: Callable[[dict[str, Any]], object], only: str = "charge", forge: Forge | None = None) -> Forge:
    """The same history with entries changed, in a log and a chain that fit them."""
    true, false = forge or settled_forge(), Forge()
    for body, index in true.chain:
        false.elsewhere(index - len(false.leaves))
        kind = body["kind"]
        rest = {k: v for k, v in body.items() if k not in ("kind", "dataset_id", "position", "prev_hash", "time")}
        if kind == only:
            change(rest)
        false.append(kind, **copy.deepcopy(rest))
    return false


def scaled(body: dict[str, Any]) -> None:
    body["epsilon_after"] = repr(float(body["epsilon_after"]) * 0.9)


def counted(*steps: tuple[str, int]) -> Forge:
    """Steps of a run whose units are counted: noise multiplier, and by how much the largest count grew."""
    forge = Forge()
    for seq, (sigma, releases) in enumerate(steps, 1):
        event = {"kind": "participation_gaussian", "noise_multiplier": sigma, "releases": releases}
        if seq == 1:
            forge.open(event={**event, "releases": 1})
        forge.settle(forge.charge(seq, event=event, epsilon_after="1.0"))
    return forge.close()


def registered() -> Forge:
    forge = Forge()
    forge.append("register", **forge.terms(), slots=1000, actor="key_1")
    return forge.open()


def tried(*attempts: int) -> Forge:
    forge = Forge().open()
    for attempt in attempts:
        forge.charge(1, attempt=attempt)
    return forge


ENTRY_LIES: list[tuple[str, Callable[[], Forge], str]] = [
    (
        "understated",
        lambda: lied(scaled).close(),
        r"^epsilon: .*position 1 is wrong.*the releases up to it cost 2\.13",
    ),
    (
        "overstated is as false",
        lambda: lied(lambda b: b.update(epsilon_after=repr(float(b["epsilon_after"]) * 1.01))).close(),
        r"^epsilon: .*position 1",
    ),
    ("understated report", lambda: settled_forge().close(epsilon="1.5"), r"^entries: .*it reports epsilon 1.5"),
    ("fewer charges", lambda: settled_forge().close(charges=4), r"^entries: .*it reports 4 charges, and 5 come"),
    ("report of another delta", lambda: settled_forge().close(delta="0.01"), r"^entries: .*reports another delta"),
    (
        "charge at another delta",
        lambda: lied(lambda b: b.update(delta="0.01")).close(),
        r"^entries: .*neighbours or delta",
    ),
    ("other unit", lambda: lied(lambda b: b.update(unit="user")).close(), r"^entries: .*its unit"),
    (
        "server vouches for a client's draw",
        lambda: lied(lambda b: b["event"].update(vouched_by="server")).close(),
        r"^entries: .*a draw that it cannot have made",
    ),
    ("counted for nothing", lambda: counted(("1.0", 0)), r"^entries: .*position 1: it costs nothing, and no counted"),
    ("two noises in one count", lambda: counted(("9.0", 1), ("0.1", 0)), r"^entries: .*noise multiplier 0\.1, and"),
    ("a leap in a count", lambda: counted(("1.0", 2)), r"^entries: .*raises a count by 2"),
    (
        "a client vouches on a registered dataset",
        lambda: (f := registered(), f.charge(1), f.close())[-1],
        r"^entries: .*from which the server draws",
    ),
    (
        "released twice",
        lambda: (f := tried(1), f.settled_again(), f.charge(1, attempt=2), f.close())[-1],
        r"released b",
    ),
    ("an attempt left out", lambda: tried(1, 3).close(), r"^entries: .*attempt 3 at step 1 of run_a, and 1 come"),
    ("the first attempt twice", lambda: tried(1, 1).close(), r"^entries: .*attempt 1 at step 1 of run_a, and 1 come"),
    ("an old attempt released", lambda: tried(1, 2).settled_again().close(), r"^entries: .*made again since"),
    (
        "a number as long as a page",
        lambda: Forge(delta="0." + 50 * "1").open().close(),
        r"^entries: .*target_delta is",
    ),
    ("unknown event", lambda: lied(lambda b: b["event"].update(kind="free")).close(), r"^entries: .*kind 'free'"),
    ("event with more", lambda: lied(lambda b: b["event"].update(discount="1")).close(), r"^entries: .*discount"),
    (
        "charge with more",
        lambda: lied(lambda b: b.update(refund="1")).close(),
        r"^entries: .*unknown fields \['refund",
    ),
    ("unknown kind", lambda: lied(lambda b: None).refund().close(), r"^entries: .*kind 'refund'"),
    (
        "unknown accountant",
        lambda: lied(lambda b: b.update(accountant="gdp")).close(),
        r"^entries: .*'gdp' is not kn",
    ),
    (
        "a plan that is none",
        lambda: lied(lambda b: b.update(accountant="prv")).close(),
        r"^epsilon: .*does not follow",
    ),
    (
        "outcome",
        lambda: lied(lambda b: b.update(outcome="free"), only="settle").close(),
        r"^entries: .*outcome 'free' is not known",
    ),
    (
        "a run opened at other terms",
        lambda: lied(lambda b: b.update(target_delta="0.01"), "open", Forge().open()).open().close(),
        r"^entries: .*it changes the budget",
    ),
    ("infinity misspelt", lambda: Forge(target="1e999").open().close(), r"^entries: .*target_epsilon is no finite"),
    ("a run opened twice", lambda: settled_forge().open().close(), r"^entries: .*it opens run 'run_a' again"),
    ("settled twice", lambda: settled_forge().settled_again().close(), r"^entries: .*or was settled already"),
    ("no report's entry", settled_forge, r"^last entry: the last entry is not a report's own"),
    ("over the target", lambda: Forge(target="2.0").open().spend(3).close(), r"^entries: .*over the 2.0 in force"),
    ("lowered target", lambda: Forge().open().raised("8.0", "4.0").close(), r"^entries: .*which is no raise"),
    ("raised from elsewhere", lambda: Forge().open().raised("2.0", "9.0").close(), r"^entries: .*which is no raise"),
]


@pytest.mark.parametrize(("make", "why"), [lie[1:] for lie in ENTRY_LIES], ids=[lie[0] for lie in ENTRY_LIES])
def test_a_lie_in_the_entries_is_named(refusal: Refusal, make: Callable[[], Forge], why: str) -> None:
    forge = make()
    document = settled_forge().close().document()
    document["integrity"] = forge.integrity()
    said = refusal(forge.sign(document), forge.trust())
    if not re.search(why, said):  # the entries alone may pass: then the document must be made to fit them
        said = refusal(forge.sign(forge.document()), forge.trust())
    assert re.search(why, said)


def test_a_reports_entry_written_on_another_processor_is_taken_and_changes_no_number(forge: Forge) -> None:
    spent = float(forge.chain[-1][0]["epsilon_after"])
    forge.close(epsilon=repr(spent * (1 - 1e-12)))
    assert list(verify_document(forge.sign(), forge.trust()))
    assert forge.document()["guarantee"]["epsilon"] == repr(spent)


def test_a_leaf_that_the_log_does_not_hold_is_noticed(forge: Forge, refusal: Refusal) -> None:
    forge.close()
    forge.leaves[forge.chain[4][1]] = b'{"operation":"something else"}'
    assert refusal(forge.sign(), forge.trust()).startswith("leaves: ")


def test_a_stale_checkpoint_is_refused(forge: Forge, refusal: Refusal) -> None:
    forge.close()
    document = forge.document()
    size = forge.chain[-1][1]
    root = merkle.root_of(merkle.leaf_hash(leaf) for leaf in forge.leaves[:size])
    body = note.Checkpoint(forge.key.name, size, root).body()
    document["integrity"]["checkpoint"] = note.sign_note(body, forge.key, forge.secret.sign)
    assert "or the checkpoint is a stale one" in refusal(forge.sign(document), forge.trust())


def test_a_checkpoint_of_another_key_is_refused(forge: Forge, refusal: Refusal) -> None:
    document = forge.close().document()
    other = Forge(secret=Ed25519PrivateKey.generate())
    other.leaves = forge.leaves
    body = note.Checkpoint(other.key.name, len(forge.leaves), bytes(32)).body()
    document["integrity"]["checkpoint"] = note.sign_note(body, other.key, other.secret.sign)
    assert refusal(forge.sign(document), forge.trust()).startswith("checkpoint: ")


# Who signed.


def test_an_unknown_signer_is_shown_and_refused_with_what_to_do(refusal: Refusal) -> None:
    forge, other = small(), Forge(secret=Ed25519PrivateKey.generate())
    for trust in (other.trust(), Trust(keys=[])):
        said = refusal(forge.sign(), trust)
        assert said.startswith("signer: ")
        assert forge.key.text in said
        assert "give it with --key" in said


def test_a_key_with_the_same_id_does_not_make_a_signature(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    forge, other = small(), Forge(secret=Ed25519PrivateKey.generate())
    value = json.loads(forge.sign())
    value["signatures"][0]["keyid"] = other.key.key_hash.hex()
    assert refusal(rfc8785.dumps(value), other.trust()).startswith("signature: ")


def test_several_signatures_and_none_are_refused(refusal: Refusal) -> None:
    forge = small()
    value = json.loads(forge.sign())
    for signatures in ([], value["signatures"] * 2, "x", [None]):
        data = rfc8785.dumps({**value, "signatures": signatures})
        assert refusal(data, forge.trust()).startswith("signature: ")


def test_another_type_of_document_is_not_taken_for_a_report(refusal: Refusal) -> None:
    forge = small()
    assert "does not know" in refusal(forge.sign(payload_type="application/json"), forge.trust())
    value = json.loads(forge.sign(payload_type="application/json"))
    value["payloadType"] = json.loads(forge.sign())["payloadType"]
    assert refusal(rfc8785.dumps(value), forge.trust()).startswith("signature: ")


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b'{"format":NaN}',
        b'{"a":1e999}',
        b'{"a":1,"a":2}',
        b'{"b":1,"a":2}',
        b"\xff\xfe",
        b"{}",
    ],
)
def test_a_signed_payload_that_is_no_report_is_refused(refusal: Refusal, payload: bytes) -> None:
    forge = small()
    assert refusal(forge.sign(payload), forge.trust()).split(":")[0] in ("json", "format")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not JSON",
        b"\x00\xff",
        b"NaN",
        b'{"payload":NaN}',
        b"[" * 200_000 + b"]" * 200_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"payload":' + b"9" * 10_000 + b"}",
        b'{"payloadType":{}}',
        b"[]",
        b"{}",
    ],
    ids=range(11),
)
def test_a_file_that_is_no_envelope_is_refused(refusal: Refusal, data: bytes) -> None:
    assert refusal(data, small().trust()).split(":")[0] in ("json", "format")


def test_a_file_too_large_is_refused_before_it_is_read(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    from tg_tinker.reports import verdicts

    monkeypatch.setattr(verdicts, "MAX_BYTES", 1000)
    assert "larger than" in refusal(small().sign(), small().trust())


# A fixed schedule, priced by an accountant that is not here.


def planned(epsilons: list[float], **more: Any) -> Forge:
    forge = Forge().open(planned_steps=len(epsilons), **more)
    for seq, epsilon in enumerate(epsilons, 1):
        forge.charge(seq, accountant="prv", epsilon_after=repr(epsilon))
    return forge


def test_a_plans_epsilon_lies_between_the_loss_distribution_and_the_gate(refusal: Refusal) -> None:
    from tg_tinker.privacy import accounting

    low = [accounting.pld_epsilon({(1.0, 0.1): n}, 1e-5) for n in (1, 2, 3)]
    high = [accounting.gate_epsilon({(1.0, 0.1): n}, 1e-5) for n in (1, 2, 3)]
    assert all(a + 0.01 < b for a, b in zip(low, high, strict=True))
    for fine in (low, high, [e + 0.01 for e in low]):
        forge = planned(fine).close()
        assert list(verify_document(forge.sign(), forge.trust()))
    below = planned([*low[:2], low[2] - 1e-3]).close()
    assert re.search(r"^epsilon: .*3 such releases cost at least", refusal(below.sign(), below.trust()))
    above = planned([*low[:2], high[2] + 1e-3]).close()
    assert re.search(r"^epsilon: .*the releases up to it cost", refusal(above.sign(), above.trust()))
    falls = planned([high[0], low[1], high[2]]).close()
    assert re.search(r"^epsilon: .*epsilon falls to", refusal(falls.sign(), falls.trust()))


def test_a_plan_is_followed_to_the_letter(refusal: Refusal) -> None:
    from tg_tinker.privacy import accounting

    low = [accounting.pld_epsilon({(1.0, 0.1): n}, 1e-5) for n in (1, 2, 3)]
    too_long = Forge().open(planned_steps=2)
    for seq, epsilon in enumerate(low, 1):
        too_long.charge(seq, accountant="prv", epsilon_after=repr(epsilon))
    another = Forge().open(planned_steps=3)
    another.charge(1, accountant="prv", event={**EVENT, "noise_multiplier": "2.0"}, epsilon_after=repr(low[0]))
    joined = Forge().open(planned_steps=3)
    joined.charge(1, event=EVENT)
    joined.charge(2, accountant="prv", epsilon_after=repr(low[1]))
    late = Forge().open("run_b").open(planned_steps=3)
    late.charge(1, accountant="prv", epsilon_after=repr(low[0]))
    for forge in (too_long, another, joined, late):
        forge.close()
        assert "a schedule that it does not follow" in refusal(forge.sign(), forge.trust())


def test_what_comes_after_a_plan_has_its_rest_of_delta_only(refusal: Refusal) -> None:
    from tg_tinker.privacy import accounting

    other = {"kind": "gaussian", "noise_multiplier": "4.0"}
    counts = {(1.0, 0.1): 1, (4.0, 1.0): 1}
    low = accounting.pld_epsilon({(1.0, 0.1): 1}, 1e-5)
    kept = accounting.privacy_profile({(1.0, 0.1): 120}, epsilons=[8.0])[0].delta
    assert 1e-7 < kept < 1e-5
    right, wrong = (accounting.gate_epsilon(counts, d) for d in (1e-5 - kept, 1e-5))
    for epsilon, honest in ((right, True), (wrong, False)):
        forge = Forge().open(planned_steps=120)
        forge.charge(1, accountant="prv", epsilon_after=repr(low))
        forge.raised("8.0", "20.0").open("run_b", other, target_epsilon="20.0")
        forge.charge(1, "run_b", other, epsilon_after=repr(epsilon)).update()
        forge.close()
        if honest:
            assert list(verify_document(forge.sign(), forge.trust()))
        else:
            assert re.search(r"^epsilon: .*position 4", refusal(forge.sign(), forge.trust()))


def test_where_the_second_accountant_cannot_say_a_claim_is_the_gates(refusal: Refusal) -> None:
    from tg_tinker.privacy import accounting

    counts, delta = {(1.0, 0.1): 1}, 1e-16
    assert math.isinf(accounting.pld_epsilon(counts, delta))
    for accountant in ("rdp", "prv"):
        honest = Forge(delta=repr(delta)).open(planned_steps=1)
        honest.charge(1, accountant=accountant)
        said = {v.check: v.shows for v in verify_document(honest.close().sign(), honest.trust())}
        assert said["second accountant"].startswith("NOT able to say anything at so small a delta")
        false = Forge(delta=repr(delta)).open(planned_steps=1)
        lower = accounting.gate_epsilon(counts, delta) - 0.01
        false.charge(1, accountant=accountant, epsilon_after=repr(lower))
        assert re.search(r"^epsilon: .*position 1 is wrong", refusal(false.close().sign(), false.trust()))


def kinds(count: int) -> Forge:
    forge = Forge(target="inf").open(event={"kind": "gaussian", "noise_multiplier": "5.0"})
    for seq in range(1, count + 1):
        forge.charge(seq, event={"kind": "gaussian", "noise_multiplier": repr(5.0 + seq / 8)})
    return forge.close()


def test_a_second_opinion_that_nobody_asked_for_is_not_claimed(refusal: Refusal) -> None:
    from tg_tinker.reports import recompute

    assert recompute.MOST_BY_LOSS == 16
    forge = kinds(17)
    report = forge.document()
    assert report["accounting"]["cross_check"]["epsilon"] == "not computed"
    said = {v.check: v.shows for v in verify_document(forge.sign(), forge.trust())}
    assert said["second accountant"].startswith("NOT computed, for 17 kinds of releases")
    for place in (report["accounting"]["cross_check"], report["privacy_profile"][2]):
        name = "epsilon" if "epsilon" in place else "pld"
        honest, place[name] = place[name], report["guarantee"]["epsilon"]
        assert re.search(r"^accounting: .* and inf computed", refusal(forge.sign(report), forge.trust()))
        place[name] = honest


def test_what_would_take_minutes_to_price_is_refused(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    from tg_tinker.reports import recompute

    forge = kinds(4)
    data = forge.sign()
    assert list(verify_document(data, forge.trust()))
    monkeypatch.setattr(recompute, "MOST_KINDS", 3)
    assert refusal(data, forge.trust()).startswith("epsilon: 4 different noise multipliers or sampling rates")


def test_what_does_not_fit_in_memory_is_refused(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    from tg_tinker.reports import recompute

    def full(history: object) -> None:
        raise MemoryError

    forge = small()
    data = forge.sign()
    monkeypatch.setattr(recompute, "first_fault", full)
    assert refusal(data, forge.trust()).startswith("epsilon: it cannot be computed")


@pytest.mark.parametrize(
    ("sigma", "delta", "said"), [("0.0001", 1e-5, "Too little noise"), ("2.0", 1.00000049e-5, "")]
)
def test_the_sentence_says_no_more_than_its_numbers(sigma: str, delta: float, said: str) -> None:
    event = {"kind": "gaussian", "noise_multiplier": sigma}
    forge = Forge(target="inf", delta=repr(delta)).open(event=event)
    forge.charge(1, event=event)
    sentence = forge.close().document()["guarantee"]["sentence"]
    assert sentence.startswith(said or "Adding or removing one record")
    assert list(verify_document(forge.sign(), forge.trust()))
    if not said:
        assert sentence.endswith("with probability 1.00001e-5.")


def test_the_guarantee_that_was_checked_names_its_dataset_and_its_time(forge: Forge) -> None:
    shown = {v.check: v.shows for v in verify_document(forge.close().sign(), forge.trust())}
    assert shown["guarantee"].startswith(
        f"dataset 'data-1' at {forge.chain[-1][0]['time']}: epsilon 2.903 at delta 1e-5"
    )


def test_an_understated_claim_is_caught_by_the_second_accountant_alone(
    forge: Forge, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tg_tinker.reports import recompute

    false = lied(lambda b: b.update(epsilon_after=repr(float(b["epsilon_after"]) * 0.5))).close()
    monkeypatch.setattr(recompute, "first_fault", lambda history: None)
    said = refusal(false.sign(), false.trust())
    assert said.startswith("second accountant: the report claims epsilon 1.4")
    assert float(said.split("at least ")[1].split()[0]) == pytest.approx(2.354, abs=1e-3)


@pytest.mark.parametrize("rate", ["1e-300", "1e-09", "1.0"])
@pytest.mark.parametrize("sigma", ["1e-310", "1e-05", "1e+300"])
def test_numbers_that_no_training_has_are_refused_and_not_stumbled_over(
    refusal: Refusal, sigma: str, rate: str
) -> None:
    event = {**EVENT, "noise_multiplier": sigma, "sample_rate": rate}
    forge = Forge().open(event=event, planned_steps=2**53 - 1)
    forge.charge(1, event=event, accountant="prv", epsilon_after="0.5")
    forge.charge(2, event=event, epsilon_after="7.75")
    history = read_history("data-1", [b for b, _ in forge.close().chain])
    figures = Figures(rdp=7.75, pld=7.75, gdp=None, profile=())
    time = forge.chain[-1][0]["time"]
    made = statement(history, figures, time=time, server_version="0", integrity=forge.integrity())
    assert refusal(forge.sign(json.loads(rfc8785.dumps(made))), forge.trust()).split(":")[0] in (
        "epsilon",
        "accounting",
    )


def test_without_noise_no_finite_epsilon_is_believed(refusal: Refusal) -> None:
    forge = Forge(target="inf").open()
    forge.charge(1)
    forge.charge(2, event={"kind": "unnoised"})
    forge.close()
    assert math.isinf(float(forge.document()["guarantee"]["epsilon"]))
    assert list(verify_document(forge.sign(), forge.trust()))
    false = lied(lambda b: b.update(epsilon_after="3.0"), forge=Forge(target="inf").open().unnoised())
    assert re.search(r"^epsilon: .*cost inf", refusal(false.close().sign(), false.trust()))


# What this user's programs saw of the log.


def receipt(forge: Forge, at: int) -> Receipt:
    """What the server handed out when the entry was appended."""
    _, index = forge.chain[at]
    hashes = [merkle.leaf_hash(leaf) for leaf in forge.leaves[: index + 1]]
    body = note.Checkpoint(forge.key.name, index + 1, merkle.root_of(hashes)).body()
    nodes = {
        n: merkle.root_of(hashes[n[1] << n[0] : (n[1] + 1) << n[0]]) for n in merkle.inclusion_nodes(index, index + 1)
    }
    return Receipt(
        entry=forge.leaves[index].decode(),
        leaf_index=index,
        checkpoint=note.sign_note(body, forge.key, forge.secret.sign),
        proof=tuple(merkle.inclusion_proof(index, index + 1, nodes)),
        verifier_key=forge.key.text,
    )


def test_a_fork_that_fits_in_itself_is_caught_by_a_receipt(tmp_path: Path, refusal: Refusal) -> None:
    folder = Folder(tmp_path)
    true = settled_forge()
    for at, (body, _) in enumerate(true.chain):
        if body["kind"] == "charge":
            Receipts(folder).append(receipt(true, at))
    true.close()
    *_, last = verify_document(true.sign(), Trust.of_user(folder, true.key))
    assert last.shows == "all 5 of your own receipts from before it are among the entries"
    cut = settled_forge()  # run_b's two charges never happened, says this log
    del cut.leaves[cut.chain[8][1] :], cut.chain[8:]
    forked = cut.elsewhere(10).close()
    assert list(verify_document(forked.sign(), forked.trust()))  # nothing in it tells
    said = refusal(forked.sign(), Trust.of_user(folder, forked.key))
    assert re.search(r"^receipts: you hold a receipt for an entry at leaf 1\d of this log.*forked", said)


def test_a_receipt_for_a_later_entry_says_nothing_of_the_report(tmp_path: Path) -> None:
    forge = settled_forge().close()
    data = forge.sign()
    forge.charge(3, "run_b")
    Receipts(Folder(tmp_path)).append(receipt(forge, len(forge.chain) - 1))
    *_, last = verify_document(data, Trust.of_user(Folder(tmp_path), forge.key))
    assert last.shows.startswith("no receipts")
    assert last.shows.endswith("; 1 of yours are NEWER: the dataset was used again since; ask for a new report")


def test_a_damaged_receipt_is_not_taken_for_a_fork(tmp_path: Path, refusal: Refusal) -> None:
    import dataclasses

    forge = settled_forge()
    good = receipt(forge, 1)
    bad = dataclasses.replace(good, entry=good.entry.replace('"seq":1', '"seq":7'))
    Receipts(Folder(tmp_path)).append(bad)
    forge.close()
    assert "one of your own receipts is damaged" in refusal(forge.sign(), Trust.of_user(Folder(tmp_path), forge.key))


def test_the_same_size_with_another_root_is_a_fork(tmp_path: Path, refusal: Refusal) -> None:
    from datetime import UTC, datetime

    forge = settled_forge().close()
    body = note.Checkpoint(forge.key.name, forge.chain[-1][1] + 1, bytes(32)).body()
    pins = Pins(Folder(tmp_path))
    pins.put(Pin(forge.key, note.sign_note(body, forge.key, forge.secret.sign), datetime.now(UTC)))
    pins.know(KnownServer("example.org:1", "t", forge.key.name))
    said = refusal(forge.sign(), Trust.of_user(Folder(tmp_path)))  # pinned: no --key is needed
    assert "another root at the same size" in said


def test_a_report_that_is_older_than_what_was_seen_of_its_log_says_so(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    forge = settled_forge().close()
    body = note.Checkpoint(forge.key.name, forge.chain[-1][1] + 4, bytes(32)).body()
    Pins(Folder(tmp_path)).put(Pin(forge.key, note.sign_note(body, forge.key, forge.secret.sign), datetime.now(UTC)))
    *_, last = verify_document(forge.sign(), Trust.of_user(Folder(tmp_path), forge.key))
    assert last.shows.endswith("; you saw the log with 3 entries more, of this dataset or others")


def test_dsse_is_what_signs() -> None:
    """The signature is over DSSE's encoding of type and payload, as a second reading of the specification has it."""
    forge = small()
    value = json.loads(forge.sign())
    from base64 import b64decode

    payload, kind = b64decode(value["payload"]), value["payloadType"]
    signed = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    assert signed == dsse.pae(kind, payload)
    forge.secret.public_key().verify(b64decode(value["signatures"][0]["sig"]), signed)
