"""Micro-batches go by what a model keeps for a token."""

import numpy as np
import pytest
import torch

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import BatchData
from tg_tinker_server.engine import torch_pass
from tg_tinker_server.engine.backend import PassRequest
from tg_tinker_server.engine.memory import bytes_per_token, tokens_within
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.torch_backend import TorchBackend


def kept_by(session, records, tokens):
    """What autograd really keeps for a batch of this size, in bytes, by its own account of saved tensors."""
    ids = torch.ones(records, tokens, dtype=torch.int64)
    weights = {p.untyped_storage().data_ptr() for p in session.base.module.parameters()}
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with session.base.computing(session.adapter), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        losses = session.lm.losses(ids, None, ids)
    del losses
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def test_what_a_token_keeps_predicts_what_a_large_batch_keeps(torch_bench):
    session = torch_bench.open(lora={"target_modules": "all-linear"})
    per_token = bytes_per_token(session.base, session.adapter, session.lm, checkpoints=False)
    assert kept_by(session, 20, 50) == pytest.approx(1000 * per_token, rel=0.1)


def test_checkpointing_keeps_less_of_a_token_and_so_more_tokens_fit(torch_bench):
    kept = [
        bytes_per_token(s.base, s.adapter, s.lm, checkpoints=s.checkpoints)
        for s in (torch_bench.open(gradient_checkpointing=on) for on in (False, True))
    ]
    assert kept[1] < kept[0] / 2


def test_a_model_that_cannot_checkpoint_says_so(tools, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.supports_gradient_checkpointing", False)
    backend = TorchBackend({"tiny": tools.loaders["tiny"]})
    with pytest.raises(InvalidRequestError, match="gradient_checkpointing"):
        backend.open(run_id="r", config=tools.config(gradient_checkpointing=True))


def test_more_memory_larger_models_and_small_tokens_decide():
    assert tokens_within(2**30, 1e6, parameters=1, device="cpu") == int(2**30 / 1.5e6)
    assert tokens_within(2**30, 1.0, parameters=135_000_000, device="cpu") == 370
    assert tokens_within(2**30, 1.0, parameters=1, device="cpu") == 2048
    assert tokens_within(2**40, 1.0, parameters=1, device="cuda") > 2048
    assert tokens_within(1, 1e6, parameters=1, device="cpu") == 64, "never so few that nothing moves"


def slices_of(monkeypatch, session, request_of, batch):
    sizes = []
    fold = torch_pass.TorchPass.fold
    monkeypatch.setattr(
        torch_pass.TorchPass, "fold", lambda self, *a: (sizes.append(len(self.index)), fold(self, *a))
    )
    result = request_of(session, batch)
    monkeypatch.undo()
    return sizes, result


def test_a_huge_batch_is_cut_by_itself_and_memory_does_not_grow_with_it(monkeypatch, tools):
    backend = TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig(activation_bytes=2**20))
    session = backend.open(run_id="r", config=tools.config(dp={"max_grad_norm": 0.5}))
    assert isinstance(session.limits(train=True).tokens, int)
    peaks = []
    for records in (200, 800):
        batch = BatchData(input_ids=np.random.default_rng(0).integers(0, 256, (records, 9)))
        sizes, _ = slices_of(monkeypatch, session, tools.run_pass, batch)
        assert sum(sizes) == records
        peaks.append(max(sizes))
    assert peaks[0] == peaks[1] < 200


def test_the_user_s_micro_batch_size_bounds_records_and_changes_no_number(monkeypatch, torch_bench, tools):
    batch = tools.batch(7)
    free = torch_bench.open(dp={"max_grad_norm": 0.5})
    bounded = torch_bench.open(dp={"max_grad_norm": 0.5}, micro_batch_size=2)
    sizes, found = slices_of(monkeypatch, bounded, tools.run_pass, batch)
    assert sizes == [2, 2, 2, 1]
    expected = tools.run_pass(free, batch).contribution.sum_P
    np.testing.assert_allclose(found.contribution.sum_P, expected, rtol=1e-4, atol=1e-7)


def test_a_pass_of_many_slices_keeps_one_sum(torch_bench, tools):
    """Counts what lives between slices, not what is resident: that is the machine's."""
    session = torch_bench.open(dp={"max_grad_norm": 0.5}, micro_batch_size=1)
    work = session.start(PassRequest.of_batch(tools.batch(40), units=[f"u{i // 3}" for i in range(40)]))
    alive = []
    while not work.finished:
        work.advance()
        alive.append(sum(t.numel() >= session.layout.size for t in tensors_of(work)))
    assert max(alive) <= 2, "the sum, and that of one unit which goes on"
    assert len(alive) == 40


def tensors_of(work):
    found, seen, stack = [], set(), [vars(work)]
    while stack:
        value = stack.pop()
        if id(value) in seen or value is work.session:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            stack.extend(v for k, v in value.items() if k != "session")
        elif isinstance(value, list | tuple):
            stack.extend(value)
        elif hasattr(value, "__dataclass_fields__"):
            stack.extend(getattr(value, f) for f in value.__dataclass_fields__)
    return found


def test_what_one_kind_of_run_keeps_is_not_taken_for_another_s(tools):
    backend = TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig(activation_bytes=2**21))
    plain, frugal = (
        backend.open(run_id=str(on), config=tools.config(gradient_checkpointing=on)) for on in (False, True)
    )
    assert plain.limits(train=True).tokens < frugal.limits(train=True).tokens
