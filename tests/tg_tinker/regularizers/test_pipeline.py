import asyncio
import json
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from tg_tinker import telemetry
from tg_tinker.errors import InvalidRequestError
from tg_tinker.regularizers import (
    L1,
    CustomLossOutput,
    RegularizerFailedError,
    RegularizerSpec,
    RegularizerTimeoutError,
    compute,
)


def leaves(*rows):
    return [torch.tensor(r, requires_grad=True) for r in rows]


def base(data, logprobs):
    return sum((x * 0).sum() for x in logprobs) + 2.5, {"mine": 7}


def total(data, logprobs):
    return sum(x.sum() for x in logprobs), {}


def spec(fn, weight=1.0, name="r", **more):
    return RegularizerSpec(fn=fn, weight=weight, name=name, **more)


def test_composition():
    composed = compute([], leaves([10.0, -12.4]), base, [spec(L1(), 0.01, "l1")])
    output = composed.output
    assert composed.total.item() == pytest.approx(2.724, abs=1e-6)
    assert output.loss_total == pytest.approx(2.724, abs=1e-6)
    assert output.regularizers["l1"].value == pytest.approx(22.4, abs=1e-5)
    assert output.regularizers["l1"].contribution == output.regularizer_total == pytest.approx(0.224, abs=1e-6)
    assert output.base_loss.value == 2.5
    assert output.base_loss.custom == {"mine": 7}


def test_without_regularizers_the_total_is_the_loss():
    output = compute([], leaves([1.0, 2.0]), total, [], track_grad_norms=True).output
    assert output.loss_total == output.base_loss.value == 3.0
    assert output.total_grad_norm == output.base_loss.grad_norm == pytest.approx(math.sqrt(2))


def test_parallel_ones_run_at_once_and_sequential_ones_do_not_with_the_same_numbers():
    found = {}
    for parallel in (True, False):
        together = threading.Barrier(3, timeout=30)
        running, most, lock = [0], [0], threading.Lock()

        def one(k, *, together=together if parallel else None, running=running, most=most, lock=lock):
            def fn(data, logprobs):
                with lock:
                    running[0] += 1
                    most[0] = max(most[0], running[0])
                if together is not None:
                    together.wait()  # breaks unless all three are here
                with lock:
                    running[0] -= 1
                return (logprobs[0] * k).sum(), {}

            return spec(fn, 0.5, f"r{k}")

        specs = [one(k) for k in (1, 2, 3)]
        found[parallel] = compute([], leaves([1.0, 2.0]), total, specs, parallel=parallel, max_concurrency=3).output
        assert most[0] == (3 if parallel else 1)
    assert found[True] == found[False]
    assert list(found[True].regularizers) == ["r1", "r2", "r3"]


def test_no_more_run_at_once_than_asked_for():
    running, most, lock = 0, 0, threading.Lock()

    def fn(data, logprobs):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return logprobs[0].sum(), {}

    compute([], leaves([1.0]), total, [spec(fn, name=str(i)) for i in range(5)], max_concurrency=2)
    assert most == 2


def test_in_a_queue_nothing_runs_after_the_first_failure():
    ran = []

    def fails(data, logprobs):
        raise ValueError("no")

    specs = [spec(fails, name="bad"), spec(lambda d, x: ran.append(1) or (x[0].sum(), {}), name="next")]
    with pytest.raises(RegularizerFailedError):
        compute([], leaves([1.0]), total, specs, parallel=False)
    assert ran == []


def test_a_failure_names_the_regularizer_and_its_cause():
    def fails(data, logprobs):
        raise KeyError("no")

    with pytest.raises(RegularizerFailedError) as caught:
        compute([], leaves([1.0]), total, [spec(L1(), name="fine"), spec(fails, name="broken")])
    assert caught.value.name == "broken"
    assert caught.value.details["kind"] == "regularizer_failed"
    assert isinstance(caught.value.__cause__, KeyError)


async def coroutine(data, logprobs):
    await asyncio.sleep(0.01)
    return 2 * logprobs[0].sum(), {}


def future(data, logprobs):
    done = Future()
    done.set_result((2 * logprobs[0].sum(), {}))
    return done


@pytest.mark.parametrize("fn", [coroutine, future])
def test_asynchronous_ones_are_awaited(fn):
    output = compute([], leaves([1.0, 2.0]), total, [spec(fn, async_=True)]).output
    assert output.regularizers["r"].value == 6.0


def test_inside_an_event_loop_too():
    async def main():
        return compute([], leaves([1.0, 2.0]), total, [spec(coroutine, async_=True)]).output

    assert asyncio.run(main()).regularizer_total == 6.0


async def sleepy(data, logprobs):
    await asyncio.sleep(60)


def never(data, logprobs):
    return Future()


@pytest.mark.parametrize("fn", [sleepy, never])
def test_one_that_takes_too_long_fails(fn):
    started = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        compute([], leaves([1.0]), total, [spec(fn, async_=True)], timeout=0.1)
    assert time.monotonic() - started < 30
    assert isinstance(caught.value, RegularizerTimeoutError)


def test_async_means_awaitable():
    with pytest.raises(RegularizerFailedError, match="cannot be awaited"):
        compute([], leaves([1.0]), total, [spec(L1(), async_=True)])


def test_gradient_norms(caplog):
    constant = spec(lambda data, logprobs: (4.0, {}), name="constant")
    specs = [spec(total, 0.1, "sum"), constant]
    output = compute([], leaves([1.0, 2.0], [3.0]), total, specs, track_grad_norms=True).output
    assert output.regularizers["sum"].grad_norm == pytest.approx(1.7320508)
    assert output.regularizers["sum"].grad_norm_weighted == pytest.approx(0.17320508)
    assert output.total_grad_norm == pytest.approx(1.1 * math.sqrt(3))
    assert output.regularizers["constant"].grad_norm == 0.0
    assert "constant has no gradient" in caplog.text


def test_the_gradient_of_the_total_is_the_weighted_sum():
    (x,) = leaves([1.0, 2.0])
    compute(
        [], [x], total, [spec(lambda d, xs: (xs[0].square().sum(), {}), 0.25)], track_grad_norms=True
    ).total.backward()
    assert x.grad.tolist() == [1 + 0.25 * 2, 1 + 0.25 * 4]


def test_json_leaves_out_norms_that_nobody_asked_for():
    text = compute([], leaves([1.0]), total, [spec(L1())]).output.to_json()
    assert "grad_norm" not in text
    assert json.loads(text)["regularizers"]["r"]["contribution"] == 1.0
    tracked = compute([], leaves([1.0]), total, [spec(L1())], track_grad_norms=True).output
    assert json.loads(tracked.to_json())["total_grad_norm"] == 2.0


def test_outputs_of_separate_data_add_up_to_that_of_all():
    def squares(data, logprobs):
        return sum(x.square().sum() for x in logprobs), {}

    rows = ([1.0, 2.0], [3.0])
    specs = [spec(squares, 0.5)]
    whole = compute([], leaves(*rows), total, specs, track_grad_norms=True).output
    parts = [compute([], leaves(r), total, specs, track_grad_norms=True).output for r in rows]
    found = CustomLossOutput.total(parts)
    assert found.loss_total == pytest.approx(whole.loss_total)
    assert found.total_grad_norm == pytest.approx(whole.total_grad_norm)
    assert found.regularizers["r"].grad_norm_weighted == pytest.approx(whole.regularizers["r"].grad_norm_weighted)


def test_observers_hear_of_every_regularizer():
    heard = []
    telemetry.attach("test", lambda event, values: heard.append((event, values.get("name"))))
    try:
        compute([], leaves([1.0]), total, [spec(L1(), name="a"), spec(L1(), name="b")], parallel=False)
        with pytest.raises(RegularizerFailedError):
            compute([], leaves([1.0]), total, [spec(lambda d, x: 1 / 0, name="c")])
    finally:
        telemetry.detach("test")
    assert heard == [
        ("custom_loss.start", None),
        ("regularizer.compute.start", "a"),
        ("regularizer.compute.stop", "a"),
        ("regularizer.compute.start", "b"),
        ("regularizer.compute.stop", "b"),
        ("custom_loss.stop", None),
        ("custom_loss.start", None),
        ("regularizer.compute.start", "c"),
        ("regularizer.compute.exception", "c"),
        ("custom_loss.exception", None),
    ]


def test_observers_hear_of_gradient_norms_that_were_asked_for():
    heard = {}
    telemetry.attach("test", lambda event, values: heard.update({event: values}), "custom_loss.stop")
    try:
        compute([], leaves([1.0, 1.0]), total, [spec(L1(), name="a")], track_grad_norms=True)
    finally:
        telemetry.detach("test")
    norms = heard["custom_loss.stop"]["grad_norms"]
    assert norms == {"a": pytest.approx(2**0.5), "total": pytest.approx(8**0.5)}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"weight": -1}, "weight"),
        ({"weight": math.nan}, "weight"),
        ({"weight": "1"}, "weight"),
        ({"name": ""}, "name"),
        ({"fn": 3}, "fn"),
        ({"async_": 1}, "async_"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_by_field(given, field):
    with pytest.raises(InvalidRequestError) as caught:
        RegularizerSpec(**{"fn": L1(), "weight": 1.0, "name": "r", **given})
    assert caught.value.field == field


def test_names_are_unique():
    with pytest.raises(ValueError, match="two regularizers are named 'r'"):
        compute([], leaves([1.0]), total, [spec(L1()), spec(L1())])


def test_objects_get_their_options():
    class Scaled:
        def compute(self, data, logprobs, *, by):
            return by * logprobs[0].sum(), {"by": by}

    output = compute([], leaves([1.0, 2.0]), total, [spec(Scaled(), opts={"by": 3.0})]).output
    assert output.regularizers["r"].value == 9.0
    assert output.regularizers["r"].custom == {"by": 3.0}


@pytest.mark.parametrize("answer", [torch.ones(2), "text", None])
def test_a_loss_that_is_no_scalar_is_refused(answer):
    with pytest.raises(InvalidRequestError, match="scalar"):
        compute([], leaves([1.0]), lambda d, x: (answer, {}))
    with pytest.raises(InvalidRequestError, match=r"\(scalar, metrics\)"):
        compute([], leaves([1.0]), lambda d, x: x[0].sum())


def test_without_torch_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from tg_tinker.regularizers import compute\n"
        "try: compute([], [], lambda d, x: (1.0, {}))\n"
        "except Exception as e: print(type(e).__name__, e)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert found.stdout.startswith("InvalidRequestError")
    assert "tg-tinker[torch]" in found.stdout


def test_many_pipelines_at_once_do_not_meet():
    def run(k):
        return compute([], leaves([float(k)]), total, [spec(L1(), name=n) for n in "abc"]).output.loss_total

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(8))) == [4.0 * k for k in range(8)]
