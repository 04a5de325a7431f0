"""An auditor with a file and no server finds every change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from tg_tinker.errors import InvalidRequestError
from tg_tinker.ledger import (
    AUDIT_DOMAIN,
    LEDGER_DOMAIN,
    START,
    ChainEntry,
    PrivacyLedger,
    audit_body,
    verify_audit_chain,
    verify_chain,
)
from tg_tinker.types import AuditLogEntry
from tg_tinker.wire.privacy import audit_from_lines

EVENT = {"kind": "gaussian", "noise_multiplier": "1.0"}
ALWAYS = {"dataset_id": "d", "run_id": "r", "time": "2026-01-02T03:04:05+00:00"}
UNIT = {"unit": "datum", "neighbours": "add-or-remove-one"}


def chain(bodies: list[dict[str, Any]], domain: bytes = LEDGER_DOMAIN) -> list[ChainEntry]:
    entries: list[ChainEntry] = []
    for position, body in enumerate(bodies):
        before = entries[-1].entry_hash if entries else START
        entries.append(ChainEntry.make(domain, body, position=position, prev_hash=before))
    return entries


def opening(**more: Any) -> dict[str, Any]:
    return {
        **ALWAYS,
        **UNIT,
        "kind": "open",
        "target_epsilon": "4.0",
        "target_delta": "1e-05",
        "mechanism": EVENT,
        **more,
    }


def charge(seq: int, epsilon: str, **more: Any) -> dict[str, Any]:
    return {**ALWAYS, **UNIT, "kind": "charge", "seq": seq, "attempt": 1, "event": EVENT, "accountant": "rdp",
            "epsilon_after": epsilon, "delta": "1e-05", **more}  # fmt: skip


def settle(seq: int, charge_position: int, outcome: str = "released", **more: Any) -> dict[str, Any]:
    return {**ALWAYS, "kind": "settle", "seq": seq, "attempt": 1, "charge_position": charge_position,
            "outcome": outcome, "update_hash": "", **more}  # fmt: skip


GOOD = [opening(), charge(1, "1.0"), settle(1, 1), charge(2, "2.0"), settle(2, 3, "failed"),
        charge(2, "3.0", attempt=2)]  # fmt: skip


def ledger(bodies: list[dict[str, Any]]) -> PrivacyLedger:
    return PrivacyLedger(
        dataset_id="d", entries=tuple(chain(bodies)), epsilon_spent=3.0, target_epsilon=4.0, delta=1e-5
    )


def test_the_hash_is_sha256_over_the_domain_and_the_canonical_bytes() -> None:
    entry = ChainEntry.make(LEDGER_DOMAIN, {"b": 1, "a": "é"}, position=0, prev_hash=START)
    by_hand = '{"a":"é","b":1,"position":0,"prev_hash":"' + "00" * 32 + '"}'
    assert entry.body_json() == by_hand
    assert entry.entry_hash == hashlib.sha256(b"tg-tinker/ledger/v1\x00" + by_hand.encode()).digest()
    assert (
        ChainEntry.make(AUDIT_DOMAIN, {"b": 1, "a": "é"}, position=0, prev_hash=START).entry_hash != entry.entry_hash
    )


def test_a_whole_chain_verifies_to_its_head_and_lines_read_back() -> None:
    entries = chain(GOOD)
    assert verify_chain(entries) == entries[-1].entry_hash
    assert [ChainEntry.from_json(e.to_json()) for e in entries] == entries
    assert verify_chain([]) == START


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(
    bodies=st.lists(st.dictionaries(st.text(max_size=6), json_values, max_size=4), min_size=3, max_size=6),
    where=st.integers(0, 5),
    how=st.sampled_from(["edit", "remove", "swap", "repeat", "replace hash"]),
)
def test_any_change_is_named_at_its_position(bodies: list[dict[str, Any]], where: int, how: str) -> None:
    entries = chain(bodies)
    at = where % (len(entries) - 1)  # cutting the end off needs a noted head, see below
    changed = list(entries)
    if how == "edit":
        changed[at] = ChainEntry({**changed[at].body, "edited": True}, changed[at].entry_hash)
    elif how == "remove":
        del changed[at]
    elif how == "swap":
        changed[at], changed[at + 1] = changed[at + 1], changed[at]
    elif how == "repeat":
        changed.insert(at + 1, changed[at])
    else:
        changed[at] = ChainEntry(changed[at].body, b"\x01" * 32)
    with pytest.raises(InvalidRequestError) as caught:
        verify_chain(changed)
    assert caught.value.details["position"] == (at + 1 if how == "repeat" else at)
    assert f"position {caught.value.details['position']}" in caught.value.message


def test_an_entry_rewritten_with_its_hash_is_found_at_the_next_one() -> None:
    entries = chain(GOOD)
    entries[1] = ChainEntry.make(LEDGER_DOMAIN, charge(1, "0.1"), position=1, prev_hash=entries[0].entry_hash)
    with pytest.raises(InvalidRequestError, match="position 2: it does not follow"):
        verify_chain(entries)


def test_a_history_that_was_cut_or_replaced_is_found_by_the_head_that_was_noted() -> None:
    entries = chain(GOOD)
    noted = entries[-1].entry_hash
    assert verify_chain(entries[:-1]) != noted  # shorter, and sound in itself
    for other in (entries[:-1], chain([*GOOD[:5], charge(3, "2.5")]), []):
        with pytest.raises(InvalidRequestError, match="noted as its head is missing"):
            verify_chain(other, head=noted)
    longer = chain([*GOOD, charge(3, "3.5")])
    assert verify_chain(longer, head=noted) == longer[-1].entry_hash


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"body": 1, "entry_hash": ""}', '{"body": {}, "entry_hash": "zz"}']
)
def test_a_line_that_is_no_entry_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="not a ledger entry"):
        ChainEntry.from_json(text)


def test_numbers_that_json_cannot_hold_do_not_crash_the_verifier() -> None:
    line = '{"body": {"position": 0, "prev_hash": "' + "00" * 32 + '", "x": NaN}, "entry_hash": "00"}'
    with pytest.raises(InvalidRequestError, match="position 0: it is not canonical"):
        verify_chain([ChainEntry.from_json(line)])


def test_a_good_ledger_verifies_and_names_its_charges_and_head() -> None:
    good = ledger(GOOD)
    good.verify(head=good.entries[2].entry_hash)
    assert [e.body["seq"] for e in good.charges] == [1, 2, 2]
    assert good.head == good.entries[-1].entry_hash


WRONG: list[tuple[str, Callable[[], list[dict[str, Any]]], int, str]] = [
    ("another dataset", lambda: [opening(), charge(1, "1.0", dataset_id="e")], 1, "belongs to dataset 'e'"),
    ("no opening", lambda: [charge(1, "1.0")], 0, "no entry before it|was not opened before"),
    ("unpaid release", lambda: [opening(), settle(1, 1)], 1, "not charged before"),
    ("settled twice", lambda: [opening(), charge(1, "1.0"), settle(1, 1), settle(1, 1)], 3, "settled already"),
    ("paid for another", lambda: [opening(), charge(1, "1.0"), settle(2, 1)], 2, "not charged before"),
    ("charged after release", lambda: [opening(), charge(1, "1.0"), settle(1, 1), charge(1, "2.0")], 3, "released"),
    ("over budget", lambda: [opening(), charge(1, "4.000001")], 1, "over the 4.0"),
    ("not a number", lambda: [opening(), charge(1, "nan")], 1, "no decimal string"),
    ("another delta", lambda: [opening(), charge(1, "1.0", delta="0.1")], 1, "delta are not those"),
    ("another budget", lambda: [opening(), opening(target_epsilon="9.0")], 1, "changes the budget"),
    (
        "unknown kind",
        lambda: [opening(), {**charge(1, "1.0"), "kind": "refund"}],
        1,
        "kind 'refund', which this version",
    ),
    (
        "unknown outcome",
        lambda: [opening(), charge(1, "1.0"), settle(1, 1, "refunded")],
        2,
        "'refunded' is not known",
    ),
    ("missing field", lambda: [opening(), {**ALWAYS, "kind": "charge"}], 1, "lacks the fields"),
]


@pytest.mark.parametrize(("bodies", "position", "reason"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_chain_that_tells_a_wrong_story_is_refused(
    bodies: Callable[[], list[dict[str, Any]]], position: int, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        ledger(bodies()).verify()
    assert caught.value.details["position"] == position


def audit_entry(position: int, previous: str) -> AuditLogEntry:
    record = AuditLogEntry(
        entry_id=position,
        operation="optim_step",
        training_client_id="run_a",
        request_hash="hmac-sha256:00",
        request_bytes=7,
        artifact_ids=["a"],
        started=datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=timezone(timedelta(hours=2))),
        completed=datetime(2026, 1, 2, tzinfo=UTC),
        success=True,
        error_code="",
        dp_metrics={"total_epsilon": "1.0"},
        prev_hash=previous,
        record_hash="",
    )
    entry = ChainEntry.make(AUDIT_DOMAIN, audit_body(record), position=position, prev_hash=bytes.fromhex(previous))
    return audit_from_lines([entry.to_json()])[0]


def audit_log(n: int) -> list[AuditLogEntry]:
    log: list[AuditLogEntry] = []
    for position in range(n):
        log.append(audit_entry(position, log[-1].record_hash if log else START.hex()))
    return log


def test_audit_records_as_the_client_gets_them_form_a_chain() -> None:
    log = audit_log(5)
    assert all(log[i].prev_hash == log[i - 1].record_hash for i in range(1, 5))
    assert verify_audit_chain(log).hex() == log[-1].record_hash
    assert verify_audit_chain(log[2:]).hex() == log[-1].record_hash  # the newest part
    assert verify_audit_chain(log[::2]).hex() == log[-1].record_hash  # a filtered query
    assert verify_audit_chain([]) == START


@pytest.mark.parametrize(
    "change", [{"success": False}, {"request_bytes": 8}, {"operation": "sample"}, {"entry_id": 9}]
)
def test_an_edited_audit_record_is_named(change: dict[str, Any]) -> None:
    from dataclasses import replace

    log = audit_log(4)
    log[2] = replace(log[2], **change)
    with pytest.raises(InvalidRequestError) as caught:
        verify_audit_chain(log)
    assert caught.value.details["position"] in (2, 3, 9)


def test_an_audit_record_that_was_replaced_with_its_hash_is_found_at_its_neighbour() -> None:
    log = audit_log(4)
    log[1] = audit_entry(1, "11" * 32)
    with pytest.raises(InvalidRequestError, match="position 1"):
        verify_audit_chain(log)


def test_audit_records_out_of_order_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="out of order"):
        verify_audit_chain(audit_log(3)[::-1])


def test_a_specimen_of_the_format_still_verifies() -> None:
    """Written by release 0.1.0; every later release must read it."""
    body = {"kind": "open", "dataset_id": "d", "run_id": "r", "unit": "datum", "target_epsilon": "4.0"}
    line = rfc8785.dumps(json.loads(chain([{**body, "target_delta": "1e-05"}])[0].to_json())).decode()
    assert ChainEntry.from_json(line).entry_hash.hex() == (
        "0c8f8ca4c2a223505d0f73378d81d8ce83be479b652b61c837e6a3b5aa864f66"
    )
