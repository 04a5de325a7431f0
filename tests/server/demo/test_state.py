"""The demo's memory: what was written is read again, and a strange folder is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.server.demo.values import CHECKPOINT, step_point
from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.demo.settings import DemoSettings
from tg_tinker_server.demo.state import DemoRecord, Measured, load_record, put_aside, save_record

SETTINGS = DemoSettings()


def record() -> DemoRecord:
    return DemoRecord(
        settings=SETTINGS.to_json(),
        run_id="run_1",
        dataset_size=100,
        before=Measured(perplexity=400.0, samples=("a", "b")),
        history=[step_point(1), step_point(2)],
    )


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    unfinished = record()
    save_record(tmp_path, unfinished)
    assert load_record(tmp_path, SETTINGS) == unfinished
    assert not unfinished.finished
    finished = replace(unfinished, checkpoint=CHECKPOINT, after=unfinished.before)
    save_record(tmp_path, finished)
    assert load_record(tmp_path, SETTINGS) == finished
    assert finished.finished


def test_an_empty_folder_has_no_record(tmp_path: Path) -> None:
    assert load_record(tmp_path, SETTINGS) is None


def test_a_record_of_other_settings_is_refused(tmp_path: Path) -> None:
    save_record(tmp_path, record())
    with pytest.raises(InvalidRequestError, match="--fresh"):
        load_record(tmp_path, replace(SETTINGS, steps=7))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"settings": 1}', "not json"])
def test_an_unreadable_record_is_refused_and_names_the_way_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "demo.json").write_text(text)
    with pytest.raises(InvalidRequestError, match="--fresh"):
        load_record(tmp_path, SETTINGS)


def test_starting_over_keeps_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "ledger.jsonl").write_text("kept")
    aside = put_aside(folder)
    assert aside is not None
    assert not folder.exists()
    assert (aside / "ledger.jsonl").read_text() == "kept"
    assert put_aside(folder) is None
