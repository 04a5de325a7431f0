import asyncio
import threading
import time

import pytest

from tg_tinker import (
    FutureCancelledError,
    FutureTimeoutError,
    InvalidRequestError,
    ResourceNotFoundError,
    TrainingConfig,
)

BATCH = {"input_ids": [[1, 2, 3]]}


@pytest.fixture
def tc(service):
    return service.create_training_client(TrainingConfig(model_ref="sum"))


def test_a_result_comes_and_stays_the_same_object(tc):
    future = tc.forward_backward(BATCH)
    result = future.result()
    assert result.num_tokens == 3
    assert future.result() is result
    assert future.result(timeout=0) is result
    assert asyncio.run(future.result_async()) is result


def test_a_timeout_names_the_future_and_the_operation_goes_on(tc, server):
    server.gate.clear()
    future = tc.forward_backward(BATCH)
    with pytest.raises(FutureTimeoutError) as caught:
        future.result(timeout=0.001)
    assert caught.value.future_id == future.id
    assert caught.value.timeout == 0.001
    assert isinstance(caught.value, TimeoutError)
    assert not future.wait(0.05)
    server.gate.set()
    assert future.wait(10)
    assert future.result().num_tokens == 3


def test_the_status_follows_the_server_and_can_be_read_or_called(tc, server):
    server.gate.clear()
    future = tc.forward_backward(BATCH)
    while not server.seen("ForwardBackward"):
        time.sleep(0.005)
    assert future.status == "pending"
    assert future.status() == "pending"
    assert not future.is_done()
    assert not future.is_success()
    assert future.get_error() is None
    server.gate.set()
    assert future.wait(10)
    assert (future.status, future.status()) == ("completed", "completed")
    assert future.is_done()
    assert future.is_success()
    assert not future.is_failed()


def test_done_is_learned_by_asking_without_waiting_for_the_result(tc):
    future = tc.forward_backward(BATCH)
    deadline = time.monotonic() + 10
    while not future.done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert future.is_success()


def test_a_failure_is_raised_and_readable(tc):
    future = tc.forward_backward({"input_ids": [[-5]]})
    with pytest.raises(InvalidRequestError) as caught:
        future.result()
    assert caught.value.field == "batch.input_ids"
    assert future.get_error() is caught.value
    assert future.exception() is caught.value
    assert future.is_failed()
    assert future.status == "failed"
    assert future.wait(0)


def test_a_future_can_be_awaited(tc):
    async def main():
        future = await tc.forward_backward_async(BATCH)
        step = await tc.optim_step_async()
        return await future, await step, await step.result_async(timeout=60)

    result, step, again = asyncio.run(main())
    assert result.num_tokens == 3
    assert step.step == 1
    assert again is step


def test_cancelling_an_await_leaves_the_operation_alone(tc, server):
    server.gate.clear()
    future = tc.forward_backward(BATCH)

    async def give_up():
        with pytest.raises(FutureTimeoutError):
            await future.result_async(timeout=0.05)
        task = asyncio.ensure_future(future.result_async())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    server.gate.set()
    assert future.result(10).num_tokens == 3


def test_cancelling_a_queued_pass_leaves_no_effect(tc, server):
    server.gate.clear()
    kept = tc.forward_backward({"input_ids": [[10]]})
    dropped = tc.forward_backward({"input_ids": [[1000]]})
    step = tc.optim_step()
    assert dropped.cancel()
    assert dropped.cancel()
    server.gate.set()
    assert step.result(10).grad_norm == 10.0
    assert kept.is_success()
    assert dropped.status == "cancelled"
    assert dropped.is_done()
    assert not dropped.is_failed()
    with pytest.raises(FutureCancelledError) as caught:
        dropped.result()
    assert caught.value.future_id == dropped.id


def test_what_has_happened_cannot_be_cancelled(tc):
    future = tc.forward_backward(BATCH)
    future.result()
    assert not future.cancel()
    assert future.is_success()


def test_many_waiters_share_one_poll(tc, server):
    server.gate.clear()
    future = tc.forward_backward(BATCH)
    results = []
    waiters = [threading.Thread(target=lambda: results.append(future.result(20))) for _ in range(8)]
    for waiter in waiters:
        waiter.start()
    time.sleep(0.3)
    assert len(server.seen("GetFuture")) == 1
    server.gate.set()
    for waiter in waiters:
        waiter.join(20)
    assert len({id(r) for r in results}) == 1
    assert len(results) == 8


def test_nobody_asks_for_a_future_that_nobody_waits_for(tc, server):
    tc.forward_backward(BATCH)
    tc.optim_step()
    time.sleep(0.3)
    assert len(server.executed) == 2
    assert server.seen("GetFuture") == []


def test_a_future_is_found_again_by_its_id(tc, service, server):
    server.gate.clear()
    future = tc.forward_backward(BATCH)
    other = tc.optim_step()
    while len(server.seen("OptimStep")) < 1:
        time.sleep(0.005)
    again, cancelled = service.get_future(future.id), service.get_future(other.future_id)
    assert (again.id, again.operation, again.status) == (future.id, "forward_backward", "pending")
    assert cancelled.cancel()
    server.gate.set()
    assert again.result(10) == future.result(10)
    assert service.get_future(future.id).result() == future.result()
    with pytest.raises(FutureCancelledError):
        other.result(10)


def test_a_future_that_never_was_is_not_found(tc, service):
    with pytest.raises(ResourceNotFoundError):
        service.get_future(f"{tc.id}.99")
    with pytest.raises(ResourceNotFoundError):
        service.get_future("run_77.1")
