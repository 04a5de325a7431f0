import asyncio
import hashlib
import hmac
import math

import numpy as np
import pytest

from tg_tinker import (
    BatchData,
    DPConfig,
    ForwardBackwardResult,
    InvalidRequestError,
    OptimStepResult,
    ResourceNotFoundError,
    SaveStateResult,
    ServiceClient,
    TrainingConfig,
)

BATCH = {"input_ids": [[1, 2], [3, 4]]}


@pytest.fixture
def tc(service):
    return service.create_training_client(TrainingConfig(model_ref="sum"))


@pytest.fixture
def private(service):
    return service.create_training_client(TrainingConfig(model_ref="sum", dp_config=DPConfig()))


def test_a_batch_may_be_lists_arrays_or_batch_data(tc, server):
    arrays = {k: np.array(v, dtype=np.int32) for k, v in BATCH.items()}
    for batch in (BATCH, arrays, BatchData(**BATCH)):
        assert isinstance(tc.forward_backward(batch).result(), ForwardBackwardResult)
    sent = [r.input_ids for r in server.seen("ForwardBackward")]
    assert sent[0] == sent[1] == sent[2]


def test_the_arrays_may_be_reused_as_soon_as_the_call_returns(tc):
    ids = np.array([[5]])
    futures = []
    for _ in range(10):
        futures.append(tc.forward_backward({"input_ids": ids}))
        ids += 1
    assert tc.optim_step().result().grad_norm == sum(range(5, 15))


@pytest.mark.parametrize(
    ("batch", "field"),
    [
        ({"input_ids": [[1, 2], [3]]}, "batch.input_ids"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, "batch.labels"),
        ({"input_ids": [[1.5]]}, "batch.input_ids"),
        ({"inputs": [[1]]}, "batch"),
        ([{"input_ids": [1]}], "batch"),
        ({"input_ids": [[1]], "attention_mask": [[2]]}, "batch.attention_mask"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_here_and_costs_no_number(tc, server, batch, field):
    with pytest.raises(InvalidRequestError) as caught:
        tc.forward_backward(batch)
    assert caught.value.field == field
    assert caught.value.constraint
    assert server.seen("ForwardBackward") == []
    assert tc.forward_backward(BATCH).id.endswith(".1")


def test_a_step_returns_what_the_reference_says(tc):
    tc.forward_backward(BATCH)
    result = tc.optim_step(apply_dp_noise=True).result()
    assert isinstance(result, OptimStepResult)
    assert (result.step, result.learning_rate, result.dp_metrics) == (1, 0.1, None)


def test_the_mode_belongs_to_the_call_and_not_to_its_execution(tc, server):
    server.gate.clear()
    trained = tc.forward_backward({"input_ids": [[7]]})
    tc.eval()
    evaluated = tc.forward_backward({"input_ids": [[100]]})
    tc.train()
    step = tc.optim_step()
    server.gate.set()
    assert step.result(20).grad_norm == 7.0
    assert trained.result().gradient_hash
    assert evaluated.result().gradient_hash == ""


def test_a_step_in_eval_mode_is_refused(tc):
    tc.eval()
    with pytest.raises(InvalidRequestError, match=r"train\(\)"):
        tc.optim_step()


def test_unit_ids_leave_only_as_keyed_hashes(tc, server):
    tc.forward_backward(BATCH, privacy_unit_ids=["alice", "bob"]).result()
    (request,) = server.seen("ForwardBackward")
    expected = hmac.new(b"k" * 32, b"tg-tinker/unit/v1\x00alice", hashlib.sha256).hexdigest()
    assert request.privacy_unit_ids[0] == expected
    assert b"alice" not in request.SerializeToString()
    assert len(set(request.privacy_unit_ids)) == 2


@pytest.mark.parametrize("units", [["a"], "ab", ["a", ""], ["a", 7]])
def test_unit_ids_that_do_not_fit_the_records_are_refused(tc, units):
    with pytest.raises(InvalidRequestError) as caught:
        tc.forward_backward(BATCH, privacy_unit_ids=units)
    assert caught.value.field == "privacy_unit_ids"


def test_an_empty_draw_is_a_batch(tc):
    from tg_tinker import collate

    assert tc.forward_backward(collate([]), privacy_unit_ids=[]).result().num_tokens == 0


def test_sampling_keeps_the_order_of_prompts_and_sends_every_option(tc, server):
    result = tc.sample(["a", "b"], 5, 0.7, 0.9, 3, ["\n"], 3, 1.1, 0.2, 0.3)
    assert [s.prompt for s in result.samples] == ["a"] * 3 + ["b"] * 3
    assert result.total_tokens == 6
    params = server.seen("Sample")[0].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (5, 0.7, 0.9, 3)
    assert (list(params.stop_sequences), params.num_completions) == (["\n"], 3)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 0.2, 0.3)


def test_one_prompt_may_be_a_plain_string(tc):
    assert [s.prompt for s in tc.sample("hello").samples] == ["hello"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"num_completions": 0}, "num_completions"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"prompts": []}, "prompts"),
        ({"prompts": [1]}, "prompts"),
        ({"temperature": "hot"}, "sampling options"),
    ],
)
def test_an_impossible_option_is_refused_by_name(tc, server, options, field):
    with pytest.raises(InvalidRequestError) as caught:
        tc.sample(**{"prompts": "a", **options})
    assert caught.value.field == field
    assert server.seen("Sample") == []


def test_samples_come_after_the_steps_before_them(tc):
    tc.forward_backward({"input_ids": [[6]]})
    tc.optim_step()
    assert tc.sample("x").samples[0].completion == "6.0"


def test_a_stream_gives_chunks_as_they_come(tc, server):
    server.gate.clear()
    stream = tc.sample_stream("Tell me", max_tokens=3, top_k=1)
    assert next(stream).text == "a"  # the rest is not made yet
    server.gate.set()
    rest = list(stream)
    assert [c.text for c in rest] == ["b", "c"]
    assert [c.finish_reason for c in rest] == [None, "length"]
    assert server.seen("SampleStream")[0].params.top_k == 1


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompts": ["a"]}, "prompts"),
        ({"prompts": "a", "num_completions": 2}, "num_completions"),
        ({"prompts": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompts": "a", "colour": 1}, "sampling options"),
    ],
)
def test_a_stream_is_refused_when_it_is_asked_for_not_when_it_is_read(tc, arguments, field):
    with pytest.raises(InvalidRequestError) as caught:
        tc.sample_stream(**arguments)
    assert caught.value.field == field


def test_checkpoints_come_back_with_their_metadata_and_step(tc):
    tc.forward_backward(BATCH)
    tc.optim_step()
    saved = tc.save_state(include_optimizer=True, metadata={"epoch": 5, "tags": ["a"]})
    assert isinstance(saved, SaveStateResult)
    assert saved.metadata == {"epoch": 5, "tags": ["a"]}
    assert saved.encryption.algorithm == "AES-256-GCM"
    assert saved.timestamp.tzinfo is not None
    tc.forward_backward(BATCH)
    tc.optim_step().result()
    assert tc.step == 2
    loaded = tc.load_state(saved.artifact_id)
    assert (loaded.step, loaded.metadata) == (1, saved.metadata)
    assert tc.step == 1


def test_a_result_that_is_here_may_be_used_like_a_future(tc):
    saved = tc.save_state("my name")
    assert saved.result() is saved
    assert saved.path == "tg://my name"
    assert tc.sample("a").result(timeout=60).total_tokens == 1


def test_loading_what_is_not_there_fails_and_changes_nothing(tc):
    with pytest.raises(ResourceNotFoundError):
        tc.load_state("ckpt_77")
    assert tc.step == 0


def test_metadata_that_is_not_json_is_refused(tc):
    with pytest.raises(InvalidRequestError) as caught:
        tc.save_state(metadata={"x": object()})
    assert caught.value.field == "metadata"


def test_the_twins_for_coroutines_give_the_same(tc):
    async def main():
        await (await tc.forward_backward_async(BATCH))
        step = await (await tc.optim_step_async())
        sampled, saved = await asyncio.gather(tc.sample_async(["a", "b"], top_k=1), tc.save_state_async())
        loaded = await tc.load_state_async(saved.artifact_id)
        return step, sampled, loaded, await tc.get_info_async()

    step, sampled, loaded, info = asyncio.run(main())
    assert (step.step, len(sampled.samples), loaded.step, info.step) == (1, 2, 1, 1)


def test_the_event_loop_stays_free_while_a_coroutine_waits(tc, server):
    server.gate.clear()

    async def main():
        waiting = asyncio.ensure_future(tc.sample_async("a"))
        ticks = 0
        for _ in range(10):
            await asyncio.sleep(0.01)
            ticks += 1
        server.gate.set()
        return ticks, await waiting

    ticks, result = asyncio.run(main())
    assert ticks == 10
    assert result.total_tokens == 1


def test_text_becomes_tokens_and_text_again(tc, server):
    assert tc.encode("hé") == list("hé".encode())
    assert tc.decode(tc.encode("hé")) == "hé"
    assert tc.decode_batch(tc.encode_batch(["a", "bc"])) == ["a", "bc"]
    assert tc.decode(np.array([104, 105])) == "hi"


def test_status_and_info_come_from_the_server(tc):
    assert tc.status == "active"
    info = tc.get_info()
    assert (info.run_id, info.base_dtype, info.trainable_parameters) == (tc.id, "float32", 1)
    tc.unload_model()
    assert tc.status == "completed"
    assert tc.config.model_ref == "sum"


def test_the_budget_is_asked_for_anew(private):
    privacy = private.privacy
    assert (privacy.total_epsilon, privacy.delta, privacy.ledger_head) == (1.0, 1e-5, "ab")
    assert privacy.epsilon_after(3) == 4.0
    assert privacy.steps_remaining() == 7
    with pytest.raises(InvalidRequestError) as caught:
        privacy.epsilon_after(-1)
    assert caught.value.field == "steps"


def test_without_a_finite_target_steps_remain_for_ever(service, private):
    other = service.create_training_client(private.config)
    assert other.privacy.steps_remaining() == math.inf


def test_a_run_without_privacy_has_no_budget_to_look_at(tc):
    with pytest.raises(InvalidRequestError, match="dp_config"):
        _ = tc.privacy


def test_leaving_the_context_closes_the_handle(server):
    with ServiceClient() as service, service.create_training_client(TrainingConfig(model_ref="sum")) as tc:
        future = tc.forward_backward(BATCH)
    with pytest.raises(InvalidRequestError, match="closed"):
        tc.optim_step()
    assert server.seen("ForwardBackward")
    assert future.id == f"{tc.id}.1"


def test_updates_leave_as_bytes_and_their_units_as_keyed_hashes(tc, server):
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    future = tc.add_updates(vectors, ["north", "south"])
    vectors += 1  # may be reused as soon as the call returns
    assert isinstance(future.result(), ForwardBackwardResult)
    (request,) = server.seen("AddUpdates")
    assert request.vectors.data == np.arange(6, dtype="<f4").tobytes()
    assert list(request.vectors.shape) == [2, 3]
    expected = hmac.new(b"k" * 32, b"tg-tinker/unit/v1\x00north", hashlib.sha256).hexdigest()
    assert request.privacy_unit_ids[0] == expected
    assert b"north" not in request.SerializeToString()


@pytest.mark.parametrize(
    ("vectors", "units", "field"),
    [
        (np.zeros((1, 2)), ["a"], "vectors"),
        ([[0.0]], ["a"], "vectors"),
        (np.zeros(2, np.float32), ["a", "b"], "vectors"),
        (np.zeros((2, 2), np.float32), ["a"], "privacy_unit_ids"),
        (np.zeros((2, 2), np.float32), "ab", "privacy_unit_ids"),
        (np.zeros((1, 2), np.float32), [""], "privacy_unit_ids"),
    ],
)
def test_updates_that_cannot_be_are_refused_here_and_cost_no_number(tc, server, vectors, units, field):
    with pytest.raises(InvalidRequestError) as caught:
        tc.add_updates(vectors, units)
    assert caught.value.field == field
    assert server.seen("AddUpdates") == []
    assert tc.forward_backward(BATCH).id.endswith(".1")


def test_updates_in_eval_mode_are_refused(tc):
    tc.eval()
    with pytest.raises(InvalidRequestError, match=r"train\(\)"):
        tc.add_updates(np.zeros((1, 2), np.float32), ["a"])
