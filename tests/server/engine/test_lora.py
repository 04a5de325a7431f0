"""Adapters share a base, begin where the seed says, and leave nothing behind."""

import gc

import pytest
import torch

from tg_tinker.errors import InvalidRequestError


def named_shapes(module):
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def test_several_adapters_share_one_base_in_memory(fresh_bench):
    first = fresh_bench.open()
    storage = {p.data_ptr() for p in first.base.module.parameters()}
    private = fresh_bench.open(dp={}, lora={"rank": 2, "target_modules": "all-linear"})
    third = fresh_bench.open(lora={"target_modules": ["o_proj"]})
    parameters = list(third.base.module.parameters())
    assert first.base is private.base is third.base
    assert storage <= {p.data_ptr() for p in third.base.module.parameters()}
    adapters = sum(s.trainable_parameters for s in (first, private, third))
    size = next(m.parameters for m in fresh_bench.backend.models() if m.name == "tiny")
    assert sum(p.numel() for p in parameters) == size + adapters


@pytest.mark.parametrize(
    "settings", [{"lora_config": None}, {"lora": {"bias": "all"}}, {"lora": {"modules_to_save": ["lm_head"]}}]
)
def test_a_run_that_trains_the_base_has_one_to_itself(fresh_bench, tools, settings):
    shared = fresh_bench.open()
    own = fresh_bench.open(**settings, randomise=False)
    assert own.base is not shared.base
    loss = tools.run_pass(shared, tools.batch(), train=False).loss
    tools.accumulate(own, tools.batch())
    tools.step(own, 0.1)
    assert tools.run_pass(shared, tools.batch(), train=False).loss == loss


def test_the_seed_alone_decides_how_an_adapter_begins(fresh_bench, tools):
    torch.manual_seed(1)
    first = tools.weights_of(fresh_bench.open(seed=3, randomise=False))
    fresh_bench.open(seed=9, randomise=False)
    torch.manual_seed(2)
    assert tools.weights_of(fresh_bench.open(seed=3, randomise=False)) == first
    assert tools.weights_of(fresh_bench.open(seed=4, randomise=False)) != first


def test_a_fresh_adapter_changes_nothing(fresh_bench, tools):
    adapter = fresh_bench.open(randomise=False)
    base = fresh_bench.open(lora_config=None, randomise=False)
    losses = [tools.run_pass(s, tools.batch(), train=False).loss for s in (adapter, base)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_parameter_names_are_those_of_adapter_files_whatever_else_is_open(fresh_bench):
    names = [set(fresh_bench.open().export_state(optimizer=False).tensors) for _ in range(2)]
    assert names[0] == names[1]
    assert "weights/base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names[0]


def test_all_linear_means_the_same_modules_on_a_used_base_and_never_the_head(fresh_bench):
    first = fresh_bench.open(lora={"target_modules": "all-linear"})
    second = fresh_bench.open(lora={"target_modules": "all-linear"})
    names = [set(s.export_state(optimizer=False).tensors) for s in (first, second)]
    assert names[0] == names[1]
    assert len(names[0]) == 2 * 7 * 2
    assert not any("lm_head" in n for n in names[0])


@pytest.mark.parametrize("name", ["self_attn", "nowhere"])
def test_a_module_that_cannot_carry_an_adapter_is_refused_and_the_base_stays_clean(fresh_bench, name):
    fresh_bench.open()
    (base,) = fresh_bench.backend._shared.values()
    before = named_shapes(base.module)
    with pytest.raises(InvalidRequestError) as e:
        fresh_bench.open(lora={"target_modules": ["q_proj", name]})
    assert name in e.value.message
    assert "q_proj" in e.value.constraint
    assert named_shapes(base.module) == before


def test_an_unknown_module_to_save_is_refused(fresh_bench):
    with pytest.raises(InvalidRequestError) as e:
        fresh_bench.open(lora={"modules_to_save": ["nowhere"]})
    assert e.value.field == "lora_config.modules_to_save"


@pytest.mark.parametrize("name", ["q_proj", "self_attn", "model"])
def test_a_module_cannot_be_saved_whole_and_carry_an_adapter(fresh_bench, name):
    with pytest.raises(InvalidRequestError) as e:
        fresh_bench.open(lora={"target_modules": ["q_proj"], "modules_to_save": [name]})
    assert e.value.field == "lora_config.modules_to_save"


def test_closing_runs_leaves_the_base_as_it_was(fresh_bench, tools):
    keeper = fresh_bench.open()
    base = keeper.base
    before = named_shapes(base.module)
    for dp in ({}, None, {"merge_units": True}):
        session = fresh_bench.open(dp=dp, lora={"target_modules": "all-linear", "dropout": 0.1})
        tools.accumulate(session, tools.batch())
        tools.step(session)
        session.close()
    # An empty wrapper stays where another adapter was; it computes what it wraps.
    assert {n.replace(".base_layer", "") for n in named_shapes(base.module)} == {
        n.replace(".base_layer", "") for n in before
    }
    hooked = [n for n, m in base.module.named_modules() if m._forward_hooks or m._backward_hooks]
    assert hooked == []
    keeper.close()
    assert not any("lora" in n for n, _ in base.module.named_modules())
    assert base.adapters == 0
    fresh_bench.open()


def test_runs_that_come_and_go_leave_no_tensors_behind(fresh_bench, tools):
    def tensors():
        gc.collect()
        return sum(1 for o in gc.get_objects() if issubclass(type(o), torch.Tensor))

    def visit():
        session = fresh_bench.backend.open(run_id="r", config=fresh_bench.config(dp={"merge_units": True}))
        tools.accumulate(session, tools.batch())
        tools.step(session)
        session.close()

    keeper = fresh_bench.open()
    visit()
    before = tensors()
    for _ in range(3):
        visit()
    assert tensors() <= before
    tools.run_pass(keeper, tools.batch())


def test_per_sample_memory_does_not_outlive_a_pass(fresh_bench, tools):
    session = fresh_bench.open(dp={})
    result = tools.run_pass(session, tools.batch(6))
    for parameter in session.parameters.values():
        assert parameter.grad is None
        assert parameter.grad_sample is None
    alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (6, session._columns.width)]
    assert alive == []
    assert result.contribution.grads_UP is None


def test_the_base_without_adapters_is_what_it_was_and_the_runs_train_on_as_before(fresh_bench, tools):
    ids = torch.tensor([[5, 6, 7]])
    fused = fresh_bench.open()
    with torch.no_grad(), fused.base.computing(fused.adapter):
        adapted = fused.base.module(ids).logits
    by_peft = fresh_bench.open(lora={"target_modules": ["embed_tokens", "q_proj"]})
    wanted = {n: p.requires_grad for n, p in fused.base.module.named_parameters()}
    with torch.no_grad(), fused.base.bare():
        bare = fused.base.module(ids).logits
    with pytest.raises(RuntimeError), fused.base.bare():
        raise RuntimeError("half-way")
    assert {n: p.requires_grad for n, p in fused.base.module.named_parameters()} == wanted
    plain, _ = tools.loaders["tiny"]()
    with torch.no_grad():
        torch.testing.assert_close(bare, plain.eval()(ids).logits, atol=1e-6, rtol=1e-6)
    with torch.no_grad(), fused.base.computing(fused.adapter):
        assert torch.equal(fused.base.module(ids).logits, adapted)
    assert not torch.equal(adapted, bare)
    for session in (by_peft, fused):
        before = tools.weights_of(session)
        tools.accumulate(session, tools.batch())
        tools.step(session)
        after = tools.weights_of(session)
        assert all(after[n] != before[n] for n in before if n.startswith("weights/"))
