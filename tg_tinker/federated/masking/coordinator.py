"""The coordinator's side of secure aggregation: it passes on what sites sealed, and learns the sum.

Shape suffixes: P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.job import Job
from tg_tinker.federated.masking import keys as k
from tg_tinker.federated.masking.agreement import Agreement, keys_digest, repeated
from tg_tinker.federated.masking.facts import Facts, raw, refused, site_table, text
from tg_tinker.federated.masking.masks import pairwise_mask, personal_mask
from tg_tinker.federated.masking.recovery import Fits, recover
from tg_tinker.federated.masking.ring import Words, dequantise_mean, error_bound
from tg_tinker.federated.masking.setting import MaskingSetting, Place
from tg_tinker.federated.masking.shamir import SHARE_BYTES

T = TypeVar("T")
FactsBySite = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskedMean:
    """What a round under masks gives.

    Attributes:
        mean: of the clipped updates of the sites that stayed, float64 [P].
        error_bound: how far rounding may have moved a coordinate of it.
        stayed: sites in the sum.
        dropped: sites whose masks were removed, and whose update is not in it.
    """

    mean: npt.NDArray[np.float64]
    error_bound: float
    stayed: tuple[str, ...]
    dropped: tuple[str, ...]


class MaskingRound:
    """One attempt at one round. Each step takes the replies to the last request and gives the facts of the next.

    A reply that is malformed or not by the protocol counts as none; ``excluded`` says why, by site. Nothing in here
    is secret, and nothing is stored: after a crash take the next attempt.

    Every step raises FederationRefusedError, reason "too_few_sites", where fewer than the threshold are left. The
    next attempt may do better, unless shares were opened in this one: then sites take part again for the same sum
    only, in this round and in every other that begins with the same weights.
    """

    def __init__(self, job: Job, round_: int, attempt: int, *, size: int, base: str) -> None:
        """Begin.

        Args:
            size: number P of coordinates of an update.
            base: digest of the weights that the round begins with, hex (`updates.weights_digest`).

        Raises:
            FederationRefusedError: see `MaskingSetting.of`.
        """
        self._setting = MaskingSetting.of(job)
        self._place = Place(self._setting.job, round_, attempt)
        self._size, self._base = size, base
        self._keys: dict[str, k.Advertisement] = {}
        self._shared: list[str] = []
        self._agreement: Agreement | None = None
        self._sum_P: Words = np.zeros(size, np.uint32)
        self.excluded: dict[str, str] = {}

    def begin(self) -> Facts:
        """The facts of "mask.keys", for all who are asked to take part."""
        return {"base": self._base}

    def keys(self, replies: FactsBySite) -> Facts:
        """From the replies to "mask.keys": the facts of "mask.shares", for all who are listed in it."""

        def read(site: str) -> k.Advertisement:
            ad = k.Advertisement.read(replies[site], site=site)
            ad.verify(site, self._setting.identity(site), self._place)
            if ad.base != self._base:
                raise refused("showed keys for other weights than it was asked to begin with")
            return ad

        shown = self._each(replies, read)
        for site in repeated(shown):
            self.excluded[site] = "shows a key that is shown twice"
            del shown[site]
        self._setting.require(len(shown), "showed their keys")
        self._keys = shown
        return {"keys": {site: ad.facts() for site, ad in shown.items()}}

    def shares(self, replies: FactsBySite) -> dict[str, Facts]:
        """From the replies to "mask.shares": by site, what its request "train" carries beside the model."""

        def read(site: str) -> dict[str, str]:
            table = site_table(replies[site], "shares", of=f"the reply of site {site!r}")
            if set(table) != set(self._keys) - {site}:
                raise refused("did not share with each of the others")
            return {peer: text(raw(table, peer, k.SEALED_BYTES, of="its shares")) for peer in table}

        sealed = self._each({site: replies[site] for site in replies if site in self._keys}, read)
        self._setting.require(len(sealed), "shared")
        self._shared = sorted(sealed)
        return {
            site: {"shares": {peer: sealed[peer][site] for peer in self._shared if peer != site}}
            for site in self._shared
        }

    def masked(self, replies: Mapping[str, npt.NDArray[Any]]) -> Facts:
        """From the masked updates: the facts of "mask.agree", for the sites named in it."""

        def read(site: str) -> Words:
            if replies[site].dtype != np.uint32 or replies[site].shape != (self._size,):
                raise refused(f"sent an array of {replies[site].dtype}, {replies[site].shape}, not a masked update")
            return replies[site]

        masked = self._each({site: replies[site] for site in replies if site in self._shared}, read)
        self._setting.require(len(masked), "stayed")
        self._sum_P = np.zeros(self._size, np.uint32)
        for update_P in masked.values():
            self._sum_P += update_P
        self._agreement = Agreement(
            keys=keys_digest(self._place, self._keys), shared=tuple(self._shared), stayed=tuple(masked)
        )
        return {"stayed": list(masked)}

    def agreed(self, replies: FactsBySite) -> Facts:
        """From the replies to "mask.agree": the facts of "mask.open", for the sites in its "signatures"."""
        agreement = self._agreed_on()

        def read(site: str) -> str:
            signature = raw(replies[site], "signature", k.SIGNATURE_BYTES, of=f"the reply of site {site!r}")
            if not agreement.is_signed(self._place, site, self._setting.identity(site), signature):
                raise FederationRefusedError("did not sign what it was shown", reason="bad_signature")
            return text(signature)

        signatures = self._each({site: replies[site] for site in replies if site in agreement.stayed}, read)
        self._setting.require(len(signatures), "signed who stayed")
        return {
            "stayed": list(agreement.stayed),
            "dropped": list(agreement.dropped),
            "signatures": signatures,
        }

    def opened(self, replies: FactsBySite) -> MaskedMean:
        """From the replies to "mask.open": the mean.

        Raises:
            FederationRefusedError: reason "too_few_sites"; "masking": shares do not give a secret that its owner
                showed; "bad_update": the sum is no sum of clipped updates.
        """
        agreement = self._agreed_on()

        def read(site: str) -> dict[str, dict[str, bytes]]:
            of = f"the reply of site {site!r}"
            found: dict[str, dict[str, bytes]] = {}
            for kind, about in (("personal", agreement.stayed), ("mask", agreement.dropped)):
                table = site_table(replies[site], kind, of=of)
                if set(table) != set(about):
                    raise refused("opened shares of other sites than it was asked for")
                found[kind] = {name: raw(table, name, SHARE_BYTES, of=of) for name in table}
            return found

        opened = self._each({site: replies[site] for site in replies if site in agreement.stayed}, read)
        self._setting.require(len(opened), "opened their shares")
        total_P = self._sum_P.copy()
        for site in agreement.stayed:
            seed = self._recover(site, {by: shares["personal"][site] for by, shares in opened.items()}, "seed")
            total_P -= personal_mask(self._place, site, seed, self._size)
        for site in agreement.dropped:
            key = self._recover(site, {by: shares["mask"][site] for by, shares in opened.items()}, "mask key")
            peer_keys = {peer: self._keys[peer].mask_key for peer in agreement.stayed}
            total_P += pairwise_mask(self._place, site, key, peer_keys, self._size)
        setting = self._setting
        return MaskedMean(
            mean=dequantise_mean(total_P, sites=len(agreement.stayed), clip=setting.clip, bits=setting.bits),
            error_bound=error_bound(setting.clip, setting.bits),
            stayed=agreement.stayed,
            dropped=agreement.dropped,
        )

    def _recover(self, site: str, shares: Mapping[str, bytes], what: str) -> bytes:
        shown = self._keys[site]
        fits: Fits = (
            (lambda secret: k.commitment(self._place, site, secret) == shown.commitment)
            if what == "seed"
            else (lambda secret: k.public_of(secret) == shown.mask_key)
        )
        by_point = {self._setting.point(by): share for by, share in shares.items()}
        found = recover(by_point, threshold=self._setting.threshold, fits=fits)
        if found is None:
            raise refused(
                f"{len(shares)} shares do not give the {what} that site {site!r} showed: it dealt wrong ones, or "
                f"one of {sorted(shares)!r:.400} gave back another; which of them cannot be told"
            )
        secret, wrong = found
        for by in shares:
            if self._setting.point(by) in wrong:
                self.excluded[by] = (
                    f"its share of {site!r}'s {what} is wrong: it, or {site!r} who dealt it, is at fault"
                )
        return secret

    def _agreed_on(self) -> Agreement:
        if self._agreement is None:
            raise refused("the masked updates come before what sites agree on and open")
        return self._agreement

    def _each(self, replies: Mapping[str, Any], read: Callable[[str], T]) -> dict[str, T]:
        """What ``read`` makes of each site's reply, in the order of names, without those it refuses."""
        found: dict[str, T] = {}
        for site in sorted(replies):
            try:
                found[site] = read(site)
            except FederationRefusedError as error:
                self.excluded[site] = error.message
        return found
