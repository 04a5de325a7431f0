"""The three sites' texts are disjoint, complete and the same everywhere."""

from __future__ import annotations

from tg_tinker_server.demo.data import diagnosis_texts
from tg_tinker_server.federated_demo.data import SITES, load_texts


def test_sites_share_no_record_and_leave_out_next_to_none() -> None:
    texts = load_texts(held_out=100)
    everything = [*texts.pooled, *texts.held_out]
    assert len(set(everything)) == len(everything)
    assert set(everything) <= set(diagnosis_texts())
    assert len(diagnosis_texts()) - len(everything) < 10  # chapter 22, codes for special purposes
    assert len(texts.held_out) == 300
    assert all(len(records) > 10_000 for records in texts.sites.values())


def test_every_chapter_has_one_site() -> None:
    numbers = [n for chapters in SITES.values() for n in chapters]
    assert sorted(numbers) == list(range(1, 22))


def test_a_limit_takes_the_same_records_first() -> None:
    few, many = load_texts(held_out=10, train_limit=20), load_texts(held_out=10, train_limit=30)
    assert few.held_out == many.held_out
    assert all(few.sites[name] == many.sites[name][:20] for name in SITES)
