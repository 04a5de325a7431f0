"""What every backend promises, run against all of them."""

import weakref

import numpy as np
import pytest

from tg_tinker.errors import DPUnsupportedError, InvalidRequestError, ServerError
from tg_tinker.types import BatchData
from tg_tinker_server.dp.mechanism import ROUNDING_ROOM
from tg_tinker_server.engine import pending
from tg_tinker_server.engine.backend import EngineState, PassRequest, StepRequest

DP = {"max_grad_norm": 0.05}


def test_loss_is_the_mean_over_records_of_each_ones_own_token_mean(bench, tools):
    session = bench.open()
    batch = tools.batch(5, padded=True, masked_prompt=True)
    together = tools.run_pass(session, batch, train=False)
    alone = [tools.run_pass(session, tools.rows(batch, [i]), train=False) for i in range(5)]
    assert together.loss == pytest.approx(np.mean([r.loss for r in alone]), rel=1e-5)
    assert together.loss_sum == pytest.approx(sum(r.loss_sum for r in alone), rel=1e-5)
    assert together.num_targets == sum(r.num_targets for r in alone)
    assert together.num_tokens == int(batch.attention_mask.sum())
    assert together.num_records == 5
    assert all(r.loss == pytest.approx(r.loss_sum / r.num_targets, rel=1e-6) for r in alone if r.num_targets)


def test_a_pass_moves_neither_weights_nor_what_is_pending(bench, tools):
    session = bench.open(lora={"dropout": 0.2})
    tools.accumulate(session, tools.batch(seed=1))
    before = tools.weights_of(session)
    tools.run_pass(session, tools.batch())
    tools.run_pass(session, tools.batch(), train=False)
    assert tools.weights_of(session) == before
    assert session.pending_calls == 1


def test_eval_passes_give_no_contribution_and_repeat_with_dropout_configured(bench, tools):
    session = bench.open(lora={"dropout": 0.4})
    first, second = (tools.run_pass(session, tools.batch(), train=False, seed=s) for s in (1, 2))
    assert first.contribution is None
    assert first.loss == second.loss


@pytest.mark.parametrize("dp", [None, DP])
def test_dropout_follows_the_seed_of_the_request(bench, tools, dp):
    session = bench.open(lora={"dropout": 0.4}, dp=dp)
    digests = [tools.run_pass(session, tools.batch(), seed=s).contribution.digest() for s in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_dropout_repeats_in_another_session_of_the_same_seed_and_only_there(bench, tools):
    digests = [
        tools.run_pass(bench.open(lora={"dropout": 0.4}, seed=s), tools.batch(), seed=1).contribution.digest()
        for s in (5, 5, 6)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_under_privacy_nobody_else_can_compute_the_dropout_masks(bench, tools):
    first, second = (
        tools.run_pass(bench.open(lora={"dropout": 0.4}, seed=5, dp=DP), tools.batch(), seed=1) for _ in range(2)
    )
    assert first.loss != second.loss


def test_the_digest_names_the_gradient(any_bench, tools):
    sessions = [any_bench.open(), any_bench.open()]
    same = [tools.run_pass(s, tools.batch()).contribution.digest() for s in sessions]
    assert same[0] == same[1]
    assert tools.run_pass(sessions[0], tools.batch(seed=9)).contribution.digest() != same[0]


@pytest.mark.parametrize("dp", [None, DP, DP | {"merge_units": True}])
def test_two_half_batches_and_a_step_equal_one_whole_batch_and_a_step(any_bench, tools, dp):
    batch = tools.batch(6, padded=True)
    moved = []
    for parts in ([range(6)], [range(2), range(2, 6)]):
        session = any_bench.open(dp=dp, optimizer={"name": "sgd"})
        for part in parts:
            tools.accumulate(session, tools.rows(batch, part))
        assert session.pending_calls == len(parts)
        before = tools.flat_weights(session)
        tools.step(session, 1.0)
        moved.append(tools.flat_weights(session) - before)
        assert session.pending_calls == 0
    np.testing.assert_allclose(moved[0], moved[1], rtol=1e-5, atol=1e-6 * np.abs(moved[0]).max())


def test_without_privacy_the_step_is_by_the_mean_over_records_of_all_calls(any_bench, tools):
    session = any_bench.open(optimizer={"name": "sgd", "momentum": 0.0}, batch_size=100)
    batch = tools.batch(3)
    single = [tools.run_pass(session, tools.rows(batch, [i])).contribution.sum_P for i in range(3)]
    before = tools.flat_weights(session)
    tools.accumulate(session, tools.rows(batch, [0]))
    tools.accumulate(session, tools.rows(batch, [1, 2]))
    tools.step(session, 0.5)
    np.testing.assert_allclose(
        tools.flat_weights(session) - before, -0.5 * np.mean(single, axis=0), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_with_privacy_the_divisor_is_public_whatever_was_drawn_in_however_many_calls(any_bench, tools, calls):
    session = any_bench.open(
        dp={"max_grad_norm": 1e6}, optimizer={"name": "sgd", "momentum": 0.0}, batch_size=5, randomise=True
    )
    batch = tools.batch(4)
    total = sum(tools.run_pass(session, tools.rows(batch, [i])).contribution.sum_P for i in range(4))
    before = tools.flat_weights(session)
    for part in np.array_split(np.arange(4), calls):
        tools.accumulate(session, tools.rows(batch, part))
    tools.step(session, 1.0)
    np.testing.assert_allclose(tools.flat_weights(session) - before, -total / 5, rtol=1e-3, atol=1e-6)


def test_five_records_and_three_are_divided_by_the_same_number(any_bench, tools):
    norms = []
    for records in (5, 3):
        session = any_bench.open(dp={"max_grad_norm": 1e-6}, batch_size=4)
        result = tools.accumulate(session, tools.batch(records))
        norms.append(tools.step(session).grad_norm / np.linalg.norm(result.contribution.sum_P))
    assert norms == pytest.approx([0.25, 0.25])


def test_an_empty_poisson_batch_still_takes_a_noised_step(any_bench, tools):
    session = any_bench.open(dp=DP | {"sampling": "poisson", "dataset_size": 100})
    result = tools.accumulate(session, BatchData(input_ids=[]))
    assert (result.loss, result.num_records, result.contribution.units) == (0.0, 0, ())
    before = tools.flat_weights(session)
    rng = tools.no_noise()
    rng.normals = lambda count: np.full(count, 2.0)
    outcome = tools.step(session, 0.1, mechanism=tools.mechanism(1.0, DP["max_grad_norm"], rng))
    assert outcome.grad_norm == pytest.approx(2.0 * 0.05 * (1 + ROUNDING_ROOM) * np.sqrt(before.size) / 8)
    assert (tools.flat_weights(session) != before).all()


@pytest.mark.parametrize("dp", [None, DP])
def test_an_empty_batch_is_refused_where_poisson_sampling_did_not_draw_it(bench, tools, dp):
    with pytest.raises(InvalidRequestError, match="no record") as e:
        tools.run_pass(bench.open(dp=dp), BatchData(input_ids=[]))
    assert e.value.field == "batch.input_ids"


def test_a_step_without_a_pass_is_refused(bench, tools):
    session = bench.open()
    tools.run_pass(session, tools.batch(), train=False)
    with pytest.raises(InvalidRequestError, match="nothing to apply"):
        tools.step(session)


def test_discarding_forgets_the_pending_calls(any_bench, tools):
    session = any_bench.open(dp=DP)
    batch = tools.batch(2)
    tools.accumulate(session, batch, units=["a", "b"])
    session.discard_pending()
    assert (session.pending_calls, session.pending_units) == (0, ())
    tools.accumulate(session, batch, units=["a", "b"])
    assert session.pending_units == ("a", "b")


def test_the_same_unit_in_two_calls_of_one_logical_batch_is_refused(any_bench, tools):
    session = any_bench.open(dp=DP)
    batch = tools.batch(2)
    tools.accumulate(session, batch, units=["a", "b"])
    again = tools.run_pass(session, batch, units=["c", "b"])
    with pytest.raises(InvalidRequestError, match="1 privacy unit") as e:
        session.accumulate(again.contribution)
    assert e.value.field == "privacy_unit_ids"
    assert session.pending_units == ("a", "b")
    assert session.pending_calls == 1
    tools.step(session)
    session.accumulate(tools.run_pass(session, batch, units=["c", "b"]).contribution)


def test_records_without_unit_ids_are_units_of_their_own(any_bench, tools):
    session = any_bench.open(dp=DP)
    for seed in range(2):
        tools.accumulate(session, tools.batch(3, seed=seed))
    assert len(session.pending_units) == 6


def test_equal_records_are_two_units_in_one_call_and_the_same_unit_in_two(bench, tools):
    session = bench.open(dp=DP)
    tools.accumulate(session, BatchData(input_ids=[[5, 6, 7], [5, 6, 7], [8, 9, 3]]))
    assert len(session.pending_units) == 3
    again = [
        BatchData(input_ids=[[8, 9, 3, 0, 0]], attention_mask=[[1, 1, 1, 0, 0]]),
        BatchData(input_ids=[[0, 0, 8, 9, 3]], attention_mask=[[0, 0, 1, 1, 1]]),
        BatchData(input_ids=[[8, 9, 3]], labels=[[-100, -100, 3]]),
    ]
    for same in again:
        with pytest.raises(InvalidRequestError) as caught:
            tools.accumulate(session, same)
        assert caught.value.field == "privacy_unit_ids"
    assert len(session.pending_units) == 3
    with pytest.raises(InvalidRequestError, match="in every call"):
        tools.accumulate(session, BatchData(input_ids=[[4, 4, 4]]), units=("alice",))


def test_several_records_of_one_unit_are_summed_and_clipped_once(any_bench, tools):
    session = any_bench.open(dp=DP)
    result = tools.run_pass(session, tools.batch(4), units=["u"] * 4)
    assert result.contribution.units == ("u",)
    assert np.linalg.norm(result.contribution.sum_P) <= 0.05


@pytest.mark.parametrize("merge", [False, True])
def test_removing_any_one_unit_moves_the_sum_by_at_most_the_bound(any_bench, tools, merge):
    session = any_bench.open(dp=DP | {"merge_units": merge})
    batch, units = tools.batch(7, padded=True), ["a", "b", "a", "c", "d", "d", "d"]

    def clipped_sum(kept):
        calls = [kept] if not merge else [kept[::2], kept[1::2]]
        for part in calls:
            if part:
                tools.accumulate(session, tools.rows(batch, part), units=[units[i] for i in part])
        released = session._pending.release(StepRequest(learning_rate=0.0))
        session.discard_pending()
        return released.grad_P.astype(np.float64) * 8

    everything = clipped_sum(list(range(7)))
    for unit in "abcd":
        without = clipped_sum([i for i in range(7) if units[i] != unit])
        assert 0 < np.linalg.norm(everything - without) <= 0.05 * (1 + 1e-5)


def test_merged_units_over_two_calls_equal_the_same_units_in_one(any_bench, tools):
    batch = tools.batch(4)
    norms = []
    for parts in ([[0, 1, 2, 3]], [[0, 1], [2, 3]]):
        session = any_bench.open(dp=DP | {"merge_units": True})
        for part in parts:
            tools.accumulate(session, tools.rows(batch, part), units=[["a", "b", "a", "b"][i] for i in part])
        assert session.pending_units == ("a", "b")
        norms.append(tools.step(session))
    assert norms[0].grad_norm == pytest.approx(norms[1].grad_norm, rel=1e-5)
    assert norms[0].num_clipped == norms[1].num_clipped == 2
    assert norms[0].norm_before_clip == pytest.approx(norms[1].norm_before_clip, rel=1e-5)


def test_gradients_kept_for_merging_are_bounded_for_all_runs_together(any_bench, tools, monkeypatch):
    one, two = (any_bench.open(dp=DP | {"merge_units": True}) for _ in range(2))
    each = 8 * one.trainable_parameters
    monkeypatch.setattr(pending, "MAX_MERGED_BYTES", 5 * each)
    monkeypatch.setattr(pending, "_batches", weakref.WeakSet([one._pending, two._pending]))
    batch = tools.batch(4)
    tools.accumulate(one, tools.rows(batch, [0, 1, 2]), units=list("abc"))
    with pytest.raises(InvalidRequestError, match="beside other runs") as refused:
        tools.accumulate(two, tools.rows(batch, [0, 1, 2]), units=list("xyz"))
    assert refused.value.field == "merge_units"
    tools.accumulate(two, tools.rows(batch, [0, 1]), units=list("xy"))
    tools.step(one)
    tools.accumulate(two, tools.rows(batch, [2]), units=["z"])
    assert two._pending.units == ("x", "y", "z")


def test_units_that_are_known_by_their_content_are_never_merged(any_bench, tools):
    """Two people may have the same tokens; merged and clipped once, removing one could move the sum by 2C."""
    session = any_bench.open(dp=DP | {"merge_units": True})
    batch = tools.batch(4)
    tools.accumulate(session, tools.rows(batch, [0, 1, 2]))
    held = session._pending.units
    with pytest.raises(InvalidRequestError, match=r"1 privacy unit.*merges what somebody named"):
        tools.accumulate(session, tools.rows(batch, [3, 0]))
    assert session._pending.units == held
    tools.accumulate(session, tools.rows(batch, [3]))
    assert tools.step(session).num_clipped == 4


def test_names_of_two_kinds_are_refused_in_one_logical_batch(any_bench, tools):
    batch = tools.batch(4)
    for one, other in ((None, ["a"]), (["prompt a"], ["a"]), (["a"], ["record a"])):
        session = any_bench.open(dp=DP)
        tools.accumulate(session, tools.rows(batch, [0]), units=one)
        with pytest.raises(InvalidRequestError, match="or in none"):
            tools.accumulate(session, tools.rows(batch, [1]), units=other)


def test_norms_and_clip_counts_follow_the_bound(any_bench, tools):
    huge, tiny = (any_bench.open(dp={"max_grad_norm": bound}) for bound in (1e6, 1e-6))
    for session in (huge, tiny):
        tools.accumulate(session, tools.batch(4))
    loose, tight = tools.step(huge), tools.step(tiny)
    assert (loose.num_clipped, tight.num_clipped) == (0, 4)
    assert loose.norm_before_clip == loose.norm_after_clip == pytest.approx(tight.norm_before_clip, rel=1e-6)
    assert 0.99e-6 < tight.norm_after_clip <= 1e-6


def test_noise_of_another_bound_than_the_runs_is_refused_and_nothing_changes(any_bench, tools):
    session = any_bench.open(dp=DP)
    tools.accumulate(session, tools.batch(2))
    before = tools.weights_of(session)
    with pytest.raises(ServerError, match="paid for"):
        tools.step(session, mechanism=tools.mechanism(1.0, 0.01))
    assert tools.weights_of(session) == before
    assert session.pending_calls == 1


def test_noise_in_a_run_without_privacy_is_refused(any_bench, tools):
    session = any_bench.open()
    tools.accumulate(session, tools.batch(2))
    with pytest.raises(ServerError, match="without differential privacy"):
        tools.step(session, mechanism=tools.mechanism())


def test_a_mechanism_is_used_by_one_step(any_bench, tools):
    session, paid = any_bench.open(dp=DP), tools.mechanism(1.0, 0.05)
    tools.accumulate(session, tools.batch(2))
    tools.step(session, mechanism=paid)
    tools.accumulate(session, tools.batch(2))
    before = tools.weights_of(session)
    with pytest.raises(RuntimeError, match="released already"):
        tools.step(session, mechanism=paid)
    assert tools.weights_of(session) == before


def test_two_private_runs_of_the_same_seed_get_different_noise(any_bench, tools):
    weights = []
    for _ in range(2):
        session = any_bench.open(dp=DP, seed=1, optimizer={"name": "sgd"})
        tools.accumulate(session, tools.batch(2))
        tools.step(session, mechanism=tools.mechanism(1.0, 0.05))
        weights.append(tools.flat_weights(session))
    assert (weights[0] != weights[1]).mean() > 0.99


def test_the_global_clip_acts_on_the_noised_mean(any_bench, tools):
    session = any_bench.open(dp=DP, optimizer={"name": "sgd", "momentum": 0.0})
    tools.accumulate(session, tools.batch(2))
    before = tools.flat_weights(session)
    outcome = tools.step(session, 1.0, mechanism=tools.mechanism(1.0, 0.05), global_clip=1e-3)
    assert outcome.grad_norm > 1e-3
    assert np.linalg.norm(tools.flat_weights(session) - before) == pytest.approx(1e-3, rel=1e-3)


def test_the_update_hash_names_the_released_update(any_bench, tools):
    hashes = []
    for seed in (0, 0, 1):
        session = any_bench.open()
        tools.accumulate(session, tools.batch(seed=seed))
        hashes.append(tools.step(session).update_hash)
    assert hashes[0].startswith("sha256:")
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("name", "rate", "steps"), [("adamw", 0.02, 15), ("adam", 0.02, 15), ("sgd", 0.5, 15), ("adafactor", 0.5, 40)]
)
def test_each_optimizer_trains_a_toy_loss_down(bench, tools, name, rate, steps):
    session = bench.open(optimizer={"name": name, "momentum": 0.5})
    batch = BatchData(input_ids=[list(b"abcabcabc")] * 2)
    losses = []
    for _ in range(steps):
        losses.append(tools.accumulate(session, batch).loss)
        tools.step(session, rate)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor"])
def test_a_restored_state_takes_the_next_step_bit_for_bit(any_bench, tools, name):
    session = any_bench.open(optimizer={"name": name})
    for seed in range(2):
        tools.accumulate(session, tools.batch(seed=seed))
        tools.step(session)
    saved = session.export_state(optimizer=True)
    other = any_bench.open(optimizer={"name": name})
    tools.accumulate(other, tools.batch(seed=5))
    other.import_state(saved, optimizer=True)
    assert other.pending_calls == 0
    for one in (session, other):
        tools.accumulate(one, tools.batch(seed=7))
        tools.step(one)
    assert tools.weights_of(session) == tools.weights_of(other)


def test_an_exported_state_is_a_copy(any_bench, tools):
    session = any_bench.open()
    saved = session.export_state(optimizer=True)
    before = {k: v.copy() for k, v in saved.tensors.items()}
    tools.accumulate(session, tools.batch())
    tools.step(session)
    assert all(np.array_equal(saved.tensors[k], before[k]) for k in before)
    session.import_state(saved, optimizer=True)
    tools.accumulate(session, tools.batch())
    tools.step(session)
    assert all(np.array_equal(saved.tensors[k], before[k]) for k in before)


def test_a_state_without_optimizer_restores_weights_and_starts_the_optimizer_anew(any_bench, tools):
    session = any_bench.open()
    tools.accumulate(session, tools.batch())
    tools.step(session)
    saved = session.export_state(optimizer=False)
    assert not any("optimizer" in key for key in saved.tensors)
    session.import_state(saved, optimizer=False)
    assert set(tools.weights_of(session)) == set(saved.tensors)
    with pytest.raises(InvalidRequestError, match="without its optimizer"):
        session.import_state(saved, optimizer=True)


def spoil(kind, tensors):
    key = sorted(tensors)[0]
    if kind == "missing":
        return {k: v for k, v in tensors.items() if k != key}
    if kind == "extra":
        return tensors | {"weights/unheard_of": tensors[key]}
    if kind == "shape":
        return tensors | {key: np.zeros((2, 2), dtype=np.float32)}
    return tensors | {key: np.full_like(tensors[key], np.nan)}


@pytest.mark.parametrize("kind", ["missing", "extra", "shape", "nan"])
def test_a_state_that_does_not_fit_changes_nothing(any_bench, tools, kind):
    session = any_bench.open()
    tools.accumulate(session, tools.batch())
    saved = session.export_state(optimizer=False)
    before = tools.weights_of(session)
    wrong = EngineState(tensors=spoil(kind, dict(saved.tensors)), scalars=saved.scalars)
    with pytest.raises(InvalidRequestError) as e:
        session.import_state(wrong, optimizer=False)
    assert e.value.field == "artifact_id"
    assert tools.weights_of(session) == before
    assert session.pending_calls == 1


def test_another_optimizers_state_is_refused(any_bench):
    saved = any_bench.open(optimizer={"name": "sgd"}).export_state(optimizer=True)
    with pytest.raises(InvalidRequestError, match="its optimizer was sgd"):
        any_bench.open(optimizer={"name": "adam"}).import_state(saved, optimizer=True)


@pytest.mark.parametrize("dp", [None, DP])
def test_a_step_that_would_diverge_changes_nothing_and_keeps_the_batch(any_bench, tools, dp):
    session = any_bench.open(dp=dp, optimizer={"name": "sgd", "weight_decay": 1e10})
    tools.accumulate(session, tools.batch())
    tools.step(session, 0.0)  # gives the optimizer a state to keep
    tools.accumulate(session, tools.batch())
    before = tools.weights_of(session)
    with pytest.raises(InvalidRequestError, match="infinite or NaN"):
        tools.step(session, 1e31)
    assert tools.weights_of(session) == before
    assert session.pending_calls == 1
    tools.step(session, 1e-12)
    assert tools.weights_of(session) != before


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf"), 1e39])
def test_an_impossible_learning_rate_is_refused_before_noise_is_drawn(any_bench, tools, rate):
    session, paid = any_bench.open(dp=DP), tools.mechanism(1.0, 0.05)
    tools.accumulate(session, tools.batch())
    with pytest.raises(InvalidRequestError) as e:
        tools.step(session, rate, mechanism=paid)
    assert e.value.field == "learning_rate"
    assert not paid.used


BAD_BATCHES = {
    "unknown id": (lambda ids: {"input_ids": ids + 300}, "batch.input_ids"),
    "negative id": (lambda ids: {"input_ids": ids - 300}, "batch.input_ids"),
    "unknown label": (lambda ids: {"labels": ids * 0 + 260}, "batch.labels"),
    "negative label": (lambda ids: {"labels": ids * 0 - 5}, "batch.labels"),
    "mask of twos": (lambda ids: {"attention_mask": ids * 0 + 2}, "batch.attention_mask"),
    "too long": (lambda ids: {"input_ids": np.ones((1, 65), dtype=np.int64)}, "batch.input_ids"),
    "floats": (lambda ids: {"input_ids": ids.astype(float)}, "batch.input_ids"),
    "one dimension": (lambda ids: {"input_ids": ids[0]}, "batch.input_ids"),
    "other shape": (lambda ids: {"labels": ids[:, 1:]}, "batch.labels"),
    "no tokens": (lambda ids: {"input_ids": ids[:, :0]}, "batch.input_ids"),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_bad_batch_is_refused_by_field_and_constraint_and_the_session_goes_on(bench, tools, name):
    session = bench.open()
    change, field = BAD_BATCHES[name]
    ids = tools.batch().input_ids
    fields = {"input_ids": ids} | change(ids)
    like = fields["input_ids"]
    fields = {"attention_mask": np.ones_like(like), "labels": like} | fields
    request = PassRequest(**{f"{key}_BT": value for key, value in fields.items()})
    with pytest.raises(InvalidRequestError) as e:
        session.check(request)
    assert e.value.field == field
    assert e.value.constraint
    with pytest.raises(InvalidRequestError):
        session.forward_backward(request)
    tools.accumulate(session, tools.batch())
    tools.step(session)


def test_too_few_unit_ids_are_refused(any_bench, tools):
    with pytest.raises(InvalidRequestError) as e:
        tools.run_pass(any_bench.open(dp=DP), tools.batch(3), units=["a"])
    assert e.value.field == "privacy_unit_ids"


def test_a_record_without_targets_counts_as_zero(bench, tools):
    session = bench.open()
    batch = tools.batch(2)
    labels = batch.labels.copy()
    labels[1] = -100
    silent = BatchData(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
    half = tools.run_pass(session, silent)
    whole = tools.run_pass(session, tools.rows(batch, [0]))
    assert half.loss == pytest.approx(whole.loss / 2, rel=1e-5)
    np.testing.assert_allclose(half.contribution.sum_P, whole.contribution.sum_P, rtol=1e-3, atol=1e-6)


def test_a_record_of_one_token_has_no_target(bench, tools):
    result = tools.accumulate(bench.open(), BatchData(input_ids=[[1], [2]]))
    assert (result.loss, result.num_targets, result.num_tokens) == (0.0, 0, 2)


def test_a_dynamic_loss_scale_is_refused_under_privacy_only(any_bench):
    any_bench.open(loss_scale="dynamic")
    with pytest.raises(DPUnsupportedError, match="skips steps") as e:
        any_bench.open(loss_scale="dynamic", dp=DP)
    assert e.value.feature == "loss_scale"
    assert e.value.alternative


def test_an_unknown_model_is_refused_naming_those_that_exist(bench):
    with pytest.raises(InvalidRequestError, match=bench.model_ref) as e:
        bench.open(model_ref="gpt-9")
    assert e.value.field == "model_ref"


def test_an_unknown_target_module_is_refused_naming_those_that_exist(bench):
    with pytest.raises(InvalidRequestError, match=r"'nowhere' does not exist.*q_proj") as e:
        bench.open(lora={"target_modules": ["q_proj", "nowhere"]})
    assert e.value.field == "lora_config.target_modules"


def test_a_contribution_of_another_session_is_refused(any_bench, tools):
    first, second = any_bench.open(), any_bench.open()
    with pytest.raises(ServerError, match="did not compute it"):
        second.accumulate(tools.run_pass(first, tools.batch()).contribution)


def test_a_closed_session_answers_with_an_error(any_bench, tools):
    session = any_bench.open()
    session.close()
    session.close()
    with pytest.raises(ServerError, match="closed"):
        tools.run_pass(session, tools.batch())


def test_models_are_described(bench):
    info = next(m for m in bench.backend.models() if m.name == bench.model_ref)
    assert info.parameters > 1000
    assert info.max_sequence_length >= 64
    assert info.family


def test_the_session_states_its_limits(bench):
    session = bench.open(max_sequence_length=32)
    assert (session.vocab_size, session.max_positions, session.base_dtype) == (260, 32, "float32")
    assert session.eos_token_ids == (257,)
    assert session.trainable_parameters == sum(t.size for t in session.export_state(optimizer=False).tensors.values())
    assert session.decode(session.encode("grüße")) == "grüße"


def test_a_step_that_failed_leaves_no_noise_in_the_batch(any_bench, tools, monkeypatch):
    session = any_bench.open(dp=DP)
    tools.accumulate(session, tools.batch(3))
    before = session._pending.release(StepRequest(learning_rate=0.1)).grad_P

    def broken(*_):
        raise MemoryError

    monkeypatch.setattr(session, "_apply", broken)
    with pytest.raises(MemoryError):
        tools.step(session, mechanism=tools.mechanism(1.0, DP["max_grad_norm"]))
    np.testing.assert_array_equal(session._pending.release(StepRequest(learning_rate=0.1)).grad_P, before)
