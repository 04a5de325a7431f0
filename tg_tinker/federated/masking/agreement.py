"""What sites must see alike before any of them opens a share: the list of keys, who shared, who stayed.

Round 4 of Bonawitz et al. 2017, with more under the signature: there it is over who stayed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.masking.facts import raw, refused
from tg_tinker.federated.masking.keys import SIGNATURE_BYTES, Advertisement
from tg_tinker.federated.masking.setting import LEAST_SITES, MaskingSetting, Place

Keys = Mapping[str, Advertisement]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """One party's view of an attempt.

    Attributes:
        keys: digest of the list of keys, hex. The list has the weights that each site begins with.
        shared: sites whose shares were passed on, sorted.
        stayed: sites whose masked update is in the sum, sorted.
    """

    keys: str
    shared: tuple[str, ...]
    stayed: tuple[str, ...]

    @property
    def dropped(self) -> tuple[str, ...]:
        """Sites whose masks are in the sum and whose update is not."""
        return tuple(sorted(set(self.shared) - set(self.stayed)))

    def signed_bytes(self, place: Place, site: str) -> bytes:
        """What ``site`` signs."""
        return place.bind(
            "tg-tinker/masking/agreement/v1",
            site=site,
            keys=self.keys,
            shared=list(self.shared),
            stayed=list(self.stayed),
        )

    def is_signed(self, place: Place, site: str, identity: Ed25519PublicKey, signature: bytes) -> bool:
        """Whether ``site`` signed the same view."""
        try:
            identity.verify(signature, self.signed_bytes(place, site))
        except InvalidSignature:
            return False
        return True


def keys_digest(place: Place, keys: Keys) -> str:
    """SHA-256 of the list of keys, hex."""
    bound = place.bind("tg-tinker/masking/key-list/v1", keys={site: ad.shown() for site, ad in keys.items()})
    return hashlib.sha256(bound).hexdigest()


def repeated(keys: Keys) -> set[str]:
    """Sites with a key or commitment that is not theirs alone, or that serves two purposes."""
    owners: dict[bytes, list[str]] = {}
    for site, ad in keys.items():
        for value in (ad.mask_key, ad.share_key, ad.commitment):
            owners.setdefault(value, []).append(site)
    return {site for sites in owners.values() if len(sites) > 1 for site in sites}


def check_keys(
    setting: MaskingSetting, place: Place, keys: Keys, *, base: str, earlier: Iterable[bytes] = ()
) -> None:
    """Require a list of keys that a site may trust.

    Args:
        base: our own, which all must have signed.
        earlier: keys seen in other attempts.

    Raises:
        FederationRefusedError: reason "unknown_site", "too_few_sites", "bad_signature" or "masking": a peer off the
            roster, fewer than the threshold, a signature that does not hold, another base, a key twice or seen
            before.
    """
    for site in keys:
        setting.identity(site)
    setting.require(len(keys), "showed their keys")
    for site, ad in keys.items():
        ad.verify(site, setting.identity(site), place)
    if others := {site for site, ad in keys.items() if ad.base != base}:
        raise refused(
            f"sites {_names(others)} were shown other weights to begin with than we: an update from weights that the "
            "coordinator makes up may be zero, and the sum then ours alone"
        )
    if twice := repeated(keys):
        raise refused(f"sites {_names(twice)} have a key in common: one of them copied it")
    seen = set(earlier)
    reused = {site for site, ad in keys.items() if {ad.mask_key, ad.share_key, ad.commitment} & seen}
    if reused:
        raise refused(f"sites {_names(reused)} show a key of an earlier attempt, which may have been opened since")


def require_stayed(setting: MaskingSetting, stayed: Iterable[str], shared: Iterable[str]) -> None:
    """Require that enough stayed, never fewer than three, and that each of them shared.

    Raises:
        FederationRefusedError: reason "too_few_sites" or "masking".
    """
    stayed = set(stayed)
    if strangers := stayed - set(shared):
        raise refused(
            f"sites {_names(strangers)} are said to have stayed, and passed on no shares: their update could not be "
            "masked against ours"
        )
    setting.require(len(stayed), "stayed")
    if len(stayed) < LEAST_SITES:
        raise FederationRefusedError(
            f"a sum over {len(stayed)} sites gives each of them the other's update", reason="too_few_sites"
        )


def check_signatures(
    setting: MaskingSetting, place: Place, agreement: Agreement, signatures: Mapping[str, Any]
) -> None:
    """Require that enough sites signed this very view, and none another.

    Raises:
        FederationRefusedError: reason "masking", "bad_signature" or "too_few_sites".
    """
    if strangers := set(signatures) - set(agreement.stayed):
        raise refused(f"sites {_names(strangers)} signed, and did not stay")
    for site in signatures:
        signature = raw(signatures, site, SIGNATURE_BYTES, of="the signatures")
        if not agreement.is_signed(place, site, setting.identity(site), signature):
            raise FederationRefusedError(
                f"site {site!r} did not sign the keys, the shares and the stayed sites that we were shown: the "
                "coordinator tells sites different things, or the signature was altered; nothing was opened",
                reason="bad_signature",
            )
    setting.require(len(signatures), "signed who stayed")


def _names(sites: Iterable[str]) -> str:
    return ", ".join(repr(site[:80]) for site in sorted(sites))
