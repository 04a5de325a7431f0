"""The plaintext is safetensors, and the reader believes nothing it says about itself."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from tests.support.work import peak_bytes
from tg_tinker_server.artifacts.tensors import DTYPES, LARGEST_HEADER_BYTES, Array, FormatError, parse, serialize

Json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def packed(tensors: dict[str, Array], state: dict[str, Any]) -> bytes:
    return b"".join(serialize(tensors, state))


def example() -> dict[str, Array]:
    return {
        "layer.lora_A": np.arange(12, dtype=np.float32).reshape(3, 4),
        "empty": np.zeros((0, 5), np.float16),
        "scalar": np.array(2.5),
        "flag": np.array([True, False, True]),
        "turned": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">i4"),
        "strided": np.arange(10, dtype=np.uint8)[::3],
    }


def crafted(header: Any, data: bytes = b"") -> memoryview:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return memoryview(len(text).to_bytes(8, "little") + text + data)


def entry(start: int, end: int, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


META = {"__metadata__": {"state": "{}"}}


def test_what_was_written_is_read_back_exactly() -> None:
    tensors, state = parse(memoryview(packed(example(), {"step": 3})))
    assert state == {"step": 3}
    assert set(tensors) == set(example())
    for name, array in example().items():
        assert tensors[name].shape == array.shape
        assert tensors[name].dtype == array.dtype.newbyteorder("<")
        np.testing.assert_array_equal(tensors[name], array)


def test_the_safetensors_library_reads_ours_and_we_read_its() -> None:
    ours = safetensors.numpy.load(packed(example(), {"step": 3}))
    for name, array in example().items():
        np.testing.assert_array_equal(ours[name], array)
    contiguous = {k: np.ascontiguousarray(v.astype(v.dtype.newbyteorder("="))) for k, v in example().items()}
    theirs = safetensors.numpy.save(contiguous, metadata={"state": '{"step":3}'})
    tensors, state = parse(memoryview(theirs))
    assert state == {"step": 3}
    for name, array in contiguous.items():
        np.testing.assert_array_equal(tensors[name], array)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_dtype_round_trips_bit_for_bit(dtype: str) -> None:
    array = np.frombuffer(bytes([0, 1] * 32), dtype=dtype)
    (back,) = parse(memoryview(packed({"x": array}, {})))[0].values()
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


def test_not_a_number_and_negative_zero_keep_their_bits() -> None:
    array = np.array([np.nan, -0.0, np.inf, np.float32(1e-45)], np.float32)
    assert parse(memoryview(packed({"x": array}, {})))[0]["x"].tobytes() == array.tobytes()


@given(st.dictionaries(st.text(), Json, max_size=4))
def test_any_json_state_round_trips(state: dict[str, Any]) -> None:
    assert parse(memoryview(packed({}, state)))[1] == state


@pytest.mark.parametrize(
    "bad", [{"x": float("nan")}, {"x": float("inf")}, {"x": {1, 2}}, {"x": b"bytes"}, {"x": np.float32(1)}]
)
def test_a_state_that_is_not_json_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not plain JSON"):
        packed({}, bad)


def test_a_state_nested_without_end_is_refused() -> None:
    state: dict[str, Any] = {}
    state["again"] = state
    with pytest.raises(ValueError, match="not plain JSON"):
        packed({}, state)


@pytest.mark.parametrize("bad", [np.array([object()]), np.array(["text"]), np.array([1j]), np.array([1], "M8[s]")])
def test_arrays_that_are_not_plain_numbers_are_refused(bad: Array) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        packed({"x": bad}, {})


def test_the_metadatas_name_is_reserved() -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        packed({"__metadata__": np.zeros(1)}, {})


def test_every_truncation_is_refused() -> None:
    whole = packed({"x": np.arange(5, dtype=np.float32)}, {"step": 1})
    for size in range(len(whole)):
        with pytest.raises(FormatError):
            parse(memoryview(whole[:size]))


@pytest.mark.parametrize("claim", [2**63, 2**64 - 1, 2**40, LARGEST_HEADER_BYTES + 1])
def test_a_header_that_claims_too_much_is_refused_before_anything_is_allocated(claim: int) -> None:
    file = memoryview(claim.to_bytes(8, "little") + b"{}" + bytes(100))

    def refuse() -> None:
        with pytest.raises(FormatError):
            parse(file)

    assert peak_bytes(refuse, tries=9) < 100_000


def test_a_header_over_the_limit_is_refused_even_if_it_is_there() -> None:
    text = json.dumps(META).encode()
    parse(crafted(text.ljust(1000)))
    with pytest.raises(FormatError):
        parse(crafted(text.ljust(LARGEST_HEADER_BYTES + 8)))


def test_a_tensor_that_claims_too_much_is_refused_before_anything_is_allocated() -> None:
    headers = [
        {**META, "x": entry(0, 2**40)},
        {**META, "x": {"dtype": "F64", "shape": [2**40], "data_offsets": [0, 2**43]}},
        {**META, "x": {"dtype": "F64", "shape": [2**61, 8], "data_offsets": [0, 0]}},
        {**META, "x": {"dtype": "F32", "shape": [2**62, 2**62, 4], "data_offsets": [0, 16]}},
    ]

    def refuse() -> None:
        for header in headers:
            with pytest.raises(FormatError):
                parse(crafted(header, bytes(16)))

    assert peak_bytes(refuse, tries=9) < 200_000


@pytest.mark.parametrize(
    "file",
    [
        pickle.dumps({"x": [1]}),
        len(pickle.dumps("x")).to_bytes(8, "little") + pickle.dumps("x"),
        len(json.dumps(META)).to_bytes(8, "little") + json.dumps(META).encode() + pickle.dumps("x"),
    ],
)
def test_pickle_is_refused_wherever_it_stands(file: bytes) -> None:
    with pytest.raises(FormatError):
        parse(memoryview(file))


def test_a_torch_style_zip_is_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x": 1}))
    with pytest.raises(FormatError):
        parse(memoryview(file.getvalue()))


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (META, b"x"),
        ({}, b""),
        ({"__metadata__": {}}, b""),
        ({"__metadata__": {"state": {}}}, b""),
        ({"__metadata__": {"state": "[]"}}, b""),
        ({"__metadata__": {"state": '{"a":NaN}'}}, b""),
        ({"__metadata__": {"state": '{"a":1,"a":2}'}}, b""),
        ({"__metadata__": {"state": "{}", "more": ""}}, b""),
        ({**META, "x": entry(0, 1), "y": entry(0, 1)}, b"x"),
        ({**META, "x": entry(0, 1), "y": entry(2, 3)}, b"xyz"),
        ({**META, "x": entry(1, 2)}, b"xy"),
        ({**META, "x": entry(0, 1)}, b"xy"),
        ({**META, "x": entry(2, 1)}, b"xy"),
        ({**META, "x": entry(-1, 1)}, b"xy"),
        ({**META, "x": entry(0, 2, shape=[3])}, b"xy"),
        ({**META, "x": entry(0, 2, shape=[-1, -2])}, b"xy"),
        ({**META, "x": entry(0, 2, shape=[True, 2])}, b"xy"),
        ({**META, "x": entry(0, 2, shape=2)}, b"xy"),
        ({**META, "x": entry(0, 1, shape=[1] * 65)}, b"x"),
        ({**META, "x": entry(0, 0, shape=[0, 2**62, 2**62])}, b""),
        ({**META, "x": entry(0, 8, dtype="O", shape=[1])}, b"x" * 8),
        ({**META, "x": entry(0, 2, dtype="BF16", shape=[1])}, b"xy"),
        ({**META, "x": {**entry(0, 1), "more": 1}}, b"x"),
        ({**META, "x": 1}, b""),
        (b"[]", b""),
        (b"\xff\xfe", b""),
        (json.dumps(META).encode("utf-16"), b""),
        (b'{"__metadata__":{"state":"{}"},"__metadata__":{"state":"{}"}}', b""),
        (b"[" * 100_000, b""),
    ],
)  # fmt: skip
def test_a_file_that_is_not_exactly_right_is_refused(header: Any, data: bytes) -> None:
    with pytest.raises(FormatError):
        parse(crafted(header, data))
