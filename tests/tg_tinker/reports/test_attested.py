"""Promises that a caller stated and no ledger holds: printed as that, everywhere, and never as more."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import rfc8785

from tests.support.exports import KEY, SIGNER, files, source
from tests.tg_tinker.reports.test_exported import checked, honest, resigned
from tg_tinker.errors import InvalidRequestError
from tg_tinker.exports.manifest import open_manifest, parse_payload
from tg_tinker.exports.tar import CARD, MANIFEST, REPORT, REPORT_PAGE
from tg_tinker.reports.card import guarantee
from tg_tinker.types import WeightsSource
from tg_tinker_server.service.lineage import IMPORTED, federation_entry

JOB = "5e" * 32
WORD = f"the weights of federated job `{JOB}` after round 12"
HELD_NOWHERE = "it is in no ledger of this server"


def entry(epsilon: float = 2.0, **other: Any) -> dict[str, Any]:
    stated = {"job": JOB, "round": 12, "epsilon": epsilon, "delta": 1e-5, "unit": "user", **other}
    return federation_entry(WeightsSource(**stated), "ckpt_0123456789abcdef", "tiny-llama-2m")


def brought(epsilon: float = 2.0) -> dict[str, bytes]:
    made = entry(epsilon)
    return files(source(run_id=IMPORTED, ledger=made["privacy"], provenance=[made]))


def test_an_export_of_brought_weights_says_whose_word_its_promise_is() -> None:
    said = checked(resigned(brought()))
    (promise, earlier) = [s for s in said if s.startswith("promise: ")]
    for sentence in (promise, earlier):
        assert "one user of the training data" in sentence
        assert "exp(2" in sentence
        assert f"So stated by the caller who brought {WORD}; {HELD_NOWHERE}." in sentence
    assert SIGNER.origin in earlier
    assert any(s.startswith("report: there is none: the promise is in no ledger") for s in said)
    card = brought()[CARD].decode()
    assert card.count(HELD_NOWHERE) == 2
    assert "tags: [differential-privacy, tg-tinker]" in card
    manifest = open_manifest(brought()[MANIFEST], KEY)
    assert manifest.epsilon == 2.0
    assert manifest.predicate["guarantee"] == promise.removeprefix("promise: ")


def test_brought_weights_that_promise_nothing_say_so_and_carry_no_tag_of_privacy() -> None:
    contents = brought(math.inf)
    said = checked(resigned(contents))
    assert f"promise: Whoever brought {WORD} promises nothing about its training data." in said
    card = contents[CARD].decode()
    assert "differential-privacy" not in card
    assert "exp(" not in card


def test_what_was_trained_further_lists_the_word_beside_its_own_ledger() -> None:
    privacy = json.loads(open_manifest(honest()[MANIFEST], KEY).payload())["predicate"]["privacy"]
    made = source(ledger=privacy, provenance=[entry()])
    card = files(made)[CARD].decode()
    assert card.count(HELD_NOWHERE) == 1
    assert f"- {guarantee(entry()['privacy'])} (`{SIGNER.origin}`)" in card


Change = Callable[[dict[str, Any]], Any]
LIES: dict[str, Change] = {
    "by nobody": lambda p: p.update(attested_by=""),
    "by the ledger": lambda p: p.update(attested_by="ledger"),
    "by a list": lambda p: p.update(attested_by=[]),
    "another dataset": lambda p: p.update(dataset_id="hospital"),
    "a job in capitals": lambda p: p.update(dataset_id="federation:" + JOB.upper()),
    "a job and more": lambda p: p.update(dataset_id=f"federation:{JOB}\n"),
    "a round before the first": lambda p: p.update(round=-1),
    "a text as a round": lambda p: p.update(round="1. Certified"),
    "half a round": lambda p: p.update(round=1.5),
    "true as a round": lambda p: p.update(round=True),
    "entries": lambda p: p.update(entries=1),
    "a head": lambda p: p.update(head="ab" * 32),
    "public": lambda p: p.update(initial_weights="public"),
    "no round": lambda p: p.pop("round"),
    "a round and nobody": lambda p: p.pop("attested_by"),
    "a field too many": lambda p: p.update(note="certified"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("where", ["its own", "an earlier one"])
def test_a_stated_promise_of_another_form_is_refused(lie: str, where: str) -> None:
    statement = json.loads(open_manifest(brought()[MANIFEST], KEY).payload())
    claims = statement["predicate"]
    parse_payload(rfc8785.dumps(statement))
    LIES[lie](claims["privacy"] if where == "its own" else claims["provenance"][0]["privacy"])
    with pytest.raises(InvalidRequestError, match="refused"):
        parse_payload(rfc8785.dumps(statement))


def test_a_stated_promise_cannot_borrow_a_report() -> None:
    report = {name: honest()[name] for name in (REPORT, REPORT_PAGE)}
    made = entry()
    with pytest.raises(InvalidRequestError, match="promise: it holds a report, and its promise is in no ledger"):
        checked(files(replace(source(run_id=IMPORTED, ledger=made["privacy"]), report=report)))


def test_a_ledger_of_the_same_name_is_not_a_word() -> None:
    privacy = {k: v for k, v in entry()["privacy"].items() if k not in ("attested_by", "round")}
    assert HELD_NOWHERE not in guarantee(privacy)
    assert parse_payload(open_manifest(files(source(ledger=privacy))[MANIFEST], KEY).payload()).epsilon == 2.0
