"""Groups of layers to put adapters on, on models that name their layers differently."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.server.engine.conftest import LLAMA_SIZES, LOADERS, VOCAB, Bench, seeded, tiny_llama
from tests.server.engine.sampling.conftest import Sampling, prompts, training_logprobs
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.losses import Loss
from tg_tinker_server.engine.backend import LossRequest
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.torch_backend import TorchBackend

MODELS = {
    "tiny": LOADERS["tiny"],
    "gpt2": LOADERS["gpt2"],
    "opt": LOADERS["opt"],
    "tied": seeded(lambda: tiny_llama(tie_word_embeddings=True)),
    "qwen3": seeded(lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA_SIZES, head_dim=4, tie_word_embeddings=True))),
    "mamba": seeded(
        lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4))
    ),
}
LLAMA = {
    "@attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "@mlp": {"gate_proj", "up_proj", "down_proj"},
    "@unembed": {"lm_head"},
}
MEANT = {
    "tiny": LLAMA,
    "qwen3": LLAMA,
    "gpt2": {
        "@attention": {"attn.c_attn", "attn.c_proj"},
        "@mlp": {"mlp.c_fc", "mlp.c_proj"},
        "@unembed": {"lm_head"},
    },
    "opt": {
        "@attention": {"q_proj", "k_proj", "v_proj", "out_proj"},
        "@mlp": {"fc1", "fc2"},
        "@unembed": {"lm_head"},
    },
}
ALL = {"target_modules": ["@attention", "@mlp", "@unembed"]}


@pytest.fixture(scope="module")
def backend():
    return TorchBackend(MODELS, PerformanceConfig(micro_batch_tokens=60))


@pytest.fixture
def bench(backend, request):
    it = Bench(backend, getattr(request, "param", "tied"))
    yield it
    it.close()


def adapted(session):
    return {n.removeprefix("base_model.model.").split(".lora_")[0] for n in session.parameters}


@pytest.mark.parametrize("bench", MEANT, indirect=True)
def test_a_group_means_its_layers_and_no_others(bench):
    everything = set()
    for group, names in MEANT[bench.model_ref].items():
        paths = adapted(bench.open(lora={"target_modules": [group]}))
        for path in paths:
            assert any(path == n or path.endswith("." + n) for n in names), path
        for name in names:
            assert any(p == name or p.endswith("." + name) for p in paths), name
        assert not everything & paths
        everything |= paths
    assert adapted(bench.open(lora=ALL)) == everything
    linear = adapted(bench.open(lora={"target_modules": "all-linear"}))
    assert everything == linear | {"lm_head"}


@pytest.mark.parametrize("bench", ["mamba"], indirect=True)
def test_a_group_that_a_model_does_not_have_is_refused_by_name(bench):
    with pytest.raises(InvalidRequestError, match="@attention"):
        bench.open(lora={"target_modules": ["@unembed", "@attention"]})


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied layers; whether they are right is what is asked
@pytest.mark.parametrize("bench", ["tied", "qwen3", "gpt2", "tiny"], indirect=True)
def test_an_adapter_on_the_output_layer_trains_and_its_files_mean_the_same_to_peft(bench, tools):
    session = bench.open(lora=ALL)
    before = tools.flat_weights(session)
    first = tools.accumulate(session, tools.batch()).loss
    tools.step(session, 0.05)
    assert tools.run_pass(session, tools.batch(), train=False).loss < first
    assert (tools.flat_weights(session) != before).any()
    state = session.export_state(optimizer=False)
    fresh, _ = MODELS[bench.model_ref]()
    model = peft.get_peft_model(
        fresh,
        peft.LoraConfig(r=4, lora_alpha=bench.config().lora_config.alpha, target_modules=sorted(adapted(session))),
    )
    tensors = {n.removeprefix("weights/"): torch.from_numpy(v) for n, v in state.tensors.items()}
    problems = peft.set_peft_model_state_dict(model, tensors)
    assert not problems.unexpected_keys
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), session.base.computing(session.adapter):
        mine = session.base.module(ids).logits
        theirs = model.eval()(ids).logits
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def datums_of(batch, index):
    """The same records as datums: every real token but the first is a target."""
    rows = [batch.input_ids[i][batch.attention_mask[i] == 1] for i in index]
    return LossRequest(
        tokens=tuple(ids[:-1] for ids in rows),
        inputs=tuple({"target_tokens": ids[1:], "weights": np.ones(len(ids) - 1, dtype=np.float32)} for ids in rows),
        loss=Loss(name="cross_entropy"),
    )


@pytest.mark.parametrize("datums", [False, True], ids=["batch", "datums"])
@pytest.mark.parametrize("bench", ["tied", "qwen3", "gpt2", "tiny"], indirect=True)
def test_under_privacy_each_record_of_the_output_layer_is_clipped_by_itself(bench, tools, datums):
    bound = 0.05
    private = bench.open(lora=ALL, dp={"max_grad_norm": bound})
    plain = bench.open(lora=ALL)
    plain.import_state(private.export_state(optimizer=False), optimizer=False)
    batch = tools.batch(records=5, tokens=9, padded=True, masked_prompt=True)
    if datums:
        together = private.forward_backward(datums_of(batch, range(5))).contribution
    else:
        together = tools.run_pass(private, batch).contribution
    total = np.zeros_like(together.sum_P)
    norms = []
    for i in range(5):
        if datums:
            gradient = plain.forward_backward(datums_of(batch, [i])).contribution.sum_P
        else:
            gradient = tools.run_pass(plain, tools.rows(batch, [i])).contribution.sum_P
        norms.append(np.linalg.norm(gradient))
        total += gradient * min(1.0, bound / norms[-1])
    assert min(norms) > bound
    np.testing.assert_allclose(together.norms_U, norms, rtol=1e-4)
    np.testing.assert_allclose(together.sum_P, total, atol=1e-6)


@pytest.mark.parametrize("bench", ["tied", "qwen3", "gpt2"], indirect=True)
def test_runs_with_adapters_on_the_output_layer_are_sampled_as_they_train(bench):
    sampling = Sampling(bench)
    runs = [sampling.run(seed, lora=ALL) for seed in (1, 2)]
    base = sampling.base()
    texts = prompts(7, 12)
    params = {"temperature": 0.0, "max_tokens": 6}
    tickets = [sampling.submit(w, t, params=params) for (_, w), t in zip(runs, texts, strict=True)]
    beside = sampling.submit(base, texts[0], params=params)
    found = sampling.results()
    for (session, _), text, ticket in zip(runs, texts, tickets, strict=True):
        sequence = found[ticket].sequences[0]
        expected = training_logprobs(session, [*text, *sequence.tokens])
        np.testing.assert_allclose(sequence.logprobs, expected[-6:], atol=1e-5)
    fresh, _ = MODELS[bench.model_ref]()
    tokens = [*texts[0], *found[beside].sequences[0].tokens]
    with torch.no_grad():
        expected = fresh.eval()(torch.tensor([tokens])).logits[0].log_softmax(-1)
    np.testing.assert_allclose(
        found[beside].sequences[0].logprobs, [expected[i - 1, tokens[i]] for i in range(7, 13)], atol=1e-5
    )
    sampling.close()


@pytest.mark.parametrize("bench", ["tiny"], indirect=True)
def test_an_adapter_on_the_output_layer_changes_nothing_for_other_runs(bench, tools, monkeypatch):
    own = bench.open(lora={"target_modules": ["@attention"]}, dp={})
    alone = tools.run_pass(own, tools.batch()).contribution.digest()
    beside = bench.open(lora=ALL, dp={})
    whole = []
    logits = own.lm.logits
    monkeypatch.setattr(own.lm, "logits", lambda *given: whole.append(given) or logits(*given))
    assert tools.run_pass(own, tools.batch()).contribution.digest() == alone
    assert not whole  # the last layer is still one with the loss
    tools.run_pass(beside, tools.batch())
    assert whole  # an adapter on it is computed, not passed over
