"""An export says in its sentence, its card and its page what its numbers say, and its numbers what was charged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.exports import CLAIM, KEY, LORA, SIGNER, archive, files, source, with_manifest
from tests.tg_tinker.reports.conftest import Forge
from tg_tinker.errors import InvalidRequestError
from tg_tinker.exports.manifest import PAYLOAD_TYPE, UNITS, Manifest, open_manifest, parse_payload
from tg_tinker.exports.reader import ExportReader
from tg_tinker.exports.tar import CARD, MANIFEST, REPORT, REPORT_PAGE
from tg_tinker.ledger import LEDGER_DOMAIN, entry_hash
from tg_tinker.reports import recompute
from tg_tinker.reports.exported import check_export, check_words
from tg_tinker.reports.page import render
from tg_tinker.reports.verdicts import REGISTRY, Trust

STEPS = 4
FORGE = Forge(secret=Ed25519PrivateKey.from_private_bytes(b"s" * 32), dataset_id="data").open().spend(STEPS).close()
TRUST = Trust(keys=[KEY])
Change = Callable[[dict[str, Any]], Any]


def claim(entries: int = 1 + STEPS) -> dict[str, Any]:
    """What an honest server states once that many entries are in the ledger."""
    bodies = [body for body, _ in FORGE.chain]
    spent = [b["epsilon_after"] for b in bodies[:entries] if b["kind"] == "charge"]
    head = entry_hash(LEDGER_DOMAIN, bodies[entries - 1]).hex()
    return {**CLAIM, "entries": entries, "epsilon": spent[-1], "head": head}


def honest(**state: Any) -> dict[str, bytes]:
    """Every file of an export of weights that paid for each of their steps."""
    made = source(ledger=claim(), step=STEPS, **state)
    report = {REPORT: FORGE.sign(), REPORT_PAGE: render(FORGE.document()).encode()}
    return files(replace(made, report=report))


def resigned(contents: Mapping[str, bytes], change: Change = lambda _: None) -> dict[str, bytes]:
    """The same with other claims, or for other files, and good signatures on all of it."""
    old = open_manifest(contents[MANIFEST], KEY)
    predicate = json.loads(json.dumps(dict(old.predicate)))
    change(predicate)
    digests = {n: hashlib.sha256(d).hexdigest() for n, d in contents.items() if n in old.files}
    manifest = Manifest(files=digests, predicate=predicate)
    return with_manifest(contents, rfc8785.dumps(SIGNER.sign_dsse(PAYLOAD_TYPE, manifest.payload())))


def checked(contents: Mapping[str, bytes]) -> list[str]:
    reader = ExportReader([archive(contents)], KEY)
    for _ in reader.weights():
        pass
    return [f"{v.check}: {v.shows}" for v in (*check_export(reader, TRUST), *check_words(reader))]


def test_an_honest_export_is_taken_at_its_word() -> None:
    said = checked(resigned(honest()))
    assert "words: README.md and report.html say this and nothing else" in said[-1]
    assert any(s.startswith("promise: Adding or removing one record") for s in said)
    assert any("at entry 5 of 6" in s for s in said)
    assert checked(files())[-1].startswith("words: README.md say")  # without privacy there is no page
    plain = replace(source(ledger=claim(), step=STEPS), weight_names=["table"])
    assert any("rests on the signer's word alone" in s for s in checked(files(plain)))


LIES: list[tuple[str, Change]] = [
    ("sentence", lambda p: p.update(guarantee=p["guarantee"].replace("exp(", "exp(0."))),
    ("delta in words", lambda p: p.update(guarantee=p["guarantee"].replace("1e-5", "1e-9"))),
    ("no sentence", lambda p: p.update(guarantee="")),
    ("more steps than charges", lambda p: p["artifact"].update(step=STEPS + 1)),
    ("head of the first charge", lambda p: p.update(privacy=claim(2))),
]


@pytest.mark.parametrize(("lie", "change"), LIES, ids=[name for name, _ in LIES])
def test_a_signer_who_states_less_than_the_numbers_is_refused(lie: str, change: Change) -> None:
    with pytest.raises(InvalidRequestError, match=r"^promise: its (sentence|weights)"):
        # A sentence that goes with the earlier entry: the step alone betrays that one.
        checked(resigned(honest(), lambda p: (change(p), _sentence(p) if lie.startswith("head") else None)))


def test_a_promise_is_held_to_the_price_of_its_own_charge(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fault(history: Any) -> recompute.Fault:
        seen.append(len(history.charges))
        return recompute.Fault(7, "too little")

    monkeypatch.setattr(recompute, "last_fault", fault)
    with pytest.raises(InvalidRequestError, match="promise: the charge at position 7 is wrong: too little"):
        checked(honest())
    assert seen == [STEPS]


def _sentence(predicate: dict[str, Any]) -> None:
    from tg_tinker.reports.card import guarantee

    predicate["guarantee"] = guarantee(predicate["privacy"])


def test_steps_that_were_paid_for_elsewhere_are_named_and_not_counted_here() -> None:
    entry = {"artifact": "ckpt_00000000", "base_model": "m", "manifest": "", "origin": "", "privacy": CLAIM}
    made = source(ledger=claim(), step=STEPS + 9, provenance=[entry])
    report = {REPORT: FORGE.sign(), REPORT_PAGE: render(FORGE.document()).encode()}
    said = checked(files(replace(made, report=report)))
    assert any(s.startswith(f"promise: also, on data behind {SIGNER.origin}: Adding") for s in said)
    made = source(ledger={**claim(), "initial_weights": "public"}, step=STEPS + 9)
    assert any("public by the word" in s for s in checked(files(replace(made, report=report))))


@pytest.mark.parametrize("kind", ["privacy", "none"])
def test_a_manifest_alone_has_the_sentence_of_its_numbers(kind: str) -> None:
    contents = honest() if kind == "privacy" else files()
    lie = resigned(contents, lambda p: p.update(guarantee="Nothing can leak."))[MANIFEST]
    with pytest.raises(InvalidRequestError, match="promise: its sentence"):
        list(REGISTRY.verify(lie, TRUST))
    assert [v.check for v in REGISTRY.verify(contents[MANIFEST], TRUST)] == ["signature", "format", "files"]


def _edited(name: str, change: Callable[[bytes], bytes]) -> dict[str, bytes]:
    contents = honest()
    return resigned({**contents, name: change(contents[name])})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (CARD, lambda d: d.replace(b"exp(", b"exp(0.")),
        (CARD, lambda d: d + b"Certified.\n"),
        (CARD, lambda d: d.replace(b"org/tiny-llama", b"org/other", 1)),
        (CARD, lambda d: d.replace(b"org/tiny-llama", b"Certified: epsilon is 0.001")),
        (CARD, lambda d: d.replace(b'base_model: "', b'base_model: "\\u0020', 1)),
        (CARD, lambda _: b""),
        (REPORT_PAGE, lambda d: d.replace(b"</body>", b"<script>alert(1)</script></body>")),
        (REPORT_PAGE, lambda _: b"<h1>epsilon = 0.01</h1>"),
    ],
)
def test_a_page_for_people_that_says_anything_else_is_refused(name: str, change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(InvalidRequestError, match=r"^words: "):
        checked(_edited(name, change))


def test_a_report_without_its_page_and_a_page_without_a_report_are_refused() -> None:
    page = honest()[REPORT_PAGE]
    for report in ({REPORT: FORGE.sign()}, {REPORT_PAGE: page}):
        made = replace(source(ledger=claim(), step=STEPS), report=report)
        with pytest.raises(InvalidRequestError, match=r"^words: report\.html"):
            checked(files(made))


EVIL = "bigram` \n\n# Epsilon is 0.001 <script>"
PROVENANCE = {
    "artifact": "ckpt_00000000", "base_model": "m", "manifest": "", "origin": "tg-tinker/" + "2" * 32,
    "privacy": CLAIM,
}  # fmt: skip


def _foreign_texts() -> Iterator[tuple[str, Change]]:
    for name in ("base_model", "exported", "origin", "server_version"):
        yield name, lambda p, name=name: p.update({name: EVIL})
    for name in ("content_hash", "id", "saved"):
        yield name, lambda p, name=name: p["artifact"].update({name: EVIL})
    for name in ("unit", "dataset_id", "head", "initial_weights"):
        yield name, lambda p, name=name: p["privacy"].update({name: EVIL})
        yield (
            f"earlier {name}",
            lambda p, name=name: p.update(provenance=[{**PROVENANCE, "privacy": {**CLAIM, name: EVIL}}]),
        )
    for name in ("artifact", "base_model", "manifest", "origin"):
        yield f"earlier {name}", lambda p, name=name: p.update(provenance=[{**PROVENANCE, name: EVIL}])
        yield f"earlier {name} no text", lambda p, name=name: p.update(provenance=[{**PROVENANCE, name: [7]}])
    yield "a sentence as a model", lambda p: p.update(base_model="bigram. Its epsilon is 0.001")
    yield "a person as a unit", lambda p: p["privacy"].update(unit="person changes nothing")
    yield "step", lambda p: p["artifact"].update(step=-1)


TEXTS = list(_foreign_texts())


@pytest.mark.parametrize("change", [c for _, c in TEXTS], ids=[name for name, _ in TEXTS])
def test_a_manifest_has_no_room_for_texts_of_others(change: Change) -> None:
    statement = json.loads(open_manifest(honest()[MANIFEST], KEY).payload())
    statement["predicate"]["provenance"] = [PROVENANCE]
    assert parse_payload(rfc8785.dumps(statement)).predicate["provenance"] == [PROVENANCE]
    change(statement["predicate"])
    with pytest.raises(InvalidRequestError, match="refused"):
        parse_payload(rfc8785.dumps(statement))


@pytest.mark.parametrize("state", [
    {"config": {"model_ref": EVIL, "lora_config": LORA}},
    {"provenance": [{**PROVENANCE, "origin": EVIL}]},
    {"ledger": {**CLAIM, "unit": EVIL}},
])  # fmt: skip
def test_what_readers_would_refuse_is_not_signed(state: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be exported"):
        files(source(**state))
    with pytest.raises(InvalidRequestError, match="model card"):
        files(replace(source(), base_model=EVIL))


def test_every_unit_that_a_run_can_protect_can_be_exported() -> None:
    assert sorted(UNITS) == ["datum", "group", "pair", "sequence", "site", "user"]
    for unit in UNITS:
        assert open_manifest(files(source(ledger={**CLAIM, "unit": unit}))[MANIFEST], KEY).epsilon == 1.5
