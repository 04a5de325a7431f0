"""Datums, steps, checkpoints and samples against a real server with the bigram model."""

import asyncio
import json
import math
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

from tg_tinker import (
    AdamParams,
    Datum,
    DPConfig,
    InvalidRequestError,
    ModelInput,
    OptimizerConfig,
    ResourceNotFoundError,
    SamplingParams,
    ServiceClient,
    TensorData,
    TrainingConfig,
)
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

rng = np.random.default_rng(5)


def datum(tokens, weights=None, **inputs):
    targets = [*tokens[1:], 0]
    return Datum(
        ModelInput.from_ints(tokens), {"target_tokens": targets, "weights": weights or [1.0] * len(tokens), **inputs}
    )


DATA = [datum([1, 2, 3], [1, 0, 2]), datum([5, 6])]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("server")
    with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=data_dir, log_level="error")) as server:
        yield server


@pytest.fixture(scope="module")
def key(embedded):
    return embedded.mint_key("clinic")


@pytest.fixture
def service(embedded, key):
    with ServiceClient(api_key=key, base_url=embedded.address) as client:
        yield client


@pytest.fixture
def tc(service):
    return service.create_training_client(TrainingConfig(model_ref="bigram", batch_size=2))


def private_run(service, dataset, **settings):
    dp = DPConfig(dataset_id=dataset, target_epsilon=None, noise_multiplier=1.0, **settings)
    return service.create_training_client(TrainingConfig(model_ref="bigram", batch_size=2, dp_config=dp))


def logprobs(result):
    return [o["logprobs"].to_numpy() for o in result.loss_fn_outputs]


def greedy(client, prompt=(1,)):
    return (
        client.sample(list(prompt), 1, SamplingParams(max_tokens=6, temperature=0.0, stop=[]))
        .result()
        .sequences[0]
        .tokens
    )


# Passes.


def test_forward_gives_every_log_probability_in_order_and_adds_up_nothing(tc):
    found = tc.forward(DATA).result()
    assert [len(x) for x in logprobs(found)] == [3, 2]
    alone = [logprobs(tc.forward([d]).result())[0] for d in DATA]
    for x, y in zip(logprobs(found), alone, strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(InvalidRequestError):
        tc.optim_step().result()
    np.testing.assert_array_equal(logprobs(tc.forward(DATA).result())[0], logprobs(found)[0])


def test_the_loss_is_the_weighted_sum(tc):
    result = tc.forward_backward(DATA, "cross_entropy").result()
    first, second = logprobs(result)
    expected = -(first @ [1, 0, 2]) - second.sum()
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-6)
    assert result.loss == result.metrics["loss:sum"]


def test_both_ways_to_name_the_arguments(tc):
    by_place = tc.forward_backward(DATA, "cross_entropy", None).result()
    by_name = tc.forward_backward(data=DATA, loss_fn="cross_entropy", loss_fn_config=None).result()
    assert by_place.batch_hash == by_name.batch_hash


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (([{"input_ids": [1]}],), "batch"),
        (("text",), "batch"),
        (([DATA[0], 3],), "batch"),
        ((DATA, "nothing"), "loss_fn"),
        ((DATA, "ppo"), "loss_fn_inputs.logprobs"),
        ((DATA, "cross_entropy", {"clip": 1.0}), "loss_fn_config"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sent(tc, arguments, field):
    with pytest.raises(InvalidRequestError) as caught:
        tc.forward_backward(*arguments)
    assert caught.value.field == field


def test_a_list_of_dicts_is_refused_with_a_hint(tc):
    with pytest.raises(InvalidRequestError, match="collate"):
        tc.forward_backward([{"input_ids": [1]}])


def test_a_batch_has_no_loss_fn_and_data_come_once(tc):
    with pytest.raises(InvalidRequestError, match="loss_fn is for datums"):
        tc.forward_backward({"input_ids": [[1, 2]]}, loss_fn="ppo")
    with pytest.raises(InvalidRequestError, match="not both"):
        tc.forward_backward(DATA, data=DATA)


def test_many_datums_travel_in_three_requests_and_are_one_batch(service, embedded):
    many = [datum(rng.integers(0, 255, size=2).tolist()) for _ in range(2500)]
    config = TrainingConfig(model_ref="bigram", batch_size=2500, optimizer=OptimizerConfig(name="sgd", momentum=0.0))
    whole, parts = (service.create_training_client(config) for _ in range(2))
    future = whole.forward_backward(many, "cross_entropy")
    assert future.id.endswith(".3")
    result = future.result()
    assert future.status == "completed"
    pieces = [parts.forward_backward(many[i : i + 500], "cross_entropy").result() for i in range(0, 2500, 500)]
    assert len(result.loss_fn_outputs) == 2500
    for x, y in zip(logprobs(result), [x for p in pieces for x in logprobs(p)], strict=True):
        np.testing.assert_array_equal(x, y)
    assert result.metrics["loss:sum"] == pytest.approx(sum(p.metrics["loss:sum"] for p in pieces), rel=1e-9)
    norms = [t.optim_step().result().grad_norm for t in (whole, parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    np.testing.assert_allclose(
        logprobs(whole.forward(DATA).result())[0], logprobs(parts.forward(DATA).result())[0], atol=1e-6
    )


def test_a_part_that_is_refused_fails_the_whole_and_poisons_the_step(tc):
    many = [datum([1, 2]) for _ in range(1025)]
    many[-1] = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [10**6, 1], "weights": [1.0, 1.0]})
    future = tc.forward_backward(many, "cross_entropy")
    with pytest.raises(InvalidRequestError):
        future.result()
    assert future.is_failed()
    with pytest.raises(InvalidRequestError):
        tc.optim_step().result()


# Steps.


def test_adam_params_stand_where_the_reference_or_the_public_api_has_them(tc):
    rates = []
    for k, call in enumerate(
        (
            tc.optim_step,
            lambda p: tc.optim_step(adam_params=p),
            lambda p: tc.optim_step(True, optim_params=p),
        ),
        start=1,
    ):
        tc.forward_backward(DATA, "cross_entropy")
        rates.append(call(AdamParams(learning_rate=k / 100)).result().learning_rate)
    assert rates == [0.01, 0.02, 0.03]
    with pytest.raises(InvalidRequestError, match="once"):
        tc.optim_step(AdamParams(), adam_params=AdamParams())
    with pytest.raises(InvalidRequestError, match="once"):
        tc.optim_step(adam_params={"learning_rate": 1.0})


def test_the_first_step_of_adam_is_the_textbook_one(service):
    """Every entry with a gradient moves by the rate, against its sign: m / sqrt(v) is 1 in size."""
    tc = service.create_training_client(TrainingConfig(model_ref="bigram", batch_size=1))
    before = tc.pull_weights().tensors
    tc.forward_backward(DATA, "cross_entropy")
    tc.optim_step(AdamParams(learning_rate=0.5)).result()
    moved = np.concatenate([(a - before[n]).ravel() for n, a in tc.pull_weights().tensors.items()])
    assert np.abs(moved).max() == pytest.approx(0.5, rel=1e-4)


# Checkpoints.


def test_a_name_is_taken_once_unless_it_is_overwritten(tc):
    saved = tc.save_state("ck-1", 3600)
    assert saved.path == saved.result().path == f"tg://{tc.id}/weights/ck-1"
    with pytest.raises(InvalidRequestError) as caught:
        tc.save_state("ck-1")
    assert caught.value.field == "name"
    assert tc.save_state("ck-1", overwrite=True).path == saved.path
    with pytest.raises(InvalidRequestError, match="twice"):
        tc.save_state("a", name="b")


def step(tc, rate=0.1):
    tc.forward_backward(DATA, "cross_entropy")
    return tc.optim_step(AdamParams(learning_rate=rate)).result()


def second_step_after(tc, load):
    load()
    before = np.concatenate([a.ravel() for a in tc.pull_weights().tensors.values()])
    tc.forward_backward([datum([1, 9, 1, 9])], "cross_entropy")  # away from where the steps before went
    tc.optim_step(AdamParams(learning_rate=0.1))
    return np.concatenate([a.ravel() for a in tc.pull_weights().tensors.values()]) - before


def test_paths_load_weights_alone_and_ids_all_that_was_saved(service):
    tc = service.create_training_client(TrainingConfig(model_ref="bigram", batch_size=1))
    for rate in (0.1, 0.3, 0.2):
        step(tc, rate)
    saved = tc.save_state("here")
    fresh = second_step_after(tc, lambda: tc.load_state(saved.path))
    kept = second_step_after(tc, lambda: tc.load_state(saved.artifact_id))
    named = second_step_after(tc, lambda: tc.load_state_with_optimizer(saved.path))
    dropped = second_step_after(tc, lambda: tc.load_state(saved.artifact_id, optimizer=False))
    assert np.abs(fresh).max() == pytest.approx(0.1, rel=1e-4)  # as a first step of Adam
    np.testing.assert_array_equal(kept, named)
    np.testing.assert_array_equal(fresh, dropped)
    assert np.abs(kept - fresh).max() > 1e-4


def test_runs_begin_from_states(service, tc):
    step(tc)
    saved = tc.save_state("start", metadata={"epoch": 1})
    expected = logprobs(tc.forward(DATA).result())
    for create in (
        service.create_training_client_from_state,
        service.create_training_client_from_state_with_optimizer,
    ):
        child = create(saved.path, base_model="bigram", user_metadata={"who": "me"})
        assert child.config.metadata["who"] == "me"
        np.testing.assert_array_equal(logprobs(child.forward(DATA).result())[0], expected[0])
    with pytest.raises(InvalidRequestError):
        service.create_training_client_from_state(saved.path, base_model="other")
    with pytest.raises(InvalidRequestError, match="export"):
        service.create_training_client_from_state(saved.path, weights_access_token="token")


# Sampling.


def test_a_snapshot_does_not_change_with_later_steps(tc):
    step(tc)
    client = tc.save_weights_and_get_sampling_client()
    before, logp = greedy(client), client.compute_logprobs([1, 2, 3]).result()
    for _ in range(5):
        tc.forward_backward([datum([1, 9, 1, 9])], "cross_entropy")
        tc.optim_step(AdamParams(learning_rate=1.0))
    assert greedy(client) == before
    assert client.compute_logprobs([1, 2, 3]).result() == logp
    assert greedy(tc.save_weights_and_get_sampling_client()) != before


def test_log_probabilities_are_those_of_training(tc):
    step(tc)
    tokens = [4, 7, 1, 2]
    client = tc.save_weights_and_get_sampling_client()
    found = client.compute_logprobs(ModelInput.from_ints(tokens)).result()
    assert found[0] is None
    np.testing.assert_allclose(found[1:], logprobs(tc.forward([datum(tokens)]).result())[0][:-1], atol=1e-4)
    sampled = client.sample(tokens, 2, SamplingParams(max_tokens=5, seed=3, stop=[])).result()
    for sequence in sampled.sequences:
        whole = [*tokens, *sequence.tokens]
        trained = logprobs(tc.forward([datum(whole)]).result())[0]
        np.testing.assert_allclose(sequence.logprobs, trained[len(tokens) - 1 : -1], atol=1e-4)


def test_a_seed_repeats_and_figures_of_the_prompt_come_with_it(tc):
    client = tc.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=8, seed=11, stop=[])
    first, second = (client.sample([1, 2], 3, params, True, 4).result() for _ in range(2))
    assert [s.tokens for s in first.sequences] == [s.tokens for s in second.sequences]
    assert first.prompt_logprobs[0] is None
    assert first.topk_prompt_logprobs.token_ids.shape == (2, 4)
    assert {s.stop_reason for s in first.sequences} == {"length"}


def test_a_base_model_can_be_sampled_and_something_must_be_named(service):
    client = service.create_sampling_client(base_model="bigram")
    assert client.get_base_model() == "bigram"
    assert len(greedy(client)) == 6
    for arguments in ({}, {"model_path": "tg://a/weights/b", "base_model": "bigram"}):
        with pytest.raises(InvalidRequestError) as caught:
            service.create_sampling_client(**arguments)
        assert caught.value.field == "model_path"
    with pytest.raises(ResourceNotFoundError):
        service.create_sampling_client("tg://run_0/weights/none")


def test_streaming_is_the_same_as_waiting(tc):
    client = tc.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=5, seed=2, stop=[])
    streamed = [t for event in client.stream([3], params) for t in event.tokens]
    assert streamed == client.sample([3], 1, params).result().sequences[0].tokens
    stream = client.stream([3], SamplingParams(max_tokens=1000, stop=[]))
    next(stream)
    stream.close()


def test_texts_are_no_prompts_here(service):
    client = service.create_sampling_client(base_model="bigram")
    with pytest.raises(InvalidRequestError, match="encode"):
        client.sample("text")
    with pytest.raises(InvalidRequestError):
        client.sample([1], nothing=3)
    assert client.decode(client.encode("Hello")) == "Hello"


def test_the_name_of_an_ephemeral_snapshot_is_deprecated(tc):
    with pytest.warns(DeprecationWarning, match="save_weights_for_sampler"):
        tc.save_weights_and_get_sampling_client("name")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tc.save_weights_and_get_sampling_client()


def test_a_sampling_client_goes_to_another_process(tc):
    step(tc)
    client = tc.save_weights_and_get_sampling_client()
    code = (
        "import pickle, sys; from tg_tinker import SamplingParams\n"
        "client = pickle.load(sys.stdin.buffer)\n"
        "params = SamplingParams(max_tokens=6, temperature=0.0, stop=[])\n"
        "print(client.sample([1], 1, params).result().sequences[0].tokens)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(client), capture_output=True, check=True)
    assert json.loads(done.stdout) == greedy(client)


# Texts.


def test_tokenizers(tc, monkeypatch):
    calls = []
    call = type(tc._transport).call
    monkeypatch.setattr(type(tc._transport), "call", lambda self, *a, **k: calls.append(a) or call(self, *a, **k))
    assert tc.decode(tc.encode("Hello world")) == "Hello world"
    assert len(calls) == 2
    tc.encode("Hello world")
    assert len(calls) == 2
    for wrong in (3, None, b"bytes"):
        with pytest.raises(InvalidRequestError):
            tc.encode(wrong)
    for wrong in ("text", [1.5], [True], None, 3):
        with pytest.raises(InvalidRequestError):
            tc.decode(wrong)
    tokenizer = tc.get_tokenizer()
    assert "hi" in tokenizer.decode(tokenizer.encode("hi"))


def test_what_the_run_is(tc, service):
    info = tc.get_info()
    assert (info.model_id, info.model_name, info.is_lora, info.lora_rank) == (tc.id, "bigram", False, None)
    assert info.model_data.arch == "bigram"
    private = private_run(service, "info-1").get_info()
    assert (private.privacy.dataset_id, private.privacy_unit) == ("info-1", "datum")
    assert private.privacy.total_epsilon == 0.0


# The end of a run.


def test_unloading_ends_a_run_and_keeps_what_it_saved(tc, service):
    saved = tc.save_state("last")
    tc.forward_backward(DATA, "cross_entropy")
    for _ in range(2):
        found = tc.unload_model()
        assert (found.model_id, found.type) == (tc.id, "unload_model")
    assert tc.status == "completed"
    for call in (tc.forward, tc.forward_backward, lambda _: tc.optim_step(), lambda _: tc.save_state()):
        with pytest.raises(ResourceNotFoundError):
            call(DATA)
    with pytest.raises((ResourceNotFoundError, InvalidRequestError)):
        service.get_training_client(tc.id).forward_backward(DATA, "cross_entropy").result()
    assert service.create_training_client_from_state(saved.path).step == 0


# Coroutines.


def test_twins(service):
    async def main():
        tc = await service.create_training_client_async(TrainingConfig(model_ref="bigram", batch_size=2))
        output = await (await tc.forward_backward_async(DATA, "cross_entropy")).result_async()
        forwarded = await (await tc.forward_async(DATA))
        assert output.metrics["loss:sum"] == pytest.approx(forwarded.metrics["loss:sum"])
        assert (await (await tc.optim_step_async(AdamParams()))).step == 1
        saved = await (await tc.save_state_async("x"))
        await (await tc.load_state_async(saved.path))
        await (await tc.load_state_with_optimizer_async(saved.path))
        sampler = await (await tc.save_weights_for_sampler_async("s"))
        client = await tc.create_sampling_client_async(sampler.path)
        again = await tc.save_weights_and_get_sampling_client_async()
        logp, same = await asyncio.gather(client.compute_logprobs_async([1, 2]), again.compute_logprobs_async([1, 2]))
        assert logp == same
        samples = await asyncio.gather(*(client.sample_async([1], 1, SamplingParams(max_tokens=3)) for _ in range(8)))
        assert all(len(s.sequences) == 1 for s in samples)
        assert await client.get_base_model_async() == "bigram"
        assert (await tc.get_info_async()).step == 1
        child = await service.create_training_client_from_state_with_optimizer_async(saved.path)
        assert (await child.unload_model_async()).model_id == child.id

    asyncio.run(main())


# Privacy.


def test_epsilon_comes_back_with_every_step(service):
    tc = private_run(service, "eps-1")
    tc.forward_backward(DATA, "cross_entropy")
    metrics = tc.optim_step(AdamParams(learning_rate=0.1)).result().metrics
    assert metrics["privacy/epsilon"] > 0
    assert math.isfinite(metrics["privacy/epsilon"])


def test_two_dimensional_and_sparse_targets(tc):
    targets = [[2, 3], [4, 5]]
    dense = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": targets, "weights": [[1.0, 0.0], [0.0, 2.0]]})
    sparse = Datum(
        ModelInput.from_ints([1, 2]),
        {
            "target_tokens": targets,
            "weights": TensorData(
                [1.0, 2.0], dtype="float32", shape=[2, 2], sparse_crow_indices=[0, 1, 2], sparse_col_indices=[0, 1]
            ),
        },
    )
    a, b = (tc.forward([d]).result() for d in (dense, sparse))
    assert a.loss_fn_outputs[0]["logprobs"].shape == [2, 2]
    assert a.metrics["loss:sum"] == pytest.approx(b.metrics["loss:sum"])
