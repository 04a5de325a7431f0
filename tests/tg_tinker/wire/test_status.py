import grpc
import pytest
from google.rpc import code_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker import errors
from tg_tinker.errors import (
    AuthenticationError,
    DPBudgetExceededError,
    DPUnsupportedError,
    InvalidRequestError,
    RateLimitedError,
    ServerError,
    TGTinkerError,
)
from tg_tinker.wire.status import TABLE, error_from_status, error_to_status, grpc_code, is_ours

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, TGTinkerError)]
VALUES = {
    "retry_after": st.floats(0, 1e6),
    "timeout": st.none() | st.floats(0, 1e6),
    "current_epsilon": st.floats(0),
    "max_epsilon": st.floats(0),
    "delta": st.floats(0, 1),
}


@st.composite
def any_error(draw):
    cls = draw(st.sampled_from(sorted(TABLE, key=lambda c: c.code)))
    text = st.text(st.characters(codec="utf-8"), max_size=60)
    values = {name: draw(VALUES.get(name, text)) for name in TABLE[cls][1]}
    details = draw(st.dictionaries(st.sampled_from(["hint", "roles", "n"]), text | st.integers(-99, 99)))
    return cls(draw(text), details=details, request_id=draw(st.none() | st.just("req-1")), **values)


def test_every_error_class_has_a_row():
    assert set(CLASSES) == set(TABLE)


def test_no_two_classes_share_a_status_or_a_code():
    assert len({row[0] for row in TABLE.values()}) == len(TABLE)
    assert len({cls.code for cls in TABLE}) == len(TABLE)


@given(any_error())
def test_an_error_survives_the_wire(error):
    back = error_from_status(status_pb2.Status.FromString(error_to_status(error).SerializeToString()))
    assert type(back) is type(error)
    assert back.message == error.message
    assert back.details == error.details
    assert back.request_id == error.request_id
    for name in TABLE[type(error)][1]:
        assert getattr(back, name) == getattr(error, name)


def test_a_subclass_without_a_row_of_its_own_travels_as_its_base():
    class Special(InvalidRequestError):
        pass

    assert grpc_code(Special("no")) is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(error_from_status(error_to_status(Special("no", field="f"))), InvalidRequestError)


def test_a_huge_error_still_fits_into_trailing_metadata():
    error = InvalidRequestError("x" * 100_000, field="f" * 9_000, constraint="c", details={"much": ["y"] * 99_999})
    status = error_to_status(error)
    assert status.ByteSize() < 6_000
    back = error_from_status(status)
    assert isinstance(back, InvalidRequestError)
    assert back.constraint == "c"


def test_a_server_error_marked_for_retry_is_unavailable():
    assert grpc_code(ServerError("draining", details={"retry": True})) is grpc.StatusCode.UNAVAILABLE
    assert grpc_code(ServerError("broken")) is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (code_pb2.UNAUTHENTICATED, AuthenticationError),
        (code_pb2.RESOURCE_EXHAUSTED, RateLimitedError),
        (code_pb2.UNIMPLEMENTED, ServerError),
        (code_pb2.DATA_LOSS, ServerError),
    ],
)
def test_a_status_of_somebody_else_becomes_the_nearest_class(code, cls):
    status = status_pb2.Status(code=code, message="from a proxy")
    assert not is_ours(status)
    error = error_from_status(status)
    assert type(error) is cls
    assert error.message == "from a proxy"


def test_unreadable_details_do_not_hide_the_error():
    status = error_to_status(DPBudgetExceededError("over", current_epsilon=3.9, max_epsilon=4.0, delta=1e-5))
    status.details[0].value = b"\xff\xff\xff"
    error = error_from_status(status)
    assert isinstance(error, TGTinkerError)
    assert error.message == "over"


def test_the_tools_of_others_see_the_field_and_the_delay():
    invalid = error_to_status(DPUnsupportedError("no", feature="apply_dp_noise", reason="epsilon is inf"))
    limited = error_to_status(RateLimitedError("full", retry_after=1.5))
    assert any(d.type_url.endswith("google.rpc.BadRequest") for d in invalid.details)
    assert any(d.type_url.endswith("google.rpc.RetryInfo") for d in limited.details)
