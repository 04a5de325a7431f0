import logging

import pytest

from tg_tinker import telemetry
from tg_tinker.errors import InvalidRequestError


@pytest.fixture
def heard():
    events = []
    telemetry.attach("test", lambda event, values: events.append((event, dict(values))))
    yield events
    telemetry.detach("test")


def test_a_span_says_when_it_began_and_how_it_ended(heard):
    with telemetry.span("work", name="a") as found:
        found["value"] = 2.0
    with pytest.raises(KeyError), telemetry.span("work", name="b"):
        raise KeyError("secret")
    assert [e for e, _ in heard] == ["work.start", "work.stop", "work.start", "work.exception"]
    assert heard[1][1]["value"] == 2.0
    assert heard[1][1]["duration_s"] >= 0
    assert heard[3][1]["error"] == "KeyError"
    assert "secret" not in str(heard)


def test_only_what_was_asked_for_is_told_and_nothing_after_detaching():
    heard = []
    telemetry.attach("some", lambda event, _: heard.append(event), "queue")
    telemetry.emit("queue.state")
    telemetry.emit("work.start")
    assert telemetry.detach("some")
    assert not telemetry.detach("some")
    telemetry.emit("queue.state")
    assert heard == ["queue.state"]


def test_an_id_is_attached_once(heard):
    with pytest.raises(InvalidRequestError, match="detach it first"):
        telemetry.attach("test", print)


def test_a_handler_that_fails_is_detached_and_stops_nobody(heard, caplog):
    telemetry.attach("broken", lambda event, values: 1 / 0)
    telemetry.emit("a")
    telemetry.emit("b")
    assert [e for e, _ in heard] == ["a", "b"]
    assert caplog.text.count("is detached") == 1


def test_a_logger_can_listen(caplog):
    caplog.set_level(logging.INFO, "tg_tinker")
    telemetry.attach_logger()
    telemetry.emit("queue.state", reason="full")
    telemetry.detach("logger")
    assert "queue.state {'reason': 'full'}" in caplog.text
