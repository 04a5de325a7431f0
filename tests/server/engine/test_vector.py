"""Sums of vectors that others computed, against NumPy."""

import math

import numpy as np
import pytest

from tests.support.work import peak_bytes
from tg_tinker import ServiceClient
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import BatchData, DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.engine import vector
from tg_tinker_server.engine.backend import PassRequest
from tg_tinker_server.engine.bigram import BigramBackend
from tg_tinker_server.engine.vector import MAX_SIZE, WithVectors, size_of

SGD = OptimizerConfig(name="sgd", momentum=0.0)
BOUND = 2.0


def config(size=12, *, dp=None, **overrides):
    private = None if dp is None else DPConfig(**({"target_epsilon": None, "max_grad_norm": BOUND} | dp))
    return TrainingConfig(**({"model_ref": f"vector:{size}", "optimizer": SGD, "dp_config": private} | overrides))


def opened(size=12, **settings):
    return WithVectors(BigramBackend()).open(run_id="run-1", config=config(size, **settings))


def random_rows(rows, size=12, seed=0):
    return np.random.default_rng(seed).normal(0, 1, (rows, size)).astype(np.float32)


def names(count):
    return tuple(f"site-{i}" for i in range(count))


def vector_of(session):
    return session.export_state(optimizer=False).tensors["weights/vector"]


def plain_clipped_sum(rows):
    """The definition, one row at a time."""
    total = [0.0] * len(rows[0])
    for row in rows:
        norm = math.sqrt(math.fsum(float(x) ** 2 for x in row))
        total = [t + float(x) * min(1.0, BOUND / norm) for t, x in zip(total, row, strict=True)]
    return np.array(total)


def test_the_vector_starts_at_zero_and_moves_by_minus_the_rate_times_the_clipped_mean(tools):
    session, rows = opened(dp={}, batch_size=5), random_rows(4)
    rows[0] *= 0.1
    assert not vector_of(session).any()
    session.accumulate(session.contribute(rows, names(4)).contribution)
    outcome = tools.step(session, 0.5)
    np.testing.assert_allclose(vector_of(session), -0.5 * plain_clipped_sum(rows) / 5, rtol=1e-6)
    assert outcome.num_clipped == 3
    assert outcome.norm_before_clip == pytest.approx(np.mean(np.linalg.norm(rows, axis=1)))


def test_without_privacy_it_moves_by_the_mean_of_the_rows(tools):
    session, rows = opened(), random_rows(4)
    result = session.contribute(rows, names(4))
    assert result.contribution.units == ()
    session.accumulate(result.contribution)
    tools.step(session, 0.5)
    np.testing.assert_allclose(vector_of(session), -0.5 * rows.astype(np.float64).mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("at_once", [1, 30, 10**6])
@pytest.mark.parametrize("merge", [False, True])
def test_rows_of_one_unit_are_summed_and_then_clipped_however_many_are_in_float64_at_once(
    monkeypatch, tools, at_once, merge
):
    monkeypatch.setattr(vector, "_NUMBERS_AT_ONCE", at_once)
    session, rows = opened(dp={"merge_units": merge}, batch_size=1), random_rows(7)
    result = session.contribute(rows, ("a", "b", "a", "c", "b", "d", "e"))
    assert result.contribution.units == ("a", "b", "c", "d", "e")
    session.accumulate(result.contribution)
    tools.step(session, 1.0)
    wide = rows.astype(np.float64)
    expected = plain_clipped_sum([wide[0] + wide[2], wide[1] + wide[4], wide[3], wide[5], wide[6]])
    np.testing.assert_allclose(vector_of(session), -expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("merge", [False, True])
def test_a_row_that_is_not_finite_contributes_zero_and_is_counted(tools, bad, merge):
    session, rows = opened(dp={"merge_units": merge}, batch_size=1), random_rows(3)
    rows[1, 5] = bad
    session.accumulate(session.contribute(rows, names(3)).contribution)
    assert session.pending_units == names(3)
    outcome = tools.step(session, 1.0)
    assert outcome.nonfinite_units == 1
    np.testing.assert_allclose(vector_of(session), -plain_clipped_sum(rows[[0, 2]]), rtol=1e-5, atol=1e-6)


def test_infinities_that_would_cancel_still_count_as_not_finite(tools):
    session, rows = opened(dp={}), random_rows(3)
    rows[0, 0], rows[1, 0] = np.inf, -np.inf
    session.accumulate(session.contribute(rows, ("a", "a", "b")).contribution)
    assert tools.step(session).nonfinite_units == 1


def test_rows_near_the_end_of_float32_are_clipped_like_any_other(tools):
    session = opened(dp={}, batch_size=1)
    rows = np.full((2, 12), np.finfo(np.float32).max, dtype=np.float32)
    session.accumulate(session.contribute(rows, names(2)).contribution)
    outcome = tools.step(session, 1.0)
    assert (outcome.num_clipped, outcome.nonfinite_units) == (2, 0)
    assert np.linalg.norm(vector_of(session)) == pytest.approx(2 * BOUND)


def test_without_privacy_a_row_that_is_not_finite_is_refused():
    rows = random_rows(2)
    rows[0, 0] = np.nan
    with pytest.raises(InvalidRequestError, match="not finite"):
        opened().contribute(rows, names(2))


def test_a_contribution_has_no_loss_and_changes_nothing_until_the_step():
    session = opened(dp={})
    result = session.contribute(random_rows(3), names(3))
    assert (result.loss, result.loss_sum, result.num_targets, result.num_tokens, result.num_records) == (
        0,
        0,
        0,
        0,
        3,
    )
    assert session.pending_calls == 0
    assert not vector_of(session).any()


BAD_ROWS = {
    "float64": (np.zeros((2, 12)), "vectors", "float64"),
    "too short": (np.zeros((2, 11), dtype=np.float32), "vectors", r"\[2, 11\]"),
    "one dimension": (np.zeros(12, dtype=np.float32), "vectors", r"\[12\]"),
    "none": (np.zeros((0, 12), dtype=np.float32), "vectors", "no row"),
    "another number of ids": (np.zeros((3, 12), dtype=np.float32), "privacy_unit_ids", "2 privacy unit ids for 3"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("dp", [None, {}])
def test_rows_that_do_not_fit_are_refused(kind, dp):
    rows, field, message = BAD_ROWS[kind]
    with pytest.raises(InvalidRequestError, match=message) as e:
        opened(dp=dp).contribute(rows, names(2))
    assert (e.value.field, bool(e.value.constraint)) == (field, True)


def test_an_empty_draw_of_poisson_sampling_is_no_row_and_still_a_call():
    session = opened(dp={"sampling": "poisson", "dataset_size": 100})
    session.accumulate(session.contribute(np.zeros((0, 12), dtype=np.float32), ()).contribution)
    assert (session.pending_calls, session.pending_units) == (1, ())


def test_tokens_are_refused_by_name():
    session = opened()
    request = PassRequest.of_batch(BatchData(input_ids=[[1, 2]]))
    refused = [
        lambda: session.check(request),
        lambda: session.start(request),
        lambda: session.forward_backward(request),
        session.live_weights,
        lambda: session.encode("text"),
        lambda: session.decode([1]),
    ]
    for call in refused:
        with pytest.raises(InvalidRequestError, match="takes no tokens"):
            call()


@pytest.mark.parametrize(
    "size", ["", "0", "-1", "1e3", "007", " 5", "5 ", "٣", "1_000", str(MAX_SIZE + 1), "9" * 400]
)
def test_an_impossible_size_is_refused(size):
    with pytest.raises(InvalidRequestError, match="names no size") as e:
        opened(model_ref=f"vector:{size}")
    assert e.value.field == "model_ref"


def test_sizes_from_one_to_the_largest_are_possible():
    assert [size_of(f"vector:{n}") for n in (1, MAX_SIZE)] == [1, MAX_SIZE]


def test_an_adapter_on_a_vector_is_refused():
    with pytest.raises(InvalidRequestError, match="no layers") as e:
        opened(lora_config=LoRAConfig())
    assert e.value.field == "lora_config"


def test_every_other_model_is_the_inner_backends(bench):
    both = WithVectors(bench.backend)
    assert both.models() == bench.backend.models()
    session = both.open(run_id="run-1", config=bench.config())
    assert type(session) is type(bench.open())
    session.close()


def test_a_run_on_a_language_model_takes_no_vectors(bench):
    session = bench.open(dp={})
    rows = np.zeros((1, session.trainable_parameters), dtype=np.float32)
    with pytest.raises(InvalidRequestError, match="computes gradients from records") as e:
        session.contribute(rows, ("a",))
    assert e.value.field == "model_ref"


def test_no_copy_of_all_rows_is_made_in_float64():
    rows, size = 64, 1 << 18
    session = opened(size, dp={})
    values = random_rows(rows, size)
    assert peak_bytes(lambda: session.contribute(values, names(rows))) < 8 * rows * size


def test_a_server_opens_runs_on_vectors_beside_its_models_and_refuses_batches_for_them(tmp_path):
    with (
        EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path)) as server,
        ServiceClient(api_key=server.mint_key(), base_url=server.address) as service,
    ):
        client = service.create_training_client(config(64, dp={}))
        with pytest.raises(InvalidRequestError, match="takes no tokens"):
            client.forward_backward(BatchData(input_ids=[[1, 2]])).result()
        with pytest.raises(InvalidRequestError, match="names no size"):
            service.create_training_client(config("many", dp={}))
