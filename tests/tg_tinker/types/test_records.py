"""A record has one encoding, and nothing else is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tg_tinker.datasets import default_delta
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.records import MAX_RECORD_BYTES, NewDataset, Record

IDS = st.integers(0, 2**31 - 1)


@st.composite
def records(draw: st.DrawFn) -> Record:
    if draw(st.booleans()):
        return Record(text=draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)))
    tokens = draw(st.integers(1, 20))
    fields: dict[str, Any] = {"input_ids": draw(npst.arrays(np.int64, tokens, elements=IDS))}
    if draw(st.booleans()):
        fields["attention_mask"] = draw(npst.arrays(np.int64, tokens, elements=st.integers(0, 1)))
    if draw(st.booleans()):
        fields["labels"] = draw(npst.arrays(np.int64, tokens, elements=st.one_of(st.just(-100), IDS)))
    return Record(**fields)


@given(records())
def test_a_record_comes_back_from_its_bytes(record: Record) -> None:
    again = Record.from_bytes(record.to_bytes())
    assert again.text == record.text
    for name in ("input_ids", "attention_mask", "labels"):
        assert (getattr(again, name) is None) == (getattr(record, name) is None)
        np.testing.assert_array_equal(getattr(again, name), getattr(record, name))


@given(st.one_of(st.binary(max_size=40), records().map(Record.to_bytes)), st.data())
def test_bytes_that_are_read_at_all_are_the_only_ones_of_their_record(data: bytes, draw: st.DataObject) -> None:
    bent = bytearray(data)
    if bent:
        bent[draw.draw(st.integers(0, len(bent) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    try:
        record = Record.from_bytes(bytes(bent))
    except InvalidRequestError:
        return
    assert record.to_bytes() == bytes(bent)


def test_the_bytes_are_those_of_the_page() -> None:
    assert Record(text="é").to_bytes().hex() == "01c3a9"
    whole = Record(input_ids=[1, 258], attention_mask=[1, 0], labels=[-100, 2])
    assert whole.to_bytes().hex() == "0203" + "0100000002010000" + "0100" + "9cffffff02000000"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "\ud800",
        7,
        ["a"],
        {},
        {"input_ids": []},
        {"input_ids": [1.5]},
        {"input_ids": ["a"]},
        {"input_ids": [[1], [2, 3]]},
        {"input_ids": [-1]},
        {"input_ids": [2**31]},
        {"input_ids": [1], "labels": [1, 2]},
        {"input_ids": [1], "labels": [-99]},
        {"input_ids": [1], "attention_mask": [2]},
        {"input_ids": [1], "text": "a"},
        {"input_ids": [1], "secret": 1},
        "x" * MAX_RECORD_BYTES,
    ],
)
def test_what_is_no_record_is_refused_without_its_content(value: Any) -> None:
    with pytest.raises(InvalidRequestError) as e:
        Record.of(value).to_bytes()
    assert e.value.field == "records"
    assert len(e.value.message) < 200


@pytest.mark.parametrize(
    "data", [b"", b"\x01", b"\x03a", b"\x02", b"\x02\x00", b"\x02\x04" + bytes(4), bytes(2**20 + 1)]
)
def test_bytes_that_are_no_record_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        Record.from_bytes(data)


def test_torch_tensors_and_numpy_arrays_are_lists() -> None:
    torch = pytest.importorskip("torch")
    expected = Record(input_ids=[1, 2], attention_mask=[True, False]).to_bytes()
    assert Record(input_ids=torch.tensor([1, 2]), attention_mask=np.array([1, 0])).to_bytes() == expected


@given(st.integers(1, 10**12))
def test_the_default_delta_is_at_most_half_a_unit_and_not_far_below(units: int) -> None:
    delta = default_delta(units)
    assert 1 / (4 * units) < delta <= 1 / (2 * units)
    assert len(f"{delta:e}".split("e")[0].rstrip("0").rstrip(".")) == 1


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"upload_id": "short"}, "upload_id"),
        ({"upload_id": "with spaces and more"}, "upload_id"),
        ({"dataset_id": ""}, "dataset_id"),
        ({"dataset_id": "a\nb"}, "dataset_id"),
        ({"privacy_unit": "person"}, "privacy_unit"),
        ({"target_epsilon": 0.0}, "dataset_id"),
        ({"target_epsilon": float("nan")}, "dataset_id"),
        ({"target_delta": 0.2}, "target_delta"),
        ({"target_delta": 0.0}, "target_delta"),
        ({"num_records": 0, "num_slots": 0}, "records"),
        ({"num_slots": 9}, "records"),
        ({"num_slots": 4}, "unit_ids"),
    ],
)
def test_what_cannot_be_registered_names_its_field(change: dict[str, Any], field: str) -> None:
    good = {
        "upload_id": "upload-1",
        "dataset_id": "d",
        "privacy_unit": "datum",
        "target_epsilon": 8.0,
        "target_delta": 0.1,
        "truncate": False,
        "num_records": 5,
        "num_slots": 5,
    }
    NewDataset(**good)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError) as e:
        NewDataset(**{**good, **change})  # type: ignore[arg-type]
    assert e.value.field == field
