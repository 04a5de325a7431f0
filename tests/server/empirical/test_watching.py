"""What the watch writes down is what happened, and a planted gradient is the one that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from tg_tinker.data import collate
from tg_tinker.types import DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker.types.losses import Loss
from tg_tinker_server.empirical.bench import Bench, Record, bench
from tg_tinker_server.empirical.planting import Planted, PlantingBigramBackend
from tg_tinker_server.empirical.settings import MODELS, AuditSettings
from tg_tinker_server.empirical.watching import Watch, WatchedBackend
from tg_tinker_server.engine.backend import Backend, LossRequest, PassRequest, StepRequest
from tg_tinker_server.engine.bigram import BigramBackend
from tg_tinker_server.engine.gradients import GradientContribution
from tg_tinker_server.engine.torch_backend import TorchBackend


@pytest.fixture(params=MODELS)
def tools(request: pytest.FixtureRequest):
    with bench(AuditSettings(model=request.param, seed=0)) as made:
        yield made


def open_run(tools: Bench, bound: float):
    dp = DPConfig(max_grad_norm=bound, target_epsilon=None, allow_unnoised_steps=True)
    return tools.open(dp, batch_size=4, learning_rate=1.0)


def test_a_planted_gradient_is_released_on_its_coordinate_and_nowhere_else(tools: Bench) -> None:
    small, large, own = tools.records(3, 5)
    tools.watch.plant(small, Planted(coordinate=100, value=0.25))
    tools.watch.plant(large, Planted(coordinate=2001, value=-70.0))
    client = open_run(tools, 0.5)
    client.forward_backward(collate([small, large]))
    client.optim_step(apply_dp_noise=False).result()
    (step,) = tools.watch.steps
    assert step.released_P[100] == pytest.approx(0.25, rel=1e-5)
    assert step.released_P[2001] == pytest.approx(-0.5, rel=1e-5)
    assert np.flatnonzero(np.abs(step.released_P) > 1e-4).tolist() == [100, 2001]
    client.forward_backward(collate([own]))
    client.optim_step(apply_dp_noise=False).result()
    assert np.count_nonzero(np.abs(tools.watch.steps[1].released_P) > 1e-6) > 5, (
        "a record without a plant keeps its own"
    )


def test_what_is_released_without_noise_is_the_clipped_sum_and_with_it_is_not(tools: Bench) -> None:
    client = open_run(tools, 0.5)
    for noise in (False, True):
        client.forward_backward(collate(tools.records(4, 6)))
        client.forward_backward(collate(tools.records(2, 9)))
        client.optim_step(apply_dp_noise=noise).result()
    exact, noised = tools.watch.steps
    assert np.abs(exact.noise_P).max() < 1e-5
    assert np.linalg.norm(exact.clipped_P) > 0.3
    assert np.std(noised.noise_P) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("how", ["discard", "import"])
def test_dropped_calls_are_not_in_the_sum(how: str) -> None:
    with bench(AuditSettings(model="bigram", seed=0)) as tools:
        dropped, kept = tools.records(4, 6), tools.records(1, 6)
        config = open_run(tools, 0.5).config
    watch = Watch()
    session = WatchedBackend(BigramBackend(), watch).open(run_id="r", config=config)
    start = session.export_state(optimizer=False)

    def send(records: list[Record], whose: str) -> None:
        request = PassRequest.of_batch(collate(records), units=[whose] * len(records))
        contribution = session.forward_backward(request).contribution
        assert contribution is not None
        session.accumulate(contribution)

    send(dropped, "dropped")
    if how == "discard":
        session.discard_pending()
    else:
        session.import_state(start, optimizer=False)
    send(kept, "kept")
    session.step(StepRequest(learning_rate=1.0))
    assert np.abs(watch.steps[0].noise_P).max() < 1e-5
    assert watch.steps[0].units == ("kept",)


def test_evaluation_reports_the_records_own_loss(tools: Bench) -> None:
    (record,) = tools.records(1, 6)
    client = open_run(tools, 0.5)
    client.eval()
    loss = client.forward_backward(collate([record])).result().loss
    tools.watch.plant(record, Planted(coordinate=3, value=9.0))
    assert client.forward_backward(collate([record])).result().loss == loss


def test_the_planting_bigram_is_the_bigram_where_nothing_is_planted() -> None:
    with bench(AuditSettings(model="bigram", seed=0)) as tools:
        records = tools.records(5, 7)
        client = open_run(tools, 0.1)
        client.forward_backward(collate(records))
        client.optim_step(apply_dp_noise=False).result()
    session = BigramBackend().open(run_id="r", config=client.config)
    result = session.forward_backward(PassRequest.of_batch(collate(records)))
    assert np.abs(tools.watch.steps[0].released_P - result.contribution.sum_P).max() < 1e-6


@pytest.mark.parametrize("model", ["bigram", "tiny-llama-2m"])
def test_a_gradient_is_planted_in_a_datum_too(model: str) -> None:
    watch = Watch()
    backend: Backend = PlantingBigramBackend() if model == "bigram" else TorchBackend()
    config = TrainingConfig(
        model_ref=model,
        lora_config=LoRAConfig(rank=2, target_modules=["q_proj"]),
        optimizer=OptimizerConfig(name="sgd", momentum=0.0),
        dp_config=DPConfig(max_grad_norm=0.5, target_epsilon=None),
        batch_size=1,
    )
    session = WatchedBackend(backend, watch).open(run_id="r", config=config)
    tokens = np.array([1, 2, 3])
    inputs = {"target_tokens": tokens, "weights": np.ones(3, dtype=np.float32)}
    request = LossRequest(tokens=(tokens,), inputs=(inputs,), loss=Loss.of("cross_entropy"), units=("canary",))
    watch.plant(tokens.tolist(), Planted(coordinate=5, value=-7.0))
    contribution = session.forward_backward(request).contribution
    assert isinstance(contribution, GradientContribution)
    assert contribution.sum_P[5] == pytest.approx(-0.5, rel=1e-5)
    assert np.abs(np.delete(contribution.sum_P, 5)).max() == 0
