import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest

from tg_tinker import (
    AuthorizationError,
    FutureCancelledError,
    InvalidRequestError,
    RateLimitedError,
    ServerError,
    ServiceClient,
    TrainingConfig,
)

CONFIG = TrainingConfig(model_ref="sum")
DROP_REPLY = "drop the reply"


def batch(value):
    return {"input_ids": [[value]]}


def expected_weight(values):
    weight = 0.0
    for value in values:
        weight = weight / 2 + value
    return weight


def until(condition, timeout=20):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def tc(service):
    return service.create_training_client(CONFIG)


def test_twenty_pipelined_pairs_equal_the_waiting_loop(tc, server):
    steps = []
    for value in range(1, 21):
        tc.forward_backward(batch(value))
        steps.append(tc.optim_step())
    assert [s.result(60).step for s in steps] == list(range(1, 21))
    assert steps[-1].result().grad_norm == expected_weight(range(1, 21))
    assert [seq for _, seq, _ in server.executed] == list(range(1, 41))


def test_submitting_does_not_wait_for_execution(tc, server):
    server.gate.clear()
    futures = [tc.forward_backward(batch(1)) for _ in range(50)]
    assert not any(f.done() for f in futures)
    server.gate.set()
    assert all(f.wait(20) for f in futures)


def test_calls_of_many_threads_all_arrive_once(tc, server):
    def work():
        for _ in range(25):
            tc.forward_backward(batch(1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tc.optim_step().result(60).grad_norm == 100.0


def test_a_lost_reply_is_asked_for_again_and_executed_once(tc, server):
    server.faults["ForwardBackward"] = [DROP_REPLY, DROP_REPLY]
    server.faults["OptimStep"] = [DROP_REPLY]
    tc.forward_backward(batch(3))
    assert tc.optim_step().result(60).grad_norm == 3.0
    assert [name for _, _, name in server.executed] == ["forward_backward", "optim_step"]
    first, second, third = server.seen("ForwardBackward")
    assert first == second == third


def test_a_full_queue_is_waited_for_and_keeps_the_order(tc, server):
    full = RateLimitedError("queue full", retry_after=0.1)
    server.faults["ForwardBackward"] = [full] * 6  # more often than retry_count
    tc.forward_backward(batch(5))
    assert tc.optim_step().result(60).grad_norm == 5.0


def test_a_restarted_server_is_sent_everything_it_lost(tc, server):
    tc.forward_backward(batch(1))
    tc.optim_step().result(60)
    server.gate.clear()
    futures = [tc.forward_backward(batch(2)), tc.optim_step(), tc.forward_backward(batch(3)), tc.optim_step()]
    until(lambda: len(server.seen("OptimStep")) == 3)
    server.gate.set()
    server.restart()
    assert futures[-1].result(30).step == 3
    assert futures[-1].result().grad_norm == expected_weight([1, 2, 3])


def test_a_restart_between_the_passes_of_a_batch_repeats_the_lost_ones_only(tc, server):
    first = tc.forward_backward(batch(1)).result(60)
    tc.optim_step().result(60)
    done = tc.forward_backward(batch(2))
    result = done.result(60)
    before = len(server.executed)
    server.restart()
    tc.forward_backward(batch(4))
    assert tc.optim_step().result(30).grad_norm == expected_weight([1, 6])
    assert done.result() is result
    assert first.loss == 1 / 1024
    assert [seq for _, seq, _ in server.executed[before:]] == [3, 4, 5]


def test_ended_calls_without_effect_are_not_executed_again(tc, server):
    tc.forward_backward(batch(1))
    tc.eval()
    tc.forward_backward(batch(9)).result(60)
    tc.train()
    tc.sample("hello")
    tc.save_state()
    server.restart()
    assert tc.optim_step().result(30).grad_norm == 1.0
    done = [name for _, _, name in server.executed]
    assert done == ["forward_backward", "forward_backward", "sample", "save_state", "forward_backward", "optim_step"]
    assert len(server.artifacts) == 1


def test_ten_restarts_in_one_script_are_only_pauses(tc, server):
    restarter = threading.Thread(target=lambda: [time.sleep(0.1) or server.restart() for _ in range(10)])
    restarter.start()
    steps = []
    while restarter.is_alive() or len(steps) < 10:
        tc.forward_backward(batch(len(steps) + 1)).result(60)
        steps.append(tc.optim_step().result(60))
    restarter.join()
    assert [s.step for s in steps] == list(range(1, len(steps) + 1))
    assert steps[-1].grad_norm == expected_weight(range(1, len(steps) + 1))
    assert server.generation == 11


def test_pipelined_calls_survive_restarts_too(tc, server):
    values = list(range(1, 31))
    futures = []
    for value in values:
        futures.append((tc.forward_backward(batch(value)), tc.optim_step()))
        if value % 10 == 0:
            server.restart()
    assert [step.result(60).step for _, step in futures] == values
    assert all(one.result(60).num_tokens == 1 for one, _ in futures)
    assert futures[-1][1].result().grad_norm == expected_weight(values)


def test_a_server_that_says_it_is_going_down_is_waited_for(tc, server):
    going = ServerError("the server is shutting down", details={"retry": True})
    server.faults["ForwardBackward"] = [going, going]
    server.faults["GetFuture"] = [going]
    assert tc.forward_backward(batch(1)).result(60).num_tokens == 1


def test_requests_are_forgotten_once_their_effects_are_durable(tc, server):
    held = [tc.forward_backward(batch(1)) for _ in range(5)]
    tc.optim_step().result(60)
    assert all(f._operation.request is None for f in held)
    journal = tc._session._journal
    assert journal.durable_seq == 6
    assert journal.restart("any", 7) == []
    assert all(f.result(60).num_tokens == 1 for f in held)


def test_fire_and_forget_forgets_without_any_poll(tc, server):
    for _ in range(10):
        tc.forward_backward(batch(1))
        tc.optim_step()
    until(lambda: len(server.executed) == 20)
    tc.forward_backward(batch(1))
    until(lambda: tc._session._journal.durable_seq == 20)
    assert server.seen("GetFuture") == []


def test_the_step_is_known_from_results_and_asked_for_otherwise(tc, server):
    assert tc.step == 0
    tc.forward_backward(batch(1))
    tc.optim_step().result(60)
    asked = len(server.seen("GetTrainingClient"))
    assert tc.step == 1
    assert len(server.seen("GetTrainingClient")) == asked
    tc.forward_backward(batch(1))
    tc.optim_step()
    until(lambda: len(server.executed) == 4)
    until(lambda: tc.step == 2)


def test_a_refused_step_does_not_count(tc):
    with pytest.raises(InvalidRequestError, match="nothing accumulated"):
        tc.optim_step().result(60)
    assert tc.step == 0


def test_a_pass_the_server_refuses_to_take_fails_what_follows_it(tc, server):
    server.faults["ForwardBackward"] = [0, AuthorizationError("may not train"), 0]
    first = tc.forward_backward(batch(1))
    refused = tc.forward_backward(batch(2))
    with pytest.raises(AuthorizationError):
        refused.result(60)
    # Submitted after the refusal was known: the server must drop the half batch it has.
    with pytest.raises(InvalidRequestError, match="refused"):
        tc.optim_step().result(60)
    assert first.result(60).num_tokens == 1
    tc.forward_backward(batch(4))
    assert tc.optim_step().result(60).grad_norm == 4.0


def test_calls_queued_behind_a_refused_one_are_not_sent(tc, server):
    server.faults["ForwardBackward"] = [0.3, AuthorizationError("may not train")]
    tc.forward_backward(batch(1))
    refused, behind = tc.forward_backward(batch(2)), tc.optim_step()
    with pytest.raises(AuthorizationError):
        refused.result(60)
    with pytest.raises(InvalidRequestError, match="not sent"):
        behind.result(60)
    assert server.seen("OptimStep") == []
    assert tc.step == 0


def test_a_call_not_yet_sent_is_cancelled_here_and_its_number_passed_over(tc, server):
    server.faults["ForwardBackward"] = [0.3]
    tc.forward_backward(batch(1))
    unsent = tc.forward_backward(batch(100))
    step = tc.optim_step()
    assert unsent.cancel()
    with pytest.raises(FutureCancelledError):
        unsent.result()
    assert step.result(60).grad_norm == 1.0
    assert len(server.seen("ForwardBackward")) == 1


def test_a_call_waiting_for_a_full_queue_can_be_cancelled(tc, server):
    server.faults["ForwardBackward"] = [RateLimitedError("full", retry_after=30.0)]
    waiting = tc.forward_backward(batch(100))
    until(lambda: server.seen("ForwardBackward"))
    assert waiting.cancel()
    tc.forward_backward(batch(2))
    assert tc.optim_step().result(60).grad_norm == 2.0


def test_two_handles_on_one_run_collide_with_a_clear_error(tc, server):
    with ServiceClient() as elsewhere:
        other = elsewhere.get_training_client(tc.id)
        other.forward_backward(batch(1)).result(60)
        with pytest.raises(InvalidRequestError, match="another handle"):
            tc.forward_backward(batch(1)).result(60)
        with pytest.raises(InvalidRequestError, match="another handle") as caught:
            tc.forward_backward(batch(1))
        assert caught.value.field == "seq"
        assert other.optim_step().result(60).step == 1


def test_even_the_same_call_at_the_same_place_is_told_apart(tc, server):
    tc.forward_backward(batch(1)).result(60)
    with ServiceClient() as elsewhere:
        other = elsewhere.get_training_client(tc.id)
        assert other.optim_step().result(60).step == 1
        with pytest.raises(InvalidRequestError):
            tc.optim_step().result(60)
        with pytest.raises(InvalidRequestError, match="another handle"):
            tc.optim_step()
    with ServiceClient() as third:
        fresh = third.get_training_client(tc.id)
        fresh.forward_backward(batch(2))
        assert fresh.optim_step().result(60).step == 2


def test_a_new_handle_goes_on_after_a_crash_that_left_a_gap(tc, server):
    tc.forward_backward(batch(1))
    tc.optim_step().result(60)
    tc.forward_backward(batch(2)).result(60)  # lost with the restart
    tc.save_state()  # its result is kept, above the gap
    server.restart()
    with ServiceClient() as elsewhere:
        other = elsewhere.get_training_client(tc.id)
        other.forward_backward(batch(3))
        assert other.optim_step().result(60).grad_norm == expected_weight([1, 3])


def test_looking_at_a_run_does_not_take_it_over(tc, server):
    with ServiceClient() as elsewhere:
        viewer = elsewhere.get_training_client(tc.id)
        assert (viewer.step, viewer.status) == (0, "active")
    assert server.seen("ResumeTrainingClient") == []
    assert tc.forward_backward(batch(1)).result(60).num_tokens == 1


def test_a_database_restored_from_before_is_a_clear_error(tc, server):
    for _ in range(3):
        tc.forward_backward(batch(1))
        tc.optim_step().result(60)
    server.runs[tc.id].disk.update(seq=2, step=1, weight=1.0, results={})
    server.restart()
    with pytest.raises(ServerError, match="went back"):
        tc.forward_backward(batch(1)).result(60)
    with pytest.raises(ServerError, match="fresh handle"):
        tc.optim_step()


def test_closing_hands_over_what_was_queued(tc, server):
    server.faults["ForwardBackward"] = [0.2]
    for _ in range(5):
        tc.forward_backward(batch(1))
    tc.close()
    assert len({r.key.seq for r in server.seen("ForwardBackward")}) == 5
    with pytest.raises(InvalidRequestError, match="closed"):
        tc.forward_backward(batch(1))


def test_a_script_that_ends_without_waiting_still_hands_over_its_calls(server):
    script = """
import threading
from tg_tinker import ServiceClient, TrainingConfig
tc = ServiceClient().create_training_client(TrainingConfig(model_ref="sum"))
for i in range(50):
    future = tc.forward_backward({"input_ids": [[1]]})
    tc.optim_step()
threading.Thread(target=future.result, daemon=True).start()
"""
    server.faults["ForwardBackward"] = [0.3]
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    until(lambda: len(server.executed) == 100)
    assert server.runs["run_1"].step == 50


def test_a_context_left_by_an_error_does_not_wait(service, server):
    server.faults["ForwardBackward"] = [20.0]
    started = time.monotonic()
    futures = []
    with pytest.raises(KeyError), service.create_training_client(CONFIG) as tc:  # noqa: PT012
        futures.append(tc.forward_backward(batch(1)))
        raise KeyError
    assert time.monotonic() - started < 15.0
    with pytest.raises(InvalidRequestError, match="closed"):
        futures[0].result(60)


def test_a_result_the_server_dropped_is_an_error_rather_than_a_wait(tc, server):
    server.gate.clear()
    future = tc.forward_backward(batch(1))
    until(lambda: server.seen("ForwardBackward") and future._operation.epoch)
    server.runs[tc.id].operations.clear()
    with pytest.raises(ServerError, match="no longer keeps"):
        future.result(60)


def test_a_request_too_large_is_refused_before_it_is_numbered(tc, server):
    with pytest.raises(InvalidRequestError) as caught:
        tc.forward_backward({"input_ids": [[1] * (9 * 2**20)]})
    assert caught.value.field == "batch"
    assert tc.forward_backward(batch(1)).result(60).num_tokens == 1


def test_a_server_that_stays_away_ends_the_wait_after_the_timeout(server):
    with ServiceClient(timeout=1.0) as service:
        tc = service.create_training_client(CONFIG)
        server.gate.clear()
        pending = tc.forward_backward(batch(1))
        until(lambda: pending._operation.epoch)
        server.stop()
        later = tc.forward_backward(batch(1))
        for future in (pending, later):
            with pytest.raises(ServerError, match="cannot reach"):
                future.result(60)
        with pytest.raises(ServerError, match="fresh handle"):
            tc.optim_step()
        server.start()


def test_a_broken_connection_under_a_call_is_repaired(tc, server):
    server.faults["ForwardBackward"] = [grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN]
    assert tc.forward_backward(batch(1)).result(60).num_tokens == 1
    assert len(server.executed) == 1


def updates(value):
    return np.full((1, 1), value, dtype=np.float32), ["a site"]


def test_updates_lost_with_a_server_are_sent_again_byte_for_byte_and_added_once(tc, server):
    tc.add_updates(*updates(1))
    tc.optim_step().result(60)
    server.gate.clear()
    futures = [tc.add_updates(*updates(2)), tc.optim_step(), tc.add_updates(*updates(3)), tc.optim_step()]
    until(lambda: len(server.seen("OptimStep")) == 3)
    server.gate.set()
    server.restart()
    assert futures[-1].result(30).step == 3
    assert futures[-1].result().grad_norm == expected_weight([1, 2, 3])
    sent = [r.SerializeToString() for r in server.seen("AddUpdates")]
    assert len(sent) > len(set(sent)) == 3


def test_updates_that_ended_are_added_again_if_their_step_was_lost(tc, server):
    first = tc.add_updates(*updates(2))
    result = first.result(60)
    server.restart()
    tc.add_updates(*updates(4))
    assert tc.optim_step().result(30).grad_norm == 6.0
    assert first.result() is result


def test_refused_updates_make_the_batch_incomplete(tc, server):
    server.faults["AddUpdates"] = [0, AuthorizationError("may not train"), 0]
    tc.add_updates(*updates(1))
    with pytest.raises(AuthorizationError):
        tc.add_updates(*updates(2)).result(60)
    with pytest.raises(InvalidRequestError, match="add_updates was refused"):
        tc.optim_step().result(60)
    tc.add_updates(*updates(4))
    assert tc.optim_step().result(60).grad_norm == 4.0


def test_weights_are_pulled_after_the_steps_and_loads_before_them(tc, server):
    server.gate.clear()
    tc.forward_backward(batch(3))
    tc.optim_step()
    threading.Timer(0.2, server.gate.set).start()
    pulled = tc.pull_weights()
    assert (pulled.step, pulled.tensors["w"].tolist()) == (1, [3.0])
    tc.forward_backward(batch(5))
    tc.optim_step(apply_dp_noise=False)
    tc.forward_backward(batch(-1))
    tc.optim_step()  # fails; the weights are there all the same
    assert tc.pull_weights().tensors["w"].tolist() == [6.5]


def test_updates_under_way_leave_the_step_known_and_nobody_waiting(tc, server):
    server.gate.clear()
    tc.add_updates(*updates(1))
    assert tc.step == 0
    assert server.seen("GetTrainingClient") == []
    assert tc.pull_weights().step == 0
