import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tg_tinker.errors import InvalidRequestError
from tg_tinker.proto.v1.common_pb2 import Tensor
from tg_tinker.wire.tensors import tensor_from_proto, tensor_to_proto

DTYPES = st.sampled_from(["int64", "int32", "uint8", "bool", "float64", "float32", "float16"])


@given(hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
def test_a_tensor_survives_the_wire(array):
    back = tensor_from_proto(tensor_to_proto(array), field="x")
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


def test_bytes_are_little_endian_whatever_the_array_is():
    assert tensor_to_proto(np.array([1], dtype=">i8")).data == b"\x01" + bytes(7)


def test_a_strided_array_is_sent_in_row_major_order():
    array = np.arange(6).reshape(2, 3).T
    assert (tensor_from_proto(tensor_to_proto(array), field="x") == array).all()


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor(dtype="object", shape=[1], data=bytes(8)),
        Tensor(dtype="int64", shape=[2], data=bytes(8)),
        Tensor(dtype="int64", shape=[-1], data=bytes(8)),
        Tensor(dtype="int64", shape=[-1, -1], data=bytes(8)),
        Tensor(dtype="int64", shape=[2**40, 2**40], data=bytes(8)),
        Tensor(dtype="int64", shape=[0, 2**62, 2**62], data=b""),
        Tensor(dtype="int64", shape=[1] * 9, data=bytes(8)),
        Tensor(dtype="", shape=[], data=b""),
    ],
)
def test_an_impossible_tensor_is_refused_by_name(tensor):
    with pytest.raises(InvalidRequestError) as caught:
        tensor_from_proto(tensor, field="batch.labels")
    assert caught.value.field == "batch.labels"
