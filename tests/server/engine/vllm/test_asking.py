"""Which requests are vLLM's, and what it is asked."""

import numpy as np
import pytest

from tg_tinker.types.sampling import GenerationOptions
from tg_tinker.types.tokens import SampleQuery, SamplingParams
from tg_tinker_server.engine.sampling.text_query import TextQuery
from tg_tinker_server.engine.vllm.adapters import not_plain
from tg_tinker_server.engine.vllm.asking import parameters, seed_of, why_not

PROMPT = (1, 2, 3)


def text(**options):
    return TextQuery(prompt=PROMPT, params=SamplingParams(), options=GenerationOptions(**options), first=0)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (SampleQuery(prompt=PROMPT), None),
        (SampleQuery(prompt=PROMPT, params=SamplingParams(temperature=0.5, seed=3, stop=["x"])), None),
        (SampleQuery(prompt=PROMPT, params=SamplingParams(temperature=0, top_k=3, top_p=0.5)), None),
        (SampleQuery(prompt=PROMPT, params=SamplingParams(top_k=2048)), None),
        (SampleQuery(prompt=PROMPT, num_samples=3, topk_sample_logprobs=128), None),
        (SampleQuery(prompt=PROMPT, prompt_logprobs=True), "of a prompt"),
        (SampleQuery(prompt=PROMPT, topk_prompt_logprobs=1), "of a prompt"),
        (text(), None),
        (SampleQuery(prompt=PROMPT, params=SamplingParams(top_k=2047)), "top_k"),
        (SampleQuery(prompt=PROMPT, params=SamplingParams(top_p=0.99)), "top_p"),
        (SampleQuery(prompt=PROMPT, params=SamplingParams(temperature=0.0099)), "temperature"),
        (SampleQuery(prompt=PROMPT, target_prompt_logprobs=np.array([-1, 5, 6])), "target_prompt_logprobs"),
        (SampleQuery(prompt=PROMPT, prompt_alt_tokens_k=1), "prompt_alt_tokens_k"),
        (text(repetition_penalty=1.1), "penalties"),
        (text(presence_penalty=0.1), "penalties"),
        (text(frequency_penalty=0.1), "penalties"),
    ],
)
def test_what_vllm_cannot_say_exactly_is_not_asked_of_it(query, reason):
    found = why_not(query, vocab_size=2048)
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"lora": {"target_modules": "all-linear", "rank": 64}}, None),
        ({"lora": {"rank": 65}}, "rank"),
        ({"lora": {"target_modules": ["q_proj", "embed_tokens"]}}, "no low-rank factors of linear layers"),
        ({"lora": {"target_modules": ["q_proj", "lm_head"]}}, None),
        ({"lora": {"frozen_factor": "a"}}, None),
        ({"lora": {"modules_to_save": ["norm"]}}, "copy of the model"),
        ({"lora": {"bias": "all"}}, "copy of the model"),
        ({"lora_config": None}, "copy of the model"),
    ],
)
def test_adapters_that_vllm_could_not_compute_with_stay_here(bundled, routed, settings, reason):
    session = bundled.backend.open(run_id="r", config=bundled.config(**settings))
    routed.closing.append(session)
    found = routed.sampler.why_built_in(session.live_weights(), SampleQuery(prompt=PROMPT))
    assert found is None if reason is None else found is not None and reason in found


def test_a_conv1d_adapter_stays_here(llama_and_gpt2_session):
    llama, gpt2 = llama_and_gpt2_session
    assert not_plain(llama.live_weights()) is None
    assert not_plain(gpt2.live_weights()) is not None


@pytest.fixture
def llama_and_gpt2_session(bundled):
    from tests.server.engine.conftest import LOADERS
    from tg_tinker_server.engine.torch_backend import TorchBackend

    backend = TorchBackend(LOADERS)
    gpt2 = bundled.config(model_ref="gpt2", lora=({"target_modules": ["c_attn"]}))
    return backend.open(run_id="a", config=bundled.config(model_ref="tiny")), backend.open(run_id="b", config=gpt2)


def test_a_sequence_is_asked_for_with_its_own_end(routed):
    weights = routed.base()
    asked = parameters(weights, SampleQuery(prompt=PROMPT, topk_sample_logprobs=4), index=0, room=7)
    assert asked == {
        "max_tokens": 7,
        "temperature": 1.0,
        "logprobs": 4,
        "stop_token_ids": sorted(weights.eos_token_ids),
    }


def test_stop_tokens_replace_the_models_own_and_lie_in_its_vocabulary(routed):
    query = SampleQuery(prompt=PROMPT, params=SamplingParams(stop=[7, 5, 7, 9999]))
    assert parameters(routed.base(), query, index=0, room=1)["stop_token_ids"] == [5, 7]
    query = SampleQuery(prompt=PROMPT, params=SamplingParams(stop=["."]))
    assert parameters(routed.base(), query, index=0, room=1)["stop_token_ids"] == []


def test_every_sequence_has_a_random_stream_of_its_own(routed):
    weights, params = routed.base(), SamplingParams(seed=3)
    asked = SampleQuery(prompt=PROMPT, params=params)
    shifted = TextQuery(prompt=PROMPT, params=params, options=GenerationOptions(), first=2)
    seeds = [parameters(weights, asked, index=i, room=1)["seed"] for i in range(4)]
    assert len(set(seeds)) == 4
    assert [parameters(weights, shifted, index=i, room=1)["seed"] for i in range(2)] == seeds[2:]
    assert seed_of(-1, 0) != seed_of(2**64 - 1, 0)
    assert all(0 <= seed < 2**56 for seed in seeds)
