"""The demo's texts: the diagnoses of ICD-10-CM, each a record, some held out as public.

They are the official wordings of a classification (package ``simple-icd-10-cm``): they look like what a clinic
must not leak, and no patient is in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import simple_icd_10_cm as icd

from tg_tinker_server.demo.settings import DemoSettings

SOURCE = "ICD-10-CM diagnosis wordings (PyPI package simple-icd-10-cm, MIT)"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoTexts:
    """Records to train on, each its own privacy unit, and public records to measure on."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def diagnosis_texts() -> list[str]:
    """Every distinct wording below the level of blocks, sorted; about 46,000 of 51 characters on average.

    Codes with a seventh character are left out: they repeat their parent's text with a standard ending.
    """
    return sorted(
        {
            icd.get_description(code)
            for code in icd.get_all_codes()
            if not (icd.is_chapter(code) or icd.is_block(code) or icd.is_extended_subcategory(code))
        }
    )


def split(texts: Iterable[str], *, held_out: int, train_limit: int | None) -> DemoTexts:
    """Order by SHA-256, so that the same texts always fall on the same side; the first are held out."""
    ordered = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    end = None if train_limit is None else held_out + train_limit
    return DemoTexts(train=tuple(ordered[held_out:end]), held_out=tuple(ordered[:held_out]))


def load_texts(settings: DemoSettings) -> DemoTexts:
    """The demo's records, in an order that is the same on every machine."""
    return split(diagnosis_texts(), held_out=settings.held_out, train_limit=settings.train_limit)
