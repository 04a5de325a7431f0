"""Three sites' texts: ICD-10-CM's diagnoses by chapters, as three kinds of hospital would see them.

They are the official wordings of a classification (package ``simple-icd-10-cm``); no patient is in them. A wording
that several chapters share belongs to the first, so that the sites' records are disjoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import simple_icd_10_cm as icd

SITES: Mapping[str, tuple[int, ...]] = {
    "clinic": (1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 14, 15, 16, 17, 18),
    "orthopaedics": (7, 8, 13, 21),
    "emergency": (19, 20),
}
"""Chapters of each site: internal medicine; eyes, ears, bones and care; injuries and their causes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FederatedTexts:
    """Each site's private records, and public records from all of their chapters to measure on."""

    sites: Mapping[str, tuple[str, ...]]
    held_out: tuple[str, ...]

    @property
    def pooled(self) -> tuple[str, ...]:
        """What one owner of all records would have."""
        return tuple(text for texts in self.sites.values() for text in texts)


def load_texts(*, held_out: int, train_limit: int | None = None) -> FederatedTexts:
    """The same split on every machine: each site's records in the order of their SHA-256, the first held out.

    Args:
        held_out: records of each site that are declared public.
        train_limit: use only so many records of a site.
    """
    end = None if train_limit is None else held_out + train_limit
    sites, public = {}, list[str]()
    for name, texts in _by_site().items():
        ordered = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
        sites[name] = tuple(ordered[held_out:end])
        public += ordered[:held_out]
    return FederatedTexts(sites=sites, held_out=tuple(public))


def _by_site() -> dict[str, set[str]]:
    chapters = [code for code in icd.get_all_codes() if icd.is_chapter(code)]
    site_of = {chapters[number - 1]: name for name, numbers in SITES.items() for number in numbers}
    texts: dict[str, set[str]] = {name: set() for name in SITES}
    seen: set[str] = set()
    for code in icd.get_all_codes():
        if icd.is_chapter(code) or icd.is_block(code) or icd.is_extended_subcategory(code):
            continue
        site, text = site_of.get(icd.get_ancestors(code)[-1]), icd.get_description(code)
        if site is not None and text not in seen:
            seen.add(text)
            texts[site].add(text)
    return texts
