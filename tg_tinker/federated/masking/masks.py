"""Masks on a vector: how a site puts them on, and how they come off the sum.

Shape suffixes: P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tg_tinker.federated.masking.keys import hkdf, keystream, pair_seed
from tg_tinker.federated.masking.ring import Words
from tg_tinker.federated.masking.setting import Place


def words(key: bytes, size: int) -> Words:
    """A keystream of ``size`` integers of 32 bits, little-endian."""
    return np.frombuffer(keystream(key, 4 * size), dtype="<u4").astype(np.uint32, copy=False)


def personal_mask(place: Place, site: str, personal_seed: bytes, size: int) -> Words:
    """The mask [P] that only the site's own seed gives."""
    return words(hkdf(personal_seed, place.bind("tg-tinker/masking/personal/v1", site=site)), size)


def pairwise_mask(place: Place, site: str, private: bytes, peer_keys: Mapping[str, bytes], size: int) -> Words:
    """The sum [P] of the masks that a site shares with each of its peers, modulo 2^32.

    The first of a pair by name adds their mask and the second subtracts it, so both cancel in a sum.

    Args:
        private: the site's mask key.
        peer_keys: the peers' public mask keys, by name.
    """
    total_P = np.zeros(size, np.uint32)
    for peer, peer_key in peer_keys.items():
        mask_P = words(pair_seed(place, private, own=site, peer=peer, peer_key=peer_key), size)
        if site < peer:
            total_P += mask_P
        else:
            total_P -= mask_P
    return total_P
