"""A lane executes in sequence order, each position at most once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tg_tinker.errors import FutureCancelledError, InvalidRequestError, RateLimitedError, ServerError
from tg_tinker_server.service.lanes import CANCELLED, COMPLETED, FAILED, Lane, Operation, parse_future_id


def crash(operation: Operation, error: Exception) -> ServerError:
    return ServerError(f"{operation.seq} crashed with {type(error).__name__}")


def make_lane(expected: int = 1, max_queue: int = 100) -> Lane:
    return Lane("run_a", expected=expected, max_queue=max_queue, kept=1000, on_crash=crash)


def make(
    seq: int,
    log: list[int],
    *,
    digest: bytes = b"",
    effect: bool = True,
    gate: asyncio.Event | None = None,
    error: Exception | None = None,
) -> Operation:
    async def work(operation: Operation) -> Any:
        if gate is not None:
            await gate.wait()
        operation.commit()
        log.append(operation.seq)
        if error is not None:
            raise error
        return operation.seq * 10

    return Operation("run_a", seq, "op", digest or str(seq).encode(), work, effect=effect)


async def ended(*operations: Operation) -> None:
    await asyncio.wait_for(asyncio.gather(*(o.ended.wait() for o in operations)), 5)


def test_operations_run_in_sequence_order_whatever_order_they_arrive_in() -> None:
    async def go() -> None:
        lane, log = make_lane(), []
        operations = [lane.submit(make(seq, log)) for seq in (3, 1, 5, 2, 4)]
        await ended(*operations)
        assert log == [1, 2, 3, 4, 5]
        assert [o.result for o in operations] == [30, 10, 50, 20, 40]

    asyncio.run(go())


def test_a_retry_gets_the_first_operation_and_a_changed_retry_is_refused() -> None:
    async def go() -> None:
        lane, log = make_lane(), []
        first = lane.submit(make(1, log))
        assert lane.submit(make(1, log)) is first
        await ended(first)
        assert lane.submit(make(1, log)) is first
        assert log == [1]
        with pytest.raises(InvalidRequestError) as caught:
            lane.submit(make(1, log, digest=b"other"))
        assert caught.value.field == "seq"

    asyncio.run(go())


def test_a_failing_or_crashing_operation_does_not_stop_the_lane() -> None:
    async def go() -> None:
        lane, log = make_lane(), []
        bad = lane.submit(make(1, log, error=InvalidRequestError("no", field="x")))
        worse = lane.submit(make(2, log, error=ZeroDivisionError("secret content")))
        good = lane.submit(make(3, log))
        await ended(bad, worse, good)
        assert (bad.status, worse.status, good.status) == (FAILED, FAILED, COMPLETED)
        assert isinstance(worse.error, ServerError)
        assert "secret content" not in str(worse.error)

    asyncio.run(go())


def test_a_waiting_operation_can_be_cancelled_and_a_committed_one_cannot() -> None:
    async def go() -> None:
        lane, log, gate = make_lane(), [], asyncio.Event()
        running = lane.submit(make(1, log, gate=gate))
        waiting = lane.submit(make(2, log))
        last = lane.submit(make(3, log))
        await asyncio.sleep(0)
        assert lane.cancel(2)
        assert lane.cancel(2)
        gate.set()
        await ended(running, waiting, last)
        assert log == [1, 3]
        assert waiting.status == CANCELLED
        assert isinstance(waiting.error, FutureCancelledError)
        assert not lane.cancel(1)
        assert not lane.cancel(99)

    asyncio.run(go())


def test_a_running_operation_cancelled_before_it_commits_leaves_no_effect() -> None:
    async def go() -> None:
        lane, log, gate = make_lane(), [], asyncio.Event()
        running = lane.submit(make(1, log, gate=gate))
        await asyncio.sleep(0.01)
        assert running.status == "running"
        assert lane.cancel(1)
        gate.set()
        await ended(running)
        assert running.status == CANCELLED
        assert log == []

    asyncio.run(go())


def test_a_running_sample_is_stopped_at_once_when_cancelled() -> None:
    async def go() -> None:
        lane, log = make_lane(), []
        never = asyncio.Event()
        running = lane.submit(make(1, log, gate=never, effect=False))
        after = lane.submit(make(2, log))
        await asyncio.sleep(0.01)
        assert lane.cancel(1)
        await ended(running, after)
        assert running.status == CANCELLED
        assert after.status == COMPLETED

    asyncio.run(go())


def test_a_full_queue_says_when_to_come_back() -> None:
    async def go() -> None:
        lane, log, gate = make_lane(max_queue=2), [], asyncio.Event()
        lane.submit(make(1, log, gate=gate))
        await asyncio.sleep(0.01)
        lane.submit(make(2, log))
        lane.submit(make(3, log))
        with pytest.raises(RateLimitedError) as caught:
            lane.submit(make(4, log))
        assert caught.value.retry_after > 0
        gate.set()

    asyncio.run(go())


def test_after_a_restart_finished_positions_are_skipped_and_the_rest_goes_on() -> None:
    async def go() -> None:
        lane, log = make_lane(expected=5), []
        later = lane.submit(make(8, log))
        lane.skip([6, 7])
        between = lane.submit(make(5, log))
        await ended(later, between)
        assert log == [5, 8]
        assert lane.expected == 9
        with pytest.raises(ServerError):
            lane.submit(make(3, log))

    asyncio.run(go())


def test_closing_fails_what_waits_and_lets_the_running_operation_end() -> None:
    async def go() -> None:
        lane, log, gate = make_lane(), [], asyncio.Event()
        running = lane.submit(make(1, log, gate=gate))
        waiting = lane.submit(make(2, log))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(lane.close(ServerError("bye"), grace_s=5))
        await asyncio.sleep(0.01)
        gate.set()
        await closing
        assert running.status == COMPLETED
        assert waiting.status == FAILED
        assert log == [1]

    asyncio.run(go())


def test_future_ids_are_positions_and_nothing_else_parses() -> None:
    assert parse_future_id("run_a.17") == ("run_a", 17)
    for text in ("", "17", "run_a.", "run_a.-1", "run_a.x", "run_a." + "9" * 40, "run_a.٣"):
        assert parse_future_id(text) is None


def test_a_number_that_never_arrives_is_given_up_and_what_waits_behind_it_goes_on() -> None:
    async def go() -> None:
        lane, log, told = make_lane(), [], []
        lane.patience_s, lane.on_given_up = 0.05, lambda o: told.append((o.seq, list(log)))
        waiting = [lane.submit(make(seq, log)) for seq in (1, 4, 5)]
        await ended(*waiting)
        assert log == [1, 4, 5]
        assert told == [(2, [1]), (3, [1])]  # before the next one ran
        late = lane.submit(make(3, log, digest=b"whatever it was"))
        await asyncio.sleep(0.02)
        assert (late.status, log) == (FAILED, [1, 4, 5])
        assert isinstance(late.error, InvalidRequestError)
        assert "did not arrive" in late.error.message

    asyncio.run(go())


def test_patience_begins_anew_with_each_gap_and_a_lane_without_later_work_waits_for_ever() -> None:
    async def go() -> None:
        lane, log = make_lane(), []
        lane.patience_s = 0.1
        first = lane.submit(make(2, log))
        await asyncio.sleep(0.06)
        lane.submit(make(3, log))  # does not buy the gap more time
        lane.submit(make(1, log))  # fills it just in time
        await ended(first)
        await asyncio.sleep(0.15)
        assert (log, lane.expected) == ([1, 2, 3], 4)
        behind = lane.submit(make(5, log))
        await asyncio.sleep(0.06)
        assert behind.status == "pending"
        await ended(behind)
        assert log == [1, 2, 3, 5]

    asyncio.run(go())


def test_without_patience_a_gap_is_waited_for() -> None:
    async def go() -> None:
        lane, log = make_lane(), []
        waiting = lane.submit(make(2, log))
        await asyncio.sleep(0.1)
        assert (waiting.status, log) == ("pending", [])

    asyncio.run(go())
