"""The coordinator's side: bad replies are left out by name, bad secrets and sums are noticed, and who is to blame."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from tests.tg_tinker.federated.masking.parties import Federation, base_of, forge, plain_mean
from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.masking import MaskingRound
from tg_tinker.federated.masking.keys import public_of


def liar(step: str, site: str, lie: Any) -> Any:
    """Replies of one site at one step become a lie, or what the lie makes of them."""

    def alter(done: str, by: str, reply: Any) -> Any:
        return (lie(reply) if callable(lie) else lie) if (done, by) == (step, site) else reply

    return alter


LIES: list[tuple[str, Any, str]] = [
    ("keys", {}, "lack a field"),
    ("keys", {"refused": "policy", "message": "no"}, "lack a field"),
    ("keys", lambda r: {**r, "mask_key": "AAAA"}, "'mask_key' is not base64 of 32 bytes"),
    ("keys", lambda r: {**r, "mask_key": r["mask_key"].rstrip("=")}, "'mask_key' is not base64 of 32 bytes"),
    ("keys", lambda r: {**r, "mask_key": r["share_key"]}, "not signed"),
    ("shares", {}, "not a table by site"),
    ("shares", lambda r: {"shares": dict(list(r["shares"].items())[1:])}, "did not share with each"),
    ("shares", lambda r: {"shares": dict.fromkeys(r["shares"], "AA==")}, "not base64 of 82 bytes"),
    ("train", lambda r: r.astype(np.float32), "not a masked update"),
    ("train", lambda r: r[:-1], "not a masked update"),
    ("train", lambda r: r.reshape(1, -1), "not a masked update"),
    ("agree", {}, "not base64 of 64 bytes"),
    ("agree", {"signature": base64.b64encode(bytes(64)).decode()}, "did not sign"),
    ("open", {}, "not a table by site"),
    ("open", lambda r: {**r, "personal": {}}, "shares of other sites"),
    ("open", lambda r: {"personal": r["mask"], "mask": r["personal"]}, "shares of other sites"),
]


@pytest.mark.parametrize(("step", "lie", "why"), LIES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_bad_reply_counts_as_none_and_is_explained(step: str, lie: Any, why: str) -> None:
    federation = Federation.of(4)
    updates = federation.updates(8)
    round_, mean = federation.run(updates, alter=liar(step, "site-2", lie))
    assert set(round_.excluded) == {"site-2"}
    assert why in round_.excluded["site-2"]
    counted = {s: u for s, u in updates.items() if s != "site-2" or step in {"agree", "open"}}
    assert set(mean.stayed) == set(counted)
    assert np.abs(mean.mean - plain_mean(counted, clip=0.25)).max() <= mean.error_bound


def test_sites_with_one_key_are_both_left_out() -> None:
    """Which of them copied cannot be told."""
    federation = Federation.of(8)
    keys = {site: federation.call("keys", site, 1, 0, {"base": base_of(1)}) for site in federation.sites}
    stolen = base64.b64decode(keys["site-1"]["mask_key"])
    own = {"share_key": public_of(b"\2" * 32), "commitment": b"\3" * 32}
    round_ = MaskingRound(federation.job, 1, 0, size=4, base=base_of(1))
    asked = round_.keys({**keys, "site-2": forge(federation, "site-2", mask_key=stolen, **own)})
    assert set(round_.excluded) == {"site-1", "site-2"}
    assert set(asked["keys"]) == set(federation.sites) - {"site-1", "site-2"}


def test_replies_of_sites_that_were_not_asked_are_passed_over() -> None:
    federation = Federation.of(4)
    updates = federation.updates(8)
    round_ = MaskingRound(federation.job, 1, 0, size=8, base=base_of(1))
    keys = {site: federation.call("keys", site, 1, 0, {"base": base_of(1)}) for site in federation.sites}
    late = keys.pop("site-3")
    request = round_.keys(keys)
    shares = {site: federation.call("shares", site, 1, 0, request) for site in request["keys"]}
    asked = round_.shares({**shares, "site-3": late, "stranger": {}})
    masked = {site: federation.call("train", site, 1, 0, asked[site], updates[site]) for site in asked}
    stay = round_.masked({**masked, "site-3": np.zeros(8, np.uint32)})
    assert stay["stayed"] == ["site-1", "site-2", "site-4"]
    agreed = {site: federation.call("agree", site, 1, 0, stay) for site in stay["stayed"]}
    opening = round_.agreed({**agreed, "site-3": agreed["site-1"]})
    opened = {site: federation.call("open", site, 1, 0, opening) for site in opening["signatures"]}
    assert round_.opened({**opened, "site-3": opened["site-1"]}).stayed == ("site-1", "site-2", "site-4")
    assert round_.excluded == {}


def wrong_share(of: str, kind: str = "personal") -> Any:
    """Another share than was dealt: a malicious peer's."""
    return lambda reply: {**reply, kind: {**reply[kind], of: base64.b64encode(b"\0" + b"\x11" * 32).decode()}}


@pytest.mark.parametrize(("kind", "of"), [("personal", "site-1"), ("personal", "site-2"), ("mask", "site-5")])
def test_one_wrong_share_is_found_and_borne_where_one_is_to_spare(kind: str, of: str) -> None:
    federation = Federation.of(6)  # four must stay
    updates = federation.updates(8)
    round_, mean = federation.run(
        updates, silent={"train": {"site-5"}}, alter=liar("open", "site-2", wrong_share(of, kind))
    )
    assert set(round_.excluded) == {"site-2"}
    assert f"or {of!r} who dealt it, is at fault" in round_.excluded["site-2"]
    counted = {s: u for s, u in updates.items() if s != "site-5"}
    assert np.abs(mean.mean - plain_mean(counted, clip=0.25)).max() <= mean.error_bound


@pytest.mark.parametrize(("kind", "what"), [("personal", "seed"), ("mask", "mask key")])
def test_with_none_to_spare_it_is_noticed_and_nobody_can_be_named(kind: str, what: str) -> None:
    federation = Federation.of(6)
    of = "site-5" if kind == "mask" else "site-1"
    silent = {"train": {"site-5"}, "agree": {"site-6"}}
    with pytest.raises(FederationRefusedError, match=f"4 shares do not give the {what} .*{of}.*cannot be told") as e:
        federation.run(federation.updates(8), silent=silent, alter=liar("open", "site-2", wrong_share(of, kind)))
    assert e.value.reason == "masking"


def test_a_sum_with_nonsense_in_it_is_noticed() -> None:
    federation = Federation.of(4)
    with pytest.raises(FederationRefusedError, match="did not follow the protocol, and masks hide which") as error:
        federation.run(federation.updates(8), alter=liar("train", "site-3", lambda r: r + np.uint32(2**30)))
    assert error.value.reason == "bad_update"


def test_steps_out_of_order_are_refused() -> None:
    round_ = MaskingRound(Federation.of(3).job, 1, 0, size=4, base=base_of(1))
    for step in (round_.agreed, round_.opened):
        with pytest.raises(FederationRefusedError, match="the masked updates come before"):
            step({})


def test_it_does_not_go_on_with_too_few() -> None:
    round_ = MaskingRound(Federation.of(3).job, 1, 0, size=4, base=base_of(1))
    for step, what in ((round_.keys, "showed their keys"), (round_.shares, "shared"), (round_.masked, "stayed")):
        with pytest.raises(FederationRefusedError, match=f"0 sites {what}, and masking needs 3 of 3"):
            step({})
    federation = Federation.of(3)
    round_, _ = federation.run(federation.updates(4), until="train")
    for step, what in ((round_.agreed, "signed who stayed"), (round_.opened, "opened their shares")):
        with pytest.raises(FederationRefusedError, match=f"0 sites {what}, and masking needs 3 of 3"):
            step({})
