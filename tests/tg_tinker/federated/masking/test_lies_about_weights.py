"""A coordinator that gives sites different weights to train from, so that updates vanish and one is left."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tg_tinker.federated.masking.lies import Lies, refused
from tests.tg_tinker.federated.masking.parties import Federation, base_of, forge
from tg_tinker.federated.masking import MaskingRound
from tg_tinker.federated.masking.keys import public_of
from tg_tinker.federated.masking.site_state import REMEMBERED_BASES, MaskingState

TRUE, LIE = base_of(1), base_of(99)


def test_weights_that_would_leave_one_update_alone_in_the_sum_are_noticed_before_shares_are_sealed() -> None:
    """Of weights of 1e30 an update is zero in float32; here the victim alone gets the true ones."""
    lies = Lies()
    victim, *others = lies.names
    bases = {victim: TRUE, **dict.fromkeys(others, LIE)}
    keys = {site: lies.ask("keys", site, {"base": base}) for site, base in bases.items()}
    for site in lies.names:
        with refused("masking", "were shown other weights to begin with"):
            lies.ask("shares", site, {"keys": keys})
    with refused("too_few_sites", "1 sites showed their keys"):
        lies.ask("shares", victim, {"keys": {victim: keys[victim]}})


def test_a_base_cannot_be_exchanged_on_the_way() -> None:
    lies = Lies()
    victim, *others = lies.names
    keys = {site: lies.ask("keys", site, {"base": TRUE if site == victim else LIE}) for site in lies.names}
    for site in others:
        keys[site]["base"] = TRUE
    with refused("bad_signature", "not signed by its identity key"):
        lies.ask("shares", victim, {"keys": keys})


def test_other_weights_than_were_signed_are_not_trained_from() -> None:
    lies = Lies()
    round_ = MaskingRound(lies.federation.job, 1, 0, size=6, base=TRUE)
    requests = round_.shares({s: lies.ask("shares", s, round_.keys(lies.keys())) for s in lies.names})
    site = lies.federation.sites[lies.names[1]]
    before = site.state
    with refused("masking", "not those that the sites signed"):
        site.receive(1, 0, requests[lies.names[1]], base=LIE)
    assert site.state == before
    with refused("masking", "no shares were received"):
        site.mask(1, 0, np.zeros(6, np.float32))
    site.receive(1, 0, requests[lies.names[1]], base=TRUE)


def test_a_second_base_in_an_attempt_is_not_signed() -> None:
    lies = Lies()
    first = lies.keys()
    with refused("masking", "other weights to begin with were shown"):
        lies.ask("keys", lies.names[0], {"base": LIE})
    assert lies.keys() == first


@pytest.mark.parametrize("base", [None, "", "AB" * 32, "ab" * 31, "٣" * 64, 7, ["ab" * 32]])
def test_what_is_no_digest_begins_nothing(base: object) -> None:
    lies = Lies()
    before = lies.federation.sites["site-1"].state
    with refused("masking", "'base' is not a digest of 64 hex digits"):
        lies.ask("keys", "site-1", {"base": base})
    assert lies.federation.sites["site-1"].state == before


def test_the_coordinator_leaves_out_a_site_with_another_base() -> None:
    federation = Federation.of(4)
    own = {"mask_key": public_of(b"\1" * 32), "share_key": public_of(b"\2" * 32), "commitment": b"\3" * 32}

    def alter(step: str, site: str, reply: object) -> object:
        return forge(federation, site, base=LIE, **own) if (step, site) == ("keys", "site-2") else reply

    round_, mean = federation.run(federation.updates(6), alter=alter)
    assert mean.stayed == ("site-1", "site-3", "site-4")
    assert "keys for other weights" in round_.excluded["site-2"]


class TestTwoRoundsFromTheSameWeights:
    """Two sums over two sets differ by single updates, and by little more."""

    def test_another_set_is_not_signed_in_whichever_round(self) -> None:
        federation = Federation.of(4, restart=True)
        federation.bases = {1: TRUE, 5: TRUE, 6: TRUE}
        updates = federation.updates(6)
        federation.run(updates)
        without = {"train": {"site-4"}}
        for round_ in (2, 3):  # other weights
            federation.run(updates, round_=round_, silent=without)
        with refused("masking", "begins with the weights of an earlier one"):
            federation.run(updates, round_=5, silent=without)
        _, mean = federation.run(updates, round_=6)
        assert len(mean.stayed) == 4

    def test_an_attempt_that_opened_nothing_binds_nobody(self) -> None:
        federation = Federation.of(4)
        federation.bases = {2: TRUE}
        federation.run(federation.updates(6), until="agree")
        _, mean = federation.run(federation.updates(6), round_=2, silent={"train": {"site-4"}})
        assert mean.dropped == ("site-4",)

    def test_the_last_weights_are_remembered_up_to_a_limit(self) -> None:
        state = MaskingState(job="j", site="s")
        for number in [*range(REMEMBERED_BASES + 2), 5]:
            state.begin(1, number, base=f"{number:064x}", secret="A" * 43 + "=")
            state.close({}, ["a", "b"])
        assert len(state.opened_bases) == REMEMBERED_BASES
        assert next(iter(state.opened_bases)) == f"{2:064x}"
        assert list(state.opened_bases)[-1] == f"{5:064x}"
        assert len(set(state.opened_bases.values())) == 1
