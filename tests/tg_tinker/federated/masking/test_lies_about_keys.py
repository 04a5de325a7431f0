"""A coordinator, or a site in league with it, that lies about keys and shares: nothing is opened, and why is said."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tg_tinker.federated.masking.lies import Lies, bytes_of, refused, text_of, to_open
from tests.tg_tinker.federated.masking.parties import Federation, base_of, forge
from tg_tinker.federated.masking import MaskingRound
from tg_tinker.federated.masking.keys import public_of


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
        copied = lies.federation.sites[c]._advertised()
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
        again = {name: bytes_of(keys[peer][name]) for name in ("mask_key", "share_key", "commitment")}
        again[field] = bytes_of(old[field])
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
        round_ = MaskingRound(lies.federation.job, 1, 0, size=6, base=base_of(1))
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
                lies.ask("open", site, to_open([a, b, c], [], signatures))
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
            lies.ask("open", a, to_open([a, b, c], [d], signatures))
        with refused("bad_signature", "tells sites different things"):
            lies.ask("open", b, to_open([a, b, c], [], signatures))

    @pytest.mark.parametrize("where", [0, 40, 81])
    def test_an_altered_share_is_refused(self, where: int) -> None:
        lies, replies = self.shared()
        a, b = lies.names[:2]
        inbox = lies.inboxes(replies, lies.names)[a]
        sealed = bytearray(bytes_of(inbox["shares"][b]))
        sealed[where] ^= 1
        with refused("masking", f"'{b}' cannot be opened"):
            lies.ask("train", a, {"shares": {**inbox["shares"], b: text_of(bytes(sealed))}})

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
