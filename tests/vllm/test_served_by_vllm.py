"""Training and sampling through a real server whose samples come from vLLM, on the bundled model."""

from __future__ import annotations

import itertools
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.support.random_runs import datum, train
from tests.vllm.conftest import BuiltIn, children
from tg_tinker import DPConfig, LoRAConfig, ServiceClient, TrainingClient, TrainingConfig
from tg_tinker.errors import ServerError
from tg_tinker.sampling_client import SamplingClient
from tg_tinker.types.tokens import SampledSequence, SampleResponse, SamplingParams
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.engine.vllm.settings import MEMORY_FOLDER

pytestmark = pytest.mark.timeout(1200)

MODEL = "tiny-llama-2m"
ADAPTERS = [
    LoRAConfig(rank=4),
    LoRAConfig(rank=8, alpha=12, target_modules="all-linear"),
    LoRAConfig(rank=4, target_modules=["@attention", "@mlp", "@unembed"]),
]
PROMPT = np.random.default_rng(9).integers(4, 300, 30).tolist()
GREEDY = SamplingParams(max_tokens=12, stop=[], temperature=0)


def training_logprobs(client: TrainingClient, tokens: list[int]) -> np.ndarray:
    """Of all tokens but the first, by the forward pass that training has."""
    output = client.forward([datum(tokens)], "cross_entropy").result()
    return np.asarray(output.loss_fn_outputs[0]["logprobs"].data)


def check(client: TrainingClient, response: SampleResponse, prompt: list[int] = PROMPT) -> None:
    """Log-probabilities of samples are those of training."""
    for sequence in response.sequences:
        expected = training_logprobs(client, [*prompt, *sequence.tokens])[len(prompt) - 1 :]
        np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-4)


def greedy(client: SamplingClient) -> SampledSequence:
    return client.sample(PROMPT, 1, GREEDY).result().sequences[0]


def by_built_in(client: SamplingClient) -> SampledSequence:
    """The same request with something that vLLM does not do."""
    return client.sample(PROMPT, 1, GREEDY, prompt_alt_tokens_k=1).result().sequences[0]


def streamed(client: TrainingClient, text: str) -> list[int]:
    """Greedy tokens of a run as it is now."""
    chunks = client.sample_stream(text, max_tokens=12, temperature=0.0)
    return [token for chunk in chunks for token in chunk.token_ids]


@pytest.fixture(scope="module")
def runs(service: ServiceClient) -> list[TrainingClient]:
    """Three plain runs and a private one, trained differently."""
    dp = DPConfig(dataset_id="d", target_epsilon=1000.0, noise_multiplier=1.0, merge_units=True)
    configs = [TrainingConfig(model_ref=MODEL, lora_config=a, batch_size=4, seed=1) for a in ADAPTERS]
    configs.append(TrainingConfig(model_ref=MODEL, lora_config=ADAPTERS[1], batch_size=4, seed=1, dp_config=dp))
    clients = [service.create_training_client(config) for config in configs]
    for seed, client in enumerate(clients):
        train(client, seed)
    return clients


@pytest.fixture(scope="module")
def samplers(runs: list[TrainingClient]) -> list[SamplingClient]:
    return [client.save_weights_and_get_sampling_client() for client in runs]


def test_samples_of_several_runs_at_once_have_the_log_probabilities_of_training(
    runs: list[TrainingClient], samplers: list[SamplingClient], built_in: BuiltIn
) -> None:
    params = SamplingParams(max_tokens=12, stop=[], seed=5)
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(lambda s=s: s.sample(PROMPT, 2, params, topk_sample_logprobs=3).result())  # type: ignore[misc]
            for s in samplers * 2
        ]
        responses = [job.result() for job in jobs]
    assert built_in.requests == 0
    assert len(children()) == 1
    for client, response, again in zip(runs, responses[:4], responses[4:], strict=True):
        check(client, response)
        assert [s.tokens for s in response.sequences] == [s.tokens for s in again.sequences]
        assert response.sequences[0].tokens != response.sequences[1].tokens
    told = [r.sequences[0].topk_logprobs for r in responses[:4]]
    assert all(np.abs(a.logprobs[0] - b.logprobs[0]).max() > 0.01 for a, b in itertools.combinations(told, 2))  # type: ignore[union-attr]
    assert not [name for name in os.listdir(MEMORY_FOLDER) if name.startswith(f"tg-tinker-adapter-{os.getpid()}-")]


def test_greedy_tokens_and_alternatives_are_those_of_the_built_in_sampler(
    samplers: list[SamplingClient], service: ServiceClient, built_in: BuiltIn
) -> None:
    options = {"topk_sample_logprobs": 4}
    for client in [*samplers, service.create_sampling_client(base_model=MODEL)]:
        before = built_in.requests
        ours = client.sample(PROMPT, 1, GREEDY, **options).result()
        assert built_in.requests == before
        theirs = client.sample(PROMPT, 1, GREEDY, prompt_alt_tokens_k=1, **options).result()
        assert built_in.requests == before + 1
        assert ours.sequences[0].tokens == theirs.sequences[0].tokens
        np.testing.assert_allclose(ours.sequences[0].logprobs, theirs.sequences[0].logprobs, atol=1e-4)
        mine, other = ours.sequences[0].topk_logprobs, theirs.sequences[0].topk_logprobs
        assert mine is not None
        assert other is not None
        np.testing.assert_array_equal(mine.token_ids, other.token_ids)
        np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.6])
def test_log_probabilities_are_those_of_the_tempered_distribution(
    samplers: list[SamplingClient], built_in: BuiltIn, temperature: float
) -> None:
    params = SamplingParams(max_tokens=1, stop=[], temperature=temperature, seed=1)
    ours = samplers[1].sample(PROMPT, 1, params, topk_sample_logprobs=128).result().sequences[0]
    assert built_in.requests == 0
    built = samplers[1].sample(PROMPT, 1, params, topk_sample_logprobs=128, prompt_alt_tokens_k=1).result()
    theirs = built.sequences[0].topk_logprobs
    assert built_in.requests == 1
    assert ours.topk_logprobs is not None
    assert theirs is not None
    np.testing.assert_allclose(ours.topk_logprobs.logprobs, theirs.logprobs, atol=1e-4)
    known = dict(zip(theirs.token_ids[0].tolist(), theirs.logprobs[0].tolist(), strict=True))
    if ours.tokens[0] in known:
        assert ours.logprobs[0] == pytest.approx(known[ours.tokens[0]], abs=1e-4)


def test_samples_are_drawn_from_the_distribution_that_is_told(samplers: list[SamplingClient]) -> None:
    params = SamplingParams(max_tokens=1, stop=[], temperature=0.7)
    response = samplers[1].sample(PROMPT, 512, params, topk_sample_logprobs=1).result()
    told = response.sequences[0].topk_logprobs
    assert told is not None
    share = np.mean([s.tokens[0] == int(told.token_ids[0, 0]) for s in response.sequences])
    p = float(np.exp(told.logprobs[0, 0]))
    assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / 512) + 1e-9
    assert len({s.tokens[0] for s in response.sequences}) > 1


def test_the_next_sample_after_a_step_has_the_new_weights(runs: list[TrainingClient], built_in: BuiltIn) -> None:
    client, text = runs[0], "The patient was"
    before = streamed(client, text)
    train(client, seed=7, steps=3)
    after = streamed(client, text)
    assert built_in.requests == 0
    frozen = client.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=12, temperature=0)
    theirs = frozen.sample(frozen.encode(text), 1, params, prompt_alt_tokens_k=1).result()
    assert built_in.requests == 1
    assert after == theirs.sequences[0].tokens
    assert after != before


def test_stop_tokens_and_texts_end_a_sequence(samplers: list[SamplingClient], built_in: BuiltIn) -> None:
    client = samplers[0]
    whole = greedy(client)
    at = next(i for i, t in enumerate(whole.tokens) if i >= 2 and t not in whole.tokens[:i])
    stopped = client.sample(PROMPT, 1, SamplingParams(max_tokens=12, stop=[whole.tokens[at]], temperature=0)).result()
    assert stopped.sequences[0].tokens == whole.tokens[: at + 1]
    assert stopped.sequences[0].stop_reason == "stop"
    text = client.decode(whole.tokens[: at + 1])[-2:]
    by_text = client.sample(PROMPT, 1, SamplingParams(max_tokens=12, stop=text, temperature=0)).result().sequences[0]
    assert by_text.stop_reason == "stop"
    assert client.decode(by_text.tokens).endswith(text) or text in client.decode(by_text.tokens)
    assert by_text.tokens == whole.tokens[: len(by_text.tokens)]
    assert built_in.requests == 0


def test_a_text_may_fill_the_model_and_a_prompt_may_too(service: ServiceClient, built_in: BuiltIn) -> None:
    client = service.create_sampling_client(base_model=MODEL)
    full = [5] * 511
    answers = [client.sample(p, 1, SamplingParams(stop=[], temperature=0)).result() for p in (full, [*full, 5])]
    assert built_in.requests == 0
    theirs = client.sample(full, 1, SamplingParams(stop=[], temperature=0), prompt_alt_tokens_k=1).result()
    assert [len(a.sequences[0].tokens) for a in answers] == [2, 1]
    assert answers[0].sequences[0].tokens == theirs.sequences[0].tokens
    assert {a.sequences[0].stop_reason for a in answers} == {"length"}


def test_a_stream_brings_tokens_as_they_come_and_hanging_up_ends_it(samplers: list[SamplingClient]) -> None:
    stream = samplers[0].stream(PROMPT, SamplingParams(max_tokens=400, stop=[]))
    first = next(iter(stream))
    assert len(first.tokens) == 1
    stream.close()  # type: ignore[attr-defined]
    assert greedy(samplers[0]).tokens == by_built_in(samplers[0]).tokens


def test_what_another_tenant_asked_is_not_remembered(
    server: EmbeddedServer, service: ServiceClient, built_in: BuiltIn
) -> None:
    prompt = np.random.default_rng(3).integers(4, 300, 400).tolist()
    params = SamplingParams(max_tokens=1)
    mine = service.create_sampling_client(base_model=MODEL)
    assert mine.sample(prompt, 1, params).result().prompt_cache_hit_tokens == 0
    assert mine.sample(prompt, 1, params).result().prompt_cache_hit_tokens >= 128
    with ServiceClient(api_key=server.mint_key("tenant-b"), base_url=server.address) as other:
        theirs = other.create_sampling_client(base_model=MODEL)
        assert theirs.sample(prompt, 1, params).result().prompt_cache_hit_tokens == 0
    assert built_in.requests == 0


def test_a_killed_worker_fails_the_request_and_the_next_one_works(samplers: list[SamplingClient]) -> None:
    (worker,) = children()
    stream = iter(samplers[0].stream(PROMPT, SamplingParams(max_tokens=400, stop=[])))
    next(stream)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(ServerError, match="vLLM engine of tiny-llama-2m ended"):
        list(stream)
    assert greedy(samplers[0]).tokens == by_built_in(samplers[0]).tokens
    assert children() != [worker]


def test_seeded_prompts_of_more_tokens_than_one_run_takes(service: ServiceClient, built_in: BuiltIn) -> None:
    """The engine of a CPU ends if it reads part of a prompt whose request has a seed."""
    run = service.create_training_client(
        TrainingConfig(model_ref=MODEL, lora_config=ADAPTERS[0], batch_size=4, seed=1)
    )
    train(run, seed=1)
    sampler = run.save_weights_and_get_sampling_client()
    prompt = np.random.default_rng(3).integers(4, 300, 400).tolist()
    greedy(sampler)
    before = children()
    params = SamplingParams(max_tokens=4, stop=[], seed=5)
    with ThreadPoolExecutor(4) as pool:
        responses = list(pool.map(lambda _: sampler.sample(prompt, 8, params).result(), range(4)))
    assert (built_in.requests, children()) == (0, before)
    for response in responses:
        check(run, response, prompt)
    assert len({tuple(s.tokens) for s in responses[0].sequences}) > 1
