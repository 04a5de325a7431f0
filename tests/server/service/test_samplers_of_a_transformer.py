"""From training to samples through the public client, on the bundled transformer: the log-probabilities agree."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.support.random_runs import datum, train
from tg_tinker import DPConfig, LoRAConfig, ServiceClient, TrainingClient, TrainingConfig
from tg_tinker.types.tokens import SampleResponse, SamplingParams
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

MODEL = "tiny-llama-2m"
GROUPS = LoRAConfig(rank=4, target_modules=["@attention", "@mlp", "@unembed"])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    folder: Path = tmp_path_factory.mktemp("server")
    with (
        EmbeddedServer(ServerConfig(port=0, data_dir=folder)) as server,
        ServiceClient(api_key=server.mint_key("tenant-a"), base_url=server.address) as client,
    ):
        yield client


def check(client: TrainingClient, prompt: list[int], response: SampleResponse) -> None:
    """What was sampled has the log-probabilities that a training forward gives it."""
    for sequence in response.sequences:
        output = client.forward([datum([*prompt, *sequence.tokens])], "cross_entropy").result()
        expected = np.asarray(output.loss_fn_outputs[0]["logprobs"].data)
        assert response.prompt_logprobs is not None
        assert response.prompt_logprobs[0] is None
        np.testing.assert_allclose([*response.prompt_logprobs[1:], *sequence.logprobs], expected, atol=1e-4)


def test_samples_of_two_runs_and_of_a_private_one_have_the_log_probabilities_of_training(
    service: ServiceClient,
) -> None:
    plain = TrainingConfig(model_ref=MODEL, lora_config=GROUPS, batch_size=4, seed=1)
    dp = DPConfig(dataset_id="d", target_epsilon=1000.0, noise_multiplier=1.0, merge_units=True)
    private = TrainingConfig(model_ref=MODEL, lora_config=GROUPS, batch_size=4, seed=1, dp_config=dp)
    clients = [service.create_training_client(c) for c in (plain, plain, private)]
    for i, client in enumerate(clients):
        train(client, seed=i)
    samplers = [client.save_weights_and_get_sampling_client() for client in clients]
    prompt = np.random.default_rng(9).integers(0, 300, 30).tolist()
    params = SamplingParams(max_tokens=12, stop=[], seed=5)
    with ThreadPoolExecutor(6) as pool:
        jobs = [
            pool.submit(lambda s=s: s.sample(prompt, 2, params, include_prompt_logprobs=True).result(60))
            for s in samplers * 2
        ]
        found = [job.result() for job in jobs]
    for client, response in zip(clients * 2, found, strict=True):
        check(client, prompt, response)
    first = found[0].prompt_logprobs
    assert first != found[1].prompt_logprobs, "two runs, one answer"
    train(clients[0], seed=7)
    again = samplers[0].sample(prompt, 1, params, include_prompt_logprobs=True).result(60)
    np.testing.assert_allclose(again.prompt_logprobs[1:], first[1:], atol=1e-5)
    base = service.create_sampling_client(base_model=MODEL).sample(prompt, 1, params, include_prompt_logprobs=True)
    assert abs(np.subtract(base.result(60).prompt_logprobs[1:], first[1:])).max() > 0.01
