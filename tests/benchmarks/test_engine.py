import json
from dataclasses import replace

import click
import numpy as np
import pytest

from benchmarks.engine import Settings, chosen_shapes, measure
from benchmarks.engine_peers import BASE, CONTENDERS, build
from benchmarks.engine_peers.agreement import TOLERANCE, disagreement, reference
from benchmarks.engine_peers.contender import Recipe
from benchmarks.engine_peers.memory import step_bytes
from benchmarks.engine_peers.results import memory_chart, show, time_chart
from benchmarks.engine_peers.shapes import SHAPES, Shape, lengths, make_batches
from benchmarks.report import write_json

TINY = Shape(name="tiny", hidden=64, layers=1, vocabulary=64, rank=2, records=4, tokens=12)
PRESENT = [name for name, entry in CONTENDERS.items() if not entry.missing]


def test_half_of_a_padded_batch_is_padding():
    shape = replace(SHAPES["A"], padded=True)
    (batch,) = make_batches(shape, shape.vocabulary)
    assert batch.attention_mask.mean() == pytest.approx(0.5, abs=0.01)
    assert batch.attention_mask[0].all(), "one record is as long as the batch"
    assert ((batch.labels == -100) == (batch.attention_mask == 0)).all()


def test_too_few_records_cannot_be_half_padding():
    with pytest.raises(ValueError, match="at least 3"):
        lengths(replace(TINY, records=2, padded=True))


def test_every_micro_batch_holds_other_records():
    first, second = make_batches(replace(TINY, micro_batches=2), 64)
    assert not np.array_equal(first.input_ids, second.input_ids)


def test_the_command_line_changes_what_it_names():
    (shape,) = chosen_shapes("A", quick=False, changes={"rank": 64, "tokens": None, "padded": False})
    assert (shape.rank, shape.tokens, shape.name) == (64, 128, "A rank=64")


def test_an_unknown_shape_is_refused_by_naming_those_that_exist():
    with pytest.raises(click.BadParameter, match="known: A, B, C, D"):
        chosen_shapes("Z", quick=False, changes={})


@pytest.mark.parametrize("name", PRESENT)
@pytest.mark.parametrize("shape", [TINY, replace(TINY, padded=True, micro_batches=2)], ids=["even", "padded-twice"])
def test_every_contender_takes_the_step_of_a_loop_over_single_records(name, shape):
    if name == BASE and shape.padded:
        pytest.skip("its loss weighs records by their length")
    recipe = Recipe(optimizer="sgd", learning_rate=1.0, noise_multiplier=0.0)
    expected = reference(shape, recipe)
    bound = expected.median_norm if CONTENDERS[name].private else None
    contender = build(name, shape, replace(recipe, max_grad_norm=expected.median_norm))
    assert disagreement(contender, expected, max_grad_norm=bound) < TOLERANCE


def test_a_contender_that_does_not_clip_is_found_out():
    recipe = Recipe(optimizer="sgd", learning_rate=1.0, noise_multiplier=0.0)
    expected = reference(TINY, recipe)
    unclipped = build("hooks", TINY, replace(recipe, max_grad_norm=1e6))
    assert disagreement(unclipped, expected, max_grad_norm=0.5 * expected.median_norm) > TOLERANCE


def test_a_run_measures_prints_keeps_and_draws(tmp_path, capsys):
    result = measure(TINY, Settings(contenders=(BASE, "ours-plain", "ours", "hooks"), rounds=1, memory=False))
    assert set(result.rows) == {BASE, "ours-plain", "ours", "hooks"}
    assert result.rows[BASE].cpu_ratio.median == 1.0
    assert all(row.cpu_s > 0 and row.wall_s > 0 for row in result.rows.values())
    show(result)
    assert "TG-Tinker, private" in capsys.readouterr().out
    write_json(tmp_path / "engine.json", {"shapes": [result]})
    assert json.loads((tmp_path / "engine.json").read_text())["shapes"][0]["rows"]["ours"]["samples"]["cpu_s"]
    assert time_chart([result], where="here").startswith("<svg")
    assert memory_chart([result], where="here") is None


def test_step_memory_is_measured_in_a_process_of_its_own():
    measured = step_bytes("hooks", TINY, Recipe())
    assert measured is None or measured >= 0
