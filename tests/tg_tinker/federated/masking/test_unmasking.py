"""What the coordinator can make of all it holds, sites in league with it included. It gets the sum and nothing else.

The attack is written out and works where it may (`test_the_attack_finds_the_update_once_...`), so that its failure
elsewhere means something. Secrets are fixed: no test can fail by chance.

Shape suffixes: P parameters.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.tg_tinker.federated.masking.parties import Federation, Vector
from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.masking.keys import AttemptSecrets, pair_seed
from tg_tinker.federated.masking.masks import personal_mask, words
from tg_tinker.federated.masking.ring import Words, dequantise_mean, levels, quantise
from tg_tinker.federated.masking.setting import MaskingSetting, Place
from tg_tinker.federated.masking.shamir import combine

SITES, VICTIM, OTHER = 5, "site-2", "site-4"  # of five sites four must stay
CLIP, BITS = 0.25, 20
SIZE = 20_000


def raw(text: str) -> bytes:
    return base64.b64decode(text)


@dataclass
class Adversary:
    """The coordinator after a round, and the secrets of sites in league with it."""

    federation: Federation
    league: set[str]
    place: Place

    def replies(self, step: str) -> dict[str, Any]:
        """What each site answered."""
        return {site: reply for done, site, _, reply in self.federation.seen if done == step}

    def key(self, site: str) -> bytes:
        """A site's public mask key."""
        return raw(self.replies("keys")[site]["mask_key"])

    def opened(self, kind: str, site: str) -> bytes | None:
        """A secret whose shares the sites opened."""
        points = sorted(self.federation.job.roster)
        shares = {
            points.index(by) + 1: raw(reply[kind][site])
            for by, reply in self.replies("open").items()
            if site in reply[kind]
        }
        return combine(shares).to_bytes(32, "big") if shares else None

    def mask_keys(self) -> dict[str, bytes]:
        """Private mask keys that the adversary has: of its league, and of those who dropped."""
        found = {}
        for site in self.federation.job.roster:
            if site in self.league:
                secret = next(s["secret"] for s in self.federation.states[site] if s["secret"])
                found[site] = AttemptSecrets(raw(secret), site, self.place).mask_key
            elif (opened := self.opened("mask", site)) is not None:
                found[site] = opened
        return found

    def peel(self, victim: str) -> tuple[Words, set[str]]:
        """The victim's masked update without every mask that can be known, and the peers whose masks are left."""
        left_P = self.replies("train")[victim].copy()
        seed = self.opened("personal", victim)
        assert seed is not None
        left_P -= personal_mask(self.place, victim, seed, left_P.size)
        known = self.mask_keys()
        for peer in known:
            mask_P = words(
                pair_seed(self.place, known[peer], own=peer, peer=victim, peer_key=self.key(victim)), left_P.size
            )
            left_P = left_P - mask_P if victim < peer else left_P + mask_P
        return left_P, set(self.replies("train")) - set(known) - {victim}


def attack(
    league: set[str], updates: dict[str, Vector] | None = None, **run: Any
) -> tuple[Adversary, dict[str, Vector]]:
    """A whole round with everybody, and what the adversary holds after it."""
    federation = Federation.of(SITES, fixed=True)
    updates = updates or federation.updates(SIZE)
    federation.run(updates, **run)
    return Adversary(federation, league, Place(federation.job.digest(), 1, 0)), updates


def looks_like(left_P: Words, update_P: Vector) -> float:
    """Share of coordinates that the update explains."""
    return float(np.mean(left_P == quantise(update_P, clip=CLIP, bits=BITS)))


def evenness(words_P: Words) -> float:
    """Chi-square over the top bytes, 255 degrees of freedom: 180 to 340 in all but one of 10,000 uniform draws."""
    counts = np.bincount(words_P >> 24, minlength=256)
    expected = words_P.size / 256
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_attack_finds_the_update_once_every_other_site_is_in_league() -> None:
    adversary, updates = attack({"site-1", "site-3", "site-4", "site-5"})
    left_P, unknown = adversary.peel(VICTIM)
    assert unknown == set()
    assert looks_like(left_P, updates[VICTIM]) == 1.0
    assert np.abs(dequantise_mean(left_P, sites=1, clip=CLIP, bits=BITS)).max() == CLIP


@pytest.mark.parametrize("dropped", [set(), {"site-5"}])
@pytest.mark.parametrize("league", [set(), {"site-1"}, {"site-1", "site-3"}, {"site-1", "site-3", "site-5"}])
def test_with_one_honest_peer_left_nothing_of_an_update_shows(league: set[str], dropped: set[str]) -> None:
    """Up to t - 1 = 3 in league, and another site's key opened because it dropped."""
    adversary, updates = attack(league, silent={"train": dropped})
    left_P, unknown = adversary.peel(VICTIM)
    assert OTHER in unknown
    assert looks_like(left_P, updates[VICTIM]) < 0.001
    assert 180 < evenness(left_P) < 340
    with pytest.raises(FederationRefusedError, match="larger than 1 clipped"):
        dequantise_mean(left_P, sites=1, clip=CLIP, bits=BITS)
    correlation = np.corrcoef(left_P.view(np.int32).astype(float), updates[VICTIM])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(SIZE)


def test_the_attack_is_as_strong_as_it_can_be() -> None:
    """What is left of the two honest updates sums to theirs: every mask that can be known was taken off."""
    adversary, updates = attack({"site-1", "site-3", "site-5"})
    left_P = adversary.peel(VICTIM)[0] + adversary.peel(OTHER)[0]
    expected_P = sum(quantise(updates[site], clip=CLIP, bits=BITS) for site in (VICTIM, OTHER))
    assert np.array_equal(left_P, expected_P)


def test_zeros_and_large_updates_leave_the_same_noise() -> None:
    flat = {"site-1": 0.0, "site-2": CLIP, "site-3": 0.0, "site-4": -CLIP, "site-5": 0.0}
    adversary, _ = attack({"site-1", "site-3", "site-5"}, {s: np.full(SIZE, v, np.float32) for s, v in flat.items()})
    large_P, unmasked = adversary.peel(VICTIM)[0], quantise(np.full(SIZE, CLIP), clip=CLIP, bits=BITS)
    assert 180 < evenness(large_P) < 340
    assert evenness(unmasked) > 1e6


def test_two_sets_of_updates_with_one_sum_give_messages_that_one_unknown_mask_makes_equal() -> None:
    """Whatever was trained, some mask between the two honest sites explains all that was seen."""
    league = {"site-1", "site-3", "site-5"}
    moved_P = np.full(SIZE, 0.0625, np.float32)
    small = Federation.of(SITES).updates(SIZE, scale=0.01)
    one, _ = attack(league, small)
    other, _ = attack(league, {**small, VICTIM: small[VICTIM] + moved_P, OTHER: small[OTHER] - moved_P})
    for step in ("keys", "shares", "agree", "open"):
        assert one.replies(step) == other.replies(step)
    before, after = one.replies("train"), other.replies("train")
    changed = {site for site in before if not np.array_equal(before[site], after[site])}
    assert changed == {VICTIM, OTHER}
    by_P = (after[VICTIM] - before[VICTIM]).view(np.int32)
    assert np.abs(by_P - 0.0625 / CLIP * levels(BITS)).max() <= 1
    assert np.abs((after[VICTIM] + after[OTHER] - before[VICTIM] - before[OTHER]).view(np.int32)).max() <= 1


def test_the_shares_of_a_league_fit_every_mask_key() -> None:
    """The key of the mask between the honest two is as undetermined as Shamir's theorem says."""
    adversary, _ = attack({"site-1", "site-3", "site-5"})
    points = sorted(adversary.federation.job.roster)
    held = {}
    for site in adversary.league:
        state = next(s for s in adversary.federation.states[site] if s["received"])
        held[points.index(site) + 1] = raw(state["received"][VICTIM])[:33]
    assert len(held) == MaskingSetting.of(adversary.federation.job).threshold - 1
    secret = next(s["secret"] for s in adversary.federation.states[VICTIM] if s["secret"])
    true_key = AttemptSecrets(raw(secret), VICTIM, adversary.place).mask_key
    for candidate in (true_key, bytes(32), b"\x5a" * 32):
        through = {0: b"\0" + candidate, **held}
        dealt = {point: combine(through, at=point).to_bytes(33, "big") for point in range(1, SITES + 1)}
        assert combine({p: dealt[p] for p in (2, 3, 4, 5)}) == int.from_bytes(candidate, "big")
        assert {p: dealt[p] for p in held} == held


def test_guesses_of_the_missing_mask_fail() -> None:
    """No mask, masks of other pairs, places and purposes, keys that everybody knows."""
    adversary, updates = attack({"site-1", "site-3", "site-5"})
    left_P, _ = adversary.peel(VICTIM)
    known = adversary.mask_keys()
    public = {VICTIM: adversary.key(VICTIM), OTHER: adversary.key(OTHER)}
    guesses = {"zeros": np.zeros(SIZE, np.uint32)}
    for name, key in {"zero key": bytes(32), **public, **known}.items():
        guesses[f"keystream of {name}"] = words(key, SIZE)
        for place in (adversary.place, Place(adversary.place.job, 1, 1), Place(adversary.place.job, 2, 0)):
            seed = pair_seed(place, key, own=OTHER, peer=VICTIM, peer_key=public[VICTIM])
            guesses[f"agreement of {name} at {place}"] = words(seed, SIZE)
    for site in (VICTIM, OTHER, "site-1"):
        seed = adversary.opened("personal", site)
        assert seed is not None
        guesses[f"personal seed of {site}"] = words(seed, SIZE)
        guesses[f"personal mask of {site}"] = personal_mask(adversary.place, OTHER, seed, SIZE)
    assert len(guesses) > 25
    for name, mask_P in guesses.items():
        for guess_P in (left_P - mask_P, left_P + mask_P):
            assert looks_like(guess_P, updates[VICTIM]) < 0.001, name


def test_no_message_holds_an_update_that_is_not_masked() -> None:
    """Also where the coordinator subtracts one message from another, in one round or over two attempts."""
    federation = Federation.of(3, fixed=True)
    updates = federation.updates(SIZE)
    for attempt in (0, 1):
        federation.run(updates, attempt=attempt, until="agree")
    arrays = [reply for step, _, _, reply in federation.seen if step == "train"]
    assert len(arrays) == 6
    zero_P = np.zeros(SIZE, np.uint32)
    for one_P in arrays:
        for other_P in [zero_P, *(reply for reply in arrays if reply is not one_P)]:
            for update_P in updates.values():
                assert looks_like(one_P - other_P, update_P) < 0.001
                assert looks_like(one_P + other_P, update_P) < 0.001
    for step, site, request, reply in federation.seen:
        for update_P in updates.values():
            plain = quantise(update_P, clip=CLIP, bits=BITS).tobytes()[:32]
            assert plain not in (reply.tobytes() if step == "train" else repr(reply).encode()), site
            assert plain not in repr(request).encode()


def test_every_attempt_and_every_site_has_other_secrets_and_masks() -> None:
    federation = Federation.of(3)  # secrets of the operating system
    updates = federation.updates(8)
    for round_, attempt in ((1, 0), (1, 1), (2, 0)):
        federation.run(updates, round_=round_, attempt=attempt, until="train")
    shown = [reply for step, _, _, reply in federation.seen if step == "keys"]
    values = [reply[name] for reply in shown for name in ("mask_key", "share_key", "commitment")]
    assert len(set(values)) == len(values) == 27
    secrets = {state["secret"] for states in federation.states.values() for state in states}
    assert len(secrets) == 9
    masked = {reply.tobytes() for step, _, _, reply in federation.seen if step == "train"}
    assert len(masked) == 9
