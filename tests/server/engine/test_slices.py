"""Passes of several runs through one model: the same numbers as alone, and nobody's harm is another's."""

import numpy as np
import pytest
import torch

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.types import BatchData
from tg_tinker_server.engine import slices, torch_pass
from tg_tinker_server.engine.backend import PassRequest
from tg_tinker_server.engine.microbatch import Limits, joins
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.torch_backend import TorchBackend

ALL = {"target_modules": "all-linear"}


@pytest.fixture
def roomy(tools):
    """Opens sessions with random adapters on one base, where 400 tokens fit in a micro-batch."""
    backend = TorchBackend(tools.loaders, PerformanceConfig(micro_batch_tokens=400))
    opened = []

    def open_(seed=0, **settings):
        session = backend.open(run_id=f"r{len(opened)}", config=tools.config(**{"lora": ALL} | settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in session.parameters.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        opened.append(session)
        return session

    yield open_
    for session in opened:
        session.close()


def request(tools, records, tokens=9, seed=0, train=True, **options):
    return PassRequest.of_batch(tools.batch(records, tokens, seed=seed, padded=True), train=train, **options)


def together(*passes):
    moved = passes[0].advance(passes[1:])
    assert len(moved) == len(passes) - 1
    return [p.result() for p in passes]


def assert_same(found, alone):
    assert found.loss == pytest.approx(alone.loss, rel=1e-6)
    assert (found.num_targets, found.num_tokens, found.num_records) == (
        alone.num_targets,
        alone.num_tokens,
        alone.num_records,
    )
    if alone.contribution is not None:
        np.testing.assert_allclose(
            found.contribution.sum_P,
            alone.contribution.sum_P,
            rtol=1e-4,
            atol=1e-6 * np.abs(alone.contribution.sum_P).max(),
        )
        assert found.contribution.units == alone.contribution.units


DP = {"max_grad_norm": 0.5}
MIXES = {
    "private": [{"dp": DP}, {"dp": DP}, {"dp": DP}],
    "public": [{}, {}, {}],
    "different bounds": [{"dp": DP}, {"dp": {"max_grad_norm": 1e-3, "merge_units": True}}, {"dp": DP}],
    "different scales": [{"lora": {**ALL, "alpha": 1}}, {"lora": {**ALL, "alpha": 64}}, {}],
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mix", MIXES)
def test_rows_together_give_the_numbers_of_rows_alone(roomy, tools, mix, train):
    sessions = [roomy(i, **settings) for i, settings in enumerate(MIXES[mix])]
    requests = [request(tools, n, seed=n, train=train) for n in (2, 3, 1)]
    alone = [s.forward_backward(r) for s, r in zip(sessions, requests, strict=True)]
    shared = together(*(s.start(r) for s, r in zip(sessions, requests, strict=True)))
    for found, expected in zip(shared, alone, strict=True):
        assert_same(found, expected)


def test_a_long_pass_takes_others_along_slice_by_slice(roomy, tools):
    long, short = roomy(0, dp=DP), roomy(1, dp=DP)
    big, small = request(tools, 90, seed=1), request(tools, 2, seed=2)
    expected = long.forward_backward(big), short.forward_backward(small)
    passes = long.start(big), short.start(small)
    moved = passes[0].advance([passes[1]])
    assert not passes[0].finished
    if not moved:  # the first slice was full
        passes[1].advance()
    while not passes[0].finished:
        passes[0].advance()
    for one, alone in zip(passes, expected, strict=True):
        assert_same(one.result(), alone)


@pytest.mark.parametrize(
    "other",
    [
        {"lora": {**ALL, "rank": 2}},
        {"lora": {"target_modules": ["q_proj"]}},
        {"lora": {**ALL, "dropout": 0.1}},
        {"gradient_checkpointing": True},
        {"lora_config": None},
        {"model_ref": "qwen"},
        {"model_ref": "gpt2-dropout", "lora": {"target_modules": ["c_attn"]}},
        {"lora": {"bias": "all", **ALL}},
        {"lora": {"target_modules": ["embed_tokens", "q_proj"]}},
        {"dp": DP},
    ],
    ids=str,
)
def test_what_cannot_share_goes_alone(roomy, tools, other):
    first, second = roomy(0), roomy(1, **other)
    passes = first.start(request(tools, 2)), second.start(request(tools, 2))
    assert passes[0].advance([passes[1]]) == []
    assert passes[1].advance([passes[0]]) == []
    assert passes[0].finished
    assert passes[1].finished


def test_training_and_evaluation_do_not_mix_and_a_run_never_joins_itself(roomy, tools):
    first, second = roomy(0), roomy(1)
    training, evaluating = first.start(request(tools, 2)), second.start(request(tools, 2, train=False))
    assert training.advance([evaluating, first.start(request(tools, 1))]) == []


def test_nan_weights_of_one_run_stay_its_own(roomy, tools):
    sick, *healthy = roomy(0, dp=DP), roomy(1, dp=DP), roomy(2, dp=DP)
    requests = [request(tools, n, seed=n) for n in (2, 3, 2)]
    alone = [s.forward_backward(r) for s, r in zip(healthy, requests[1:], strict=True)]
    with torch.no_grad():
        for parameter in sick.parameters.values():
            parameter.fill_(float("nan"))
    passes = [s.start(r) for s, r in zip((sick, *healthy), requests, strict=True)]
    passes[0].advance(passes[1:])
    poisoned = passes[0].result()
    assert not poisoned.contribution.sum_P.any(), "its units are not finite: they add exactly zero"
    for one, expected in zip(passes[1:], alone, strict=True):
        assert_same(one.result(), expected)


def test_a_public_run_that_diverged_hears_of_it_and_nobody_else(roomy, tools):
    sick, healthy = roomy(0), roomy(1)
    with torch.no_grad():
        next(iter(sick.parameters.values())).fill_(float("inf"))
    passes = sick.start(request(tools, 2)), healthy.start(request(tools, 2))
    passes[0].advance([passes[1]])
    with pytest.raises(InvalidRequestError, match="not finite"):
        passes[0].result()
    assert np.isfinite(passes[1].result().contribution.sum_P).all()


def test_a_crash_in_company_is_repeated_alone_and_leaves_the_others_where_they_were(roomy, tools, monkeypatch):
    first, second = roomy(0, dp=DP), roomy(1, dp=DP)
    requests = request(tools, 2, seed=1), request(tools, 2, seed=2)
    alone = [s.forward_backward(r) for s, r in zip((first, second), requests, strict=True)]
    whole = slices._losses

    def out_of_memory(passes):
        if len(passes) > 1:
            raise RuntimeError("out of memory")
        return whole(passes)

    monkeypatch.setattr(slices, "_losses", out_of_memory)
    passes = [s.start(r) for s, r in zip((first, second), requests, strict=True)]
    assert passes[0].advance([passes[1]]) == []
    assert passes[0].finished
    assert not passes[1].finished
    passes[1].advance()
    for one, expected in zip(passes, alone, strict=True):
        np.testing.assert_array_equal(one.result().contribution.sum_P, expected.contribution.sum_P)


def test_a_clip_that_fails_moves_no_pass(roomy, tools, monkeypatch):
    first, second = roomy(0, dp=DP), roomy(1, dp=DP)
    passes = first.start(request(tools, 2)), second.start(request(tools, 2))

    def broken(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(second.clipper, "clip_and_sum", broken)
        assert passes[0].advance([passes[1]]) == []
    assert not passes[1].finished
    expected = first.forward_backward(request(tools, 2))
    np.testing.assert_allclose(
        passes[0].result().contribution.sum_P, expected.contribution.sum_P, rtol=1e-4, atol=1e-7
    )


def test_units_are_clipped_in_their_own_run_even_under_the_same_name(roomy, tools):
    first, second = roomy(0, dp=DP), roomy(0, dp=DP)
    same = [request(tools, 2, seed=1, units=["u", "u"]) for _ in range(2)]
    alone = first.forward_backward(same[0])
    for found in together(first.start(same[0]), second.start(same[1])):
        assert_same(found, alone)
        assert np.linalg.norm(found.contribution.sum_P) <= 0.5


def test_records_without_targets_add_nothing(roomy, tools):
    session, other = roomy(0, dp=DP), roomy(1, dp=DP)
    silent = PassRequest.of_batch(BatchData(input_ids=[[1, 2, 3]], labels=[[-100, -100, -100]]))
    assert not session.forward_backward(silent).contribution.sum_P.any()
    found, _ = together(session.start(silent), other.start(request(tools, 2)))
    assert not found.contribution.sum_P.any()


def test_room_is_measured_in_rows_tokens_and_padding():
    limits = Limits(tokens=100, records=8)
    assert joins([(2, 10)], (2, 12), limits)
    assert not joins([(2, 10)], (7, 2), limits), "rows"
    assert not joins([(5, 10)], (4, 15), limits), "tokens"
    assert not joins([(4, 2)], (1, 20), limits), "padding"


def test_private_runs_share_only_at_one_width_and_with_masks_alike(roomy, tools):
    """Else a neighbour's longest record would decide how this run's records are rounded."""
    first, second = roomy(0, dp=DP), roomy(1, dp=DP)

    def moved(one, other):
        return len(first.start(PassRequest.of_batch(one)).advance([second.start(PassRequest.of_batch(other))]))

    short, long = tools.batch(2, 9), tools.batch(2, 30)
    holes = BatchData(input_ids=short.input_ids, attention_mask=[[1, 0, 1, 1, 1, 1, 1, 1, 1]] * 2)
    assert (moved(short, tools.batch(3, 12)), moved(short, long), moved(short, holes)) == (1, 0, 0)


def test_a_closed_run_is_neither_head_nor_companion(roomy, tools):
    first, second = roomy(0), roomy(1)
    passes = [s.start(request(tools, 2, train=False)) for s in (first, second)]
    first.close()
    assert passes[1].advance([passes[0]]) == []
    with pytest.raises(ServerError, match="closed"):
        passes[0].advance()


def test_a_failure_while_folding_counts_nobody_twice(roomy, tools, monkeypatch):
    sessions = roomy(0, dp=DP), roomy(1, dp=DP)
    passes = [s.start(request(tools, 2, seed=i)) for i, s in enumerate(sessions)]
    fold = torch_pass.TorchPass.fold

    def late(self, losses, rows, part):
        if self is passes[1]:
            monkeypatch.undo()
            raise MemoryError
        fold(self, losses, rows, part)

    monkeypatch.setattr(torch_pass.TorchPass, "fold", late)
    assert passes[0].advance([passes[1]]) == []
    while not passes[1].finished:
        passes[1].advance()
    for i, (one, session) in enumerate(zip(passes, sessions, strict=True)):
        assert_same(one.result(), session.forward_backward(request(tools, 2, seed=i)))


def test_a_companion_s_mask_counts_as_the_head_s_does(roomy, tools):
    plain, holed = roomy(0), roomy(1)
    batch = tools.batch(2)
    mask = np.ones_like(batch.input_ids)
    mask[:, 2:4] = 0
    with_holes = PassRequest.of_batch(BatchData(input_ids=batch.input_ids, attention_mask=mask))
    alone = holed.forward_backward(with_holes)
    _, found = together(plain.start(request(tools, 2)), holed.start(with_holes))
    assert_same(found, alone)


def test_dropout_differs_from_slice_to_slice(roomy):
    session = roomy(0, lora={**ALL, "dropout": 0.5}, micro_batch_size=1)
    record = BatchData(input_ids=[[1, 2, 3, 4, 5, 6]] * 2)
    work = session.start(PassRequest.of_batch(record))
    while not work.finished:
        work.advance()
    assert work._sums_B[0] != work._sums_B[1]


def test_the_memory_for_per_sample_gradients_bounds_the_records_of_a_slice(tools):
    bytes_per_record = 4 * 1856
    backend = TorchBackend(tools.loaders, PerformanceConfig(per_sample_bytes=3 * bytes_per_record + 1000))
    session = backend.open(run_id="r", config=tools.config(lora=ALL, dp=DP))
    assert session._columns.width == 1920
    assert session.limits(train=True).records == 3
