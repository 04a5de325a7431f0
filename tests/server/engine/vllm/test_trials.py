"""Weights are answered with only where vLLM and the model here find the same."""

import numpy as np
import pytest
import torch

from tests.server.engine.vllm.test_adapters import built_in_logits
from tg_tinker_server.engine.vllm.trials import Trial


def answers(trial, logits_NV, *, alternatives=8):
    """What a vLLM with these logits says."""
    logprobs_NV = torch.log_softmax(torch.from_numpy(logits_NV), dim=-1).numpy()
    for question in trial.questions("trial-1", 1):
        logprobs_V = logprobs_NV[len(question["prompt"]) - 1]
        best = np.argsort(-logprobs_V)[:alternatives].tolist()
        yield {
            "id": question["id"],
            "tokens": best[:1],
            "logprobs": [[[t, float(logprobs_V[t])] for t in best]],
            "ended": True,
        }


@pytest.fixture
def weights(routed):
    return routed.run(scale=0.3)[0].live_weights()


@pytest.fixture
def of(bundled):
    return Trial.of  # as it is, before ``routed`` puts the toy's in its place


def test_a_trial_asks_what_peft_answers_and_takes_no_other_answer(of, weights):
    trial = of(weights)
    logits_NV = built_in_logits(weights, list(trial.tokens))
    assert [trial.agrees(a) for a in answers(trial, logits_NV)] == [True] * 3
    bare = type(weights)(weights.base, None, size_bytes=0, on_close=lambda: None)
    of_base = of(bare)
    ignoring = answers(trial, np.log(np.exp(of_base.logprobs_NV)))  # as if there were no adapter
    assert not any(trial.agrees(a) for a in ignoring)
    assert of(weights).tokens == trial.tokens == of_base.tokens


def test_what_is_asked_is_what_the_sampler_asks_and_adapters_by_number(of, weights):
    questions = of(weights).questions("trial-4", 4)
    assert [len(q["prompt"]) for q in questions] == [3, 7, 12]
    assert {q["adapter"] for q in questions} == {4}
    assert len({q["id"] for q in questions}) == 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a | {"error": "ValueError"},
        lambda a: a | {"logprobs": []},
        lambda a: a | {"logprobs": [a["logprobs"][0][:7]]},
        lambda a: a | {"logprobs": [[[t, float("nan")] for t, _ in a["logprobs"][0]]]},
        lambda a: a | {"logprobs": [[[t, p + 2e-3] for t, p in a["logprobs"][0]]]},
        lambda a: a | {"logprobs": [[[t + 5000, p] for t, p in a["logprobs"][0]]]},
        lambda a: a | {"logprobs": [[[-1, a["logprobs"][0][0][1]], *a["logprobs"][0][1:]]]},
    ],
)
def test_anything_else_is_no_agreement(of, weights, spoil):
    trial = of(weights)
    answer = next(answers(trial, built_in_logits(weights, list(trial.tokens))))
    assert trial.agrees(answer)
    assert not trial.agrees(spoil(answer))
