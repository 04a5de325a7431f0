"""A site stops when it is told to, whatever its messages and its SuperNode are at."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from flwr.clientapp import ClientApp

from tg_tinker.errors import ServerError
from tg_tinker.federated.flower import supernode
from tg_tinker.federated.flower.internals import Endpoint
from tg_tinker.federated.flower.supernode import _serve_aside, _watch

NOWHERE = Endpoint(address="127.0.0.1:1", secret=b"secret")


def test_a_site_whose_supernode_is_away_waits_and_stops() -> None:
    over = threading.Event()
    threading.Timer(0.3, over.set).start()
    started = time.monotonic()
    _serve_aside(NOWHERE, ClientApp(), over)
    assert 0.2 < time.monotonic() - started < 20


def test_a_message_that_takes_long_keeps_no_site_from_stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode, "serve_site", lambda *_: time.sleep(30))
    monkeypatch.setattr(supernode, "_LAST_WORDS_S", 0.2)
    over = threading.Event()
    over.set()
    started = time.monotonic()
    _serve_aside(NOWHERE, ClientApp(), over)
    assert time.monotonic() - started < 20


def test_an_executor_that_fails_ends_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(supernode, "serve_site", fail)
    over = threading.Event()
    with pytest.raises(ValueError, match="broken"):
        _serve_aside(NOWHERE, ClientApp(), over)
    assert over.is_set()


class FakeProgram:
    """A program that ends as soon as it is started."""

    def __init__(self, on_start: Callable[[int], None]) -> None:
        self.running = False
        self.starts = 0
        self._on_start = on_start

    def start(self) -> None:
        self.starts += 1
        self._on_start(self.starts)


class FakeNode:
    """A SuperNode that is not let in."""

    number = None

    def __init__(self, program: FakeProgram) -> None:
        self.program = program

    def failure(self) -> ServerError:
        return ServerError("not let in")

    def unanswered(self, waited_s: float) -> ServerError:
        return ServerError(f"no answer within {waited_s:g} s")


def test_a_supernode_is_started_again_and_again_and_its_reason_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(supernode, "_LONGEST_PAUSE_S", 0.02)
    monkeypatch.setattr(supernode, "_WATCH_S", 0.005)
    over = threading.Event()
    node = FakeNode(FakeProgram(lambda starts: over.set() if starts == 5 else None))
    told: list[str] = []
    _watch(node, over, told.append, [])  # type: ignore[arg-type]
    assert node.program.starts == 5
    assert told == ["not let in; trying again until it works"]


def test_pauses_between_starts_grow_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode, "_WATCH_S", 0.0)
    pauses: list[float] = []

    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout:
                pauses.append(timeout)
            return self.is_set()

    over = Clock()
    node = FakeNode(FakeProgram(lambda starts: over.set() if starts == 8 else None))
    _watch(node, over, lambda _: None, [])  # type: ignore[arg-type]
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_a_supernode_that_cannot_be_started_ends_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise ServerError("no such folder")

    monkeypatch.setattr(supernode, "_FIRST_PAUSE_S", 0.01)
    over = threading.Event()
    trouble: list[Exception] = []
    _watch(FakeNode(FakeProgram(fail)), over, lambda _: None, trouble)  # type: ignore[arg-type]
    assert over.is_set()
    assert [str(e) for e in trouble] == ["no such folder"]


def test_a_supernode_that_finds_nobody_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supernode, "_WATCH_S", 0.005)
    monkeypatch.setattr(supernode, "_SILENCE_S", 0.05)
    node = FakeNode(FakeProgram(lambda _: None))
    node.program.running = True
    over = threading.Event()
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        if "no answer" in text:
            node.number = 7  # type: ignore[assignment]
        else:
            threading.Timer(0.2, over.set).start()

    started = time.monotonic()
    _watch(node, over, tell, [])  # type: ignore[arg-type]
    assert time.monotonic() - started > 0.25
    assert told == ["no answer within 0.05 s; trying on until it does", "connected to the SuperLink as node 7"]
