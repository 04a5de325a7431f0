"""The guard against servers that lie with their own key: receipts are held to the run, answers to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import rfc8785

from tests.tg_tinker.transparency.logs import Log
from tg_tinker.errors import InvalidRequestError, LogVerificationError, ServerError
from tg_tinker.log_guard import LogGuard, RunTerms
from tg_tinker.proto.v1 import privacy_pb2
from tg_tinker.transparency.folder import Folder
from tg_tinker.transparency.pins import Pins
from tg_tinker.transparency.receipts import Receipts
from tg_tinker.transparency.watch import Watch
from tg_tinker.types import DPMetrics, OptimStepOutput
from tg_tinker.types.log import LogReceipt, LogState
from tg_tinker.types.run import PrivacyState
from tg_tinker.wire.log import checkpoint_to_proto

PRIVACY = PrivacyState(
    dataset_id="data-1", epsilon_spent=0.0, target_epsilon=8.0, delta=1e-5, noise_multiplier=2.0, sample_rate=1.0,
    expected_batch_size=4.0,
)  # fmt: skip
TERMS = RunTerms("run_a", PRIVACY)
BODY: dict[str, Any] = {
    "kind": "charge",
    "dataset_id": "data-1",
    "run_id": "run_a",
    "seq": 1,
    "unit": "datum",
    "neighbours": "add-or-remove-one",
    "event": {"kind": "gaussian", "noise_multiplier": "2.0"},
    "epsilon_after": "1.5",
    "delta": "1e-05",
}


class Wire:
    """Stands for the transport: answers from a log, and runs what was put off when told."""

    def __init__(self, log: Log) -> None:
        self.log, self.asked, self.later = log, [], []
        self.fault: Exception | None = None
        self.alarm = self

    def after(self, delay_s: float, function: Callable[[], None]) -> None:
        self.later.append(function)

    def pass_time(self) -> None:
        waiting, self.later = self.later, []
        for function in waiting:
            function()

    def send(self, request: tuple[Any, bytes]) -> Future[Any]:
        sizes = list(privacy_pb2.GetCheckpointRequest.FromString(request[1]).known_sizes)
        self.asked.append(sizes)
        done: Future[Any] = Future()
        if self.fault is not None:
            done.set_exception(self.fault)
        else:
            done.set_result(self.reply(sizes))
        return done

    def call(self, request: privacy_pb2.GetCheckpointRequest) -> Any:
        self.asked.append(list(request.known_sizes))
        if self.fault is not None:
            raise self.fault
        return self.reply(list(request.known_sizes))

    def reply(self, sizes: Sequence[int]) -> Any:
        return checkpoint_to_proto(state(self.log, size) for size in sizes or [0])


def state(log: Log, known: int) -> LogState:
    note, key, _, proof = log.answer(known)
    return LogState(checkpoint=note, verifier_key=key, known_size=known, consistency=tuple(proof))


def guarded(folder: Path, log: Log, *, loopback: bool = False) -> tuple[LogGuard, Wire]:
    wire = Wire(log)
    watch = Watch(
        Pins(Folder(folder)),
        address="host:1",
        tenant="t",
        loopback=loopback,
        receipts=Receipts(Folder(folder)),
        save_s=3600.0,
    )
    return LogGuard(wire, watch), wire  # type: ignore[arg-type]


def body(**more: Any) -> str:
    return rfc8785.dumps({**BODY, **more}).decode()


def paid(log: Log, known: int, entry: str | None = None, **more: Any) -> OptimStepOutput:
    """A step's result, its charge appended to the log just now."""
    log.append(body() if entry is None else entry)
    index = log.size - 1
    receipt = LogReceipt(
        entry_json=log.entries[index], leaf_index=index, inclusion=log.receipt(index).proof, log=state(log, known)
    )
    dp = DPMetrics(
        noise_applied=True, epsilon_spent=0.1, total_epsilon=1.5, delta=1e-5, grad_norm_before_clip=1.0,
        grad_norm_after_clip=1.0, num_clipped=0,
    )  # fmt: skip
    fields: dict[str, Any] = {"dp_metrics": dp, "receipt": receipt, **more}
    return OptimStepOutput(grad_norm=1.0, learning_rate=0.1, step=1, latency_ms=1.0, **fields)


@pytest.fixture
def log() -> Log:
    return Log(["{}"])


def test_a_step_that_was_paid_for_is_accepted_and_its_receipt_kept(tmp_path: Path, log: Log) -> None:
    guard, _ = guarded(tmp_path, log)
    guard.check()
    guard.accept(TERMS, 1, 1, paid(log, 1))
    assert guard.known_size == 2
    assert len(Receipts(Folder(tmp_path)).read_all(log.key.name, "data-1")) == 1


def test_a_run_without_privacy_has_nothing_to_prove(tmp_path: Path, log: Log) -> None:
    guard, _ = guarded(tmp_path, log)
    guard.accept(RunTerms("run_a", None), 1, 0, OptimStepOutput(1.0, 0.1, 1, None, 1.0))


AMPLIFIED = {"kind": "sampled_gaussian", "noise_multiplier": "2.0", "sample_rate": "0.01", "vouched_by": "client"}
WRONG = {
    "kind": body(kind="report"),
    "another dataset": body(dataset_id="shadow"),
    "another run": body(run_id="run_b"),
    "another step": body(seq=2),
    "another unit": body(unit="user"),
    "other neighbours": body(neighbours="replace-one"),
    "more noise": body(event={"kind": "gaussian", "noise_multiplier": "1000000.0"}),
    "amplified": body(event=AMPLIFIED),
    "unknown event": body(event={"kind": "quantum"}),
    "another epsilon": body(epsilon_after="0.5"),
    "another delta": body(delta="0.1"),
    "not an object": "[]",
    "not JSON": "{",
    "deep": "[" * 100_000,
    "huge number": body().replace('"1.5"', "1" * 400),
}  # fmt: skip


@pytest.mark.parametrize("entry", WRONG.values(), ids=WRONG)
def test_a_receipt_that_is_not_of_this_charge_is_refused_for_good(tmp_path: Path, log: Log, entry: str) -> None:
    guard, _ = guarded(tmp_path, log)
    guard.check()
    with pytest.raises(LogVerificationError) as caught:
        guard.accept(TERMS, 1, 1, paid(log, 1, entry))
    assert caught.value.kind == "bad_proof"
    with pytest.raises(LogVerificationError):
        _ = guard.known_size
    with pytest.raises(LogVerificationError):
        guard.check_later().result()


@pytest.mark.parametrize("left_out", [{"receipt": None}, {"dp_metrics": None}, {"receipt": None, "dp_metrics": None}])
def test_a_private_step_without_its_proof_is_refused(tmp_path: Path, log: Log, left_out: dict[str, None]) -> None:
    guard, _ = guarded(tmp_path, log)
    guard.check()
    with pytest.raises(LogVerificationError, match="without the receipt"):
        guard.accept(TERMS, 1, 1, paid(log, 1, **left_out))


def test_a_step_released_without_noise_must_be_charged_as_one(tmp_path: Path, log: Log) -> None:
    guard, _ = guarded(tmp_path, log)
    guard.check()
    told = paid(log, 1, body(event={"kind": "unnoised"}))
    assert told.dp_metrics is not None
    with pytest.raises(LogVerificationError):
        guard.accept(TERMS, 1, 1, told)
    guard, _ = guarded(tmp_path / "other", log)
    guard.check()
    told = paid(log, 2, body(event={"kind": "unnoised"}))
    told.dp_metrics.noise_applied = False  # type: ignore[union-attr]
    guard.accept(TERMS, 1, 2, told)


def test_a_proof_from_another_size_than_was_asked_for_is_refused(tmp_path: Path, log: Log) -> None:
    guard, wire = guarded(tmp_path, log)
    guard.check()
    with pytest.raises(LogVerificationError, match="another size"):
        guard.accept(TERMS, 1, 1, paid(log, 0))
    guard, wire = guarded(tmp_path / "other", log)
    wire.reply = lambda sizes: checkpoint_to_proto([state(log, 1)])  # type: ignore[method-assign]
    with pytest.raises(LogVerificationError, match="another size"):
        guard.check()


def in_flight(guard: LogGuard, log: Log, fork: Log | None = None) -> None:
    """Two steps that named the same size; the second answered from ``fork`` where there is one."""
    known = guard.known_size
    guard.accept(TERMS, 1, known, paid(log, known))
    other = fork or log
    guard.accept(TERMS, 1, known, paid(other, known))


def test_answers_that_overtook_each_other_are_shown_to_be_of_one_history(tmp_path: Path, log: Log) -> None:
    guard, wire = guarded(tmp_path, log)
    guard.check()
    in_flight(guard, log)
    assert wire.asked[1:] == [[2, 3]]
    assert guard.known_size == 3


def test_two_answers_from_two_histories_are_found_by_the_question_that_ties_them(tmp_path: Path, log: Log) -> None:
    guard, _ = guarded(tmp_path, log)
    guard.check()
    fork = Log(["{}", '{"another":"history"}'])
    in_flight(guard, log, fork)
    with pytest.raises(LogVerificationError) as caught:
        _ = guard.known_size
    assert caught.value.kind in ("forked", "rolled_back")


def test_a_server_that_will_not_tie_its_answers_together_is_left(tmp_path: Path, log: Log) -> None:
    guard, wire = guarded(tmp_path, log)
    guard.check()
    wire.fault = ServerError("not now")
    in_flight(guard, log)
    assert guard.known_size == 3
    for _ in range(2):
        wire.pass_time()
    with pytest.raises(LogVerificationError, match="one history"):
        _ = guard.known_size


def test_a_question_that_failed_once_is_asked_again_without_another_step(tmp_path: Path, log: Log) -> None:
    guard, wire = guarded(tmp_path, log)
    guard.check()
    wire.fault = ServerError("not now")
    in_flight(guard, log)
    wire.fault = None
    wire.pass_time()
    assert wire.asked[-1] == [2, 3]
    for _ in range(5):
        wire.pass_time()
    assert guard.known_size == 3


def test_the_newest_pin_is_written_soon_though_nothing_more_happens(tmp_path: Path, log: Log) -> None:
    guard, wire = guarded(tmp_path, log)
    guard.check()
    guard.accept(TERMS, 1, 1, paid(log, 1))
    pinned = Pins(Folder(tmp_path)).get(log.key.name)
    assert pinned is not None
    assert pinned.checkpoint.size == 1
    wire.pass_time()
    pinned = Pins(Folder(tmp_path)).get(log.key.name)
    assert pinned is not None
    assert pinned.checkpoint.size == 2


def test_receipts_newer_than_the_pin_count_after_a_kill(tmp_path: Path, log: Log) -> None:
    guard, _ = guarded(tmp_path, log)
    guard.check()
    guard.accept(TERMS, 1, 1, paid(log, 1))  # and killed here
    again, _ = guarded(tmp_path, Log(["{}"]))
    with pytest.raises(LogVerificationError) as caught:
        again.check()
    assert caught.value.kind == "rolled_back"


def test_two_processes_on_two_histories_find_out_when_they_remember(tmp_path: Path, log: Log) -> None:
    mine, wire = guarded(tmp_path, log)
    mine.check()
    fork = Log(["{}"])
    other, elsewhere = guarded(tmp_path, fork)
    other.check()
    mine.accept(TERMS, 1, 1, paid(log, 1))
    for known in (1, 2):
        other.accept(TERMS, 1, known, paid(fork, known, body(time=str(known), run_id="run_a")))
    elsewhere.pass_time()
    wire.pass_time()
    wire.pass_time()
    with pytest.raises(LogVerificationError):
        mine.check()


def test_two_processes_on_one_history_go_on(tmp_path: Path, log: Log) -> None:
    mine, wire = guarded(tmp_path, log)
    mine.check()
    other, elsewhere = guarded(tmp_path, log)
    other.check()
    mine.accept(TERMS, 1, 1, paid(log, 1))
    other.accept(TERMS, 1, 1, paid(log, 1))
    for _ in range(3):
        elsewhere.pass_time()
        wire.pass_time()
    mine.check()
    other.check()
    assert mine.known_size == other.known_size == 3


def test_a_pin_damaged_while_training_ends_it_with_an_error_that_names_the_file(tmp_path: Path, log: Log) -> None:
    guard, wire = guarded(tmp_path, log)
    guard.check()
    guard.accept(TERMS, 1, 1, paid(log, 1))
    (pin,) = (tmp_path / "pins").glob("*.json")
    pin.write_text("damaged")
    wire.pass_time()
    with pytest.raises(InvalidRequestError, match="damaged"):
        _ = guard.known_size


def test_another_log_on_this_machine_is_another_server_but_not_in_the_middle(
    tmp_path: Path, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    guarded(tmp_path, log, loopback=True)[0].check()
    guard, wire = guarded(tmp_path, Log(["{}"], seed=2), loopback=True)
    guard.check()
    assert "another log answers" in caplog.text
    wire.log = Log(["{}", "{}"], seed=3)
    with pytest.raises(LogVerificationError) as caught:
        guard.check()
    assert caught.value.kind == "identity_changed"


def test_a_step_said_to_have_no_noise_was_not_charged_for_noise(tmp_path: Path, log: Log) -> None:
    guard, _ = guarded(tmp_path, log)
    guard.check()
    told = paid(log, 1)
    told.dp_metrics.noise_applied = False  # type: ignore[union-attr]
    with pytest.raises(LogVerificationError):
        guard.accept(TERMS, 1, 1, told)


def test_only_questions_unanswered_in_a_row_count(tmp_path: Path, log: Log) -> None:
    guard, wire = guarded(tmp_path, log)
    guard.check()
    for _ in range(3):
        wire.fault = ServerError("not now")
        in_flight(guard, log)
        wire.fault = None
        wire.pass_time()
    assert guard.known_size == log.size
