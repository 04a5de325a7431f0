import threading

import pytest

from tg_tinker import (
    Datum,
    InvalidRequestError,
    ModelInput,
    ResourceNotFoundError,
    ServerError,
    ServiceClient,
    TGTinkerError,
    TrainingConfig,
)
from tg_tinker.recovery import Recovery, RecoveryPolicy
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

DATA = [Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, 1.0]})]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path_factory.mktemp("server"), log_level="error")
    with (
        EmbeddedServer(config) as server,
        ServiceClient(api_key=server.mint_key("clinic"), base_url=server.address) as client,
    ):
        yield client


@pytest.fixture
def tc(service):
    return service.create_training_client(TrainingConfig(model_ref="bigram", batch_size=1))


def training(service, *, lose_at, steps=5, save_every=2):
    """A loop that saves as it goes; its run is deleted under it once."""
    lost = []

    def train(client):
        while client.step < steps:
            if client.step == lose_at and not lost:
                lost.append(client.id)
                service.delete_training_client(client.id)
            client.forward_backward(DATA, "cross_entropy")
            step = client.optim_step().result().step
            if step % save_every == 0:
                client.save_state(f"step-{step}")
        return client.step

    return train


def policy(**settings):
    return RecoveryPolicy(enabled=True, backoff_s=0.0, **settings)


def test_a_lost_run_goes_on_from_its_last_checkpoint(service, tc):
    heard = []
    recovery = Recovery(service, tc, policy(on_recovery=heard.append))
    assert recovery.run(training(service, lose_at=3)) == 5
    (recovered,) = heard
    assert (recovered.run_id, recovered.attempt, recovered.checkpoint.step) == (tc.id, 1, 2)
    assert recovered.client.id == recovery.client.id != tc.id


def test_the_weights_are_those_of_an_undisturbed_run(service, tc):
    undisturbed = service.create_training_client(tc.config)
    training(service, lose_at=-1)(undisturbed)
    recovery = Recovery(service, tc, policy())
    recovery.run(training(service, lose_at=3))
    expected, found = (c.forward(DATA).result().metrics["loss:sum"] for c in (undisturbed, recovery.client))
    assert found == pytest.approx(expected, rel=1e-9)


def test_it_is_off_unless_asked_for(service, tc):
    with pytest.raises(TGTinkerError, match="no such training client"):
        Recovery(service, tc, RecoveryPolicy()).run(training(service, lose_at=3))


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(service, tc):
    heard = []
    recovery = Recovery(service, tc, policy(on_failure=lambda run, error: heard.append((run, type(error)))))
    with pytest.raises(TGTinkerError, match="no such training client"):
        recovery.run(training(service, lose_at=1))
    assert [run for run, _ in heard] == [tc.id]


def test_attempts_are_counted(service, tc):
    tc.save_state("start")
    calls = []

    def train(client):
        calls.append(client.id)
        raise ServerError("always")

    with pytest.raises(ServerError, match="always"):
        Recovery(service, tc, policy(max_attempts=2)).run(train)
    assert len(calls) == 3


def test_refusals_are_not_recovered_from(service, tc):
    tc.save_state("start")
    recovery = Recovery(service, tc, policy(on_recovery=pytest.fail))
    with pytest.raises(InvalidRequestError):
        recovery.run(lambda client: client.optim_step().result())
    with pytest.raises(ResourceNotFoundError):
        recovery.run(lambda client: client.load_state("ckpt_none"))


def test_watching_ends_with_the_run_or_when_told(service, tc):
    stop = threading.Event()
    recovery = Recovery(service, tc, policy(poll_s=0.02))
    threading.Timer(0.1, stop.set).start()
    assert not recovery.watch(stop)
    service.delete_training_client(tc.id)
    assert recovery.watch(threading.Event())


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"max_attempts": 0}, "max_attempts"),
        ({"backoff_s": 90.0}, "longest_backoff_s"),
        ({"poll_s": 0}, "poll_s"),
        ({"strategy": "best"}, "strategy"),
    ],
)
def test_policies_that_cannot_be(given, field):
    with pytest.raises(InvalidRequestError) as caught:
        RecoveryPolicy(**given)
    assert caught.value.field == field
