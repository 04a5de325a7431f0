"""Updates: what a round trains, one vector and back, every malformed update refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.updates import (
    check_update,
    flatten,
    layout,
    size,
    subtract,
    trained_names,
    unflatten,
    weights_digest,
)

A = "base_model.model.layers.0.q_proj.lora_A.weight"
B = "base_model.model.layers.0.q_proj.lora_B.weight"
HEAD = "base_model.model.lora_head.weight"


def adapter(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {B: (4, 2), A: (2, 3), HEAD: (5,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_a_frozen_factor_is_left_out_and_what_is_no_factor_never_is():
    assert trained_names(adapter(), None) == sorted([A, B, HEAD])
    assert trained_names(adapter(), "a") == sorted([B, HEAD])
    assert trained_names(adapter(), "b") == sorted([A, HEAD])
    assert trained_names(["e.lora_embedding_A", "e.lora_embedding_B"], "a") == ["e.lora_embedding_B"]
    assert trained_names(["x.not_lora_A.weight"], "a") == ["x.not_lora_A.weight"]


@given(st.dictionaries(st.text("ab.", min_size=1), st.lists(st.integers(0, 3), max_size=3), max_size=4))
def test_flatten_and_unflatten_undo_each_other(shapes):
    arrays = {n: np.arange(np.prod(s, dtype=int), dtype=np.float32).reshape(s) + len(n) for n, s in shapes.items()}
    vector = flatten(arrays)
    assert vector.dtype == np.float32
    assert vector.shape == (size(layout(arrays)),) == (sum(a.size for a in arrays.values()),)
    back = unflatten(vector, layout(arrays))
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].shape == array.shape


def test_the_vector_is_in_the_order_of_names_whatever_the_order_of_the_dict():
    arrays = {"b": np.array([3.0], np.float32), "a": np.array([[1.0, 2.0]], np.float32)}
    assert flatten(arrays).tolist() == [1.0, 2.0, 3.0]
    assert list(layout(arrays)) == ["a", "b"]
    reversed_layout = dict(reversed(layout(arrays).items()))
    assert unflatten(flatten(arrays), reversed_layout)["b"].tolist() == [3.0]


def test_unflatten_copies_and_refuses_another_length():
    vector = np.zeros(3, np.float32)
    unflatten(vector, {"a": (3,)})["a"][0] = 1
    assert vector[0] == 0
    with pytest.raises(FederationRefusedError, match="3 parameters") as error:
        unflatten(np.zeros(4, np.float32), {"a": (3,)})
    assert error.value.reason == "bad_update"


def test_an_update_is_after_minus_before_of_what_was_trained():
    before, after = adapter(1), adapter(2)
    update = subtract(after, before, "a")
    assert set(update) == {B, HEAD}
    for name in update:
        np.testing.assert_array_equal(update[name], after[name] - before[name])
    check_update(update, before, "a")
    check_update(update, layout(before), "a")


def altered(**changes):
    return {**subtract(adapter(1), adapter(2), "a"), **changes}


@pytest.mark.parametrize(
    ("update", "text"),
    [
        ({B: altered()[B]}, f"missing '{HEAD}'"),
        (altered(**{A: np.zeros((2, 3), np.float32)}), f"not expected '{A}'"),
        (altered(**{HEAD: np.zeros(5)}), "float64"),
        (altered(**{HEAD: np.zeros((5, 1), np.float32)}), r"shape \(5, 1\)"),
        (altered(**{HEAD: np.array([0, 0, 0, 0, np.nan], np.float32)}), "not finite"),
        (altered(**{HEAD: np.array([0, 0, 0, 0, -np.inf], np.float32)}), "not finite"),
        ({}, "missing"),
    ],
)
def test_a_malformed_update_is_refused(update, text):
    with pytest.raises(FederationRefusedError, match=text) as error:
        check_update(update, adapter(), "a")
    assert error.value.reason == "bad_update"


def test_a_refusal_names_a_few_arrays_and_no_value():
    update = {f"w{i}": np.full(1, 123.456, np.float32) for i in range(9)}
    with pytest.raises(FederationRefusedError) as error:
        check_update(update, adapter(), None)
    assert "and 4 more" in str(error.value)
    assert "123" not in str(error.value)


def test_the_digest_of_weights_is_that_of_their_bytes():
    weights = adapter()
    reordered = dict(reversed(weights.items()))
    assert weights_digest(weights) == weights_digest(reordered)
    for name in weights:
        changed = {**weights, name: np.nextafter(weights[name], np.float32(9))}
        assert weights_digest(changed) != weights_digest(weights)
    renamed = {**weights, "other": weights[A]}
    del renamed[A]
    assert weights_digest(renamed) != weights_digest(weights)
