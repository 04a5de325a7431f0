"""Text: completions, their ends, and what company changes."""

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tests.server.engine.sampling.texts import PROMPTS, Certain, Texts, collect
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import LoRAConfig, TrainingConfig
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.sampling.bigram_rows import BigramRows
from tg_tinker_server.engine.sampling.text_query import text_queries
from tg_tinker_server.engine.sampling.token_sampler import BatchedSampler
from tg_tinker_server.engine.torch_backend import TorchBackend


def test_a_batch_of_prompts_gives_what_each_gives_alone(bench):
    session = bench.open()
    together = collect(session, PROMPTS, max_tokens=12, temperature=0.0)
    alone = [collect(session, [p], max_tokens=12, temperature=0.0)[0] for p in PROMPTS]
    assert together == alone


@pytest.mark.parametrize("model", ["gpt2", "opt", "qwen"])
def test_left_padding_is_right_in_other_families(torch_bench, model):
    targets = {"gpt2": ["c_attn"]}.get(model, ["q_proj"])
    session = torch_bench.open(model_ref=model, lora={"target_modules": targets})
    together = collect(session, PROMPTS, max_tokens=12, temperature=0.0)
    assert together == [collect(session, [p], max_tokens=12, temperature=0.0)[0] for p in PROMPTS]


def test_left_padding_is_right_with_a_sliding_window(tools):
    def build():
        return MistralForCausalLM(
            MistralConfig(
                vocab_size=260,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                sliding_window=6,
                initializer_range=0.2,
            )
        )

    backend = TorchBackend({"m": tools.seeded(build)})
    session = backend.open(run_id="r", config=TrainingConfig(model_ref="m", lora_config=LoRAConfig(rank=2)))
    together = collect(session, PROMPTS, max_tokens=12, temperature=0.0)
    assert together == [collect(session, [p], max_tokens=12, temperature=0.0)[0] for p in PROMPTS]


def test_the_cache_changes_nothing(torch_bench):
    session = torch_bench.open()
    (tokens, _, _) = collect(session, [PROMPTS[1]], max_tokens=10, temperature=0.0)[0]
    context = list(PROMPTS[1])
    for token in tokens:
        with torch.no_grad(), session.base.computing(session.adapter):
            logits = session.lm.logits(torch.tensor([context]))
        assert int(logits[0, -1].argmax()) == token
        context.append(token)


def test_a_slice_adds_one_token_to_a_completion_and_to_one_that_begins_two(bench):
    texts = Texts(bench.open())
    texts.ask(PROMPTS, max_tokens=10, seed=1)
    begun = False
    while not texts.sampler.idle:
        news = texts.step()
        assert all(len(e.tokens) <= 1 for e in news)
        most = max((sum(e.index == i for e in news) for i in range(3)), default=0)
        assert most <= (1 if begun else 2)
        begun = begun or bool(news)


def test_a_seed_repeats_and_another_does_not(bench):
    session = bench.open()
    one, again, other = (collect(session, PROMPTS, max_tokens=12, seed=s) for s in (1, 1, 2))
    assert one == again != other


def test_without_a_seed_samples_differ(bench):
    session = bench.open()
    assert collect(session, PROMPTS, max_tokens=12) != collect(session, PROMPTS, max_tokens=12)


def test_repeated_prompts_draw_from_streams_of_their_own(bench):
    completions = collect(bench.open(), [PROMPTS[0]] * 4, max_tokens=12, seed=3)
    assert len({tokens for tokens, _, _ in completions}) == 4


def test_completions_of_a_prompt_are_those_of_the_prompt_repeated(bench):
    session = bench.open()
    repeated = collect(session, [p for p in PROMPTS for _ in range(3)], max_tokens=12, seed=3)
    assert collect(session, PROMPTS, completions=3, max_tokens=12, seed=3) == repeated


def test_sampling_leaves_the_global_generators_alone(bench):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    collect(bench.open(), PROMPTS, max_tokens=5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_max_tokens_ends_with_length(bench):
    for tokens, _, reason in collect(bench.open(), PROMPTS, max_tokens=3, seed=1):
        assert len(tokens) <= 3
        assert reason == ("length" if len(tokens) == 3 else "eos")


def test_the_end_token_ends_with_eos_and_is_not_counted():
    assert collect(Certain("hé!"), [[1]], temperature=0.0) == [(tuple("hé!".encode()), "hé!", "eos")]


def test_a_stop_sequence_ends_with_stop_and_is_not_shown():
    found = collect(Certain("abcdef"), [[1]], temperature=0.0, stop_sequences=("cd",))
    assert found == [(tuple(b"abcd"), "ab", "stop")]


def test_a_stop_at_the_first_character_leaves_an_empty_completion():
    assert collect(Certain("abc"), [[1]], temperature=0.0, stop_sequences=("a",)) == [((97,), "", "stop")]


def test_a_stop_that_is_not_completed_is_shown_at_the_end():
    found = collect(Certain("abcdef"), [[1]], temperature=0.0, max_tokens=3, stop_sequences=("cdx",))
    assert found == [(tuple(b"abc"), "abc", "length")]


def test_a_stop_that_the_end_token_cuts_off_is_shown():
    found = collect(Certain("abc"), [[1]], temperature=0.0, stop_sequences=("cd",))
    assert found == [(tuple(b"abc"), "abc", "eos")]


@pytest.mark.parametrize("stop", ["x" * 5000, "c" + "x" * 9998])
def test_a_stop_may_be_as_long_as_the_options_allow(stop):
    assert collect(Certain("abc"), [[1]], temperature=0.0, stop_sequences=(stop,))[0][1:] == ("abc", "eos")


def test_no_piece_holds_half_a_character():
    texts = Texts(Certain("a€b😀c"))
    texts.ask([[1]], temperature=0.0)
    pieces = []
    while not texts.sampler.idle:
        pieces += [e.text for e in texts.step()]
    assert pieces == ["a", "", "", "€", "b", "", "", "", "😀", "c", ""]


def test_sequences_that_end_early_make_room_and_the_others_go_on():
    results = collect(Certain("abcdefgh"), [[ord("g")], [ord("a")], [ord("e")]], temperature=0.0)
    assert [r[1] for r in results] == ["h", "bcdefgh", "fgh"]


def test_penalties_are_of_each_completion_alone(bench):
    session = bench.open()
    options = {"max_tokens": 12, "temperature": 0.0, "frequency_penalty": 1e9, "repetition_penalty": 1.3}
    together = collect(session, PROMPTS, **options)
    assert all(len(set(tokens)) == len(tokens) for tokens, _, _ in together)
    assert together == [collect(session, [p], **options)[0] for p in PROMPTS]


def test_rows_are_dropped_from_a_real_cache_without_touching_the_others(torch_bench):
    session = torch_bench.open()
    free = collect(session, PROMPTS, max_tokens=12, temperature=0.0)
    # A character that one completion reaches early and others not at all stops that one.
    stops = sorted(set(free[0][1][:4]) - set(free[1][1]) - set(free[2][1]) - {""})
    assert stops, "the model's completions differ"
    stopped = collect(session, PROMPTS, max_tokens=12, temperature=0.0, stop_sequences=(stops[0],))
    assert stopped[0][2] == "stop"
    assert stopped[1:] == free[1:]


def test_more_prompts_than_rows_take_turns(tools):
    results = []
    for rows in (2, 64):
        backend = TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig(generation_rows=rows))
        session = backend.open(run_id="r", config=TrainingConfig(model_ref="tiny", lora_config=LoRAConfig(rank=2)))
        results.append(collect(session, PROMPTS * 2, sampler=backend.token_sampler(), max_tokens=6, seed=1))
    assert results[0] == results[1]


def test_no_slice_reads_more_prompt_tokens_than_the_limit():
    read = []

    class Noting(BigramRows):
        def read(self, readings):
            read.append([len(r.tokens) for r in readings])
            return super().read(readings)

    sampler = BatchedSampler(Noting(), most_rows=64, prefix_bytes=0, prefill_tokens=512)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, n).tolist() for n in (*[120] * 9, 3000, *[3] * 80)]
    collect(Certain("abc"), prompts, sampler=sampler, max_tokens=2, seed=1)
    assert max(len(sizes) * max(sizes) for sizes in read) <= 512
    assert sum(map(sum, read)) == sum(map(len, prompts))
    assert max(map(len, read)) == 64


def test_generation_ends_where_the_model_ends(torch_bench):
    (result,) = collect(torch_bench.open(max_sequence_length=8), [[1] * 60], max_tokens=100, temperature=0.0)
    assert len(result[0]) <= 4
    assert result[2] in ("length", "eos")


@pytest.mark.parametrize(
    ("prompts", "match"), [([], "no prompt"), ([[260]], "outside"), ([[-1]], "outside"), ([[1] * 5000], "no room")]
)
def test_impossible_prompts_are_refused(bench, prompts, match):
    with pytest.raises(InvalidRequestError, match=match) as e:
        text_queries(bench.open().live_weights(), prompts, GenerationOptions())
    assert e.value.field == "prompts"


def test_an_empty_prompt_begins_with_the_start_token(bench):
    session = bench.open()
    assert collect(session, [[]], max_tokens=5, seed=1) == collect(session, [[256]], max_tokens=5, seed=1)
