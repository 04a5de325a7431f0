"""Envelopes travel through Flower unchanged, and nothing else is taken for one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.flower import records
from tg_tinker.federated.flower.records import LARGEST_HEADER, from_content, to_content
from tg_tinker.federated.messages import DTYPES, Envelope, array_digest

KEY = Ed25519PrivateKey.generate()


def over_the_wire(content: RecordDict) -> RecordDict:
    """Through Flower's own bytes."""
    proto = recorddict_to_proto(content)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))


def envelope(arrays: dict[str, npt.NDArray[Any]] | None = None, **facts: Any) -> Envelope:
    message = Envelope(
        kind="train",
        direction="request",
        job="ab" * 32,
        site="site-1",
        round=3,
        attempt=2,
        facts=facts,
        arrays=arrays or {},
    )
    return message.signed(KEY)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 4), (2, 0, 5)])
def test_every_type_and_shape_arrives_as_it_was_signed(dtype: str, shape: tuple[int, ...]) -> None:
    drawn = np.random.default_rng(1).integers(0, 256, size=(*shape, 8), dtype=np.uint8)
    value = drawn.view(dtype)[..., 0].reshape(shape)  # any bit pattern, NaN payloads included
    sent = envelope({"w": value, "other": np.zeros(2, "<f4")})
    received = from_content(over_the_wire(to_content(sent)))
    received.verify(KEY.public_key())
    assert received.signature == sent.signature
    assert received.signed_bytes() == sent.signed_bytes()
    assert received.arrays["w"].dtype.str == dtype
    assert received.arrays["w"].shape == shape
    assert received.arrays["w"].tobytes() == value.tobytes()


def test_big_endian_and_strided_arrays_arrive_with_their_values() -> None:
    value = np.arange(12, dtype=">f4").reshape(3, 4)[:, ::2]
    received = from_content(over_the_wire(to_content(envelope({"w": value}))))
    received.verify(KEY.public_key())
    np.testing.assert_array_equal(received.arrays["w"], [[0, 2], [4, 6], [8, 10]])


def test_a_number_and_an_array_of_one_number_are_signed_differently() -> None:
    assert array_digest(np.array(1.0)) != array_digest(np.array([1.0]))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(facts=st.dictionaries(st.text(), json_values, max_size=4))
def test_any_facts_arrive_as_they_were_signed(facts: dict[str, Any]) -> None:
    sent = envelope(**{"f": facts})
    received = from_content(over_the_wire(to_content(sent)))
    received.verify(KEY.public_key())
    assert received.facts == {"f": facts}
    assert (received.kind, received.direction, received.job) == ("train", "request", "ab" * 32)
    assert (received.site, received.round, received.attempt) == ("site-1", 3, 2)


def test_an_array_in_many_envelopes_is_held_once() -> None:
    weights = np.ones(1000, "<f4")
    shared: dict[int, Array] = {}
    contents = [to_content(envelope({"w": weights}), shared=shared) for _ in range(3)]
    assert len({id(c.array_records["arrays"]["w"].data) for c in contents}) == 1
    for content in contents:
        from_content(content).verify(KEY.public_key())


def test_types_that_are_not_sent_are_refused_at_the_sender() -> None:
    message = Envelope(kind="train", direction="reply", job="", site="s", arrays={"w": np.ones(2, "<f2")})
    with pytest.raises(FederationRefusedError, match="float16"):
        to_content(message)


def head(content: RecordDict) -> ConfigRecord:
    record = content["envelope"]
    assert isinstance(record, ConfigRecord)
    return record


def with_header(**changes: Any) -> Callable[[RecordDict], None]:
    """The header with other fields; ``...`` removes one."""

    def change(content: RecordDict) -> None:
        raw = head(content)["header"]
        assert isinstance(raw, bytes)
        fields = {**json.loads(raw), **changes}
        head(content)["header"] = rfc8785.dumps({k: v for k, v in fields.items() if v is not ...})

    return change


def with_raw_header(raw: object) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        head(content)["header"] = raw  # type: ignore[assignment]

    return change


def with_array(**changes: Any) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        array = content.array_records["arrays"]["w"]
        for name, value in changes.items():
            setattr(array, name, value)

    return change


def with_record(name: str, record: ConfigRecord | ArrayRecord | MetricRecord | None) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        if record is None:
            del content[name]
        else:
            content[name] = record

    return change


def extra_field(content: RecordDict) -> None:
    head(content)["more"] = 1


GOOD = rfc8785.dumps(
    {
        "format": "tg-tinker/federated-envelope/v1",
        "kind": "k",
        "direction": "reply",
        "job": "",
        "site": "s",
        "round": 0,
        "attempt": 0,
        "facts": {},
    }
)

BROKEN = {
    "an additional record": with_record("more", ConfigRecord({"a": 1})),
    "no arrays": with_record("arrays", None),
    "no envelope": with_record("envelope", None),
    "arrays of another kind": with_record("arrays", MetricRecord({"a": 1})),
    "an envelope of another kind": with_record("envelope", ArrayRecord()),
    "an additional field": extra_field,
    "a header as text": with_raw_header("{}"),
    "an empty header": with_raw_header(b""),
    "a list": with_raw_header(b"[]"),
    "a space in the header": with_raw_header(GOOD.replace(b":", b": ", 1)),
    "a name twice": with_raw_header(GOOD.replace(b"{", b'{"attempt":0,', 1)),
    "NaN": with_raw_header(GOOD.replace(b'"attempt":0', b'"attempt":NaN')),
    "a lone surrogate": with_raw_header(GOOD.replace(b'"job":""', b'"job":"\\ud800"')),
    "a number of 400 digits": with_raw_header(GOOD.replace(b'"attempt":0', b'"attempt":1' + b"0" * 400)),
    "depth": with_raw_header(b"[" * 100_000),
    "a header too large": with_raw_header(b" " * (LARGEST_HEADER + 1)),
    "an unknown header field": with_header(more=1),
    "a missing header field": with_header(kind=...),
    "another format": with_header(format="tg-tinker/federated-envelope/v2"),
    "another direction": with_header(direction="sideways"),
    "a round below zero": with_header(round=-1),
    "a round that is a truth value": with_header(round=True),
    "a round that is a text": with_header(round="1"),
    "an attempt too large": with_header(attempt=2**31),
    "a kind too long": with_header(kind="k" * 65),
    "a site that is a number": with_header(site=1),
    "facts that are a list": with_header(facts=[]),
    "another storage": with_array(stype="numpy.ndarray"),
    "objects": with_array(dtype="|O"),
    "a type that is not sent": with_array(dtype="<f2", shape=(4,)),
    "big endian": with_array(dtype=">f4"),
    "a shape too large": with_array(shape=(3,)),
    "a shape below zero": with_array(shape=(-1, -2)),
    "a shape of floats": with_array(shape=(2.0,)),
    "a shape of truth values": with_array(shape=(True, 2)),
    "too many axes": with_array(shape=(2, *[1] * 8)),
    "sizes beyond NumPy's beside a size of 0": with_array(shape=(0, *[2**31 - 1] * 3), data=b""),
    "a size beyond NumPy's after a size of 0": with_array(shape=(0, 2**63), data=b""),
    "bytes missing": with_array(data=b"\0" * 7),
}


@pytest.mark.parametrize("name", BROKEN)
def test_anything_else_is_refused(name: str) -> None:
    content = over_the_wire(to_content(envelope({"w": np.ones(2, "<f4")})))
    from_content(content)
    BROKEN[name](content)
    with pytest.raises(FederationRefusedError) as refused:
        from_content(content)
    assert refused.value.details["reason"] == "bad_update"


def test_what_is_too_large_is_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    large = envelope({"a": np.ones(4, "<f4"), "b": np.ones(4, "<f4")}, text="x" * 500)
    content = over_the_wire(to_content(large))
    for limit, value in (("MOST_ARRAYS", 1), ("LARGEST_ARRAYS", 31), ("LARGEST_HEADER", 400)):
        with monkeypatch.context() as patch:
            patch.setattr(records, limit, value)
            for read in (lambda: to_content(large), lambda: from_content(content)):
                with pytest.raises(FederationRefusedError) as refused:
                    read()
                assert refused.value.details["reason"] == "bad_update"
    for limit, value in (("MOST_ARRAYS", 2), ("LARGEST_ARRAYS", 32)):
        monkeypatch.setattr(records, limit, value)
    from_content(over_the_wire(to_content(large)))


@pytest.mark.parametrize("signature", [b"", b"\0" * 63, b"\0" * 65, "text", 7])
def test_a_missing_signature_is_refused(signature: Any) -> None:
    content = to_content(envelope())
    head(content)["signature"] = signature
    with pytest.raises(FederationRefusedError) as refused:
        from_content(content)
    assert refused.value.details["reason"] == "bad_signature"


def test_whatever_a_courier_changes_breaks_the_signature() -> None:
    for change in (
        with_header(site="site-2"),
        with_header(round=4),
        with_header(facts={"a": 1}),
        with_array(data=b"\1" * 8),
    ):
        content = over_the_wire(to_content(envelope({"w": np.ones(2, "<f4")})))
        change(content)
        with pytest.raises(FederationRefusedError) as refused:
            from_content(content).verify(KEY.public_key())
        assert refused.value.details["reason"] == "bad_signature"
