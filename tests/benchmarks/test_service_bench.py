import itertools
import json
import math
from pathlib import Path

import click
import pytest

from benchmarks.service import TOPICS, chosen, keep
from benchmarks.service_parts.clients import Times, chart
from benchmarks.service_parts.epsilon import epsilon_cost
from benchmarks.service_parts.latency import probe
from benchmarks.service_parts.loops import BARE, extra_ms, interleave, table
from benchmarks.service_parts.sampling import tokens_before_end
from benchmarks.service_parts.server import Cost, ServerProcess
from benchmarks.service_parts.topic import Requirement, Topic, percentile, show
from benchmarks.service_parts.workload import TINY, tiny_models


def a_topic(**changes):
    return Topic(**{"title": "A topic", "columns": ("", "ms"), "rows": [("a", 1)], **changes})


def costs_of(*server_and_wall_s):
    return [Cost(server_cpu_s=server, own_cpu_s=0.01, wall_s=wall) for server, wall in server_and_wall_s]


def test_a_requirement_says_whether_it_is_met():
    assert Requirement(what="p95", measured=20.0, limit=20.0, unit="ms").met
    slow = Requirement(what="gain", measured=1.9, limit=2.0, unit="times", kind="at least")
    assert str(slow) == "gain: at least 2 times required, 1.9 measured: not met"
    assert not Requirement(what="p95", measured=math.nan, limit=20.0, unit="ms").met


def test_a_topic_prints_its_requirements_beside_its_figures(capsys):
    topic = a_topic(requirements=[Requirement(what="p95", measured=12.5, limit=20.0, unit="ms")])
    show(topic, core_share=1.0)
    printed = capsys.readouterr().out
    assert "BUSY" not in printed
    show(topic, core_share=0.5)
    assert "50% of a core; BUSY" in capsys.readouterr().out
    assert "A topic" in printed
    assert "p95: at most 20 ms required, 12.5 measured: met" in printed


def test_measuring_one_topic_keeps_the_others(tmp_path):
    path = tmp_path / "service.json"
    keep(path, "sampling", a_topic(figures={"rate": 1.0}), quick=False, core_share=1.0)
    keep(path, "cost", a_topic(), quick=True, core_share=1.0)
    keep(path, "cost", a_topic(figures={"extra": 2.0}), quick=False, core_share=0.5)
    kept = json.loads(path.read_text())["topics"]
    assert list(kept) == ["cost", "sampling"]
    assert kept["cost"]["core_share"] == 0.5
    assert kept["cost"]["figures"] == {"extra": 2.0}
    assert kept["sampling"]["machine"]["cores"]


def test_an_unknown_topic_is_refused_by_naming_those_that_exist():
    assert chosen("epsilon,cost") == ["epsilon", "cost"]
    assert chosen(None) == list(TOPICS)
    with pytest.raises(click.BadParameter, match="known: cost, latency"):
        chosen("speed")


def test_what_the_service_adds_is_the_median_of_the_rounds_own_differences():
    # A slow second round slows both, and does not count twice.
    costs = {
        "in pairs": costs_of((0.02, 0.03), (0.08, 0.3), (0.03, 0.06)),
        BARE: costs_of((0, 0.02), (0, 0.2), (0, 0.03)),
    }
    assert extra_ms(costs, "in pairs") == pytest.approx(20.0)
    assert [row[0] for row in table(costs)] == ["in pairs", BARE]
    assert table(costs)[0][5] == "1.500"


def test_a_probe_takes_its_calls_in_turn():
    asked = []
    taken = probe({"a": lambda: asked.append("a"), "b": lambda: asked.append("b")}, count=5, period_s=0.0)
    assert asked == list(itertools.islice(itertools.cycle("ab"), 5))
    assert {name: len(values) for name, values in taken.items()} == {"a": 3, "b": 2}


def test_percentiles_are_interpolated():
    assert percentile([float(i) for i in range(101)], 95) == pytest.approx(95.0)


def test_a_completion_ends_before_its_end_token():
    assert tokens_before_end([7, 7, 0, 7], eos=0) == 2
    assert tokens_before_end([7, 7], eos=0) == 2


def test_the_gain_of_clients_is_paired_and_drawn():
    times = Times(in_turn=[2.0, 20.0], together=[1.0, 10.0])
    assert times.gain.median == 2.0
    topic = a_topic(figures={"gains": {mode: {8: times.gain} for mode in ("tenant", "off")}})
    assert chart(topic, where="here").count("2.00") == 2


def test_epsilon_agrees_with_its_peer(tmp_path):
    topic = epsilon_cost(tmp_path, quick=True)
    agreement = next(r for r in topic.requirements if "difference" in r.what)
    assert agreement.met
    assert all(us > 0 for us in topic.figures["cpu_us"].values())


def test_a_server_of_its_own_is_measured_and_ended(tmp_path: Path):
    with ServerProcess(tmp_path, models=tiny_models(tmp_path / "model")) as server:
        costs = interleave(TINY, server, ("in pairs",), steps=3, rounds=2)
        assert server.cpu_s() > 0
    assert {name: len(taken) for name, taken in costs.items()} == {BARE: 2, "in pairs": 2}
    assert all(cost.wall_s > 0 for taken in costs.values() for cost in taken)
