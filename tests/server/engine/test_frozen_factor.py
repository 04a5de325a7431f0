"""One factor of every adapter is not trained: gradients against PEFT and autograd with it switched off."""

import numpy as np
import pytest
import torch

from tg_tinker import ServiceClient
from tg_tinker.errors import DPUnsupportedError, InvalidRequestError
from tg_tinker.types import BatchData, TrainingConfig
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.engine.backend import EngineState, PassRequest
from tg_tinker_server.engine.bigram import BigramBackend
from tg_tinker_server.engine.grad_rows import GradRows
from tg_tinker_server.engine.losses import record_losses
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.torch_backend import TorchBackend
from tg_tinker_server.service.checkpoint_fit import _shape

FAMILIES = {
    "tiny": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}
FACTORS = ("a", "b")


def is_factor(name, factor):
    return f".lora_{factor.upper()}." in name or name.endswith(f".lora_embedding_{factor.upper()}")


def frozen_in(tensors, factor):
    return {name: t.tobytes() for name, t in tensors.items() if is_factor(name, factor)}


def weights(session):
    return dict(session.export_state(optimizer=False).tensors)


def float64_session(tools, config, model):
    """All of its parameters random, both factors, in float64."""
    backend = TorchBackend({model: tools.loaders[model]}, PerformanceConfig(micro_batch_tokens=60))
    session = backend.open(run_id="r", config=config)
    session.base.module.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in session.base.module.named_parameters():
            if "lora_" in name or p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.1)
    return session


def loop(session, batch, factor):
    """Each record's gradient [B, P] by PEFT's own layers, with ``requires_grad`` off on the frozen factor."""
    grads = []
    with session.base.by_peft(session.adapter):
        named = {n: p for n, p in session.base.module.named_parameters() if "lora_" in n or p.requires_grad}
        for name, p in named.items():
            p.requires_grad_(not is_factor(name.replace(f".{session.adapter}", ""), factor))
        trained = [named[n] for n in sorted(named, key=lambda n: n.replace(f".{session.adapter}", ""))]
        trained = [p for p in trained if p.requires_grad]
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
            length = int(mask.sum())
            logits = session.base.module(input_ids=torch.from_numpy(ids[None, :length]), use_cache=False).logits
            loss = record_losses(logits, torch.from_numpy(labels[None, :length])).mean_B.sum()
            parts = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
            grads.append(torch.cat([g.reshape(-1) for g in parts]).numpy())
    return np.stack(grads)


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("factor", FACTORS)
def test_the_clipped_sum_is_over_the_trained_parameters_alone_as_in_a_plain_loop(tools, factor, model, checkpointing):
    config = tools.config(
        model_ref=model,
        dp={"max_grad_norm": 0.05},
        lora={"target_modules": FAMILIES[model], "frozen_factor": factor},
        gradient_checkpointing=checkpointing,
    )
    session, batch = float64_session(tools, config, model), tools.batch(5, padded=True)
    result = tools.run_pass(session, batch)
    grads_BP = loop(session, batch, factor)
    norms = np.linalg.norm(grads_BP, axis=1)
    np.testing.assert_allclose(np.sort(result.contribution.norms_U), np.sort(norms), rtol=1e-9)
    assert (norms > 0.05).all()
    assert relative_error(result.contribution.sum_P, (grads_BP * (0.05 / norms)[:, None]).sum(axis=0)) < 1e-8
    assert session.trainable_parameters == grads_BP.shape[1]


@pytest.mark.parametrize("lora", [{}, {"bias": "all"}, {"modules_to_save": ["norm", "down_proj"]}], ids=str)
@pytest.mark.parametrize("dp", [None, {"max_grad_norm": 0.05}])
@pytest.mark.parametrize("factor", FACTORS)
def test_saved_modules_and_biases_are_trained_all_the_same(tools, factor, dp, lora):
    model = "qwen" if "bias" in lora else "tiny"
    config = tools.config(model_ref=model, dp=dp, lora={"frozen_factor": factor} | lora)
    session, batch = float64_session(tools, config, model), tools.batch(4, padded=True)
    found = tools.run_pass(session, batch).contribution.sum_P
    names = list(session.parameters)
    grads_BP = loop(session, batch, factor)
    norms = np.linalg.norm(grads_BP, axis=1)
    scale = np.ones(4) if dp is None else np.minimum(1, 0.05 / norms)
    assert relative_error(found, scale @ grads_BP) < (1e-6 if dp is None else 1e-8)
    assert any("lora_" not in name for name in names) is bool(lora)


@pytest.mark.parametrize("factor", FACTORS)
def test_adapters_on_embeddings_freeze_the_same_factor(torch_bench, tools, factor):
    lora = {"target_modules": ["embed_tokens", "q_proj"], "frozen_factor": factor}
    session = torch_bench.open(lora=lora, optimizer={"name": "sgd"})
    before = weights(session)
    tools.accumulate(session, tools.batch())
    tools.step(session, 0.5)
    after = weights(session)
    assert len(frozen_in(before, factor)) == 3
    assert frozen_in(after, factor) == frozen_in(before, factor)
    assert all((after[n] != before[n]).any() for n in after if not is_factor(n, factor))
    with pytest.raises(DPUnsupportedError, match="lora_embedding_"):
        torch_bench.open(lora=lora, dp={})


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor"])
@pytest.mark.parametrize("dp", [None, {"max_grad_norm": 0.05}])
@pytest.mark.parametrize("factor", FACTORS)
def test_steps_leave_the_frozen_factor_bit_for_bit_and_move_all_the_rest(torch_bench, tools, factor, dp, name):
    optimizer = {"name": name, "weight_decay": 0.1}
    session = torch_bench.open(dp=dp, lora={"frozen_factor": factor}, optimizer=optimizer)
    before = weights(session)
    for seed in range(2):
        tools.accumulate(session, tools.batch(seed=seed))
        tools.step(session, 0.1, mechanism=tools.mechanism(1.0, 0.05) if dp else None, global_clip=1.0)
    after = weights(session)
    assert frozen_in(after, factor) == frozen_in(before, factor) != {}
    assert all((after[n] != before[n]).any() for n in after if not is_factor(n, factor))
    state = session.export_state(optimizer=True).tensors
    assert not any(n.startswith("optimizer/") and is_factor(n.rpartition("/")[0], factor) for n in state)


@pytest.mark.parametrize("factor", FACTORS)
def test_noise_is_drawn_for_the_trained_parameters_alone(torch_bench, tools, factor):
    whole, session = torch_bench.open(dp={}), torch_bench.open(dp={}, lora={"frozen_factor": factor})
    rng = tools.no_noise()
    tools.accumulate(session, tools.batch())
    tools.step(session, mechanism=tools.mechanism(1.0, 1.0, rng))
    kept = sum(len(t) for t in frozen_in(weights(session), factor).values()) // 4
    assert rng.drawn == session.trainable_parameters == whole.trainable_parameters - kept
    assert kept > 0


@pytest.mark.parametrize("dp", [None, {"max_grad_norm": 0.05}])
@pytest.mark.parametrize("factor", FACTORS)
def test_runs_of_one_frozen_factor_share_passes_and_no_others(tools, factor, dp):
    backend = TorchBackend(tools.loaders, PerformanceConfig(micro_batch_tokens=400))

    def opened(**lora):
        session = backend.open(run_id="r", config=tools.config(dp=dp, lora=lora))
        with torch.no_grad():
            for p in session._own.values():
                p.copy_(torch.randn(p.shape) * 0.1)
        return session

    first, second = (opened(frozen_factor=factor, alpha=alpha) for alpha in (8, 16))
    other, whole = opened(frozen_factor="b" if factor == "a" else "a"), opened()
    assert first.share_key == second.share_key is not None
    assert len({first.share_key, other.share_key, whole.share_key}) == 3
    batches = [tools.batch(1, seed=1), tools.batch(3, seed=2)]
    alone = [tools.run_pass(s, b).contribution for s, b in zip((first, second), batches, strict=True)]
    passes = [s.start(PassRequest.of_batch(b)) for s, b in zip((first, second), batches, strict=True)]
    outsider = other.start(PassRequest.of_batch(batches[0]))
    assert passes[0].advance([outsider, passes[1]]) == [passes[1]]
    for one, expected in zip(passes, alone, strict=True):
        while not one.finished:
            one.advance()
        assert relative_error(one.result().contribution.sum_P, expected.sum_P) < 1e-5


@pytest.mark.parametrize("factor", FACTORS)
def test_the_frozen_factor_s_gradient_is_never_computed_and_what_it_needs_not_kept(
    fresh_bench, tools, monkeypatch, factor
):
    written = []
    add_product = GradRows.add_product

    def noted(self, parameter, left, right):
        written.append(self.columns.by_parameter[id(parameter)].name)
        add_product(self, parameter, left, right)

    monkeypatch.setattr(GradRows, "add_product", noted)
    lora = {"target_modules": "all-linear"}
    whole = fresh_bench.open(dp={}, lora=lora, randomise=False)
    session = fresh_bench.open(dp={}, lora=lora | {"frozen_factor": factor})
    written.clear()
    tools.run_pass(session, tools.batch(2))
    assert sorted(written) == list(session.parameters)
    assert session._columns.width < whole._columns.width


def test_a_frozen_first_factor_keeps_less_for_the_backward_pass(tools):
    kept = {}
    for factor in (None, "a"):
        backend = TorchBackend({"tiny": tools.loaders["tiny"]})
        lora = {"target_modules": "all-linear", "frozen_factor": factor}
        session = backend.open(run_id="r", config=tools.config(dp={}, lora=lora))
        kept[factor] = session.base.bytes_per_token[session._kind]
    assert kept["a"] < 0.95 * kept[None]


@pytest.mark.parametrize("factor", FACTORS)
def test_the_probe_finds_a_wrong_rule_beside_a_second_factor_of_zeros(fresh_bench, monkeypatch, factor):
    add_product = GradRows.add_product
    monkeypatch.setattr(
        GradRows, "add_product", lambda self, parameter, left, right: add_product(self, parameter, 2 * left, right)
    )
    with pytest.raises(DPUnsupportedError, match="gradients of these parameters are wrong"):
        fresh_bench.open(dp={}, lora={"frozen_factor": factor}, randomise=False)


def test_the_probe_puts_the_frozen_factor_back(fresh_bench):
    lora = {"frozen_factor": "b"}
    begun = [weights(fresh_bench.open(dp=dp, lora=lora, randomise=False)) for dp in (None, {})]
    assert {n: t.tobytes() for n, t in begun[0].items()} == {n: t.tobytes() for n, t in begun[1].items()}


@pytest.mark.parametrize("dp", [None, {"max_grad_norm": 0.05}])
def test_a_fresh_adapter_with_its_second_factor_frozen_has_no_gradient_and_that_is_allowed(fresh_bench, tools, dp):
    session = fresh_bench.open(dp=dp, lora={"frozen_factor": "b"}, randomise=False)
    assert not tools.accumulate(session, tools.batch()).contribution.sum_P.any()
    assert tools.step(session).nonfinite_units == 0


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weights_of_one_frozen_factor_load_into_a_run_of_another_and_its_optimizer_does_not(torch_bench, tools, name):
    settings = {"optimizer": {"name": name}, "dp": {}}
    first = torch_bench.open(lora={"frozen_factor": "a"}, **settings)
    tools.accumulate(first, tools.batch())
    tools.step(first)
    saved = first.export_state(optimizer=True)
    for factor in ("b", None):
        second = torch_bench.open(lora={"frozen_factor": factor}, randomise=False, **settings)
        before = tools.weights_of(second)
        with pytest.raises(InvalidRequestError, match="optimizer=False"):
            second.import_state(saved, optimizer=True)
        assert tools.weights_of(second) == before
        second.import_state(saved, optimizer=False)
        assert {n: t.tobytes() for n, t in weights(second).items()} == {
            n: t.tobytes() for n, t in weights(first).items()
        }
        tools.accumulate(second, tools.batch())
        tools.step(second)


@pytest.mark.parametrize("factor", FACTORS)
def test_a_state_without_the_frozen_factor_is_refused(torch_bench, factor):
    session = torch_bench.open(lora={"frozen_factor": factor})
    saved = session.export_state(optimizer=False)
    trained = {n: t for n, t in saved.tensors.items() if not is_factor(n, factor)}
    with pytest.raises(InvalidRequestError, match="parameters are missing"):
        session.import_state(EngineState(tensors=trained, scalars=saved.scalars), optimizer=False)


def test_other_runs_that_come_and_go_on_the_base_thaw_nothing(fresh_bench, tools):
    session = fresh_bench.open(lora={"frozen_factor": "a", "target_modules": ["embed_tokens", "q_proj"]})
    before = frozen_in(weights(session), "a")
    for lora in ({}, {"frozen_factor": "b"}, {"target_modules": ["embed_tokens"]}):
        guest = fresh_bench.open(lora=lora)
        tools.run_pass(guest, tools.batch())
        guest.close()
        assert [n for n, p in session._own.items() if not p.requires_grad] == [
            n for n in session._own if is_factor(n, "a")
        ]
    tools.accumulate(session, tools.batch())
    tools.step(session)
    assert frozen_in(weights(session), "a") == before


def test_a_model_without_factors_refuses_to_freeze_one(tools):
    with pytest.raises(InvalidRequestError, match="no factors A and B") as e:
        BigramBackend().open(run_id="r", config=tools.config(model_ref="bigram", lora={"frozen_factor": "a"}))
    assert e.value.field == "lora_config.frozen_factor"


def test_a_checkpoint_goes_from_a_run_of_one_frozen_factor_to_one_of_another(tmp_path, tools):
    def config(factor) -> TrainingConfig:
        return tools.config(dp={}, lora={"frozen_factor": factor}, batch_size=2, optimizer={"name": "sgd"})

    backend = TorchBackend({"tiny": tools.loaders["tiny"]})
    with (
        EmbeddedServer(ServerConfig(port=0, data_dir=tmp_path), backend=backend) as server,
        ServiceClient(api_key=server.mint_key(), base_url=server.address) as service,
    ):
        first = service.create_training_client(config("a"))
        first.forward_backward(BatchData(input_ids=[[1, 2, 3], [4, 5, 6]])).result()
        first.optim_step().result()
        saved = first.save_state().result()
        second = service.create_training_client(config("b"))
        with pytest.raises(InvalidRequestError, match="optimizer=False"):
            second.load_state(saved.artifact_id).result()
        assert second.load_state(saved.artifact_id, optimizer=False).result().step == 1
        second.forward_backward(BatchData(input_ids=[[1, 2, 3], [4, 5, 6]])).result()
        second.optim_step().result()


def test_a_checkpoint_from_before_factors_could_be_frozen_has_the_same_shape():
    old = {"model_ref": "tiny", "lora_config": {"rank": 4}}
    assert _shape(old) == _shape({"model_ref": "tiny", "lora_config": {"rank": 4, "frozen_factor": "a"}})
    assert _shape(old) != _shape({"model_ref": "tiny", "lora_config": {"rank": 8, "frozen_factor": None}})
    assert _shape({"model_ref": "tiny", "lora_config": None}) != _shape(old)
