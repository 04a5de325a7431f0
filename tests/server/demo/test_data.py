"""The demo's texts: many, distinct, always split the same way."""

from __future__ import annotations

from tg_tinker_server.demo.data import diagnosis_texts, load_texts, split
from tg_tinker_server.demo.settings import DemoSettings


def test_there_are_tens_of_thousands_of_distinct_short_texts() -> None:
    texts = diagnosis_texts()
    assert len(texts) == len(set(texts)) > 40_000
    assert 40 < sum(map(len, texts)) / len(texts) < 60


def test_no_held_out_text_is_trained_on() -> None:
    texts = load_texts(DemoSettings())
    assert len(texts.held_out) == 512
    assert not set(texts.held_out) & set(texts.train)


def test_the_split_does_not_depend_on_the_order_of_the_texts() -> None:
    one = split(["a", "b", "c", "d"], held_out=1, train_limit=2)
    other = split(["d", "c", "b", "a", "a"], held_out=1, train_limit=2)
    assert one == other
    assert len(one.train) == 2


def test_delta_is_below_one_over_the_number_of_records() -> None:
    settings = DemoSettings()
    assert settings.target_delta < 1 / len(load_texts(settings).train)
