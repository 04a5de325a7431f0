"""A coordinator's link over Flower's Grid: who is who, deadlines, and all that goes wrong on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.run import RunNotRunningException

from tests.tg_tinker.federated.flower.federation import wait_until
from tests.tg_tinker.federated.flower.toy import ToySite, train
from tg_tinker.errors import ServerError
from tg_tinker.federated.flower import link as link_module
from tg_tinker.federated.flower.apps import client_app, server_app
from tg_tinker.federated.flower.in_process import Disturb, Fault, InProcessGrid
from tg_tinker.federated.flower.link import APP_FAILED, FAILURES, NODE_UNAVAILABLE, FlowerLink
from tg_tinker.federated.flower.records import from_content
from tg_tinker.federated.hello import HELLO
from tg_tinker.federated.link import CoordinatorLink
from tg_tinker.federated.messages import Envelope

KEY = Ed25519PrivateKey.generate()
NAMES = ("berlin", "oslo", "rome")


class Bench:
    """Three toy sites behind a grid in memory."""

    def __init__(self, disturb: Disturb | None = None, names: Iterable[str] = NAMES, **options: float) -> None:
        self.sites = {name: ToySite(name, KEY.public_key()) for name in names}
        self.roster = {name: site.public for name, site in self.sites.items()}
        self.grid = InProcessGrid({name: client_app(site) for name, site in self.sites.items()}, disturb=disturb)
        settings: dict[str, Any] = {"hello_timeout_s": 5.0, "poll_s": 0.02, **options}
        self.link = FlowerLink(self.grid, roster=self.roster, key=KEY, **settings)

    def ask(self, *, timeout_s: float = 5.0, **changes: object) -> dict[str, str]:
        """What became of a request to each: "" for a good reply, else the failure."""
        requests = [train(name, KEY, **changes) for name in self.sites]  # type: ignore[arg-type]
        outcomes = self.link.exchange(requests, timeout_s=timeout_s)
        assert [o.site for o in outcomes] == list(self.sites)
        for outcome, request in zip(outcomes, requests, strict=True):
            if outcome.reply is not None:
                assert outcome.failure == ""
                outcome.reply.verify(self.sites[outcome.site].key.public_key())
                assert outcome.reply.facts == {"site": outcome.site}
                np.testing.assert_array_equal(outcome.reply.arrays["w"], -np.asarray(request.arrays["w"]))
        return {o.site: o.failure for o in outcomes}


@contextmanager
def bench(disturb: Disturb | None = None, **options: float) -> Iterator[Bench]:
    made = Bench(disturb, NAMES, **options)
    try:
        yield made
    finally:
        made.grid.close()


def only(name: str, fault: Fault, kind: str = "train") -> Disturb:
    return lambda node, message: fault if node == name and from_content(message.content).kind == kind else None


def test_requests_find_their_sites_and_replies_their_requests() -> None:
    with bench() as b:
        assert b.link.sites() == sorted(NAMES)
        for round_ in (1, 2):
            assert b.ask(round_=round_, value=float(round_)) == dict.fromkeys(NAMES, "")
        for name, site in b.sites.items():
            assert [(r.site, r.round) for r in site.seen] == [(name, 1), (name, 2)]


def test_the_unchanged_server_app_runs_over_the_grid() -> None:
    with bench() as b:
        seen: list[str] = []

        def run(link: CoordinatorLink) -> None:
            seen.extend(link.sites())
            assert [o.failure for o in link.exchange([train("oslo", KEY)], timeout_s=5)] == [""]

        b.grid.serve(server_app(run, roster=b.roster, key=KEY, poll_s=0.02))
        assert seen == sorted(NAMES)


def test_an_exchange_finds_the_sites_by_itself_and_asks_each_once() -> None:
    hellos: list[str] = []

    def count(node: str, message: Message) -> None:
        if from_content(message.content).kind == HELLO:
            hellos.append(node)

    with bench(count) as b:
        assert b.ask() == dict.fromkeys(NAMES, "")
        assert b.ask() == dict.fromkeys(NAMES, "")
        b.link.sites()
        assert sorted(hellos) == sorted(NAMES)


def test_a_straggler_is_left_out_and_its_late_reply_never_taken_for_another() -> None:
    with bench() as b:
        b.link.sites()
        b.sites["oslo"].slow_s = 3.0
        started = time.monotonic()
        assert b.ask(timeout_s=1.0, round_=1) == {"berlin": "", "oslo": "no answer within 1 s", "rome": ""}
        assert time.monotonic() - started < 2.9
        b.sites["oslo"].slow_s = 0.0
        assert b.ask(round_=2, value=2.0) == dict.fromkeys(NAMES, "")  # `ask` checks the values


def test_a_lost_request_is_a_failure_at_the_deadline() -> None:
    with bench(only("rome", Fault(drop=True))) as b:
        assert b.ask(timeout_s=1.0) == {"berlin": "", "oslo": "", "rome": "no answer within 1 s"}


def test_a_duplicated_reply_counts_once() -> None:
    with bench(only("rome", Fault(copies=3))) as b:
        assert b.ask() == dict.fromkeys(NAMES, "")
        assert b.ask(round_=2) == dict.fromkeys(NAMES, "")


def test_a_site_that_introduces_itself_twice_is_one_site() -> None:
    with bench(lambda _, __: Fault(copies=3)) as b:
        assert b.link.sites() == sorted(NAMES)
        assert b.ask() == dict.fromkeys(NAMES, "")


def test_a_delayed_reply_within_the_deadline_counts() -> None:
    with bench(only("rome", Fault(delay_s=0.2))) as b:
        assert b.ask() == dict.fromkeys(NAMES, "")


@pytest.mark.parametrize("code", range(10))
def test_every_error_of_flower_is_said_in_plain_words(code: int) -> None:
    with bench(only("oslo", Fault(error=code))) as b:
        words = FAILURES.get(code, f"Flower answered with error {code}")
        assert b.ask() == {"berlin": "", "oslo": words, "rome": ""}


def test_the_codes_are_flowers() -> None:
    assert (APP_FAILED, NODE_UNAVAILABLE) == (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.NODE_UNAVAILABLE)
    codes = {v for k, v in vars(ErrorCode).items() if k.isupper() and v != ErrorCode.UNKNOWN}
    assert codes == set(FAILURES)


def test_a_dead_site_is_no_longer_listed_and_comes_back() -> None:
    with bench() as b:
        b.link.sites()
        b.grid.kill("oslo")
        assert b.ask()["oslo"] == "no node that is connected proved to be 'oslo'"
        assert b.link.sites() == ["berlin", "rome"]
        b.grid.revive("oslo")
        assert b.ask() == dict.fromkeys(NAMES, "")


def test_a_site_that_dies_at_work_is_answered_for() -> None:
    with bench() as b:
        b.link.sites()
        b.sites["oslo"].slow_s = 0.3
        threading.Timer(0.1, b.grid.kill, ["oslo"]).start()
        started = time.monotonic()
        assert b.ask(timeout_s=60) == {"berlin": "", "oslo": "its SuperNode is gone", "rome": ""}
        assert time.monotonic() - started < 30
        b.grid.revive("oslo")
        b.sites["oslo"].slow_s = 0.0
        assert b.ask(round_=2) == dict.fromkeys(NAMES, "")


def test_an_app_that_fails_tells_nothing_but_the_kind_of_error() -> None:
    with bench() as b:
        failures = b.ask(kind="crash")
        assert failures == dict.fromkeys(NAMES, "its app failed (ValueError)")


def test_a_reply_to_another_request_is_refused() -> None:
    with bench() as b:
        assert b.ask(kind="elsewhere") == dict.fromkeys(NAMES, "its reply answers another request")


def test_a_reply_that_flower_cannot_decode_costs_its_sender_only() -> None:
    with bench(only("oslo", Fault(unreadable=True))) as b:
        b.link.sites()
        first = b.ask(timeout_s=1.0)  # finding out may cost what was fetched together with it
        assert first["oslo"] != ""
        for round_ in (2, 3):
            started = time.monotonic()
            failures = b.ask(timeout_s=60, round_=round_)
            assert failures == {
                "berlin": "",
                "oslo": "its reply cannot be read (TypeError: Invalid arguments for Array)",
                "rome": "",
            }
            assert time.monotonic() - started < 30


@pytest.mark.parametrize("kind", ["train", HELLO])
@pytest.mark.parametrize("unforeseen", [False, True])
def test_a_reply_that_nobody_expected_costs_its_sender_only(
    monkeypatch: pytest.MonkeyPatch, kind: str, unforeseen: bool
) -> None:
    def broken(content: RecordDict) -> Envelope:
        read = from_content(content)
        if (read.kind, read.site, read.direction) != (kind, "oslo", "reply"):
            return read
        if unforeseen:
            raise OverflowError("int too large to convert to float")
        content["envelope"]["header"] = b'{"attempt":1' + b"0" * 400 + b"}"  # type: ignore[index]
        return from_content(content)

    with bench(hello_timeout_s=1.0) as b:
        monkeypatch.setattr(link_module, "from_content", broken)
        failures = b.ask(timeout_s=1.0)
    assert (failures["berlin"], failures["rome"]) == ("", "")
    assert ("cannot be read" if kind == "train" else "no node that is connected") in failures["oslo"]


def test_a_stranger_is_ignored_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    with bench() as b:
        b.link = FlowerLink(
            b.grid, roster={k: v for k, v in b.roster.items() if k != "rome"}, key=KEY, hello_timeout_s=20
        )
        b.link._roster["atlantis"] = b.roster["rome"]  # somebody is missing, so every node is asked
        started = time.monotonic()
        assert b.link.sites() == ["berlin", "oslo"]
        assert time.monotonic() - started < 15
        assert list(b.link.ignored) == [b.grid.number("rome")]
        assert "'rome', which is not on the roster" in caplog.text
        b.link.sites()
        assert caplog.text.count("is ignored") == 1


def test_a_node_that_only_claims_a_name_is_ignored() -> None:
    with bench() as b:
        b.roster["rome"] = ToySite("rome", KEY.public_key()).public
        b.link = FlowerLink(b.grid, roster=b.roster, key=KEY, hello_timeout_s=2)
        assert b.link.sites() == ["berlin", "oslo"]
        assert "not signed by the key" in b.link.ignored[b.grid.number("rome")]


def test_a_node_with_an_old_answer_of_a_site_is_ignored() -> None:
    """It recorded what the site once answered."""
    site = ToySite("rome", KEY.public_key())
    recorded: list[Envelope] = []

    def parrot(request: Envelope) -> Envelope:
        recorded.append(site(request))
        return recorded[0]

    with InProcessGrid({"parrot": client_app(parrot)}) as grid:
        assert FlowerLink(grid, roster={"rome": site.public}, key=KEY).sites() == ["rome"]
        second = FlowerLink(grid, roster={"rome": site.public}, key=KEY)
        assert second.sites() == []
        assert "answers another question" in second.ignored[grid.number("parrot")]


def test_a_site_tells_its_name_to_its_coordinator_only() -> None:
    with bench() as b:
        stranger = FlowerLink(b.grid, roster=b.roster, key=Ed25519PrivateKey.generate(), hello_timeout_s=2)
        assert stranger.sites() == []


def test_a_node_that_was_set_right_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with bench() as b:
        right, b.sites["rome"].key = b.sites["rome"].key, Ed25519PrivateKey.generate()
        assert b.link.sites() == ["berlin", "oslo"]
        b.sites["rome"].key = right
        assert b.link.sites() == ["berlin", "oslo"]
        monkeypatch.setattr(link_module, "_ASK_AGAIN_S", 0.0)
        b.link._ask_again = dict.fromkeys(b.link._ask_again, 0.0)
        assert b.link.sites() == sorted(NAMES)


def test_a_silent_node_is_waited_for_once_and_found_when_it_speaks() -> None:
    with bench(only("rome", Fault(delay_s=3.0), HELLO), hello_timeout_s=1.0) as b:
        assert b.link.sites() == ["berlin", "oslo"]
        started = time.monotonic()
        assert b.link.sites() == ["berlin", "oslo"]
        assert time.monotonic() - started < 1.0
        while b.link.sites() != sorted(NAMES):
            assert time.monotonic() - started < 30
            time.sleep(0.05)


def test_a_site_that_moved_is_found_at_its_new_node() -> None:
    site = ToySite("rome", KEY.public_key())
    with InProcessGrid({"old": client_app(site), "new": client_app(site)}) as grid:
        grid.kill("new")
        link = FlowerLink(grid, roster={"rome": site.public}, key=KEY)
        assert link.sites() == ["rome"]
        grid.kill("old")
        grid.revive("new")
        assert link.exchange([train("rome", KEY)], timeout_s=5)[0].failure == ""


def test_two_requests_to_one_site_are_handled_one_after_the_other() -> None:
    with bench() as b:
        b.sites["oslo"].slow_s = 0.05
        outcomes = b.link.exchange([train("oslo", KEY, round_=r) for r in (1, 2, 3)], timeout_s=5)
        assert [o.reply.round for o in outcomes if o.reply] == [1, 2, 3]
        assert b.sites["oslo"].most_at_work == 1


def test_sites_work_at_the_same_time() -> None:
    with bench() as b:
        b.link.sites()
        for site in b.sites.values():
            site.slow_s = 1.0
        started = time.monotonic()
        assert b.ask() == dict.fromkeys(NAMES, "")
        assert time.monotonic() - started < 2.9


def test_a_request_dies_with_its_deadline() -> None:
    sent: list[Message] = []
    with bench(lambda _, message: sent.append(message)) as b:
        b.link.sites()
        sent.clear()
        b.ask(timeout_s=7.0)
        assert all(6.0 < message.metadata.ttl <= 7.0 for message in sent)
        assert len(sent) == 3


class BrokenGrid(InProcessGrid):
    """A grid whose calls do what a SuperLink in trouble does."""

    trouble: Callable[[], None] | None = None

    def _maybe(self) -> None:
        if self.trouble:
            self.trouble()

    def get_node_ids(self) -> Iterable[int]:
        self._maybe()
        return super().get_node_ids()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._maybe()
        return super().pull_messages(message_ids)


class HttpError(Exception):
    """Like what Flower's HTTP client raises."""


HttpError.__module__ = "httpx._exceptions"


@pytest.fixture
def broken() -> Iterator[tuple[BrokenGrid, FlowerLink]]:
    site = ToySite("rome", KEY.public_key())
    grid = BrokenGrid({"rome": client_app(site)})
    with grid:
        yield grid, FlowerLink(grid, roster={"rome": site.public}, key=KEY, hello_timeout_s=1.0, poll_s=0.02)


def raising(error: BaseException, times: int) -> Callable[[], None]:
    left = [times]

    def trouble() -> None:
        if left[0]:
            left[0] -= 1
            raise error

    return trouble


def test_a_superlink_that_hangs_ends_at_the_deadline(broken: tuple[BrokenGrid, FlowerLink]) -> None:
    grid, link = broken
    grid.trouble = lambda: time.sleep(30)
    started = time.monotonic()
    outcome = link.exchange([train("rome", KEY)], timeout_s=0.3)[0]
    assert time.monotonic() - started < 20
    assert outcome.reply is None
    assert "the SuperLink" in outcome.failure or "no node" in outcome.failure
    with pytest.raises(ServerError, match="is it running"):
        link.sites()


def test_a_superlink_that_ended_is_not_waited_for(broken: tuple[BrokenGrid, FlowerLink]) -> None:
    grid, link = broken
    link.sites()
    link._ended = lambda: "flower-superlink ended: killed"
    grid.trouble = lambda: time.sleep(30)
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"flower-superlink ended: killed; .* resumes"):
        link.exchange([train("rome", KEY)], timeout_s=60)
    assert time.monotonic() - started < 20


def test_an_http_error_that_passes_is_survived(broken: tuple[BrokenGrid, FlowerLink]) -> None:
    grid, link = broken
    link.sites()
    original = grid.get_node_ids()
    grid.get_node_ids = lambda: original  # type: ignore[method-assign]
    grid.trouble = raising(HttpError("500 database is locked"), 5)
    assert link.exchange([train("rome", KEY)], timeout_s=5)[0].failure == ""
    assert not link._one_by_one


def test_a_run_that_was_stopped_ends_the_coordinator(broken: tuple[BrokenGrid, FlowerLink]) -> None:
    grid, link = broken
    grid.trouble = raising(RunNotRunningException(), 1)
    with pytest.raises(ServerError, match="ended the run"):
        link.exchange([train("rome", KEY)], timeout_s=5)


def test_a_superlink_that_takes_no_messages_is_a_failure(broken: tuple[BrokenGrid, FlowerLink]) -> None:
    grid, link = broken
    link.sites()
    grid.push_messages = lambda messages: []  # type: ignore[method-assign]
    assert "did not take" in link.exchange([train("rome", KEY)], timeout_s=1)[0].failure


def test_flowers_own_way_to_ask_works_on_the_grid() -> None:
    with bench() as b:
        numbers = list(b.grid.get_node_ids())
        messages = [b.grid.create_message(RecordDict(), "query.tg_tinker", number, group_id="") for number in numbers]
        replies = list(b.grid.send_and_receive(messages, timeout=5))
        assert {r.metadata.src_node_id for r in replies} == set(numbers)
        assert all(r.has_error() and "other records" in (r.error.reason or "") for r in replies)


def test_apps_share_no_memory_with_each_other_or_the_coordinator() -> None:
    held: list[RecordDict] = []
    go_on = threading.Event()
    app = ClientApp()

    @app.query("tg_tinker")
    def spoil(message: Message, context: object) -> Message:
        go_on.wait(5)
        assert set(message.content) == {"sent"}
        message.content["spoilt"] = ConfigRecord()
        held.append(RecordDict())
        return Message(held[-1], reply_to=message)

    with InProcessGrid({"a": app}) as grid:
        messages = [Message(RecordDict({"sent": ConfigRecord()}), grid.number("a"), "query.tg_tinker") for _ in "12"]
        ids = list(grid.push_messages(messages))
        messages[1].content["later"] = ConfigRecord()  # it waits: a node handles one message at a time
        go_on.set()
        assert wait_until(lambda: all(grid._flights[i].replies for i in ids), 5)
        for content in held:
            content["later"] = ConfigRecord()
        replies = list(grid.pull_messages(ids))
        assert [r.has_content() and set(r.content) for r in replies] == [set(), set()]
        assert [set(m.content) for m in messages] == [{"sent"}, {"sent", "later"}]
