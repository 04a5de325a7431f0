"""A coordinator that lies about who stayed, in one attempt or over several: no update is uncovered; why is said."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.tg_tinker.federated.masking.lies import Lies, refused, to_open
from tests.tg_tinker.federated.masking.parties import Federation, base_of, plain_mean
from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.masking import MaskingRound, MaskingSetting
from tg_tinker.federated.masking.agreement import require_stayed


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
                lies.ask("open", site, to_open(stayed, dropped, shown))
            with refused("too_few_sites", "2 sites signed who stayed, and masking needs 3 of 4"):
                honest = {s: signatures[s] for s in stayed if (s in (a, b)) == (site in (a, b))}
                lies.ask("open", site, to_open(stayed, dropped, honest))
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
        [
            ("abcd", "a"),
            ("abcd", "b"),
            ("abc", "d"),
            ("abc", ""),
            ("abcd", "abcd"),
            ("abc", "abcd"),
            ("bcd", "a"),
            ("", "abcd"),
        ],
    )
    def test_both_kinds_of_share_of_one_site_cannot_be_asked_for(self, stayed: str, dropped: str) -> None:
        lies = Lies()
        lies.until_masked()
        by = dict(zip("abcd", lies.names, strict=True))
        signatures = {site: lies.ask("agree", site, {"stayed": lies.names}) for site in lies.names}
        with refused("masking", "both kinds of share"):
            lies.ask("open", by["a"], to_open([by[x] for x in stayed], [by[x] for x in dropped], signatures))
        opened = lies.ask("open", by["a"], to_open(lies.names, [], signatures))
        assert set(opened["personal"]) == set(lies.names)
        assert opened["mask"] == {}
        with refused("masking", "already opened, and for other sites"):
            lies.ask("open", by["a"], to_open([by[x] for x in stayed], [by[x] for x in dropped], signatures))

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
            lies.ask("open", d, to_open([a, b, c], [d], signatures))

    def test_a_signature_of_who_did_not_stay_does_not_count(self) -> None:
        lies = Lies()
        lies.until_masked()
        a, b, c, d = lies.names
        signatures = {site: lies.ask("agree", site, {"stayed": [a, b, c]}) for site in (a, b, c)}
        with refused("masking", f"'{d}' signed, and did not stay"):
            lies.ask("open", a, to_open([a, b, c], [d], {**signatures, d: signatures[c]}))

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

    def test_a_sum_over_two_would_give_each_the_others_update(self) -> None:
        lies = Lies(3)
        lies.until_masked()
        with refused("too_few_sites", "2 sites stayed, and masking needs 3 of 3"):
            lies.ask("agree", lies.names[0], {"stayed": lies.names[:2]})
        setting = replace(MaskingSetting.of(lies.federation.job), threshold=2)  # whatever the setting says
        with refused("too_few_sites", "a sum over 2 sites"):
            require_stayed(setting, lies.names[:2], lies.names)


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
            lies.ask("keys", lies.names[0], {"base": base_of(1)})

    def test_two_sums_that_differ_by_one_site_need_more_sites_than_there_are(self) -> None:
        """Half of the sites opened attempt 0, the other half are asked for another set in attempt 1."""
        lies = Lies(5)
        lies.federation.run(lies.updates, until="agree")
        signed = {site: reply for step, site, _, reply in lies.federation.seen if step == "agree"}
        for site in lies.names[:3]:
            lies.ask("open", site, to_open(lies.names, [], signed))
        round_ = MaskingRound(lies.federation.job, 1, 1, size=6, base=base_of(1))
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
    ("agree", {"stayed": ["site-1", "site-1", "site-2", "site-3", "site-4"]}),
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
