"""Custom losses end to end: against autograd on the same model here, under privacy, and run by the server."""

import asyncio
import time

import numpy as np
import pytest
import torch

from tests.server.engine.conftest import LOADERS
from tg_tinker import (
    Datum,
    DPConfig,
    DPUnsupportedError,
    InvalidRequestError,
    LoRAConfig,
    ModelInput,
    OptimizerConfig,
    ServiceClient,
    TrainingConfig,
)
from tg_tinker.custom.linear import forward_data
from tg_tinker.regularizers import L1, RegularizerFailedError, RegularizerSpec
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.engine.torch_backend import TorchBackend

RATE = 0.25


def datum(tokens, **inputs):
    return Datum(ModelInput.from_ints(tokens), {"target_tokens": [*tokens[1:], 7], **inputs})


DATA = [
    datum([1, 5, 9, 2], advantages=[1.0, -1.0, 0.5, 2.0]),
    datum([3, 8], advantages=[-1.0, 1.0]),
    datum([4, 4, 6], advantages=[0.0, 3.0, 1.0]),
]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    config = ServerConfig(port=0, data_dir=tmp_path_factory.mktemp("server"), log_level="error")
    with EmbeddedServer(config, TorchBackend({"tiny": LOADERS["tiny"]})) as server:
        yield server


@pytest.fixture
def service(embedded):
    with ServiceClient(api_key=embedded.mint_key("clinic"), base_url=embedded.address) as client:
        yield client


def create(service, **settings):
    given = {
        "model_ref": "tiny",
        "mixed_precision": "fp32",
        "max_sequence_length": 16,
        "batch_size": 1,
        "optimizer": OptimizerConfig(name="sgd", momentum=0.0, nesterov=False, learning_rate=RATE),
        **settings,
    }
    return service.create_training_client(TrainingConfig(**given))


def private(service, dataset, **settings):
    """Without noise to speak of and without clipping, so that a step shows the sum."""
    dp = {"dataset_id": dataset, "noise_multiplier": 1e-9, "target_epsilon": None, "max_grad_norm": 1e3, **settings}
    return create(service, dp_config=DPConfig(**dp))


def flat(tensors):
    return np.concatenate([tensors[n].ravel() for n in sorted(tensors)])


def gradient_of(tc, act):
    """What a step of SGD shows: the sum of the gradients that ``act`` added."""
    before = flat(tc.pull_weights().tensors)
    result = act()
    tc.optim_step().result()
    return (before - flat(tc.pull_weights().tensors)) / RATE, result


def squares(data, logprobs):
    return sum((x**2).sum() for x in logprobs), {"mine": 4.0}


def spread(data, logprobs):
    return torch.cat(logprobs).var(correction=0), {}


def autograd(tc, loss):
    """The gradient of the loss on the same weights, by torch alone."""
    model, _ = LOADERS["tiny"]()
    tensors = tc.pull_weights().tensors
    state = {n: torch.tensor(a) for n, a in tensors.items()}
    model.load_state_dict(state, strict=False)
    names = [n for n, p in model.named_parameters() if n in state]
    assert sorted(names) == sorted(state)
    logprobs = []
    for d in DATA:
        logits = model(torch.tensor([d.model_input.to_ints()])).logits[0].log_softmax(-1)
        targets = torch.tensor(d.loss_fn_inputs["target_tokens"].data)
        logprobs.append(logits.gather(-1, targets[:, None])[:, 0])
    loss(DATA, logprobs)[0].backward()
    parameters = dict(model.named_parameters())
    return np.concatenate([parameters[n].grad.numpy().ravel() for n in sorted(names)])


@pytest.mark.parametrize("loss", [squares, spread], ids=["squares", "spread"])
def test_the_gradient_is_that_of_autograd_on_the_same_model(service, loss):
    tc = create(service, lora_config=None)
    expected = autograd(tc, loss)
    found, result = gradient_of(tc, lambda: tc.forward_backward_custom(DATA, loss).result())
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max() + 1e-6)
    assert result.metrics["loss:sum"] == result.loss == result.custom_loss.loss_total


def test_the_result_speaks_of_the_custom_loss(service):
    tc = create(service, lora_config=None)
    logprobs = [o["logprobs"].to_numpy() for o in tc.forward(forward_data(DATA)).result().loss_fn_outputs]
    result = tc.forward_backward_custom(DATA, squares).result()
    total = sum((x.astype(np.float64) ** 2).sum() for x in logprobs)
    assert result.metrics["loss:sum"] == pytest.approx(total, rel=1e-5)
    assert result.metrics["surrogate_loss:sum"] == pytest.approx(2 * total, rel=1e-4)  # -sum(lp * -2 lp)
    assert result.metrics["mine"] == 4.0
    assert len(result.loss_fn_outputs) == len(DATA)
    assert tc.forward_backward_custom(DATA, squares, regularizers=[]).result().metrics == result.metrics


def test_a_regularizer_changes_the_update_by_its_weighted_gradient(service):
    tc = create(service, lora_config=None)
    start = tc.save_state("start")
    plain, _ = gradient_of(tc, lambda: tc.forward_backward_custom(DATA, squares).result())
    tc.load_state(start.artifact_id)
    alone, _ = gradient_of(tc, lambda: tc.forward_backward_custom(DATA, L1()).result())
    tc.load_state(start.artifact_id)
    specs = [RegularizerSpec(fn=L1(), weight=0.1, name="l1")]
    both, result = gradient_of(
        tc, lambda: tc.forward_backward_custom(DATA, squares, regularizers=specs, track_grad_norms=True).result()
    )
    np.testing.assert_allclose(both, plain + 0.1 * alone, atol=1e-4 * np.abs(both).max())
    assert result.custom_loss.regularizers["l1"].grad_norm == pytest.approx(3.0)  # 9 signs


def refused_step(tc):
    with pytest.raises(InvalidRequestError):
        tc.optim_step().result()
    return tc.step


async def sleepy(data, logprobs):
    await asyncio.sleep(5)


@pytest.mark.parametrize(
    ("loss", "options", "error"),
    [
        (lambda d, x: 1 / 0, {}, ZeroDivisionError),
        (lambda d, x: (x[0].sum(), {}), {}, ValueError),
        (
            squares,
            {"regularizers": [RegularizerSpec(fn=lambda d, x: 1 / 0, weight=1.0, name="bad")]},
            RegularizerFailedError,
        ),
        (
            squares,
            {"regularizers": [RegularizerSpec(fn=sleepy, weight=1.0, name="slow", async_=True)], "timeout": 0.1},
            TimeoutError,
        ),
    ],
    ids=["raises", "no gradient", "regularizer", "timeout"],
)
def test_a_failure_adds_nothing(service, loss, options, error):
    tc = create(service, lora_config=None)
    with pytest.raises(error):
        tc.forward_backward_custom(DATA, loss, **options).result()
    assert refused_step(tc) == 0


def test_in_eval_mode_there_is_no_second_pass(service):
    tc = create(service, lora_config=None)
    tc.eval()
    result = tc.forward_backward_custom(DATA, squares).result()
    assert result.custom_loss.loss_total > 0
    tc.train()
    assert refused_step(tc) == 0


def test_arguments_that_cannot_be(service):
    tc = create(service, lora_config=None)
    for given, field in (
        ({"data": [], "loss_fn": squares}, "data"),
        ({"data": DATA, "loss_fn": squares, "loss_type_input": "logits"}, "loss_type_input"),
        ({"data": DATA, "loss_fn": squares, "privacy_unit": "datum"}, "privacy_unit"),
        ({"data": [Datum(ModelInput.from_ints([1]), {})], "loss_fn": squares}, "loss_fn_inputs.target_tokens"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            tc.forward_backward_custom(**given)
        assert caught.value.field == field


def test_the_twin_does_not_block(service):
    tc = create(service, lora_config=None)

    def slow(data, logprobs):
        time.sleep(0.3)
        return squares(data, logprobs)

    async def main():
        ticks, task = 0, asyncio.ensure_future(tc.forward_backward_custom_async(DATA, slow))
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks, await (await task)

    ticks, result = asyncio.run(main())
    assert ticks > 5
    assert result.custom_loss.loss_total > 0


# Under differential privacy.


def test_under_privacy_a_loss_sees_one_unit_at_a_time(service):
    tc = private(service, "alone-1", privacy_unit="user")
    seen = []

    def watched(data, logprobs):
        seen.append([d.model_input.to_ints() for d in data])
        return spread(data, logprobs)

    found, _ = gradient_of(
        tc, lambda: tc.forward_backward_custom(DATA, watched, privacy_unit_ids=["a", "b", "a"]).result()
    )
    assert seen == [[DATA[i].model_input.to_ints() for i in rows] for rows in ([0, 2], [1])]
    other = private(service, "alone-2", privacy_unit="user")

    def separately():
        other.forward_backward_custom([DATA[0], DATA[2]], spread, privacy_unit_ids=["a", "a"])
        other.forward_backward_custom([DATA[1]], spread, privacy_unit_ids=["b"])

    expected, _ = gradient_of(other, separately)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_loss_over_the_batch_is_refused_under_privacy(service):
    tc = private(service, "batch-1")
    with pytest.raises(DPUnsupportedError) as caught:
        tc.forward_backward_custom(DATA, spread, privacy_unit="batch")
    assert "each unit alone" in caught.value.alternative
    plain = create(service)
    assert plain.forward_backward_custom(DATA, spread, privacy_unit="batch").result().custom_loss.loss_total > 0


def test_private_data_goes_nowhere_unasked(service):
    tc = private(service, "external-1")

    async def elsewhere(data, logprobs):
        return L1()(data, logprobs)

    specs = [RegularizerSpec(fn=elsewhere, weight=0.1, name="judge", async_=True)]
    with pytest.raises(DPUnsupportedError) as caught:
        tc.forward_backward_custom(DATA, squares, regularizers=specs)
    assert "allow_external" in caught.value.alternative
    assert tc.forward_backward_custom(DATA, squares, regularizers=specs, allow_external=True).result().custom_loss


def test_without_diagnostics_nothing_can_be_computed_here(service):
    tc = private(service, "off-1", diagnostics="off")
    with pytest.raises(DPUnsupportedError, match="diagnostics"):
        tc.forward_backward_custom(DATA, squares)


# Run by the server.


def weighted(logprobs, advantages):
    ratio = (logprobs * advantages).sum()
    return ratio * ratio + (logprobs * logprobs).sum(), {"custom/ratio:sum": ratio, "custom/ratio:mean": ratio}


def test_a_loss_that_the_server_runs_is_the_one_that_runs_here(service):
    handle = service.create_custom_loss(weighted, {"logprobs": 1, "advantages": 1})
    assert handle.loss_id
    tc = create(service, lora_config=None)
    start = tc.save_state("start")
    there, far = gradient_of(tc, lambda: tc.forward_backward_custom(DATA, handle).result())
    tc.load_state(start.artifact_id)
    here, near = gradient_of(tc, lambda: tc.forward_backward_custom(DATA, weighted, per_datum=True).result())
    np.testing.assert_allclose(there, here, atol=1e-4 * np.abs(here).max())
    assert far.metrics["loss:sum"] == pytest.approx(near.metrics["loss:sum"], rel=1e-5)


def test_it_may_run_privately_without_diagnostics(service):
    handle = service.create_custom_loss(weighted, {"logprobs": 1, "advantages": 1})
    refused = private(service, "handle-0", diagnostics="off").forward_backward_custom(DATA, handle)
    with pytest.raises(DPUnsupportedError, match="centred over a group"):
        refused.result()
    tc = private(service, "handle-1", diagnostics="off", custom_loss="independent")
    result = tc.forward_backward_custom(DATA, handle).result()
    assert np.isnan(result.metrics["loss:sum"])
    assert tc.optim_step().result().step == 1


def test_with_regularizers_a_handle_runs_here(service):
    handle = service.create_custom_loss(weighted, {"logprobs": 1, "advantages": 1})
    tc = create(service, lora_config=LoRAConfig(rank=2))
    specs = [RegularizerSpec(fn=L1(), weight=0.1, name="l1")]
    result = tc.forward_backward_custom(DATA, handle, regularizers=specs).result()
    assert result.custom_loss.regularizer_total > 0
    assert {"custom/ratio:sum", "custom/ratio:mean"} <= set(result.metrics)
