"""Passes take turns in slices, share only within their group, and hurt nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from tg_tinker.errors import FutureCancelledError, InvalidRequestError, ServerError
from tg_tinker.types import DPConfig
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.lanes import CANCELLED, FAILED, Lane, Operation
from tg_tinker_server.service.passes import PassQueue, sharing_group


class FakePass:
    """Counts its slices and writes each visit to the model into a log: the head, then those it took along."""

    def __init__(
        self, name: str, slices: int, log: list[list[str]], *, room: int = 99, fails: str = "", slice_s: float = 0.0
    ) -> None:
        self.name, self.slices, self.log, self.room, self.fails = name, slices, log, room, fails
        self.slice_s = slice_s
        self.offered: list[list[str]] = []

    @property
    def finished(self) -> bool:
        return self.slices == 0

    def advance(self, others: Sequence[FakePass] = ()) -> list[FakePass]:
        self.offered.append([o.name for o in others])
        if self.fails == "advance":
            raise InvalidRequestError(f"{self.name} failed", field="batch")
        moved = list(others[: self.room])
        self.log.append([self.name, *(o.name for o in moved)])
        for each in (self, *moved):
            assert not each.finished
            each.slices -= 1
        time.sleep(self.slice_s)
        return moved

    def result(self) -> str:
        if self.fails == "result":
            raise InvalidRequestError(f"{self.name} is not finite", field="batch")
        return "result of " + self.name


class FakeSession:
    """Starts the one pass it was given."""

    def __init__(self, work: FakePass) -> None:
        self.work = work

    def start(self, request: Any) -> FakePass:
        if self.work.fails == "start":
            raise InvalidRequestError(f"{self.work.name} is malformed", field="batch")
        return self.work


class Bench:
    """A queue with its threads, and the log of what ran on the model."""

    def __init__(self) -> None:
        self.executors = Executors()
        self.queue = PassQueue(self.executors)
        self.log: list[list[str]] = []

    def make(self, name: str, slices: int, **options: Any) -> FakePass:
        return FakePass(name, slices, self.log, **options)

    def submit(
        self, work: FakePass, group: str | None = None, ensure_wanted: Callable[[], None] = lambda: None
    ) -> asyncio.Task[Any]:
        session: Any = FakeSession(work)
        request: Any = object()
        return asyncio.create_task(self.queue.run(session, request, group=group, ensure_wanted=ensure_wanted))


def bench_run(scenario: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario; afterwards nothing may wait and no task may be left."""

    async def go() -> None:
        bench = Bench()
        try:
            await asyncio.wait_for(scenario(bench), 20)
            await asyncio.wait_for(bench.queue.close(), 5)
            assert asyncio.all_tasks() == {asyncio.current_task()}
        finally:
            bench.executors.close()

    asyncio.run(go())


async def outcomes(*tasks: asyncio.Task[Any]) -> list[Any]:
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_passes_are_computed_first_come_first_served_and_a_huge_one_lets_small_ones_by() -> None:
    async def scenario(bench: Bench) -> None:
        tasks = [bench.submit(bench.make(n, s)) for n, s in (("huge", 5), ("small", 1), ("middle", 2))]
        assert await outcomes(*tasks) == ["result of huge", "result of small", "result of middle"]
        assert bench.log == [[n] for n in ("huge", "small", "middle", "huge", "middle", "huge", "huge", "huge")]

    bench_run(scenario)


def test_only_passes_of_one_group_share_a_slice() -> None:
    async def scenario(bench: Bench) -> None:
        works = [bench.make(n, 2) for n in ("a1", "b1", "a2", "alone", "b2", "alone too")]
        groups = ["a", "b", "a", None, "b", None]
        await outcomes(*(bench.submit(w, g) for w, g in zip(works, groups, strict=True)))
        assert bench.log == 2 * [["a1", "a2"], ["b1", "b2"], ["alone"], ["alone too"]]
        assert [w.offered for w in works if w.name.startswith("alone")] == [[[], []], [[], []]]

    bench_run(scenario)


def test_those_that_were_not_taken_along_keep_their_place_and_the_others_go_to_the_back() -> None:
    async def scenario(bench: Bench) -> None:
        works = [bench.make(n, 2, room=1) for n in "abcd"]
        await outcomes(*(bench.submit(w, "g") for w in works))
        assert bench.log == 2 * [["a", "b"], ["c", "d"]]
        assert works[0].offered == [["b", "c", "d"]] * 2
        assert works[2].offered[0] == ["d", "a", "b"]

    bench_run(scenario)


def test_nobody_waits_for_company() -> None:
    async def scenario(bench: Bench) -> None:
        first = bench.submit(bench.make("first", 2, slice_s=0.05), "g")
        await asyncio.sleep(0.02)
        second = bench.submit(bench.make("second", 1), "g")
        await outcomes(first, second)
        assert bench.log == [["first"], ["second", "first"]]

    bench_run(scenario)


@pytest.mark.parametrize("where", ["start", "advance", "result"])
def test_a_pass_that_fails_hurts_nobody_else_in_its_group(where: str) -> None:
    async def scenario(bench: Bench) -> None:
        works = [bench.make(n, 3, room=0 if where == "advance" else 2) for n in ("x", "bad", "y")]
        works[1].fails = where
        good, bad, other = await outcomes(*(bench.submit(w, "g") for w in works))
        assert (good, other) == ("result of x", "result of y")
        assert isinstance(bad, InvalidRequestError)
        assert works[0].slices == works[2].slices == 0
        late = await outcomes(bench.submit(bench.make("late", 1), "g"))
        assert late == ["result of late"]

    bench_run(scenario)


def test_a_head_that_fails_leaves_the_others_their_places() -> None:
    async def scenario(bench: Bench) -> None:
        bad, *good = bench.make("bad", 1, fails="advance"), bench.make("a", 2), bench.make("b", 2)
        assert isinstance((await outcomes(*(bench.submit(w, "g") for w in (bad, *good))))[0], InvalidRequestError)
        assert bench.log == [["a", "b"], ["a", "b"]]

    bench_run(scenario)


def test_a_pass_with_nothing_to_compute_gets_its_result() -> None:
    async def scenario(bench: Bench) -> None:
        empty, other = bench.submit(bench.make("empty", 0), "g"), bench.submit(bench.make("other", 1), "g")
        assert await outcomes(empty, other) == ["result of empty", "result of other"]
        assert bench.log == [["other"]]

    bench_run(scenario)


def test_a_pass_nobody_waits_for_leaves_before_its_next_slice_and_nothing_of_it_is_kept() -> None:
    async def scenario(bench: Bench) -> None:
        left, right = bench.make("left", 1000, slice_s=0.01), bench.make("right", 8, slice_s=0.01)
        seen = weakref.ref(left)
        task = bench.submit(left, "g")
        other = bench.submit(right, "g")
        await asyncio.sleep(0.03)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        visits = sum("left" in names for names in bench.log)
        assert await other == "result of right"
        assert sum("left" in names for names in bench.log) <= visits + 1  # the slice that was running
        del left, task
        gc.collect()
        assert seen() is None

    bench_run(scenario)


def test_a_pass_that_is_no_longer_wanted_stops_with_what_its_operation_says() -> None:
    async def scenario(bench: Bench) -> None:
        work = bench.make("big", 10_000, slice_s=0.001)

        async def compute(operation: Operation) -> Any:
            session: Any = FakeSession(work)
            result = await bench.queue.run(session, session, ensure_wanted=operation.ensure_wanted)
            operation.commit()
            return result

        lane = Lane("run_a", expected=1, max_queue=10, kept=10, on_crash=lambda *_: ServerError("crash"))
        operation = lane.submit(Operation("run_a", 1, "forward_backward", b"", compute))
        other = bench.submit(bench.make("other", 20))
        await asyncio.sleep(0.02)
        assert lane.cancel(1)
        await asyncio.wait_for(operation.ended.wait(), 2)
        assert operation.status == CANCELLED
        assert isinstance(operation.error, FutureCancelledError)
        left = work.slices
        assert left > 0
        assert await other == "result of other"
        assert work.slices == left
        await lane.close(None)

    bench_run(scenario)


def test_a_failed_operation_keeps_its_error_and_nothing_of_its_batch() -> None:
    async def scenario(bench: Bench) -> None:
        class Batch:
            pass

        async def compute(operation: Operation) -> Any:
            batch = Batch()
            kept.append(weakref.ref(batch))
            session: Any = FakeSession(bench.make("bad", 1, fails="advance"))
            request: Any = batch
            try:
                await bench.queue.run(session, request, group="g")
            except InvalidRequestError as e:
                raise ServerError("failed") from e

        kept: list[weakref.ref[Batch]] = []
        lane = Lane("run_a", expected=1, max_queue=10, kept=10, on_crash=lambda *_: ServerError("crash"))
        operation = lane.submit(Operation("run_a", 1, "forward_backward", b"", compute))
        await asyncio.wait_for(operation.ended.wait(), 2)
        await asyncio.sleep(0.01)
        assert operation.status == FAILED
        gc.collect()
        assert kept[0]() is None
        await lane.close(None)

    bench_run(scenario)


def test_steps_and_samples_have_their_turn_between_the_slices_of_a_huge_pass() -> None:
    async def scenario(bench: Bench) -> None:
        huge = bench.make("huge", 100, slice_s=0.003)
        task = bench.submit(huge)
        waited = []
        for _ in range(5):
            await asyncio.sleep(0.004)
            asked = huge.slices
            await bench.executors.compute(lambda: None)
            waited.append(asked - huge.slices)
        assert max(waited) <= 2  # the slice that was running, at most one that was submitted before
        assert huge.slices > 0
        task.cancel()
        await outcomes(task)

    bench_run(scenario)


def test_what_an_ended_pass_does_next_comes_before_the_next_slice() -> None:
    async def scenario(bench: Bench) -> None:
        async def train(name: str) -> None:
            session: Any = FakeSession(bench.make(name, 1))
            await bench.queue.run(session, session)
            await bench.executors.compute(lambda: bench.log.append(["accumulate " + name]))

        await asyncio.gather(train("a"), train("b"))
        assert bench.log == [["a"], ["accumulate a"], ["b"], ["accumulate b"]]

    bench_run(scenario)


@pytest.mark.parametrize("room", [0, 3])
def test_sixteen_runs_of_all_sizes_each_wait_a_bounded_number_of_slices(room: int) -> None:
    async def scenario(bench: Bench) -> None:
        draw = random.Random(3)
        works = [bench.make(f"run {n}", draw.choice([1, 2, 5, 40]), room=room) for n in range(16)]
        sizes = {w.name: w.slices for w in works}
        ends: dict[str, int] = {}

        async def one(work: FakePass, group: str | None) -> None:
            await bench.submit(work, group)
            ends[work.name] = len(bench.log)

        await asyncio.gather(*(one(w, draw.choice(["a", "b", None])) for w in works))
        moved = [name for names in bench.log for name in names]
        assert all(moved.count(name) == size for name, size in sizes.items())
        assert all(ends[name] <= 16 * size + 1 for name, size in sizes.items())

    bench_run(scenario)


@pytest.mark.parametrize("fails", ["start", "advance", "result"])
def test_a_failed_pass_is_freed_without_a_garbage_collection(fails: str) -> None:
    async def scenario(bench: Bench) -> None:
        work = bench.make("failing", 1, fails=fails)
        freed = weakref.ref(work)
        session: Any = FakeSession(work)
        del work
        with contextlib.suppress(InvalidRequestError):
            await bench.queue.run(session, object())  # type: ignore[arg-type]
        del session
        await asyncio.sleep(0.01)  # the threads let go too
        assert freed() is None

    gc.disable()
    try:
        bench_run(scenario)
    finally:
        gc.enable()


def test_closing_with_passes_waiting_ends_all_of_them_and_leaves_no_task() -> None:
    async def scenario(bench: Bench) -> None:
        works = [bench.make(str(n), 1000, slice_s=0.01) for n in range(3)]
        tasks = [bench.submit(w) for w in works]
        await asyncio.sleep(0.03)
        await bench.queue.close()
        left = [w.slices for w in works]
        assert all(isinstance(o, asyncio.CancelledError) for o in await outcomes(*tasks))
        assert [w.slices for w in works] == left

    bench_run(scenario)


def test_without_its_threads_the_queue_lets_nobody_wait_for_ever() -> None:
    async def go() -> None:
        bench = Bench()
        bench.executors.close()
        task = bench.submit(bench.make("late", 1))
        assert isinstance((await asyncio.wait_for(outcomes(task), 5))[0], BaseException)

    asyncio.run(go())


def some_run(tenant: str = "t", dp: DPConfig | None = None, noise: float = 1.0) -> Any:
    private = None if dp is None else SimpleNamespace(config=dp, noise_multiplier=noise)
    return SimpleNamespace(tenant=tenant, private=private)


def test_tenants_share_only_when_the_operator_says_that_they_trust_each_other() -> None:
    mine, also_mine, theirs = some_run("a"), some_run("a"), some_run("b")
    assert sharing_group(mine, "tenant") == sharing_group(also_mine, "tenant")
    assert sharing_group(mine, "tenant") != sharing_group(theirs, "tenant")
    assert sharing_group(mine, "everyone") == sharing_group(theirs, "everyone")
    assert sharing_group(mine, "off") is None


@pytest.mark.parametrize("share", ["tenant", "everyone"])
def test_no_exact_figure_is_computed_in_one_pass_with_a_private_run(share: Any) -> None:
    unnoised = DPConfig(target_epsilon=None, allow_unnoised_steps=True)
    plain, private = some_run(), some_run(dp=DPConfig())
    assert sharing_group(private, share) == sharing_group(some_run(dp=DPConfig(), noise=4.0), share)
    assert sharing_group(private, share) != sharing_group(plain, share)
    assert sharing_group(some_run(dp=unnoised), share) is None
    assert sharing_group(some_run(dp=DPConfig(), noise=1e-6), share) is None
