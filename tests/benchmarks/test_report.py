import json

import pytest

from benchmarks.report import Ratio, machine, machine_slug, paired_ratio, paired_ratios, round_orders, write_json


def test_what_slows_a_whole_round_leaves_its_ratio_alone():
    quiet, busy = [1.0, 1.0, 1.0], [1.0, 5.0, 2.0]
    ours = [0.5 * slowdown for slowdown in busy]
    assert paired_ratio(ours, busy) == paired_ratio([0.5] * 3, quiet) == Ratio(median=0.5, low=0.5, high=0.5)


def test_one_round_is_its_own_median():
    assert paired_ratio([3.0], [2.0]) == Ratio(median=1.5, low=1.5, high=1.5)


def test_rounds_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0, 2.0], [1.0])


def test_the_base_is_one_times_itself():
    assert paired_ratios({"a": [2.0, 3.0], "b": [4.0, 3.0]}, "a")["a"].median == 1.0


def test_every_round_holds_every_contender_once_in_an_order_that_repeats():
    orders = list(round_orders("abcd", rounds=5))
    assert all(sorted(order) == list("abcd") for order in orders)
    assert orders == list(round_orders("abcd", rounds=5))
    assert len({tuple(order) for order in orders}) > 1


def test_the_machine_says_what_a_figure_needs():
    facts = machine()
    assert {"cpu", "cores", "threads", "torch", "date", "command"} <= set(facts)
    assert machine_slug(facts)


def test_a_machine_name_fits_a_file_name():
    facts = {"cpu": "Intel(R) Xeon(R) CPU E5-2686 v4 @ 2.30GHz", "cores": 8, "gpu": "NVIDIA H200"}
    assert machine_slug(facts) == "intel-xeon-e5-2686-v4-8-cores"
    assert machine_slug(facts, device="cuda") == "nvidia-h200"


def test_a_measurement_with_ratios_is_kept_as_json(tmp_path):
    write_json(tmp_path / "deep" / "x.json", {"ratio": Ratio(median=1.0, low=0.9, high=1.1)})
    assert json.loads((tmp_path / "deep" / "x.json").read_text())["ratio"]["median"] == 1.0
