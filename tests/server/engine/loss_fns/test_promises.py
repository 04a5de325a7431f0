"""What every backend promises of datums."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import BatchData
from tg_tinker.types.losses import CUSTOM, LOSSES, Loss
from tg_tinker_server.dp.mechanism import ROUNDING_ROOM
from tg_tinker_server.engine.backend import EngineState, LossRequest, StepRequest
from tg_tinker_server.engine.bigram import BigramBackend
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.tokenizers import ByteTokenizer
from tg_tinker_server.engine.torch_backend import TorchBackend

NAMES = [*LOSSES, CUSTOM]
BOUND = 0.05
DP = {"max_grad_norm": BOUND}
BAD = [np.nan, np.inf, -np.inf, 1e30, -1e30]


def without(asked, unit):
    keep = [i for i, u in enumerate(asked.units) if u != unit]
    return dataclasses.replace(
        asked,
        tokens=tuple(asked.tokens[i] for i in keep),
        inputs=tuple(asked.inputs[i] for i in keep),
        units=tuple(asked.units[i] for i in keep),
    )


def with_bad_values(asked, seed):
    """In every second datum one input is spoilt at one place."""
    rng = np.random.default_rng(seed)
    for given in asked.inputs[::2]:
        name = rng.choice([k for k, v in given.items() if v.dtype == np.float32])
        given[name][rng.integers(len(given[name]))] = rng.choice(BAD)
    return asked


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_removing_any_unit_moves_the_clipped_sum_by_no_more_than_the_bound(bench, data, name, seed):
    session = bench.open(dp=DP)
    asked = data.request(name, units=tuple("abacba"))
    if seed is not None:
        asked = with_bad_values(asked, seed)
    contribution = session.forward_backward(asked).contribution
    assert np.isfinite(contribution.sum_P).all()
    for unit in "abc":
        rest = session.forward_backward(without(asked, unit)).contribution.sum_P
        assert np.linalg.norm(contribution.sum_P - rest) <= BOUND * (1 + ROUNDING_ROOM)


@pytest.mark.parametrize("name", NAMES)
def test_a_unit_in_several_calls_is_clipped_once(bench, data, name):
    session = bench.open(dp=DP | {"merge_units": True}, batch_size=1)

    def released(*parts):
        session.discard_pending()
        for asked in parts:
            session.accumulate(session.forward_backward(asked).contribution)
        return session._pending.release(StepRequest(learning_rate=0.1)).grad_P

    first = data.request(name, (3, 4, 5), units=tuple("abc"))
    second = data.request(name, (4, 6, 2), units=tuple("aab"), of=5)
    both = released(first, second)
    in_one = dataclasses.replace(
        first,
        tokens=first.tokens + second.tokens,
        inputs=first.inputs + second.inputs,
        units=first.units + second.units,
    )
    np.testing.assert_allclose(both, released(in_one), atol=1e-6)
    for unit in "abc":
        rest = released(without(first, unit), without(second, unit))
        assert np.linalg.norm((both - rest).astype(np.float64)) <= BOUND * (1 + ROUNDING_ROOM)


def test_a_unit_in_two_calls_is_refused_unless_units_are_merged(bench, data):
    session = bench.open(dp=DP)
    session.accumulate(session.forward_backward(data.request("dro", units=tuple("abcdef"))).contribution)
    with pytest.raises(InvalidRequestError, match="merge_units"):
        session.accumulate(session.forward_backward(data.request("dro", of=1, units=tuple("fghijk"))).contribution)


def test_a_unit_without_an_id_is_known_by_its_tokens_alone(bench, data):
    session = bench.open(dp=DP)
    first, second = data.request("dro"), data.request("cross_entropy")
    for given in second.inputs:
        given["target_tokens"][:] = 7
    session.accumulate(session.forward_backward(first).contribution)
    with pytest.raises(InvalidRequestError, match="privacy_unit_ids"):
        session.accumulate(session.forward_backward(second).contribution)
    assert len(session.pending_units) == len(data.lengths)


@pytest.mark.parametrize("name", NAMES)
def test_a_unit_that_is_not_finite_adds_zero_and_is_counted(bench, data, name):
    session = bench.open(dp=DP)
    asked = data.request(name, (4, 4, 4), units=tuple("abc"))
    clean = session.forward_backward(without(asked, "b")).contribution.sum_P
    for key in ("weights", "advantages"):
        if key in asked.inputs[1]:
            asked.inputs[1][key][:] = np.nan
    session.accumulate(session.forward_backward(asked).contribution)
    np.testing.assert_allclose(session._pending._sum_P, clean, atol=1e-6 * BOUND)
    result = session.step(StepRequest(learning_rate=0.1))
    assert result.nonfinite_units == 1


@pytest.mark.parametrize("name", NAMES)
def test_without_privacy_what_is_not_finite_is_refused(bench, data, name):
    session = bench.open()
    asked = data.request(name)
    for given in asked.inputs:
        given["weights" if name == "cross_entropy" else "advantages"][:] = np.nan
    with pytest.raises(InvalidRequestError, match="not finite"):
        session.forward_backward(asked)
    assert session.pending_calls == 0


def test_without_privacy_the_step_is_by_the_plain_sum_over_datums_of_all_calls(bench, data):
    session = bench.open(optimizer={"name": "sgd", "momentum": 0.0}, batch_size=100)
    each = [session.forward_backward(data.request("ppo", index=[i])).contribution.sum_P for i in range(6)]
    before = session.export_state(optimizer=False).tensors
    for index in ([0, 1], [2], [3, 4, 5]):
        session.accumulate(session.forward_backward(data.request("ppo", index=index)).contribution)
    session.step(StepRequest(learning_rate=0.5))
    after = session.export_state(optimizer=False).tensors
    moved = np.concatenate([(after[k] - before[k]).ravel() for k in sorted(after)])
    np.testing.assert_allclose(moved, -0.5 * np.sum(each, axis=0), rtol=1e-3, atol=1e-6)


def test_the_digest_is_of_the_gradient_of_the_sum(bench, data):
    session = bench.open()
    contribution = session.forward_backward(data.request("ppo")).contribution
    assert contribution.digest() == contribution.layout.digest(contribution.sum_P)


@pytest.mark.parametrize("dp", [None, DP])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_logical_batch_is_of_batches_or_of_datums(bench, tools, data, dp, batch_first):
    session = bench.open(dp=dp)
    parts = [tools.run_pass(session, tools.batch(2)), session.forward_backward(data.request("ppo"))]
    first, second = parts if batch_first else reversed(parts)
    session.accumulate(first.contribution)
    with pytest.raises(InvalidRequestError, match="optim_step in between"):
        session.accumulate(second.contribution)
    assert session.pending_calls == 1
    session.step(StepRequest(learning_rate=0.1))
    session.accumulate(second.contribution)


def test_a_datum_weighted_by_one_over_its_targets_is_a_record_of_a_batch(bench, tools):
    session = bench.open(optimizer={"name": "sgd"})
    batch = tools.batch(3, 8)
    records = session.forward_backward(_request_of(batch))
    expected = tools.run_pass(session, batch)
    assert records.loss == pytest.approx(3 * expected.loss, rel=1e-5)
    np.testing.assert_allclose(records.contribution.sum_P, expected.contribution.sum_P, atol=1e-6)


def _request_of(batch: BatchData) -> LossRequest:
    return LossRequest(
        tokens=tuple(ids[:-1] for ids in batch.input_ids),
        inputs=tuple(
            {"target_tokens": ids[1:], "weights": np.full(len(ids) - 1, 1 / (len(ids) - 1), dtype=np.float32)}
            for ids in batch.input_ids
        ),
        loss=Loss.of("cross_entropy"),
    )


def test_evaluation_gives_log_probabilities_and_no_contribution(bench, data):
    session = bench.open(lora={"dropout": 0.4})
    first, second = (session.forward_backward(data.request("gspo", train=False, seed=s)) for s in (1, 2))
    assert first.contribution is None
    assert [lp.tolist() for lp in first.logprobs] == [lp.tolist() for lp in second.logprobs]
    assert [lp.shape for lp in first.logprobs] == [(n,) for n in data.lengths]


@pytest.mark.parametrize("dp", [None, DP])
def test_dropout_follows_the_seed_of_the_request(bench, data, dp):
    session = bench.open(lora={"dropout": 0.4}, dp=dp)
    digests = [session.forward_backward(data.request("ppo", seed=s)).contribution.digest() for s in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_no_datum_is_refused_unless_poisson_sampling_may_draw_none(bench):
    nothing = LossRequest(tokens=(), inputs=(), loss=Loss.of("cross_entropy"))
    with pytest.raises(InvalidRequestError, match="no datum"):
        bench.open().forward_backward(nothing)
    with pytest.raises(InvalidRequestError, match="no datum"):
        bench.open(dp=DP).check(nothing)
    session = bench.open(dp=DP | {"sampling": "poisson", "dataset_size": 100})
    found = session.forward_backward(nothing)
    assert (found.loss, found.logprobs, found.num_records, found.metrics) == (0.0, (), 0, {})
    session.accumulate(found.contribution)
    assert session.step(StepRequest(learning_rate=0.1)).grad_norm == 0.0


def changed(asked, datum, **inputs):
    given = list(asked.inputs)
    given[datum] = {k: v for k, v in (given[datum] | inputs).items() if v is not None}
    return dataclasses.replace(asked, inputs=tuple(given))


def of_tokens(asked, tokens):
    return dataclasses.replace(asked, tokens=(tokens, *asked.tokens[1:]))


LOW = np.full(5, 1.3, np.float32)
REFUSED = {
    "a token outside": (lambda d: of_tokens(d, np.array([1, 2, 3, 4, 260])), "data.model_input", "260"),
    "no token": (lambda d: of_tokens(d, np.zeros(0, int)), "data.model_input", "no token"),
    "too long": (lambda d: of_tokens(d, np.zeros(65, int)), "data.model_input", "65"),
    "tokens of floats": (lambda d: of_tokens(d, np.ones(5)), "data.model_input", "float64"),
    "a target outside": (lambda d: changed(d, 1, target_tokens=np.array([-100])), "target_tokens", "outside"),
    "targets of another length": (
        lambda d: changed(d, 0, target_tokens=np.ones(4, int)),
        "target_tokens",
        "5 tokens",
    ),
    "alternatives": (lambda d: changed(d, 0, target_tokens=np.ones((5, 2), int)), "target_tokens", r"\[N\]"),
    "no advantages": (lambda d: changed(d, 2, advantages=None), "advantages", "datum 2"),
    "another shape": (lambda d: changed(d, 0, advantages=np.ones(4, np.float32)), "advantages", "shape"),
    "thresholds that cross": (lambda d: changed(d, 0, clip_low_threshold=LOW), "clip_low_threshold", "datum 0"),
    "too few units": (lambda d: dataclasses.replace(d, units=("a",)), "privacy_unit_ids", "1 privacy"),
    "a graph of another loss": (lambda d: dataclasses.replace(d, graph="{}"), "loss_fn", "custom"),
    "too few inputs": (lambda d: dataclasses.replace(d, inputs=d.inputs[1:]), "data", "6 datums"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_by_name(bench, data, what):
    change, field, words = REFUSED[what]
    session = bench.open()
    asked = change(data.request("ppo"))
    for call in (session.check, session.start, session.forward_backward):
        with pytest.raises(InvalidRequestError, match=words) as e:
            call(asked)
        assert e.value.field in (field, f"loss_fn_inputs.{field}")


def test_both_backends_agree_on_the_same_bigram(data, tools):
    """The table of the NumPy model as the embedding of a torch model whose logits are looked up."""

    class Table(nn.Module):
        def __init__(self, values):
            super().__init__()
            self.config = SimpleNamespace(model_type="table")
            self.table = nn.Embedding.from_pretrained(torch.from_numpy(values).float(), freeze=False)

        def get_input_embeddings(self):
            return self.table

        def get_output_embeddings(self):
            return None

        def forward(self, input_ids, attention_mask=None, use_cache=False):
            return SimpleNamespace(logits=self.table(input_ids))

    bigram = BigramBackend()
    models = {"tiny": lambda: (Table(bigram._base_VV.copy()), ByteTokenizer())}
    other = TorchBackend(models, PerformanceConfig(micro_batch_tokens=40))
    numpy_session = bigram.open(run_id="a", config=tools.config(model_ref="bigram"))
    torch_session = other.open(run_id="b", config=tools.config(lora_config=None))
    state = numpy_session.export_state(optimizer=False)
    weights = np.random.default_rng(2).normal(0, 0.3, (260, 260)).astype(np.float32)
    numpy_session.import_state(
        EngineState(tensors=dict.fromkeys(state.tensors, weights), scalars=state.scalars), optimizer=False
    )
    held = torch_session.export_state(optimizer=False)
    torch_session.import_state(
        EngineState(
            tensors=dict.fromkeys(held.tensors, (bigram._base_VV + weights).astype(np.float32)), scalars=held.scalars
        ),
        optimizer=False,
    )
    for name in NAMES:
        found, expected = (s.forward_backward(data.request(name)) for s in (torch_session, numpy_session))
        assert found.loss == pytest.approx(expected.loss, rel=1e-5), name
        np.testing.assert_allclose(found.contribution.sum_P, expected.contribution.sum_P, atol=1e-5)
