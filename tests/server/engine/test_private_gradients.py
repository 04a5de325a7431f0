"""The clipped sum of the torch engine against a float64 loop that treats every record alone."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from tg_tinker.errors import ServerError
from tg_tinker.types import BatchData, DPConfig, LoRAConfig, TrainingConfig
from tg_tinker_server.dp.mechanism import ROUNDING_ROOM
from tg_tinker_server.engine.backend import PassRequest, StepRequest
from tg_tinker_server.engine.dp_optimizer import UnitClippingOptimizer
from tg_tinker_server.engine.grad_rows import Columns, GradRows
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.torch_backend import TorchBackend

BOUND = 0.3
SMALL_BOUND = 0.05
SMALL_CONFIG = TrainingConfig(
    model_ref="tiny",
    lora_config=LoRAConfig(rank=4),
    dp_config=DPConfig(max_grad_norm=SMALL_BOUND, target_epsilon=None),
    max_sequence_length=64,
)


def float64_gradients(tools, config, weights, batch, model_ref="tiny"):
    """Each record's gradient [B, P], alone in its batch, without padding, in float64; no hooks anywhere."""
    plain = TorchBackend({model_ref: tools.loaders[model_ref]})
    session = plain.open(run_id="loop", config=config.model_copy(update={"dp_config": None}))
    session.import_state(weights, optimizer=False)
    model = session.base.module.double()
    grads = []
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
        length = int(mask.sum())
        tokens = torch.from_numpy(ids[:length])[None]
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        target = torch.from_numpy(labels[1:length].copy())
        keep = target != -100
        log_probs = torch.log_softmax(logits[keep], dim=-1)
        loss = -log_probs[torch.arange(int(keep.sum())), target[keep]].sum() / max(1, int(keep.sum()))
        parts = torch.autograd.grad(loss, list(session.parameters.values()))
        grads.append(torch.cat([g.reshape(-1) for g in parts]).numpy())
    session.close()
    return np.stack(grads)


def loop_clipped_sum(grads_BP, units, bound):
    total = np.zeros(grads_BP.shape[1])
    for unit in dict.fromkeys(units):
        grad = sum(g for g, u in zip(grads_BP, units, strict=True) if u == unit)
        total += grad * min(1.0, bound / np.linalg.norm(grad))
    return total


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


SHAPES = {
    "equal lengths": {},
    "padding": {"padded": True},
    "masked prompts": {"masked_prompt": True},
    "padding and masked prompts": {"padded": True, "masked_prompt": True},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("units", [list("abcdefg"), list("aabcbba")])
@pytest.mark.parametrize("bound", [BOUND, 9.0])
def test_the_clipped_sum_agrees_with_a_float64_loop(torch_bench, tools, shape, units, bound):
    session = torch_bench.open(dp={"max_grad_norm": bound}, lora={"target_modules": "all-linear"})
    batch = tools.batch(7, tokens=11, **SHAPES[shape])
    result = tools.run_pass(session, batch, units=units)
    grads_BP = float64_gradients(tools, session._config, session.export_state(optimizer=False), batch)
    assert relative_error(result.contribution.sum_P, loop_clipped_sum(grads_BP, units, bound)) < 1e-5
    np.testing.assert_allclose(
        np.sort(result.contribution.norms_U),
        np.sort([np.linalg.norm(sum(g for g, v in zip(grads_BP, units, strict=True) if v == u)) for u in set(units)]),
        rtol=1e-5,
    )
    if bound == 9.0:
        assert min(result.contribution.norms_U) < bound < max(result.contribution.norms_U), "bites some, spares some"


def test_accumulation_over_calls_agrees_with_the_float64_loop(torch_bench, tools):
    session = torch_bench.open(dp={"max_grad_norm": BOUND}, batch_size=6)
    batch = tools.batch(6, padded=True)
    before = session.export_state(optimizer=False)
    for part in ([0, 1], [2], [3, 4, 5]):
        tools.accumulate(session, tools.rows(batch, part))
    grads_BP = float64_gradients(tools, session._config, before, batch)
    expected = loop_clipped_sum(grads_BP, range(6), BOUND) / 6
    released = session._pending.release(StepRequest(learning_rate=0.0))
    assert relative_error(released.grad_P, expected) < 1e-5


def test_merged_units_over_calls_agree_with_the_float64_loop(torch_bench, tools):
    session = torch_bench.open(dp={"max_grad_norm": BOUND, "merge_units": True}, batch_size=6)
    batch, units = tools.batch(6, padded=True), list("abcabd")
    before = session.export_state(optimizer=False)
    for part in ([0, 1, 2], [3, 4, 5]):
        tools.accumulate(session, tools.rows(batch, part), units=[units[i] for i in part])
    expected = loop_clipped_sum(float64_gradients(tools, session._config, before, batch), units, BOUND) / 6
    released = session._pending.release(StepRequest(learning_rate=0.0))
    assert relative_error(released.grad_P, expected) < 1e-5


def test_without_privacy_the_gradient_agrees_with_the_float64_loop(torch_bench, tools):
    session = torch_bench.open()
    batch = tools.batch(6, padded=True, masked_prompt=True)
    grads_BP = float64_gradients(tools, session._config, session.export_state(optimizer=False), batch)
    contribution = tools.run_pass(session, batch).contribution
    assert relative_error(contribution.sum_P, grads_BP.sum(axis=0)) < 1e-5


@pytest.mark.parametrize("model", ["qwen", "gpt2"])
def test_other_model_families_agree_with_the_float64_loop(torch_models, tools, torch_bench, model):
    target = "all-linear" if model == "qwen" else ["c_attn", "c_fc"]
    session = torch_bench.open(model_ref=model, dp={"max_grad_norm": BOUND}, lora={"target_modules": target})
    batch = tools.batch(5, padded=True)
    result = tools.run_pass(session, batch)
    grads_BP = float64_gradients(tools, session._config, session.export_state(optimizer=False), batch, model)
    assert relative_error(result.contribution.sum_P, loop_clipped_sum(grads_BP, range(5), BOUND)) < 1e-5


def test_training_every_parameter_agrees_with_the_float64_loop(torch_bench, tools):
    session = torch_bench.open(dp={"max_grad_norm": BOUND}, lora_config=None, randomise=False)
    batch = tools.batch(4, padded=True)
    result = tools.run_pass(session, batch)
    grads_BP = float64_gradients(tools, session._config, session.export_state(optimizer=False), batch)
    assert relative_error(result.contribution.sum_P, loop_clipped_sum(grads_BP, range(4), BOUND)) < 1e-5


@pytest.mark.parametrize("micro_batch_tokens", [1, 25, 10_000])
def test_the_size_of_micro_batches_changes_nothing_beyond_rounding(tools, micro_batch_tokens):
    sums = []
    for tokens in (micro_batch_tokens, 40):
        backend = TorchBackend(
            {"tiny": tools.loaders["tiny"]}, PerformanceConfig(micro_batch_tokens=tokens, per_sample_bytes=20_000)
        )
        session = backend.open(run_id="r", config=SMALL_CONFIG)
        sums.append(tools.run_pass(session, tools.batch(6, padded=True), units=list("aabbcd")).contribution.sum_P)
    assert relative_error(*sums) < 1e-5


def test_gradient_checkpointing_changes_nothing_beyond_rounding(torch_bench, tools):
    sums = [
        tools.run_pass(
            torch_bench.open(dp={"max_grad_norm": BOUND}, gradient_checkpointing=on), tools.batch(6)
        ).contribution.sum_P
        for on in (False, True)
    ]
    assert relative_error(*sums) < 1e-5


def test_private_runs_have_a_float32_base_where_others_have_bfloat16(tools):
    backend = TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig(base_dtype="bfloat16"))
    plain = backend.open(run_id="p", config=SMALL_CONFIG.model_copy(update={"dp_config": None}))
    assert plain.base_dtype == "bfloat16"
    assert {p.dtype for p in plain.parameters.values()} == {torch.float32}
    assert backend.open(run_id="r", config=SMALL_CONFIG).base_dtype == "float32"


def test_removing_a_record_that_shapes_the_batch_moves_the_sum_by_at_most_the_bound(tools):
    """The longest record decides the padded width, and with it how all others are rounded."""
    backend = TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig(base_dtype="bfloat16"))
    session = backend.open(run_id="r", config=SMALL_CONFIG)
    ids = np.tile(np.random.default_rng(0).integers(1, 50, 24), (64, 1))
    mask = np.ones_like(ids)
    mask[1:, 12:] = 0
    batch = BatchData(input_ids=ids, attention_mask=mask, labels=np.where(mask == 1, ids, -100))
    everything = tools.run_pass(session, batch).contribution.sum_P
    without = tools.run_pass(session, tools.rows(batch, range(1, 64))).contribution.sum_P
    assert np.linalg.norm(everything - without) <= SMALL_BOUND * (1 + ROUNDING_ROOM)


GRADS = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4)).flatmap(
    lambda s: st.tuples(
        arrays(np.float32, (s[0], s[1], 2), elements=st.floats(width=32)),
        arrays(np.float32, (s[0], s[2]), elements=st.floats(-100, 100, width=32)),
        arrays(np.int64, s[0], elements=st.integers(0, 3)),
    )
)


def clipped(first, second, units, bound, dtype=torch.float32):
    """The clipped sum of two parameters' per-sample gradients, as the engine computes it."""
    shapes = {"a": first.shape[1:], "b": second.shape[1:]}
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    columns = Columns(parameters)
    rows = GradRows(columns, len(units), torch.device("cpu"))
    for parameter, grads in zip(parameters.values(), (first, second), strict=True):
        rows.add(parameter, torch.from_numpy(grads).to(dtype))
    clipper = UnitClippingOptimizer(
        torch.optim.SGD(parameters.values(), lr=0.1),
        columns=columns,
        max_grad_norm=bound,
        expected_batch_size=1,
        keep_units=False,
    )
    return clipper.clip_and_sum(rows.matrix_NW, units)


@given(grads=GRADS, bound=st.floats(1e-30, 1e3), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=200, deadline=None)
def test_for_any_gradients_removing_one_unit_moves_the_sum_by_at_most_the_bound(grads, bound, dtype):
    """One unit's contribution is at most the bound; what its removal does to the others is float32 rounding."""
    first, second, units = grads
    whole = clipped(first, second, units, bound, dtype).sum_P.numpy()
    assert np.isfinite(whole).all()
    for unit in np.unique(units):
        keep = units != unit
        alone = clipped(first[~keep], second[~keep], units[~keep], bound, dtype).sum_P.numpy()
        assert np.linalg.norm(alone) <= bound
        without = clipped(first[keep], second[keep], units[keep], bound, dtype).sum_P.numpy()
        assert np.linalg.norm(whole - without) <= bound * (1 + 1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_unit_that_is_not_finite_leaves_the_others_exactly_as_without_it(poison):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(4, 3, 2)).astype(np.float32), rng.normal(size=(4, 5)).astype(np.float32)
    units, bad = np.arange(4), first.copy()
    bad[1, 0, 0] = poison
    keep = units != 1
    contribution = clipped(bad, second, units, 1.0)
    np.testing.assert_array_equal(contribution.sum_P, clipped(first[keep], second[keep], units[keep], 1.0).sum_P)
    assert np.isfinite(contribution.norms_U).sum() == 3
    assert contribution.units == [0, 1, 2, 3]


def test_a_record_that_overflows_is_counted_and_the_step_is_as_without_it(torch_bench, tools, monkeypatch):
    session = torch_bench.open(dp={"max_grad_norm": BOUND})
    batch = tools.batch(4)
    clip_and_sum = session.clipper.clip_and_sum

    def poisoned(grads_NW, units, **kwargs):
        grads_NW[units == 2, 5] = float("inf")
        return clip_and_sum(grads_NW, units, **kwargs)

    expected = sum(tools.run_pass(session, tools.rows(batch, [i])).contribution.sum_P for i in (0, 1, 3))
    monkeypatch.setattr(session.clipper, "clip_and_sum", poisoned)
    result = tools.accumulate(session, batch)
    assert relative_error(result.contribution.sum_P, expected) < 1e-5
    outcome = tools.step(session, mechanism=tools.mechanism(1.0, BOUND))
    assert outcome.nonfinite_units == 1
    assert np.isfinite(outcome.grad_norm)


def test_opacus_own_noise_and_divisor_are_closed(torch_bench):
    session = torch_bench.open(dp={})
    with pytest.raises(RuntimeError, match="ledger"):
        session.clipper.add_noise()
    with pytest.raises(RuntimeError, match="release"):
        session.clipper.scale_grad()


def test_no_global_seed_reaches_the_noise_of_a_step(torch_bench, tools):
    moved = []
    for _ in range(2):
        session = torch_bench.open(dp={}, optimizer={"name": "sgd"})
        tools.accumulate(session, tools.batch(2))
        torch.manual_seed(42)
        np.random.seed(42)
        tools.step(session, 1.0, mechanism=tools.mechanism())
        moved.append(tools.flat_weights(session))
    assert (moved[0] != moved[1]).mean() > 0.99


def test_passes_and_steps_leave_the_global_generator_as_it_was(torch_bench, tools):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    session = torch_bench.open(dp={}, lora={"dropout": 0.3})
    tools.accumulate(session, tools.batch(2))
    tools.step(session, mechanism=tools.mechanism())
    assert torch.equal(torch.get_rng_state(), before)


def test_an_empty_batch_folds_to_nothing(torch_bench, tools):
    session = torch_bench.open(dp={"sampling": "poisson", "dataset_size": 50, "merge_units": True})
    contribution = tools.accumulate(session, BatchData(input_ids=[])).contribution
    assert not contribution.sum_P.any()
    assert tools.step(session).grad_norm == 0.0


@pytest.mark.parametrize("units", [15, 16, 17, 255, 1024])
def test_one_unit_more_moves_the_rounding_of_many_equal_ones_by_nothing_to_speak_of(units):
    """A plain float32 sum is off by up to units^2 2^-24: at 1,024 equal rows twice the room that the noise has."""
    row = np.random.default_rng(1).normal(size=(1, 3, 2)).astype(np.float32)
    first, second = np.repeat(row, units + 1, axis=0), np.zeros((units + 1, 4), dtype=np.float32)
    first[-1] = 0.0  # the unit that comes and goes has no gradient at all
    with_it = clipped(first, second, np.arange(units + 1), 1.0).sum_P.numpy()
    without = clipped(first[:-1], second[:-1], np.arange(units), 1.0).sum_P.numpy()
    assert np.linalg.norm(with_it - without) < 1e-5
    exact = row.astype(np.float64).ravel() / np.linalg.norm(row) * units
    assert np.linalg.norm(with_it[:6] - exact) <= units * 1e-5


def test_shifted_micro_batches_of_a_thousand_equal_records_move_the_sum_within_the_room(tools):
    """One record more shifts every border between micro-batches, and with it how every other is rounded."""
    backend = TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig(micro_batch_tokens=2048))
    session = backend.open(run_id="r", config=SMALL_CONFIG)
    ids = np.tile(np.random.default_rng(0).integers(1, 50, 2), (1025, 1))
    labels = ids.copy()
    labels[0] = -100  # has no target, so no gradient
    batch = BatchData(input_ids=ids, labels=labels, attention_mask=np.ones_like(ids))
    everything = tools.run_pass(session, batch).contribution.sum_P
    without = tools.run_pass(session, tools.rows(batch, range(1, 1025))).contribution.sum_P
    assert np.linalg.norm(everything - without) <= 0.1 * ROUNDING_ROOM * SMALL_BOUND


def one_more(tools, extra_ids, *, extra_mask=None):
    """The clipped sum of four short records with and without one more unit that has no gradient."""
    backend = TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig(micro_batch_tokens=2048))
    session = backend.open(run_id="r", config=SMALL_CONFIG)
    ids = np.zeros((5, 30), dtype=np.int64)
    ids[:4, :6] = np.random.default_rng(0).integers(1, 256, (4, 6))
    ids[4, : len(extra_ids)] = extra_ids
    mask = (ids != 0).astype(np.int64)
    if extra_mask is not None:
        mask[4, : len(extra_mask)] = extra_mask
    labels = np.where(mask == 1, ids, -100)
    labels[4] = -100
    batch = BatchData(input_ids=ids, attention_mask=mask, labels=labels)
    return [tools.run_pass(session, tools.rows(batch, range(n))).contribution.sum_P for n in (4, 5)]


@pytest.mark.parametrize("extra", [{"extra_ids": [7] * 25}, {"extra_ids": [7] * 6, "extra_mask": [1, 0, 1, 1, 1, 1]}])
def test_a_longer_or_masked_unit_leaves_the_others_bit_for_bit_as_they_were(tools, extra):
    """It is computed apart, so that it decides neither their width nor their kind of attention."""
    without, with_it = one_more(tools, **extra)
    assert without.any()
    np.testing.assert_array_equal(with_it, without)


def test_a_unit_is_of_one_kind_whichever_of_its_records_needs_a_mask(torch_bench, tools):
    session = torch_bench.open(dp={"max_grad_norm": BOUND})
    batch = BatchData(input_ids=[[1, 2, 3, 4]] * 3, attention_mask=[[1] * 4, [1, 0, 1, 1], [1] * 4])
    work = session.start(PassRequest.of_batch(batch, units=["a", "a", "b"]))
    assert sorted(b.index.tolist() for b in work._batches) == [[0, 1], [2]]


def test_a_pass_that_counted_a_unit_twice_is_not_accumulated(torch_bench, tools):
    session = torch_bench.open(dp={"max_grad_norm": BOUND})
    contribution = tools.run_pass(session, tools.batch(2), units=["a", "b"]).contribution
    with pytest.raises(ServerError, match="twice"):
        session.accumulate(dataclasses.replace(contribution, units=("a", "a")))
    assert session.pending_calls == 0


def test_products_of_float32_keep_all_their_bits(tools):
    torch.set_float32_matmul_precision("medium")
    TorchBackend({"tiny": tools.loaders["tiny"]})
    assert torch.get_float32_matmul_precision() == "highest"
