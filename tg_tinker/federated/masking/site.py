"""A site's side of secure aggregation: it follows the steps, in order, and refuses what would uncover its update.

Shape suffixes: P parameters.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.job import Job
from tg_tinker.federated.masking import keys as k
from tg_tinker.federated.masking.agreement import (
    Agreement,
    check_keys,
    check_signatures,
    keys_digest,
    require_stayed,
)
from tg_tinker.federated.masking.facts import Facts, digest, raw, refused, site_list, site_table, text
from tg_tinker.federated.masking.masks import pairwise_mask, personal_mask
from tg_tinker.federated.masking.ring import Words, quantise
from tg_tinker.federated.masking.setting import MaskingSetting, Place
from tg_tinker.federated.masking.shamir import SHARE_BYTES
from tg_tinker.federated.masking.site_state import MaskingState, set_digest
from tg_tinker.transparency._encoding import from_base64

MAX_ATTEMPTS = 1_000_000
_REQUEST = "the coordinator's request"


class MaskingSite:
    """One site in all rounds of one job.

    Write ``state`` to disk, readable by its owner alone, and fsync it before a reply leaves: what a site refuses
    rests on what it answered before. A step that is repeated with the same request gives the same bytes, with another
    request it is refused. A refusal changes nothing.
    """

    def __init__(
        self,
        job: Job,
        site: str,
        identity: Ed25519PrivateKey,
        *,
        state: Mapping[str, Any] | None = None,
        entropy: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """Begin, or go on from a ``state`` that was stored.

        Args:
            identity: the key behind the site's entry on the roster.
            entropy: random bytes, as many as asked for; fixed in tests alone.

        Raises:
            FederationRefusedError: the job cannot be masked (`MaskingSetting.of`), the site is not on its roster
                under this key, or the state is of another job or site.
        """
        self._setting = MaskingSetting.of(job)
        self._site, self._key, self._entropy = site, identity, entropy
        if self._setting.identity(site).public_bytes_raw() != identity.public_key().public_bytes_raw():
            raise FederationRefusedError(
                f"the roster of the job has another public key for site {site!r}; compare it with the one of this "
                "site's key file",
                reason="unknown_site",
            )
        self._state = MaskingState(job=self._setting.job, site=site) if state is None else _read(state)
        if (self._state.job, self._state.site) != (self._setting.job, site):
            raise refused(
                f"the stored state is of site {self._state.site!r} in job {self._state.job[:12]}, not of {site!r} in "
                f"{self._setting.job[:12]}; look at the site's state folder"
            )

    @property
    def state(self) -> Facts:
        """What to store, as JSON: secret. See `MaskingState`."""
        return self._state.model_dump(mode="json")

    def answer(self, kind: str, round_: int, attempt: int, facts: Mapping[str, Any]) -> Facts:
        """The reply to "mask.keys", "mask.shares", "mask.agree" or "mask.open".

        Raises:
            FederationRefusedError: as the step's own method; reason "masking" for another kind.
        """
        match kind:
            case "mask.keys":
                return self.advertise(round_, attempt, facts)
            case "mask.shares":
                return self.share(round_, attempt, facts)
            case "mask.agree":
                return self.agree(round_, attempt, facts)
            case "mask.open":
                return self.open(round_, attempt, facts)
            case _:
                raise refused(f"{kind[:80]!r} is no step of masking")

    def advertise(self, round_: int, attempt: int, facts: Mapping[str, Any]) -> Facts:
        """Step "mask.keys": draw fresh keys and show them, signed together with the weights to begin with.

        Args:
            facts: "base", as `MaskingRound.begin` gives it.

        Raises:
            FederationRefusedError: reason "wrong_round": an attempt that is over, or that the job does not have;
                "masking": another base was shown for this attempt before.
        """
        base = digest(facts, "base", of=_REQUEST)
        state = self._state
        over = (round_, attempt) == (state.round, state.attempt) and state.secret is None
        possible = 1 <= round_ <= self._setting.rounds and 0 <= attempt < MAX_ATTEMPTS
        if over or not possible or (round_, attempt) < (state.round, state.attempt):
            raise self._wrong_round(round_, attempt)
        if (round_, attempt) != (state.round, state.attempt):
            state.begin(round_, attempt, base=base, secret=text(self._entropy(k.SECRET_BYTES)))
        if state.base != base:
            raise refused(f"other weights to begin with were shown for {self._place} before")
        return self._advertised().facts()

    def share(self, round_: int, attempt: int, facts: Mapping[str, Any]) -> Facts:
        """Step "mask.shares": check everybody's keys, seal a share of both secrets for each peer.

        Args:
            facts: "keys" by site, as `MaskingRound.keys` gives them.

        Raises:
            FederationRefusedError: see `check_keys`; reason "masking" also where our own keys are missing or were
                exchanged, or where other keys were shown before.
        """
        secret = self._at(round_, attempt)
        table = site_table(facts, "keys", of=_REQUEST)
        shown = {site: k.Advertisement.read(entry, site=site) for site, entry in table.items()}
        earlier = {from_base64(key) for key in self._state.earlier_keys}
        own = self._advertised()
        check_keys(self._setting, self._place, shown, base=own.base, earlier=earlier)
        if shown.get(self._site) != own:
            raise refused("the list of keys lacks ours, or has other keys under our name")
        listed = {site: ad.facts() for site, ad in shown.items()}
        if self._state.keys not in (None, listed):
            raise refused(f"another list of keys was shown for {self._place} before; two lists split the sites")
        shares = secret.shares(self._setting)
        sealed = {
            site: k.seal(
                self._place,
                secret.share_key,
                shares[site],
                sender=self._site,
                receiver=site,
                receiver_key=ad.share_key,
            )
            for site, ad in shown.items()
            if site != self._site
        }
        self._state.keys = listed
        return {"shares": {site: text(data) for site, data in sealed.items()}}

    def receive(self, round_: int, attempt: int, facts: Mapping[str, Any], *, base: str) -> None:
        """First half of "train": open the shares from peers. Do this before training, which a refusal would waste.

        Args:
            facts: "shares" by sender, as `MaskingRound.shares` gives them.
            base: digest of the weights in the request, hex. What is passed to `mask` must be trained from these.

        Raises:
            FederationRefusedError: reason "too_few_sites"; "masking": other weights than all sites signed; shares
                from somebody without keys, not openable, or others than were received before.
        """
        secret = self._at(round_, attempt)
        keys = self._keys()
        if base != self._state.base:
            raise refused(
                "the weights to train from are not those that the sites signed with their keys for "
                f"{self._place}: the others may have got others still"
            )
        table = site_table(facts, "shares", of=_REQUEST)
        if strangers := set(table) - set(keys) | {self._site} & set(table):
            raise refused(f"shares from {sorted(strangers)!r:.200}, who showed no keys or are ourselves")
        self._setting.require(len(table) + 1, "shared")
        received = {
            site: k.unseal(
                self._place,
                secret.share_key,
                raw(table, site, k.SEALED_BYTES, of="the shares"),
                sender=site,
                sender_key=keys[site].share_key,
                receiver=self._site,
            )
            for site in table
        }
        listed = {site: text(data) for site, data in sorted(received.items())}
        if self._state.received not in (None, listed):
            raise refused(f"shares from other sites were passed on for {self._place} before")
        self._state.received = listed

    def mask(self, round_: int, attempt: int, vector_P: npt.NDArray[np.floating]) -> Words:
        """Second half of "train": the update [P], clipped, rounded and masked. For the reply's arrays.

        Raises:
            FederationRefusedError: reason "bad_update": not finite; "masking": no shares were received, or another
                update was masked before: the difference of the two would be plain.
        """
        secret = self._at(round_, attempt)
        received, keys = self._received(), self._keys()
        masked_P = quantise(vector_P, clip=self._setting.clip, bits=self._setting.bits)
        rounded = hashlib.sha256(masked_P.astype("<u4", copy=False).tobytes()).hexdigest()
        if self._state.masked not in (None, rounded):
            raise refused(f"another update was masked in {self._place} before; send the stored one again")
        masked_P = masked_P + personal_mask(self._place, self._site, secret.personal_seed, masked_P.size)
        peer_keys = {peer: keys[peer].mask_key for peer in received}
        masked_P += pairwise_mask(self._place, self._site, secret.mask_key, peer_keys, masked_P.size)
        self._state.masked = rounded
        return masked_P

    def agree(self, round_: int, attempt: int, facts: Mapping[str, Any]) -> Facts:
        """Step "mask.agree": sign who stayed.

        Args:
            facts: "stayed", as `MaskingRound.masked` gives it.

        Raises:
            FederationRefusedError: reason "too_few_sites"; "masking": we are not among them or sent no update, one of
                them did not share, or another set was signed in this attempt or opened in this round or in one that
                began with the same weights.
        """
        self._at(round_, attempt)
        stayed = site_list(facts, "stayed", of=_REQUEST)
        if self._state.stayed is None:
            if self._state.masked is None or self._site not in stayed:
                raise refused("we are asked who stayed before our update was sent, or although it was not counted")
            require_stayed(self._setting, stayed, [self._site, *self._received()])
            if self._state.opened_round == round_ and self._state.opened_stayed != stayed:
                raise refused(
                    f"in round {round_} shares were already opened for the sum over {self._state.opened_stayed}; the "
                    "sum over others would give away single updates. Take the same sites, or go on to the next round"
                )
            if self._state.opened_bases.get(self._base, set_digest(stayed)) != set_digest(stayed):
                raise refused(
                    f"round {round_} begins with the weights of an earlier one, in which shares were opened for the "
                    "sum over other sites; the two sums would differ by little more than single updates. Take the "
                    "same sites, or begin another job"
                )
            self._state.stayed = stayed
        if self._state.stayed != stayed:
            raise refused(f"another set of sites was said to have stayed in {self._place} before")
        return {"signature": text(self._key.sign(self._agreement().signed_bytes(self._place, self._site)))}

    def open(self, round_: int, attempt: int, facts: Mapping[str, Any]) -> Facts:
        """Step "mask.open": hand out one share for each site, never of both of its secrets; then forget all secrets.

        For a site that stayed it is a share of its personal seed, for one that dropped of its mask key.

        Args:
            facts: "stayed", "dropped" and "signatures" by site, as `MaskingRound.agreed` gives them.

        Raises:
            FederationRefusedError: reason "masking": not what we signed, or what was opened before; and
                `check_signatures`.
        """
        stayed, dropped = (site_list(facts, name, of=_REQUEST) for name in ("stayed", "dropped"))
        state = self._state
        if state.opened is not None and (round_, attempt) == (state.round, state.attempt):
            if [sorted(state.opened["personal"]), sorted(state.opened["mask"])] != [stayed, dropped]:
                raise refused(
                    f"shares for {self._place} were already opened, and for other sites than are asked for now"
                )
            return state.opened
        secret = self._at(round_, attempt)
        if state.stayed is None:
            raise refused("we are asked to open shares before we signed who stayed")
        agreement = self._agreement()
        if (tuple(stayed), tuple(dropped)) != (agreement.stayed, agreement.dropped):
            raise refused(
                f"we are asked to open shares of {stayed!r} as stayed and of {dropped!r} as dropped, and signed "
                f"{list(agreement.stayed)} and {list(agreement.dropped)}; both kinds of share of one site uncover "
                "its update"
            )
        signatures = site_table(facts, "signatures", of=_REQUEST)
        check_signatures(self._setting, self._place, agreement, signatures)
        pieces = {site: from_base64(data) for site, data in self._received().items()}
        pieces[self._site] = secret.shares(self._setting)[self._site]
        reply = {
            "personal": {site: text(pieces[site][SHARE_BYTES:]) for site in stayed},
            "mask": {site: text(pieces[site][:SHARE_BYTES]) for site in dropped},
        }
        state.close(reply, stayed)
        return reply

    def forget(self) -> None:
        """Drop all secrets, e.g. when the job ends before an attempt did."""
        self._state.forget()

    @property
    def _place(self) -> Place:
        return Place(self._setting.job, self._state.round, self._state.attempt)

    def _secrets(self) -> k.AttemptSecrets:
        assert self._state.secret is not None
        return k.AttemptSecrets(from_base64(self._state.secret), self._site, self._place)

    @property
    def _base(self) -> str:
        assert self._state.base is not None
        return self._state.base

    def _advertised(self) -> k.Advertisement:
        return self._secrets().advertise(self._key, self._base)

    def _at(self, round_: int, attempt: int) -> k.AttemptSecrets:
        if (round_, attempt) != (self._state.round, self._state.attempt) or self._state.secret is None:
            raise self._wrong_round(round_, attempt)
        return self._secrets()

    def _wrong_round(self, round_: int, attempt: int) -> FederationRefusedError:
        over = "" if self._state.secret is not None else ", which is over"
        return FederationRefusedError(
            f"masking of round {round_}, attempt {attempt} is asked for, and this site is at {self._place}{over}; "
            "begin another attempt with fresh keys",
            reason="wrong_round",
        )

    def _keys(self) -> dict[str, k.Advertisement]:
        if self._state.keys is None:
            raise refused("nobody's keys were shown yet; ask for shares first")
        return {site: k.Advertisement.read(ad, site=site) for site, ad in self._state.keys.items()}

    def _received(self) -> dict[str, str]:
        if self._state.received is None:
            raise refused("no shares were received yet; they come before the update is masked")
        return self._state.received

    def _agreement(self) -> Agreement:
        return Agreement(
            keys=keys_digest(self._place, self._keys()),
            shared=tuple(sorted([self._site, *self._received()])),
            stayed=tuple(self._state.stayed or ()),
        )


def _read(state: Mapping[str, Any]) -> MaskingState:
    try:
        return MaskingState.model_validate(dict(state))
    except ValidationError as error:
        fields = sorted({".".join(map(str, e["loc"])) for e in error.errors(include_input=False)})
        raise refused(
            f"the stored state of masking cannot be read ({', '.join(fields)}); begin another round"
        ) from None
