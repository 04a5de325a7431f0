"""A coordinator that lies: whatever it shows or asks, no site uncovers its update, and each refusal says why."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

import numpy as np
import pytest

from tests.tg_tinker.federated.masking.parties import Federation, forge, plain_mean
from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.masking import MaskingRound
from tg_tinker.federated.masking.keys import public_of


class Lies:
    """Four sites (three must stay), asked one by one."""

    def __init__(self, count: int = 4) -> None:
        self.federation = Federation.of(count)
        self.updates = self.federation.updates(6)
        self.names = sorted(self.updates)

    def ask(self, step: str, site: str, request: Any = None, *, attempt: int = 0, round_: int = 1) -> Any:
        return self.federation.call(step, site, round_, attempt, request, self.updates[site])

    def keys(self, *, attempt: int = 0, round_: int = 1) -> dict[str, Any]:
        return {site: self.ask("keys", site, attempt=attempt, round_=round_) for site in self.names}

    def inboxes(self, replies: dict[str, Any], senders: list[str]) -> dict[str, Any]:
        """Requests to train, with shares of the senders alone."""
        return {
            site: {"shares": {peer: replies[peer]["shares"][site] for peer in senders if peer != site}}
            for site in replies
        }

    def until_masked(self) -> tuple[MaskingRound, dict[str, Any]]:
        """An honest attempt up to the masked updates of all."""
        round_ = MaskingRound(self.federation.job, 1, 0, size=6)
        request = round_.keys(self.keys())
        requests = round_.shares({site: self.ask("shares", site, request) for site in self.names})
        return round_, {site: self.ask("train", site, requests[site]) for site in self.names}


def refused(reason: str, match: str) -> Any:
    """The refusal that is expected, for this reason."""
    return pytest.raises(FederationRefusedError, match=match, check=lambda error: error.reason == reason)


def view(sites: list[str], dropped: list[str], signatures: dict[str, Any]) -> dict[str, Any]:
    """A request to open."""
    return {
        "stayed": sites,
        "dropped": dropped,
        "signatures": {site: reply["signature"] for site, reply in signatures.items()},
    }


class TestWhoStayed:
    def test_two_sets_shown_to_two_groups_open_nothing(self) -> None:
        lies = Lies()
        lies.until_masked()
        a, b, c, d = lies.names
        signatures = {
            site: lies.ask("agree", site, {"stayed": [a, b, c] if site in (a, b) else [a, c, d]})
            for site in (a, b, c, d)
        }
        for site, stayed, dropped in ((a, [a, b, c], [d]), (c, [a, c, d], [b])):
            shown = {peer: signatures[peer] for peer in stayed}
            with refused("bad_signature", "tells sites different things"):
                lies.ask("open", site, view(stayed, dropped, shown))
            with refused("too_few_sites", "2 sites signed who stayed, and masking needs 3 of 4"):
                honest = {s: signatures[s] for s in stayed if (s in (a, b)) == (site in (a, b))}
                lies.ask("open", site, view(stayed, dropped, honest))
        assert not any(step == "open" for step, *_ in lies.federation.seen)

    def test_a_second_set_is_not_signed(self) -> None:
        lies = Lies()
        lies.until_masked()
        a, b, c, d = lies.names
        lies.ask("agree", a, {"stayed": [a, b, c]})
        with refused("masking", "another set of sites"):
            lies.ask("agree", a, {"stayed": [a, b, c, d]})

    @pytest.mark.parametrize(
        ("stayed", "dropped"),
        [("abcd", "a"), ("abcd", "b"), ("abc", "d"), ("abcd", "abcd"), ("abc", "abcd"), ("bcd", "a"), ("", "abcd")],
    )
    def test_both_kinds_of_share_of_one_site_cannot_be_asked_for(self, stayed: str, dropped: str) -> None:
        lies = Lies()
        lies.until_masked()
        by = dict(zip("abcd", lies.names, strict=True))
        signatures = {site: lies.ask("agree", site, {"stayed": lies.names}) for site in lies.names}
        with refused("masking", "both kinds of share"):
            lies.ask("open", by["a"], view([by[x] for x in stayed], [by[x] for x in dropped], signatures))
        opened = lies.ask("open", by["a"], view(lies.names, [], signatures))
        assert set(opened["personal"]) == set(lies.names)
        assert opened["mask"] == {}
        with refused("masking", "already opened, and for other sites"):
            lies.ask("open", by["a"], view([by[x] for x in stayed], [by[x] for x in dropped], signatures))

    def test_each_site_gets_one_kind_of_share_opened(self) -> None:
        federation = Federation.of(7)
        federation.run(federation.updates(4), silent={"train": {"site-3", "site-6"}})
        for step, _, _, reply in federation.seen:
            if step == "open":
                assert set(reply["mask"]) == {"site-3", "site-6"}
                assert set(reply["personal"]) == set(federation.sites) - {"site-3", "site-6"}

    def test_a_site_whose_update_is_not_counted_signs_and_opens_nothing(self) -> None:
        lies = Lies()
        lies.until_masked()
        a, b, c, d = lies.names
        with refused("masking", "was not counted"):
            lies.ask("agree", d, {"stayed": [a, b, c]})
        signatures = {site: lies.ask("agree", site, {"stayed": [a, b, c]}) for site in (a, b, c)}
        with refused("masking", "before we signed"):
            lies.ask("open", d, view([a, b, c], [d], signatures))

    def test_a_signature_of_who_did_not_stay_does_not_count(self) -> None:
        lies = Lies()
        lies.until_masked()
        a, b, c, d = lies.names
        signatures = {site: lies.ask("agree", site, {"stayed": [a, b, c]}) for site in (a, b, c)}
        with refused("masking", f"'{d}' signed, and did not stay"):
            lies.ask("open", a, view([a, b, c], [d], {**signatures, d: signatures[c]}))

    def test_a_site_that_did_not_share_cannot_have_stayed(self) -> None:
        lies = Lies()
        request = {"keys": lies.keys()}
        replies = {site: lies.ask("shares", site, request) for site in lies.names}
        a, b, c, d = lies.names
        lies.ask("train", a, lies.inboxes(replies, [a, b, c])[a])
        with refused("masking", f"'{d}' are said to have stayed"):
            lies.ask("agree", a, {"stayed": [a, b, c, d]})

    def test_fewer_than_the_threshold(self) -> None:
        lies = Lies()
        lies.until_masked()
        with refused("too_few_sites", "2 sites stayed"):
            lies.ask("agree", lies.names[0], {"stayed": lies.names[:2]})


class TestTwoAttempts:
    """The next attempt masks the same update again, so sums over two sets would differ by single updates."""

    def opened_once(self) -> Lies:
        lies = Lies()
        lies.federation.run(lies.updates)
        return lies

    def test_another_set_in_another_attempt_is_refused_once_shares_were_opened(self) -> None:
        lies = self.opened_once()
        silent = {"train": {lies.names[0]}}
        with refused("masking", "shares were already opened for the sum over"):
            lies.federation.run(lies.updates, attempt=1, silent=silent)
        updates = {site: u + 1 for site, u in lies.updates.items()}
        lies.federation.run(updates, round_=2, silent=silent)

    def test_the_same_set_may_be_summed_again(self) -> None:
        lies = self.opened_once()
        for attempt in (1, 5):
            _, mean = lies.federation.run(lies.updates, attempt=attempt)
            expected_P = plain_mean(lies.updates, clip=0.25)
            assert np.abs(mean.mean - expected_P).max() <= mean.error_bound

    def test_an_attempt_that_opened_nothing_binds_nobody(self) -> None:
        lies = Lies()
        lies.federation.run(lies.updates, until="agree")
        _, mean = lies.federation.run(lies.updates, attempt=1, silent={"train": {lies.names[0]}})
        assert mean.dropped == (lies.names[0],)

    def test_whoever_went_on_does_not_come_back(self) -> None:
        lies = Lies()
        lies.until_masked()
        lies.keys(attempt=1)
        with refused("wrong_round", "at round 1, attempt 1"):
            lies.ask("agree", lies.names[0], {"stayed": lies.names})
        with refused("wrong_round", "at round 1, attempt 1"):
            lies.ask("keys", lies.names[0])

    def test_two_sums_that_differ_by_one_site_need_more_sites_than_there_are(self) -> None:
        """Half of the sites opened attempt 0, the other half are asked for another set in attempt 1."""
        lies = Lies(5)
        lies.federation.run(lies.updates, until="agree")
        signed = {site: reply for step, site, _, reply in lies.federation.seen if step == "agree"}
        for site in lies.names[:3]:
            lies.ask("open", site, view(lies.names, [], signed))
        round_ = MaskingRound(lies.federation.job, 1, 1, size=6)
        request = round_.keys(lies.keys(attempt=1))
        requests = round_.shares({s: lies.ask("shares", s, request, attempt=1) for s in lies.names})
        for site in lies.names:
            lies.ask("train", site, requests[site], attempt=1)
        willing = []
        for site in lies.names[:4]:
            try:
                lies.ask("agree", site, {"stayed": lies.names[:4]}, attempt=1)
                willing.append(site)
            except FederationRefusedError as error:
                assert "already opened" in error.message  # noqa: PT017
        assert willing == lies.names[3:4]


class TestKeys:
    def test_keys_of_an_earlier_attempt_are_a_replay(self) -> None:
        lies = Lies()
        old = lies.keys()
        new = lies.keys(attempt=1)
        a, b = lies.names[:2]
        with refused("bad_signature", f"'{b}' are not signed .* round 1, attempt 1"):
            lies.ask("shares", a, {"keys": {**new, b: old[b]}}, attempt=1)
        lies.ask("shares", a, {"keys": new}, attempt=1)

    def test_keys_of_another_job_are_a_replay(self) -> None:
        lies, foreign = Lies(), Lies()
        foreign.federation = Federation.of(4, bits=18)
        keys, others = lies.keys(), foreign.keys()
        with refused("bad_signature", "exchanged or replayed"):
            lies.ask("shares", lies.names[0], {"keys": {**keys, lies.names[1]: others[lies.names[1]]}})

    def test_keys_of_two_sites_cannot_be_swapped(self) -> None:
        lies = Lies()
        keys = lies.keys()
        a, b, c, _ = lies.names
        with refused("bad_signature", "exchanged"):
            lies.ask("shares", a, {"keys": {**keys, b: keys[c], c: keys[b]}})

    @pytest.mark.parametrize("field", ["mask_key", "share_key", "commitment"])
    def test_the_coordinator_cannot_put_its_own_key_in(self, field: str) -> None:
        lies = Lies()
        keys = lies.keys()
        mine = forge(lies.federation, "coordinator", **{field: public_of(b"\x07" * 32)})[field]
        for target in lies.names[:2]:
            with refused("bad_signature", f"'{target}'"):
                lies.ask("shares", lies.names[0], {"keys": {**keys, target: {**keys[target], field: mine}}})

    def test_a_list_without_our_keys(self) -> None:
        lies = Lies()
        keys = lies.keys()
        own = keys.pop(lies.names[0])
        with refused("masking", "lacks ours"):
            lies.ask("shares", lies.names[0], {"keys": keys})
        other = forge(
            lies.federation,
            lies.names[0],
            mask_key=public_of(b"\1" * 32),
            share_key=public_of(b"\2" * 32),
            commitment=b"\3" * 32,
        )
        assert other != own
        with refused("masking", "other keys under our name"):
            lies.ask("shares", lies.names[0], {"keys": {**keys, lies.names[0]: other}})

    def test_fewer_than_the_threshold(self) -> None:
        lies = Lies()
        keys = lies.keys()
        few = {site: keys[site] for site in lies.names[:2]}
        with refused("too_few_sites", "2 sites showed their keys, and masking needs 3 of 4"):
            lies.ask("shares", lies.names[0], {"keys": few})

    def test_a_peer_that_is_not_on_the_roster(self) -> None:
        lies = Lies()
        keys = lies.keys()
        stranger = forge(
            lies.federation,
            "stranger",
            mask_key=public_of(b"\1" * 32),
            share_key=public_of(b"\2" * 32),
            commitment=b"\3" * 32,
        )
        with refused("unknown_site", "'stranger' is not on the roster"):
            lies.ask("shares", lies.names[0], {"keys": {**keys, "stranger": stranger}})

    @pytest.mark.parametrize("field", ["mask_key", "share_key", "commitment"])
    def test_a_peer_that_copies_keys(self, field: str) -> None:
        lies = Lies()
        keys = lies.keys()
        b, c = lies.names[1:3]
        own = {
            "mask_key": public_of(b"\1" * 32),
            "share_key": public_of(b"\2" * 32),
            "commitment": b"\3" * 32,
        }
        copied = lies.federation.sites[c]._secrets().advertise(lies.federation.sites[c]._key)
        thief = forge(lies.federation, b, **{**own, field: getattr(copied, field)})
        with refused("masking", f"'{b}', '{c}' have a key in common"):
            lies.ask("shares", lies.names[0], {"keys": {**keys, b: thief}})

    def test_a_peer_with_one_key_for_two_purposes(self) -> None:
        lies = Lies()
        keys = lies.keys()
        lazy = forge(
            lies.federation,
            lies.names[1],
            mask_key=public_of(b"\1" * 32),
            share_key=public_of(b"\1" * 32),
            commitment=b"\3" * 32,
        )
        with refused("masking", "in common"):
            lies.ask("shares", lies.names[0], {"keys": {**keys, lies.names[1]: lazy}})

    @pytest.mark.parametrize("field", ["mask_key", "share_key", "commitment"])
    def test_a_peer_that_uses_a_key_of_an_earlier_round(self, field: str) -> None:
        lies = Lies()
        lies.federation.run(lies.updates)
        old = lies.federation.seen[0][3]
        peer = lies.federation.seen[0][1]
        keys = lies.keys(round_=2)
        again = {name: _bytes(keys[peer][name]) for name in ("mask_key", "share_key", "commitment")}
        again[field] = _bytes(old[field])
        reused = forge(lies.federation, peer, round_=2, **again)
        with refused("masking", f"'{peer}' show a key of an earlier attempt"):
            lies.ask("shares", lies.names[-1], {"keys": {**keys, peer: reused}}, round_=2)

    @pytest.mark.parametrize("field", ["mask_key", "share_key"])
    @pytest.mark.parametrize("order", [bytes(32), b"\1" + bytes(31)])
    def test_a_key_with_which_everybody_agrees_on_zero(self, field: str, order: bytes) -> None:
        lies = Lies()
        keys = lies.keys()
        good = {"mask_key": public_of(b"\1" * 32), "share_key": public_of(b"\2" * 32), "commitment": b"\3" * 32}
        bad = forge(lies.federation, lies.names[1], **{**good, field: order})
        with refused("masking", "is not a key"):
            lies.ask("shares", lies.names[0], {"keys": {**keys, lies.names[1]: bad}})
        round_ = MaskingRound(lies.federation.job, 1, 0, size=6)
        assert set(round_.keys({**keys, lies.names[1]: bad})["keys"]) == set(lies.names) - {lies.names[1]}

    def test_another_list_after_the_first(self) -> None:
        lies = Lies()
        keys = lies.keys()
        lies.ask("shares", lies.names[0], {"keys": keys})
        del keys[lies.names[3]]
        with refused("masking", "another list of keys"):
            lies.ask("shares", lies.names[0], {"keys": keys})

    def test_two_lists_shown_to_two_groups_open_nothing(self) -> None:
        """Everybody sees the same set stay, and not the same keys: the signatures show it."""
        lies = Lies()
        keys = lies.keys()
        a, b, c, d = lies.names
        short = {site: keys[site] for site in (a, b, c)}
        replies = {site: lies.ask("shares", site, {"keys": keys if site == a else short}) for site in (a, b, c)}
        inboxes = lies.inboxes(replies, [a, b, c])
        for site in (a, b, c):
            lies.ask("train", site, inboxes[site])
        signatures = {site: lies.ask("agree", site, {"stayed": [a, b, c]}) for site in (a, b, c)}
        for site in (a, b):
            with refused("bad_signature", "tells sites different things"):
                lies.ask("open", site, view([a, b, c], [], signatures))
        assert d not in replies


class TestShares:
    def shared(self) -> tuple[Lies, dict[str, Any]]:
        lies = Lies()
        request = {"keys": lies.keys()}
        return lies, {site: lies.ask("shares", site, request) for site in lies.names}

    def test_two_sets_of_sharers_open_nothing(self) -> None:
        """A mask with a site that the others take for absent would be opened as if it had dropped."""
        lies, replies = self.shared()
        a, b, c, d = lies.names
        for site in (a, b, c):
            lies.ask("train", site, lies.inboxes(replies, [a, b, c, d] if site == a else [a, b, c])[site])
        signatures = {site: lies.ask("agree", site, {"stayed": [a, b, c]}) for site in (a, b, c)}
        with refused("bad_signature", "tells sites different things"):
            lies.ask("open", a, view([a, b, c], [d], signatures))
        with refused("bad_signature", "tells sites different things"):
            lies.ask("open", b, view([a, b, c], [], signatures))

    @pytest.mark.parametrize("where", [0, 40, 81])
    def test_an_altered_share_is_refused(self, where: int) -> None:
        lies, replies = self.shared()
        a, b = lies.names[:2]
        inbox = lies.inboxes(replies, lies.names)[a]
        sealed = bytearray(_bytes(inbox["shares"][b]))
        sealed[where] ^= 1
        with refused("masking", f"'{b}' cannot be opened"):
            lies.ask("train", a, {"shares": {**inbox["shares"], b: _text(bytes(sealed))}})

    def test_a_share_for_somebody_else_or_of_somebody_else_is_refused(self) -> None:
        lies, replies = self.shared()
        a, b, c, _ = lies.names
        inboxes = lies.inboxes(replies, lies.names)
        for wrong in (inboxes[c]["shares"][b], inboxes[a]["shares"][c]):
            with refused("masking", f"'{b}' cannot be opened"):
                lies.ask("train", a, {"shares": {**inboxes[a]["shares"], b: wrong}})

    def test_shares_of_an_earlier_attempt_are_refused(self) -> None:
        lies, old = self.shared()
        request = {"keys": lies.keys(attempt=1)}
        new = {site: lies.ask("shares", site, request, attempt=1) for site in lies.names}
        a, b = lies.names[:2]
        inbox = lies.inboxes(new, lies.names)[a]["shares"]
        with refused("masking", "cannot be opened"):
            lies.ask("train", a, {"shares": {**inbox, b: old[b]["shares"][a]}}, attempt=1)

    def test_too_few_or_strange_senders_are_refused(self) -> None:
        lies, replies = self.shared()
        a, b, c, _ = lies.names
        inbox = lies.inboxes(replies, lies.names)[a]["shares"]
        with refused("too_few_sites", "2 sites shared"):
            lies.ask("train", a, {"shares": {b: inbox[b]}})
        with refused("masking", "showed no keys or are ourselves"):
            lies.ask("train", a, {"shares": {**inbox, a: replies[b]["shares"][c]}})
        with refused("masking", "showed no keys or are ourselves"):
            lies.ask("train", a, {"shares": {**inbox, "stranger": inbox[b]}})

    def test_other_shares_after_the_first_are_refused(self) -> None:
        lies, replies = self.shared()
        a, b, c, d = lies.names
        lies.ask("train", a, lies.inboxes(replies, [a, b, c])[a])
        with refused("masking", "from other sites were passed on"):
            lies.ask("train", a, lies.inboxes(replies, [a, b, c, d])[a])


def test_a_second_update_is_not_masked_with_the_same_masks() -> None:
    lies = Lies()
    lies.until_masked()
    site = lies.federation.sites[lies.names[0]]
    again = lies.updates[lies.names[0]]
    first = site.mask(1, 0, again)
    assert np.array_equal(first, site.mask(1, 0, again))
    with refused("masking", "another update was masked"):
        site.mask(1, 0, again + np.float32(0.01))


MALFORMED: list[tuple[str, Any]] = [
    ("shares", {}),
    ("shares", {"keys": []}),
    ("shares", {"keys": {"site-1": 5}}),
    ("shares", {"keys": {"site-1": {"mask_key": "AA=="}}}),
    ("train", {"shares": None}),
    ("train", {"shares": {"site-2": "AA=="}}),
    ("train", {"shares": {"site-2": 7, "site-3": "=", "site-4": ""}}),
    ("agree", {}),
    ("agree", {"stayed": "site-1"}),
    ("agree", {"stayed": [1]}),
    ("agree", {"stayed": ["site-1", "site-1", "site-2"]}),
    ("open", {"stayed": [], "dropped": []}),
    ("open", {"stayed": ["site-1", "site-2", "site-3", "site-4"], "dropped": []}),
    ("open", {"stayed": ["site-1", "site-2", "site-3", "site-4"], "dropped": [], "signatures": {"site-2": "?"}}),
]


@pytest.mark.parametrize(
    ("step", "request_"), MALFORMED, ids=lambda v: v if isinstance(v, str) else json.dumps(v)[:40]
)
def test_malformed_requests_are_refused_and_change_nothing(step: str, request_: Any) -> None:
    lies = Lies()
    lies.federation.run(
        lies.updates, until={"shares": "keys", "train": "shares", "agree": "train"}.get(step, "agree")
    )
    before = copy.deepcopy(lies.federation.sites["site-1"].state)
    with pytest.raises(FederationRefusedError) as error:
        lies.ask(step, "site-1", request_)
    assert error.value.reason in {"masking", "too_few_sites"}
    assert lies.federation.sites["site-1"].state == before


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
