"""A site that dies anywhere in a round goes on: one update, paid for once, on the right weights."""

from __future__ import annotations

import contextlib
import secrets
import time
from pathlib import Path

import numpy as np
import pytest

from tests.tg_tinker.federated.site_lab import ADAPTER, TEXTS, Crash, Party, Tripwire, moved, site_job
from tg_tinker.federated.site import FAILED
from tg_tinker.types.federation import WeightsSource
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger

UNPROTECTED = {"require_record_privacy": False, "public_units": len(TEXTS)}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path_factory.mktemp("server"))
    with EmbeddedServer(config) as server:
        yield server


class Place:
    """Makes parties that share a server and nothing else."""

    def __init__(self, server: EmbeddedServer, folder: Path) -> None:
        self.server, self.folder, self.made = server, folder, 0

    def party(self, *, private: bool, **settings) -> Party:
        self.made += 1
        name = f"data-{self.made}"
        party = Party(
            self.server,
            self.folder / name,
            dataset=name,
            policy={} if private else UNPROTECTED,
            # A tenant of its own: few runs at a time are allowed to one.
            api_key=self.server.mint_key(f"tenant-{secrets.token_hex(8)}"),
            **settings,
        )
        party.register(target_epsilon=8.0 if private else None)
        return party


@pytest.fixture
def place(server, tmp_path):
    return Place(server, tmp_path)


def exact_job():
    """Every record in every step and no noise: the update is determined."""
    return site_job(records=None, batch_size=len(TEXTS))


def begun(place, job, *, private, round_):
    """A party that has come to the beginning of a round, and the weights of then."""
    party, weights = place.party(private=private), ADAPTER
    party.join(job)
    for earlier in range(1, round_):
        weights = moved(weights, party.ask(job, "train", earlier, arrays=weights).arrays)
    return party, weights


def points_of(place, job, *, private, round_):
    """What is passed in a round without a crash, and its update."""
    party, weights = begun(place, job, private=private, round_=round_)
    wire = Tripwire()
    reply = party.ask(job, "train", round_, arrays=weights, wire=wire)
    assert reply.facts == {}
    return wire.passed, reply.arrays["table"]


def crash(party, job, weights, *, round_, at):
    """Die at a point."""
    wire = Tripwire(at=at)
    with pytest.raises(Crash):
        party.ask(job, "train", round_, arrays=weights, wire=wire)
    return wire.passed[-1]


def check_exact(place, round_, part):
    """Without noise the update is determined: a crash changes no bit of it."""
    job = exact_job()
    points, expected = points_of(place, job, private=False, round_=round_)
    assert len(points) > 40
    assert float(np.abs(expected).sum()) > 1
    for at in range(len(points))[part]:
        party, weights = begun(place, job, private=False, round_=round_)
        point = crash(party, job, weights, round_=round_, at=at)
        reply = party.ask(job, "train", round_, attempt=2, arrays=weights)
        np.testing.assert_array_equal(reply.arrays["table"], expected, err_msg=point)


def check_price(place, round_, part):
    """With noise: one price, whatever happened, and one update from then on."""
    job = site_job()
    points, _ = points_of(place, job, private=True, round_=round_)
    for at in range(len(points))[part]:
        party, weights = begun(place, job, private=True, round_=round_)
        point = crash(party, job, weights, round_=round_, at=at)
        reply = party.ask(job, "train", round_, attempt=2, arrays=weights)
        assert reply.facts == {}, point
        again = party.ask(job, "train", round_, attempt=3, arrays=weights)
        np.testing.assert_array_equal(again.arrays["table"], reply.arrays["table"])
        assert party.charges() == party.releases() == round_ * job.local_steps, point
        with party.service() as service:
            assert len(service.list_training_clients()) == 1, point
            assert len(service.list_artifacts()) <= 1, point  # one may be lost that was made and not noted
        with party.state() as state:
            record = state.job(job.digest())
            assert record.counted, point
            assert record.charges == round_ * job.local_steps, point


# Each of the four looks at every 14th point, and each at other ones; all points of all take a minute.
def test_a_crash_in_the_first_round_changes_no_bit_of_its_update(place):
    check_exact(place, 1, slice(0, None, 14))


def test_a_crash_in_a_later_round_changes_no_bit_of_its_update(place):
    check_exact(place, 2, slice(2, None, 14))


def test_a_crash_in_the_first_round_costs_nothing(place):
    check_price(place, 1, slice(4, None, 14))


def test_a_crash_in_a_later_round_costs_nothing(place):
    check_price(place, 2, slice(6, None, 14))


@pytest.mark.slow
@pytest.mark.parametrize("round_", [1, 2])
@pytest.mark.parametrize("check", [check_exact, check_price])
def test_a_crash_at_any_point_at_all(place, check, round_):
    check(place, round_, slice(None))


@pytest.mark.slow
def test_two_crashes_in_one_round(place):
    job = exact_job()
    points, expected = points_of(place, job, private=False, round_=1)
    rng = np.random.default_rng(7)
    for _ in range(60):
        party, weights = begun(place, job, private=False, round_=1)
        first, second = sorted(rng.integers(0, len(points), 2))
        crash(party, job, weights, round_=1, at=int(first))
        with contextlib.suppress(Crash):
            party.ask(job, "train", 1, attempt=2, arrays=weights, wire=Tripwire(at=int(second - first)))
        reply = party.ask(job, "train", 1, attempt=3, arrays=weights)
        np.testing.assert_array_equal(reply.arrays["table"], expected)


@pytest.mark.parametrize("named", ["before load_state", "after load_state", "before forward_backward"])
def test_a_crash_around_loading_leaves_the_round_on_its_own_weights(place, named):
    """Between two rounds the run's step is that of the next one already, and its weights are not."""
    job = exact_job()
    points, expected = points_of(place, job, private=False, round_=2)
    party, weights = begun(place, job, private=False, round_=2)
    crash(party, job, weights, round_=2, at=points.index(named))
    other = moved(weights, {"table": np.float32(0.125)})
    assert party.ask(job, "train", 2, attempt=2, arrays=other).facts["refused"] == "wrong_round"
    reply = party.ask(job, "train", 2, attempt=3, arrays=weights)
    assert reply.facts == {}
    np.testing.assert_array_equal(reply.arrays["table"], expected)


def test_a_step_that_is_still_under_way_is_counted_before_the_next_round(place):
    job = site_job()
    points, _ = points_of(place, job, private=True, round_=1)
    party, weights = begun(place, job, private=True, round_=1)
    crash(party, job, weights, round_=1, at=points.index("before optim_step"))
    with party.state() as state:
        (run_id,) = state.run_ids(job.digest())
    with party.service() as service:
        run = service.get_training_client(run_id)
        run.eval()
        run.forward_backward({"input_ids": np.full((24, 2000), 7)})  # keeps the queue busy
        run.train()
        run.optim_step()
        run.close()  # both are handed over, and nobody waits for them
    assert party.ask(job, "train", 2, arrays=weights).facts == {}
    with party.state() as state:
        assert state.job(job.digest()).charges == party.charges() == 3


@pytest.fixture
def slow_ledger(monkeypatch):
    """A busy server: a charge stands in the ledger a while after its step was sent."""
    plain = PrivacyLedger.reserve

    def reserve(*args, **kwargs):
        time.sleep(0.7)
        return plain(*args, **kwargs)

    monkeypatch.setattr(PrivacyLedger, "reserve", reserve)


def test_a_statement_waits_for_the_step_of_a_process_that_died(place, slow_ledger):
    job = site_job()
    party, weights = begun(place, job, private=True, round_=1)

    class Wire(Tripwire):
        def point(self, name):
            if name == "after optim_step":
                time.sleep(0.3)  # until the server has it
                raise Crash

    with pytest.raises(Crash):
        party.ask(job, "train", 1, arrays=weights, wire=Wire())
    said = party.statement(job)
    assert said.rounds == ()
    assert party.charges() == 1
    assert float(said.epsilon) >= party.epsilon_of_all() > 0
    assert party.ask(job, "train", 1, attempt=2, arrays=weights).facts["refused"] == "wrong_round"


def test_who_was_asked_to_finish_takes_no_step_even_if_nothing_could_be_signed(place):
    job = site_job()
    party, weights = begun(place, job, private=True, round_=1)

    class Wire(Tripwire):
        def point(self, name):
            if name == "before get_signed_report":
                raise Crash

    with pytest.raises(Crash):
        party.ask(job, "finish", wire=Wire())
    assert party.ask(job, "train", 1, arrays=weights).facts["refused"] == "wrong_round"
    assert party.statement(job).epsilon_spent == 0


def test_an_update_that_cost_more_than_was_agreed_does_not_leave(place, monkeypatch):
    """The server charges the last step twice: it died between charge and release, and made the step again."""
    job = site_job(rounds=1, records={"target_epsilon": 2.0})
    party, weights = begun(place, job, private=True, round_=1)
    plain, steps = PrivacyLedger.reserve, []

    def reserve(*args, **kwargs):
        steps.append(args)
        if len(steps) == job.total_steps:
            plain(*args, **kwargs)
        return plain(*args, **kwargs)

    monkeypatch.setattr(PrivacyLedger, "reserve", reserve)
    for attempt in (1, 2):
        reply = party.ask(job, "train", 1, attempt=attempt, arrays=weights)
        assert reply.facts["refused"] == "policy"
        assert "used up" in reply.facts["message"]
        assert dict(reply.arrays) == {}
    assert party.charges() == job.total_steps + 1
    assert float(party.statement(job).epsilon) >= party.epsilon_of_all()


def test_a_run_that_was_made_and_not_noted_is_found_again(place):
    job = site_job()
    points, _ = points_of(place, job, private=True, round_=1)
    party, weights = begun(place, job, private=True, round_=1)
    crash(party, job, weights, round_=1, at=points.index("after create_training_client"))
    assert party.ask(job, "train", 1, attempt=2, arrays=weights).facts == {}
    with party.service() as service:
        assert len(service.list_training_clients()) == 1


@pytest.mark.parametrize("named", ["after load_state", "before result", "after result", "before pull_weights"])
def test_site_and_server_end_together_and_nothing_is_charged_too_little(place, tmp_path, named):
    job = site_job()
    points, _ = points_of(place, job, private=True, round_=1)
    last = len(points) - 1 - points[::-1].index(named)
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "server")
    server = EmbeddedServer(config).start()
    party = Party(server, tmp_path)
    party.register(target_epsilon=8.0)
    party.join(job)
    crash(party, job, ADAPTER, round_=1, at=last)
    server.stop(grace_s=0.0)
    with EmbeddedServer(config) as party.server:
        reply = party.ask(job, "train", 1, attempt=2, arrays=ADAPTER)
        assert reply.facts == {}
        assert party.releases() == job.local_steps
        assert party.releases() <= party.charges() <= job.local_steps + 1


def test_a_restored_server_that_lost_the_round_is_not_trained_on(place):
    """The run holds other weights than the site believes: it is loaded anew, and the base is right again."""
    job = exact_job()
    points, expected = points_of(place, job, private=False, round_=2)
    party, weights = begun(place, job, private=False, round_=2)
    crash(party, job, weights, round_=2, at=points.index("before forward_backward"))
    with party.state() as state:
        (run_id,) = state.run_ids(job.digest())
    with party.service() as service:  # what a restored database amounts to: an older step, other weights
        run = service.get_training_client(run_id)
        info = service.import_weights(
            {"table": np.full((260, 260), 3.0, np.float32)},
            base_model="bigram",
            lora_config=run.config.lora_config,
            step=0,
            source=WeightsSource(job=job.digest(), round=0, epsilon=0.0, delta=1e-5),
        )
        run.load_state(info.artifact_id, optimizer=False)
    reply = party.ask(job, "train", 2, attempt=2, arrays=weights)
    assert reply.facts["refused"] == FAILED
    reply = party.ask(job, "train", 2, attempt=3, arrays=weights)
    assert reply.facts == {}
    np.testing.assert_array_equal(reply.arrays["table"], expected)


def test_steps_lost_in_failures_count_against_the_job(place):
    """The run paid for steps that no update came of: the job ends rather than overspend."""
    job = site_job()
    party, _ = begun(place, job, private=True, round_=1)
    points, _ = points_of(place, job, private=True, round_=1)
    crash(party, job, ADAPTER, round_=1, at=points.index("before forward_backward"))
    with party.state() as state:
        (run_id,) = state.run_ids(job.digest())
    with party.service() as service:
        run = service.get_training_client(run_id)
        for _ in range(3):
            run.forward_backward(dataset=party.dataset).result()
            run.optim_step().result()
    reply = party.ask(job, "train", 1, attempt=2, arrays=ADAPTER)
    assert reply.facts["refused"] == FAILED  # the run is beyond the round
    reply = party.ask(job, "train", 1, attempt=3, arrays=ADAPTER)
    assert reply.facts["refused"] == "policy"
    assert "used up" in reply.facts["message"]
    assert party.charges() <= job.total_steps
