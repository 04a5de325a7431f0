"""What the demo remembers between two calls."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.server.federated_demo.values import SMALL
from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.federated_demo.state import FILE_NAME, Arm, DemoRecord, Point, load_record, save_record


def record() -> DemoRecord:
    made = DemoRecord(settings=SMALL.to_json(), job_id="icd", expires="2030-01-01T00:00:00+00:00", in_process=True)
    made.put(Arm(name="north", run_id="run_1").at(Point(step=2, perplexity=300.5, epsilon=6.25)))
    made.site_epsilons = ({"north": 6.25, "south": 6.5},)
    return made


def test_a_record_is_read_back_as_it_was(tmp_path: Path) -> None:
    assert load_record(tmp_path, SMALL) is None
    save_record(tmp_path, record())
    assert load_record(tmp_path, SMALL) == record()


def test_an_arm_is_replaced_and_a_point_taken_again_stands_once() -> None:
    made = record()
    arm = made.arm("north").at(Point(step=4, perplexity=200.0, epsilon=8.0))
    made.put(arm.at(Point(step=2, perplexity=250.0, epsilon=7.0)))
    assert [(p.step, p.perplexity) for p in made.arm("north").points] == [(2, 250.0)]
    assert len(made.arms) == 1


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    save_record(tmp_path, record())
    with pytest.raises(InvalidRequestError, match=r"made with other settings.*--fresh"):
        load_record(tmp_path, dataclasses.replace(SMALL, target_epsilon=3.0))


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"settings": 3}'])
def test_a_damaged_record_is_refused_with_what_to_do(tmp_path: Path, damage: str) -> None:
    (tmp_path / FILE_NAME).write_text(damage)
    with pytest.raises(InvalidRequestError, match=r"cannot be read .*--fresh"):
        load_record(tmp_path, SMALL)
