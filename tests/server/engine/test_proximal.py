"""The proximal term against torch's optimizers on plain numbers, and where its anchor comes from."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tg_tinker import ServiceClient
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import BatchData, OptimizerConfig, TrainingConfig
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.engine.backend import EngineState
from tg_tinker_server.engine.state import checkpoint_of

MU, RATE = 0.7, 0.2
OPTIMIZERS = {
    "sgd": ({"name": "sgd", "momentum": 0.0}, lambda p: torch.optim.SGD(p, lr=RATE)),
    "sgd with momentum": (
        {"name": "sgd", "momentum": 0.9, "nesterov": False},
        lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9),
    ),
    "adamw": ({"name": "adamw", "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.1)),
}


def layout_order(session, state):
    """Trained weights in the order of the flat gradient."""
    return np.concatenate([state.tensors["weights/" + name].ravel() for name in session._layout.shapes])


def now(session):
    return layout_order(session, session.export_state(optimizer=False)).astype(np.float64)


def anchored(tools, session):
    """Whether the next step of SGD with a gradient of almost nothing pulls to other weights than now's."""
    before = now(session)
    tools.accumulate(session, tools.batch())
    tools.step(session, 1e-3, global_clip=1e-12)
    return np.abs(now(session) - before).max() > 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dp", [None, {"max_grad_norm": 0.05}])
def test_steps_are_those_of_the_gradient_plus_mu_times_the_way_from_the_anchor(any_bench, tools, name, dp):
    settings, make = OPTIMIZERS[name]
    session = any_bench.open(dp=dp, optimizer=settings | {"proximal_mu": MU}, batch_size=4)
    anchor = now(session)
    weights = torch.nn.Parameter(torch.from_numpy(anchor.copy()))
    optimizer = make([weights])
    for seed in range(4):
        before = now(session)
        result = tools.accumulate(session, tools.batch(seed=seed))
        weights.grad = torch.from_numpy(result.contribution.sum_P / 4 + MU * (weights.detach().numpy() - anchor))
        optimizer.step()
        outcome = tools.step(session, RATE)
        assert outcome.grad_norm == pytest.approx(np.linalg.norm(result.contribution.sum_P / 4), rel=1e-5)
        expected = weights.detach().numpy().copy()
        assert np.linalg.norm(now(session) - expected) < 1e-3 * np.linalg.norm(expected - before)
        term = MU * np.linalg.norm(before - anchor)
        assert seed == 0 or term > 0.05 * outcome.grad_norm, "the term is no matter of rounding"
        with torch.no_grad():
            weights.copy_(torch.from_numpy(now(session)))


def test_noise_is_added_before_and_the_global_clip_does_not_shorten_the_term(any_bench, tools):
    session = any_bench.open(
        dp={"max_grad_norm": 0.05}, optimizer={"name": "sgd", "momentum": 0.0, "proximal_mu": MU}, batch_size=4
    )
    start = now(session)
    tools.accumulate(session, tools.batch())
    tools.step(session, 1.0)
    before = now(session)
    tools.accumulate(session, tools.batch())
    rng = tools.no_noise()
    rng.normals = lambda count: np.full(count, 3.0)
    tools.step(session, RATE, mechanism=tools.mechanism(1.0, 0.05, rng), global_clip=1e-6)
    moved = now(session) - before + RATE * MU * (before - start)
    assert np.linalg.norm(moved) == pytest.approx(RATE * 1e-6, rel=0.5)
    assert np.linalg.norm(before - start) > 1e-3


def test_no_mu_is_no_term_and_no_anchor_is_kept(any_bench, tools):
    ends = []
    for optimizer in ({"name": "sgd"}, {"name": "sgd", "proximal_mu": 0.0}):
        session = any_bench.open(optimizer=optimizer)
        for seed in range(2):
            tools.accumulate(session, tools.batch(seed=seed))
            tools.step(session)
        assert not any(k.startswith("anchor/") for k in session.export_state(optimizer=True).tensors)
        ends.append(tools.weights_of(session))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_snapshot_brings_its_anchor_along_and_goes_on_bit_for_bit(any_bench, tools, name):
    settings = {"optimizer": {"name": name, "proximal_mu": MU}}
    session = any_bench.open(**settings)
    for seed in range(2):
        tools.accumulate(session, tools.batch(seed=seed))
        tools.step(session, RATE)
    other = any_bench.open(**settings, randomise=False)
    other.import_state(session.export_state(optimizer=True), optimizer=True)
    for seed in (7, 8):
        for one in (session, other):
            tools.accumulate(one, tools.batch(seed=seed))
            tools.step(one, RATE)
    assert tools.weights_of(session) == tools.weights_of(other)


SGD = {"name": "sgd", "momentum": 0.0, "proximal_mu": 100.0}


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_checkpoint_is_the_new_anchor_of_whoever_loads_it(any_bench, tools, optimizer):
    session = any_bench.open(optimizer=SGD)
    assert not anchored(tools, session)
    tools.accumulate(session, tools.batch())
    tools.step(session, 1e-2)
    snapshot = session.export_state(optimizer=True)
    assert any(k.startswith("anchor/") for k in snapshot.tensors)
    assert anchored(tools, session)
    session.import_state(checkpoint_of(snapshot), optimizer=optimizer)
    assert not anchored(tools, session)
    session.import_state(snapshot, optimizer=True)
    assert anchored(tools, session)
    session.import_state(snapshot, optimizer=False)
    assert not anchored(tools, session)


def test_a_step_that_fails_moves_no_anchor(any_bench, tools):
    session = any_bench.open(optimizer={"name": "sgd", "momentum": 0.0, "proximal_mu": 1e38})
    start = now(session)
    tools.accumulate(session, tools.batch())
    tools.step(session, 1e-2)
    before = tools.weights_of(session)
    assert (now(session) != start).any()
    tools.accumulate(session, tools.batch())
    with pytest.raises(InvalidRequestError, match="nothing was changed"):
        tools.step(session, 1e30)
    assert tools.weights_of(session) == before
    assert session.pending_calls == 1


@pytest.mark.parametrize("kind", ["shape", "nan", "missing"])
def test_an_anchor_that_does_not_fit_changes_nothing(any_bench, tools, kind):
    session = any_bench.open(optimizer=SGD)
    tools.accumulate(session, tools.batch())
    tools.step(session, 1e-2)
    saved = session.export_state(optimizer=True)
    tensors = dict(saved.tensors)
    key = next(k for k in tensors if k.startswith("anchor/"))
    if kind == "missing":
        tensors["anchor/unheard_of"] = tensors.pop(key)
    else:
        tensors[key] = np.zeros((2, 2), np.float32) if kind == "shape" else np.full_like(tensors[key], np.nan)
    before = tools.weights_of(session)
    with pytest.raises(InvalidRequestError, match="does not fit"):
        session.import_state(EngineState(tensors=tensors, scalars=saved.scalars), optimizer=True)
    assert tools.weights_of(session) == before


def test_a_frozen_factor_feels_no_pull(torch_bench, tools):
    session = torch_bench.open(lora={"frozen_factor": "a"}, optimizer=SGD | {"proximal_mu": MU})
    before = dict(session.export_state(optimizer=False).tensors)
    for seed in range(2):
        tools.accumulate(session, tools.batch(seed=seed))
        tools.step(session, RATE)
    snapshot = session.export_state(optimizer=True).tensors
    assert {k for k in snapshot if k.startswith("anchor/")} == {"anchor/" + name for name in session.parameters}
    assert all((snapshot[k] != before[k]).any() == ("lora_B" in k) for k in before)


@pytest.mark.parametrize("mu", [-1.0, float("nan"), float("inf")])
def test_an_impossible_mu_is_refused(mu):
    with pytest.raises(ValidationError):
        OptimizerConfig(proximal_mu=mu)


def training(client, steps, start=0):
    for seed in range(start, start + steps):
        ids = np.random.default_rng(seed).integers(0, 256, (2, 9))
        client.forward_backward(BatchData(input_ids=ids)).result()
        client.optim_step().result()


def test_the_anchor_survives_a_restart_of_the_server_and_a_loaded_checkpoint_takes_its_place(tmp_path):
    optimizer = OptimizerConfig(name="sgd", momentum=0.0, learning_rate=RATE, proximal_mu=MU)
    config = TrainingConfig(model_ref="bigram", optimizer=optimizer, batch_size=2)

    def server() -> EmbeddedServer:
        return EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path))

    def pulled(client):
        return client.pull_weights().tensors["table"].astype(np.float64)

    with server() as running:
        key = running.mint_key()
        with ServiceClient(api_key=key, base_url=running.address) as service:
            whole, broken = (service.create_training_client(config) for _ in range(2))
            training(whole, 4)
            training(broken, 2)
            whole_id, broken_id = whole.id, broken.id
    with server() as running, ServiceClient(api_key=key, base_url=running.address) as service:
        whole, broken = (service.get_training_client(i) for i in (whole_id, broken_id))
        training(broken, 2, start=2)
        np.testing.assert_array_equal(pulled(broken), pulled(whole))
        saved = broken.save_state(include_optimizer=True).result()
        broken.load_state(saved.artifact_id).result()
        fresh = service.create_training_client(config, checkpoint_id=saved.artifact_id)
        for client in (whole, broken, fresh):
            training(client, 2, start=9)
        np.testing.assert_array_equal(pulled(broken), pulled(fresh))
        assert (pulled(broken) != pulled(whole)).any()
