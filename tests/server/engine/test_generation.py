import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker_server.engine.backend import StepRequest
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.torch_backend import TorchBackend

PROMPTS = [[5, 6, 7], list(b"a longer prompt"), [200]]


def collect(session, prompts, *, slice_tokens=4, **params):
    """Tokens, text and finish reason of each completion."""
    out = [[(), "", None] for _ in prompts]
    for events in session.generate(prompts, GenerationOptions(**params), slice_tokens=slice_tokens):
        for event in events:
            assert out[event.index][2] is None, "an event after the end"
            out[event.index][0] += event.token_ids
            out[event.index][1] += event.text
            out[event.index][2] = event.finish_reason
    return [tuple(o) for o in out]


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

    from tg_tinker.types import LoRAConfig, TrainingConfig

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


@pytest.mark.parametrize("slice_tokens", [1, 3, 100])
def test_slices_change_nothing_and_hold_at_most_so_many_tokens(bench, slice_tokens):
    session = bench.open()
    expected = collect(session, PROMPTS, max_tokens=10, seed=1)
    assert collect(session, PROMPTS, max_tokens=10, seed=1, slice_tokens=slice_tokens) == expected
    events = list(session.generate(PROMPTS, GenerationOptions(max_tokens=10, seed=1), slice_tokens=slice_tokens))
    assert max(len(e.token_ids) for es in events for e in es) <= slice_tokens


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


def favour(session, logits_of):
    """Make a session's next token certain, by the token before."""

    class Certain:
        def start(self, prompts):
            return np.stack([logits_of(p[-1]) for p in prompts])

        def advance(self, tokens, keep):
            return np.stack([logits_of(t) for t in tokens])

    session._decoder = Certain


def spelled(text, eos=257):
    """After each byte of the text comes the next, after the last the end."""
    tokens = [*text.encode(), eos]

    def logits_of(token):
        logits = np.zeros(260)
        logits[tokens[tokens.index(token) + 1] if token in tokens[:-1] else tokens[0]] = 100.0
        return logits

    return logits_of


def test_the_end_token_ends_with_eos_and_is_not_counted(bench):
    session = bench.open()
    favour(session, spelled("hé!"))
    assert collect(session, [[1]], temperature=0.0) == [(tuple("hé!".encode()), "hé!", "eos")]


def test_a_stop_sequence_ends_with_stop_and_is_not_shown(bench):
    session = bench.open()
    favour(session, spelled("abcdef"))
    assert collect(session, [[1]], temperature=0.0, stop_sequences=("cd",)) == [(tuple(b"abcd"), "ab", "stop")]


def test_a_stop_at_the_first_character_leaves_an_empty_completion(bench):
    session = bench.open()
    favour(session, spelled("abc"))
    assert collect(session, [[1]], temperature=0.0, stop_sequences=("a",)) == [((97,), "", "stop")]


def test_a_stop_that_is_not_completed_is_shown_at_the_end(bench):
    session = bench.open()
    favour(session, spelled("abcdef"))
    (result,) = collect(session, [[1]], temperature=0.0, max_tokens=3, stop_sequences=("cdx",))
    assert result == (tuple(b"abc"), "abc", "length")


def test_no_piece_holds_half_a_character(bench):
    session = bench.open()
    favour(session, spelled("a€b😀c"))
    events = list(session.generate([[1]], GenerationOptions(temperature=0.0), slice_tokens=1))
    assert [e.text for es in events for e in es] == ["a", "", "", "€", "b", "", "", "", "😀", "c", ""]


def test_sequences_that_end_early_make_room_and_the_others_go_on(bench):
    session = bench.open()
    favour(session, spelled("abcdefgh"))
    results = collect(session, [[ord("g")], [ord("a")], [ord("e")]], temperature=0.0, slice_tokens=2)
    assert [r[1] for r in results] == ["h", "bcdefgh", "fgh"]


def test_rows_are_dropped_from_a_real_cache_without_touching_the_others(torch_bench):
    session = torch_bench.open()
    free = collect(session, PROMPTS, max_tokens=12, temperature=0.0)
    # A character that one completion reaches early and others not at all stops that one.
    stops = sorted(set(free[0][1][:4]) - set(free[1][1]) - set(free[2][1]) - {""})
    assert stops, "the model's completions differ"
    stopped = collect(session, PROMPTS, max_tokens=12, temperature=0.0, stop_sequences=(stops[0],))
    assert stopped[0][2] == "stop"
    assert stopped[1:] == free[1:]


def test_more_prompts_than_rows_are_generated_in_groups(tools):
    from tg_tinker.types import LoRAConfig, TrainingConfig

    results = []
    for rows in (2, 64):
        backend = TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig(generation_rows=rows))
        session = backend.open(run_id="r", config=TrainingConfig(model_ref="tiny", lora_config=LoRAConfig(rank=2)))
        results.append(collect(session, PROMPTS * 2, max_tokens=6, seed=1))
    assert results[0] == results[1]


def test_no_turn_reads_more_prompt_tokens_than_the_limit_nor_generates_beside_it(bench):
    session, turn, turns = bench.open(), [], []

    class Noting:
        def start(self, prompts):
            turn.append((len(prompts), max(map(len, prompts))))
            return np.zeros((len(prompts), 260))

        def advance(self, tokens, keep):
            turn.append("advance")
            return np.zeros((len(keep), 260))

    session._decoder, session.model_positions = Noting, 4096
    prompts = [[1] * 479] * 9 + [[1] * 3000] + [[1] * 3] * 80
    for _ in session.generate(prompts, GenerationOptions(max_tokens=20, seed=1), slice_tokens=8):
        turns.append(tuple(turn))
        turn.clear()
    reading = [t for t in turns if set(t) != {"advance"}]
    assert reading == [((4, 479),), ((4, 479),), ((1, 479),), ((1, 3000),), ((64, 3),), ((16, 3),)]
    assert max(len(t) for t in turns) == 8


def test_generation_ends_where_the_model_ends(torch_bench):
    (result,) = collect(torch_bench.open(max_sequence_length=8), [[1] * 60], max_tokens=100, temperature=0.0)
    assert len(result[0]) <= 4
    assert result[2] in ("length", "eos")


@pytest.mark.parametrize(
    ("prompts", "match"), [([], "no prompt"), ([[260]], "outside"), ([[-1]], "outside"), ([[1] * 5000], "no room")]
)
def test_impossible_prompts_are_refused_before_the_first_slice(bench, prompts, match):
    with pytest.raises(InvalidRequestError, match=match) as e:
        bench.open().generate(prompts, GenerationOptions(), slice_tokens=1)
    assert e.value.field == "prompts"


def test_an_empty_prompt_begins_with_the_start_token(bench):
    session = bench.open()
    assert collect(session, [[]], max_tokens=5, seed=1) == collect(session, [[256]], max_tokens=5, seed=1)


def test_other_sessions_may_train_between_slices(torch_bench, tools):
    session, other = (
        torch_bench.open(),
        torch_bench.open(dp={}, lora={"target_modules": "all-linear", "dropout": 0.3}),
    )
    expected = collect(session, PROMPTS, max_tokens=10, seed=1)
    out = [() for _ in PROMPTS]
    for events in session.generate(PROMPTS, GenerationOptions(max_tokens=10, seed=1), slice_tokens=1):
        for event in events:
            out[event.index] += event.token_ids
        assert torch.is_grad_enabled()
        tools.accumulate(other, tools.batch())
        other.step(StepRequest(learning_rate=0.1))
    assert out == [tokens for tokens, _, _ in expected]


def test_a_session_closed_between_slices_says_so(bench):
    session = bench.open()
    generation = session.generate(PROMPTS, GenerationOptions(max_tokens=10, seed=1), slice_tokens=1)
    next(generation)
    session.close()
    with pytest.raises(Exception, match="closed"):
        next(generation)
