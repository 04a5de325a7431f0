import itertools
import subprocess
import sys

import numpy as np
import pytest

from tg_tinker import metrics
from tg_tinker.errors import InvalidRequestError


def reduced(name, values, weights=None):
    return metrics.reduce([{name: v} for v in values], weights)


@pytest.mark.parametrize(
    ("reducer", "expected"), [("mean", 1.75), ("sum", 3.0), ("min", 1.0), ("max", 2.0), ("slack", 0.25)]
)
def test_the_plain_reducers(reducer, expected):
    assert reduced(f"x:{reducer}", [1, 2], [1, 3]) == {f"x:{reducer}": expected}


def test_unique_numbers_every_value_after_the_first():
    assert reduced("k:unique", [5, 6, 7]) == {"k:unique": 5, "k:unique_1": 6, "k:unique_2": 7}


@pytest.mark.parametrize("values", list(itertools.permutations([1, 2, 3])))
def test_the_unordered_hash_is_the_published_one_in_any_order(values):
    assert reduced("h:hash_unordered", values) == {"h:hash_unordered": 529344067295497451}


def test_the_unordered_hash_takes_sets_apart_and_is_the_same_in_every_process():
    assert reduced("h:hash_unordered", [{3, 1}, 2]) == {"h:hash_unordered": 529344067295497451}
    code = "from tg_tinker.metrics import hash_unordered; print(hash_unordered([3, 1, 2]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert int(found.stdout) == 529344067295497451


@pytest.mark.parametrize(("values", "expected"), [([2**64 - 1, 2], 1), ([-1, 1], 0), ([2.9, 3], 5)])
def test_hash2_adds_modulo_2_to_the_64(values, expected):
    assert reduced("h:hash2", values) == {"h:hash2": expected}


@pytest.mark.parametrize("reducer", ["mean", "slack"])
def test_nothing_of_weight_has_the_mean_zero(reducer):
    assert reduced(f"x:{reducer}", [4, 4], [0, 0]) == {f"x:{reducer}": 0.0 if reducer == "mean" else 4.0}


def test_an_unknown_reducer_is_dropped_with_a_warning(caplog):
    assert reduced("z:weird", [1, 2]) == {}
    assert "z:weird" in caplog.text


def test_only_what_every_chunk_has_is_kept(caplog):
    assert metrics.reduce([{"a:sum": 1, "b:sum": 1}, {"a:sum": 2, "c:sum": 1}]) == {"a:sum": 3.0}
    assert "b:sum" in caplog.text


@pytest.mark.parametrize("name", ["loss", "a:b:sum", ":sum", "loss:", 7])
def test_a_name_without_exactly_one_colon_is_refused_when_it_is_made(name):
    for act in (lambda: metrics.split(name), lambda: metrics.reduce([{name: 1.0}])):
        with pytest.raises(InvalidRequestError) as caught:
            act()
        assert caught.value.field == "metrics"


def test_chunking_does_not_change_what_a_mean_is():
    values = np.random.default_rng(0).normal(size=30)
    parts = np.split(values, [3, 17])
    found = metrics.reduce([{"x:mean": p.mean()} for p in parts], [len(p) for p in parts])
    assert found["x:mean"] == pytest.approx(values.mean(), abs=1e-12)


def test_no_chunks_have_no_metrics():
    assert metrics.reduce([]) == {}


def test_one_weight_belongs_to_each_chunk():
    with pytest.raises(InvalidRequestError, match="2 weights for 1"):
        metrics.reduce([{"x:sum": 1}], [1, 2])
