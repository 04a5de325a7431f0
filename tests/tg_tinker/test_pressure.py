import time

import pytest

from tg_tinker import TrainingConfig, telemetry
from tg_tinker._pressure import Pressure, QueueState
from tg_tinker.errors import RateLimitedError


def test_a_full_queue_is_told_and_logged_once_a_minute(caplog, monkeypatch):
    heard = []
    telemetry.attach("test", lambda event, values: heard.append(values["reason"]), "queue.state")
    pressure = Pressure()
    try:
        for i in range(3):
            pressure.heard(RateLimitedError(f"full {i}", retry_after=0.2))
        assert heard == ["full 0"]
        assert caplog.text.count("waiting for the server") == 1
        assert pressure.state.waiting
        assert pressure.state.reason == "full 2"
        assert 0 < pressure.state.retry_after_s <= 0.2
        later = time.monotonic() + 61
        monkeypatch.setattr(time, "monotonic", lambda: later)
        assert pressure.state == QueueState()
        pressure.heard(RateLimitedError("again", retry_after=1.0))
        assert heard == ["full 0", "again"]
    finally:
        telemetry.detach("test")


def test_calls_wait_for_room_and_the_client_says_why(service, server):
    tc = service.create_training_client(TrainingConfig(model_ref="sum"))
    assert tc.queue_state == service.queue_state == QueueState()
    server.faults["ForwardBackward"] = [RateLimitedError("100 operations wait already", retry_after=0.5)]
    future = tc.forward_backward({"input_ids": [[1]]})
    deadline = time.monotonic() + 60
    while not tc.queue_state.waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert tc.queue_state.reason == "100 operations wait already"
    assert future.result(20).num_tokens == 1
    assert not tc.queue_state.waiting


def test_what_is_asked_directly_hears_of_it_as_an_error(service, server):
    server.faults["ListArtifacts"] = [RateLimitedError("too many", retry_after=0.01)] * 10
    with pytest.raises(RateLimitedError) as caught:
        service.list_artifacts()
    assert caught.value.retry_after == 0.01
