"""A site between the steps: what it remembers, repeats, forgets, and refuses out of order."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.tg_tinker.federated.masking.parties import STEPS, Federation, base_of, identity, make_job, names
from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.masking import KINDS, MaskingSite
from tg_tinker.federated.masking.site_state import REMEMBERED_KEYS, MaskingState


def everything(federation: Federation) -> list[tuple[str, str, Any, Any]]:
    federation.run(federation.updates(6), silent={"train": {"site-2"}})
    return list(federation.seen)


def same(one: Any, other: Any) -> bool:
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else bool(one == other)


def test_a_step_that_is_repeated_answers_the_same_bytes_even_after_a_restart() -> None:
    """A fresh process with the stored state, at every step."""
    federation = Federation.of(4)
    updates = federation.updates(6)
    for last in STEPS:
        federation.run(updates, until=last)
        for step, site, request, reply in [entry for entry in federation.seen if entry[0] == last]:
            state = json.loads(json.dumps(federation.sites[site].state))
            federation.sites[site] = MaskingSite(federation.job, site, identity(site), state=state)
            assert same(federation.call(step, site, 1, 0, request, updates[site]), reply), step
            assert federation.sites[site].state == state
        if last != "open":
            federation = Federation.of(4)


def test_secrets_are_gone_once_shares_were_opened() -> None:
    federation = Federation.of(4)
    everything(federation)
    for site in ("site-1", "site-3", "site-4"):
        held = {s["secret"] for s in federation.states[site]} | {
            share for s in federation.states[site] for share in (s["received"] or {}).values()
        }
        held.discard(None)
        assert len(held) == 4  # its secret and the shares of three peers
        left = json.dumps(federation.sites[site].state)
        assert not any(secret in left for secret in held)
        assert federation.sites[site].state["masked"] is None


def test_a_site_that_dropped_loses_its_secrets_with_the_next_attempt_or_on_demand() -> None:
    federation = Federation.of(4)
    everything(federation)
    site = federation.sites["site-2"]
    secret = site.state["secret"]
    assert secret is not None
    site.advertise(2, 0, {"base": base_of(2)})
    assert secret not in json.dumps(site.state)
    again = site.state["secret"]
    site.forget()
    assert again not in json.dumps(site.state)
    with pytest.raises(FederationRefusedError, match="which is over") as error:
        site.advertise(2, 0, {"base": base_of(2)})
    assert error.value.reason == "wrong_round"
    site.advertise(2, 1, {"base": base_of(2)})


def test_the_state_does_not_show_secrets_when_it_is_printed() -> None:
    federation = Federation.of(3)
    federation.run(federation.updates(4), until="agree")
    state = MaskingState.model_validate(federation.sites["site-1"].state)
    assert state.secret is not None
    assert state.received is not None
    assert state.secret not in repr(state)
    assert not any(share in repr(state) for share in state.received.values())


def test_changing_what_state_returned_changes_no_site() -> None:
    federation = Federation.of(3)
    federation.run(federation.updates(4), until="train")
    taken = federation.sites["site-1"].state
    taken["received"].clear()
    assert len(federation.sites["site-1"].state["received"]) == 2


def test_keys_of_earlier_attempts_are_remembered_up_to_a_limit() -> None:
    state = MaskingState(job="j", site="s")
    for attempt in range(REMEMBERED_KEYS // 3 + 1):
        state.begin(1, attempt, base="ab" * 32, secret="A" * 43 + "=")
        state.keys = {
            "s": {
                "mask_key": f"m{attempt}",
                "share_key": f"s{attempt}",
                "commitment": f"c{attempt}",
                "base": "b",
                "signature": "x",
            }
        }
    state.forget()
    assert len(state.earlier_keys) == REMEMBERED_KEYS
    assert state.earlier_keys[:2] == ["s0", "c0"]
    assert state.earlier_keys[-1] == f"c{REMEMBERED_KEYS // 3}"


@pytest.mark.parametrize(
    ("done", "then", "message"),
    [
        ("", "shares", "begin another attempt"),
        ("keys", "train", "ask for shares first"),
        ("shares", "agree", "before our update was sent"),
        ("train", "open", "before we signed"),
    ],
)
def test_steps_out_of_order_are_refused(done: str, then: str, message: str) -> None:
    federation = Federation.of(3)
    updates = federation.updates(4)
    if done:
        federation.run(updates, until=done)
    request = {"stayed": names(3), "dropped": [], "signatures": {}, "shares": {}, "keys": {}}
    with pytest.raises(FederationRefusedError, match=message):
        federation.call(then, "site-1", 1, 0, request, updates["site-1"])


def test_nothing_is_masked_before_shares_were_received() -> None:
    federation = Federation.of(3)
    federation.run(federation.updates(4), until="shares")
    with pytest.raises(FederationRefusedError, match="no shares were received"):
        federation.sites["site-1"].mask(1, 0, np.zeros(4, np.float32))


@pytest.mark.parametrize(("round_", "attempt"), [(0, 0), (-1, 0), (11, 0), (1, -1), (1, 10**6)])
def test_rounds_that_the_job_does_not_have(round_: int, attempt: int) -> None:
    site = Federation.of(3).sites["site-1"]
    with pytest.raises(FederationRefusedError) as error:
        site.advertise(round_, attempt, {"base": base_of(1)})
    assert error.value.reason == "wrong_round"


def test_after_opening_nothing_more_is_answered_but_the_opening() -> None:
    federation = Federation.of(4)
    seen = everything(federation)
    for step, site, request, reply in seen:
        if site != "site-1":
            continue
        if step == "open":
            assert federation.call(step, site, 1, 0, request) == reply
            continue
        with pytest.raises(FederationRefusedError, match="which is over"):
            federation.call(step, site, 1, 0, request, np.zeros(6, np.float32))


def test_another_kind_of_request_is_no_step() -> None:
    assert {f"mask.{step}" for step in STEPS} - {"mask.train"} == set(KINDS)
    with pytest.raises(FederationRefusedError, match="'train' is no step of masking"):
        Federation.of(3).sites["site-1"].answer("train", 1, 0, {})


class TestWhoASiteIs:
    def test_off_the_roster(self) -> None:
        with pytest.raises(FederationRefusedError, match="not on the roster") as error:
            MaskingSite(make_job(names(3)), "site-9", identity("site-9"))
        assert error.value.reason == "unknown_site"

    def test_under_another_key(self) -> None:
        with pytest.raises(FederationRefusedError, match="another public key") as error:
            MaskingSite(make_job(names(3)), "site-1", Ed25519PrivateKey.generate())
        assert error.value.reason == "unknown_site"

    def test_with_the_state_of_another_job_or_site(self) -> None:
        job, other = make_job(names(3)), make_job(names(3), bits=19)
        state = MaskingSite(job, "site-1", identity("site-1")).state
        with pytest.raises(FederationRefusedError, match="stored state is of site 'site-1'"):
            MaskingSite(job, "site-2", identity("site-2"), state=state)
        with pytest.raises(FederationRefusedError, match="stored state is of site 'site-1'"):
            MaskingSite(other, "site-1", identity("site-1"), state=state)

    def test_with_a_damaged_state(self) -> None:
        state = MaskingSite(make_job(names(3)), "site-1", identity("site-1")).state
        for damage in (
            {"round": "three"},
            {"format": "v9"},
            {"secret": "AA=="},
            {"received": {"a": "?"}},
            {"more": 1},
        ):
            with pytest.raises(FederationRefusedError, match=f"cannot be read .*{next(iter(damage))}"):
                MaskingSite(make_job(names(3)), "site-1", identity("site-1"), state={**state, **damage})
