"""Datasets on the wire: pairs that undo each other, ids that are ids."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.rpc.raw_client import batch
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.records import Budget, DatasetInfo, NewDataset
from tg_tinker.wire import datasets as wire
from tg_tinker.wire.call_messages import call_from_proto, call_to_proto
from tg_tinker.wire.calls import Pass, Position

REAL = st.floats(1e-9, 1e9)
COUNT = st.integers(0, 2**60)


@given(st.builds(DatasetInfo, dataset_id=st.text(), privacy_unit=st.text(), num_slots=COUNT, num_units=COUNT,
                 num_records=COUNT, truncate=st.booleans(), target_epsilon=REAL | st.just(float("inf")),
                 target_delta=REAL, epsilon_spent=REAL,
                 created=st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
                 ))  # fmt: skip
def test_a_description_comes_back(info: DatasetInfo) -> None:
    assert wire.dataset_from_proto(wire.dataset_to_proto(info)) == info


@given(st.builds(Budget, dataset_id=st.text(), epsilon_spent=REAL, target_epsilon=REAL, target_delta=REAL))
def test_a_budget_comes_back(budget: Budget) -> None:
    assert wire.budget_from_proto(wire.budget_to_proto(budget)) == budget


@given(st.integers(1, 1000), st.integers(1, 1000), st.booleans())
def test_what_is_asked_for_comes_back(slots: int, more: int, truncate: bool) -> None:
    new = NewDataset(
        upload_id="upload-1", dataset_id="d", privacy_unit="user", target_epsilon=float("inf"), target_delta=1e-4,
        truncate=truncate, num_records=slots + more, num_slots=slots,
    )  # fmt: skip
    assert wire.new_dataset_from_proto(wire.new_dataset_to_proto(new)) == new


@given(st.lists(st.binary(min_size=16, max_size=16)))
def test_record_ids_come_back(ids: list[bytes]) -> None:
    shown = wire.record_ids_from_bytes(b"".join(ids))
    assert wire.split_record_ids(wire.record_ids_to_bytes(shown)) == ids


@pytest.mark.parametrize(
    "ids", ["rec_" + "0" * 32, ["rec_" + "0" * 30], ["0" * 32], ["rec_" + "G" * 32], ["rec_" + "A" * 32], [7]]
)
def test_what_is_no_record_id_is_refused(ids: list[str]) -> None:
    with pytest.raises(InvalidRequestError, match=r"dataset\.record_ids"):
        wire.record_ids_to_bytes(ids)


def test_half_an_id_is_refused() -> None:
    with pytest.raises(InvalidRequestError):
        wire.split_record_ids(bytes(17))


@pytest.mark.parametrize("train", [True, False])
def test_a_drawn_pass_comes_back_and_carries_no_batch(train: bool) -> None:
    message = call_to_proto(Pass.drawn_from("notes", train=train), Position(run_id="r", seq=1))
    assert not message.HasField("input_ids")
    again = call_from_proto(message)
    assert isinstance(again, Pass)
    assert (again.dataset_id, again.train, again.batch.num_records, again.units) == ("notes", train, 0, None)
    message.MergeFrom(call_to_proto(batch(), Position(run_id="r", seq=1)))
    with pytest.raises(InvalidRequestError, match="not both"):
        call_from_proto(message)
