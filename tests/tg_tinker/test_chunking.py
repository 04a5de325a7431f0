import logging
from concurrent.futures import Future

import numpy as np
import pytest

from tg_tinker.chunking import Joined, chunks, combined, estimated_bytes
from tg_tinker.errors import ServerError
from tg_tinker.types import ForwardBackwardOutput
from tg_tinker.types.datum import Datum, ModelInput, TensorData


def datum(n=1):
    return Datum(ModelInput.from_ints([1] * n), {"target_tokens": [1] * n, "weights": [1.0] * n})


def test_parts_are_consecutive_and_bounded():
    data = [datum() for _ in range(2500)]
    assert chunks(data) == [slice(0, 1024), slice(1024, 2048), slice(2048, 2500)]
    assert chunks(data[:1024]) == [slice(0, 1024)]
    assert chunks([]) == [slice(0, 0)]


def test_bytes_bound_parts_too_and_a_large_datum_stands_alone():
    small, large = datum(10), datum(1000)
    assert estimated_bytes(small) == 10 * (8 + 8 + 4)
    assert chunks([small, large, small, small], most_bytes=500) == [slice(0, 1), slice(1, 2), slice(2, 4)]


def test_a_sparse_tensor_counts_what_it_stores():
    rows = TensorData(
        [1.0], dtype="float32", shape=[4, 10**6], sparse_crow_indices=[0, 0, 0, 0, 1], sparse_col_indices=[7]
    )
    d = Datum(ModelInput.from_ints([1] * 4), {"weights": rows})
    assert estimated_bytes(d) < 200


def output(loss, kind="ArrayRecord", n=1, **metrics):
    logprobs = {"logprobs": TensorData([loss], dtype="float32")}
    return ForwardBackwardOutput(loss, "sha256:a", f"sha256:{loss}", 3, 1.0, metrics, kind, [logprobs] * n)


def test_outputs_are_one_in_order_and_metrics_are_reduced():
    whole = combined(
        [output(1.0, **{"loss:sum": 1.0, "x:mean": 1.0}), output(2.0, n=3, **{"loss:sum": 2.0, "x:mean": 2.0})]
    )
    assert whole.loss == 3.0
    assert whole.metrics == {"loss:sum": 3.0, "x:mean": 1.75}
    assert [o["logprobs"].data for o in whole.loss_fn_outputs] == [[1.0], [2.0], [2.0], [2.0]]
    assert whole.num_tokens == 6
    assert whole.batch_hash.startswith("sha256:")
    assert whole.gradient_hash != combined([output(2.0), output(1.0)]).gradient_hash


def test_outputs_of_different_types_are_warned_of(caplog):
    caplog.set_level(logging.WARNING)
    assert combined([output(1.0), output(1.0, kind="Other")]).loss_fn_output_type == "ArrayRecord"
    assert "Other" in caplog.text


def test_one_part_is_itself():
    one = output(1.0)
    assert combined([one]) is one


class Part:
    name = "forward_backward"

    def __init__(self, future_id):
        self.future_id, self.status, self.outcome, self.watchers = future_id, "pending", Future(), 0

    def end(self, status, value):
        self.status = status
        (self.outcome.set_exception if isinstance(value, Exception) else self.outcome.set_result)(value)

    def watch(self):
        self.watchers += 1

    def unwatch(self):
        self.watchers -= 1

    def cancel(self):
        return True


def test_parts_end_as_one():
    parts = [Part("r.1"), Part("r.2")]
    joined = Joined(parts, sum)
    assert (joined.future_id, joined.status) == ("r.2", "pending")
    joined.watch()
    assert [p.watchers for p in parts] == [1, 1]
    joined.unwatch()
    parts[0].end("completed", 1)
    assert joined.status == "running"
    assert not joined.outcome.done()
    parts[1].end("completed", 2)
    assert (joined.status, joined.outcome.result()) == ("completed", 3)
    assert [p.watchers for p in parts] == [0, 0]


def test_the_first_failure_is_that_of_all():
    parts = [Part("r.1"), Part("r.2"), Part("r.3")]
    joined = Joined(parts, sum)
    parts[1].end("failed", ServerError("second"))
    assert joined.status == "failed"
    with pytest.raises(ServerError, match="second"):
        joined.outcome.result()
    parts[0].end("failed", ServerError("first"))
    parts[2].end("completed", 1)
    with pytest.raises(ServerError, match="second"):
        joined.outcome.result()


def test_nothing_to_wait_for_is_an_outcome_at_once():
    joined = Joined([], lambda outputs: outputs)
    assert (joined.outcome.result(timeout=0), joined.status, joined.future_id) == ([], "completed", "")


def test_only_a_single_part_can_be_cancelled():
    assert Joined([Part("r.1")], sum).cancel()
    assert not Joined([Part("r.1"), Part("r.2")], sum).cancel()


def test_what_cannot_be_combined_is_an_error_for_whoever_waits():
    part = Part("r.1")
    joined = Joined([part], lambda _: 1 / 0)
    part.end("completed", 1)
    with pytest.raises(ZeroDivisionError):
        joined.outcome.result()
    assert joined.status == "failed"


def test_means_do_not_depend_on_the_cut():
    values = np.arange(7.0)
    for cut in (1, 3, 6):
        parts = [output(0.0, n=len(p), **{"x:mean": p.mean()}) for p in np.split(values, [cut])]
        assert combined(parts).metrics["x:mean"] == pytest.approx(3.0)
