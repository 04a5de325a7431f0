"""What a coordinator keeps: whole or not at all, for one process at a time."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.tg_tinker.federated.jobs import make_job
from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.federated.aggregation import Moments
from tg_tinker.federated.rounds import Answer, Course
from tg_tinker.federated.state import RESULT, STATE, Saved, StateFolder


def saved(**settings):
    course = Course(rounds=3, roster=("site-0", "site-1", "site-2"), quorum=1, min_updates=1).accepted("site-0")
    return Saved(**{"job": make_job(), "course": course, "adapter": "ckpt_0", "adapter_digest": "0" * 64, **settings})


def after_round(state):
    course = state.course if state.course.phase == "training" else state.course.begin()
    course = course.ask(["site-0"]).answer("site-0", Answer(kind="update"), round=course.round, attempt=1)
    return state.model_copy(update={"course": course.release(artifact_id="ckpt_1", weights_digest="11")})


def moments(seed):
    rng = np.random.default_rng(seed)
    return Moments(m={"q.lora_A.weight": rng.normal(size=(2, 3))}, v={"q.lora_A.weight": rng.random((2, 3))})


def test_what_was_saved_comes_back_to_the_last_bit(tmp_path):
    with StateFolder(tmp_path / "new" / "state") as folder:
        assert folder.load() is None
        state = folder.save(after_round(saved(bound=0.1 + 0.2, statements={"site-0": {"x": 1}})), moments(1))
        again, kept = folder.load()
    assert again == state
    assert again.bound == 0.1 + 0.2
    for part in ("m", "v"):
        expected = getattr(moments(1), part)
        assert {n: a.tobytes() for n, a in getattr(kept, part).items()} == {
            n: a.tobytes() for n, a in expected.items()
        }


def test_a_state_without_new_moments_keeps_the_old_ones_and_old_files_go(tmp_path):
    with StateFolder(tmp_path) as folder:
        state = folder.save(after_round(saved()), moments(1))
        state = folder.save(state.model_copy(update={"bound": 2.0}))
        assert (folder.load()[1].m["q.lora_A.weight"] == moments(1).m["q.lora_A.weight"]).all()
        state = folder.save(after_round(state), moments(2))
        assert [p.name for p in tmp_path.glob("moments-*")] == [state.moments]
        assert (folder.load()[1].m["q.lora_A.weight"] == moments(2).m["q.lora_A.weight"]).all()


def test_one_coordinator_works_in_a_folder_at_a_time(tmp_path):
    with StateFolder(tmp_path), pytest.raises(InvalidRequestError, match="another coordinator"):
        StateFolder(tmp_path)
    StateFolder(tmp_path).close()


def test_only_the_owner_can_read_it(tmp_path):
    with StateFolder(tmp_path / "state") as folder:
        folder.save(after_round(saved()), moments(1))
        folder.write_result("{}")
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0
    assert all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "state").iterdir())


@pytest.mark.parametrize("number", range(1, 7))
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_kill_at_any_write_leaves_the_old_state_or_the_new_one(tmp_path, monkeypatch, number, call):
    with StateFolder(tmp_path) as folder:
        old = folder.save(after_round(saved()), moments(1))
    calls = []

    def killed(original):
        def method(*arguments):
            calls.append(arguments)
            if len(calls) == number:
                raise KeyboardInterrupt
            return original(*arguments)

        return method

    target = (Path, "replace") if call == "replace" else (os, "fsync")
    with monkeypatch.context() as patch:
        patch.setattr(*target, killed(getattr(*target)))
        with StateFolder(tmp_path) as folder:
            try:
                new = folder.save(after_round(old), moments(2))
            except KeyboardInterrupt:
                new = None
    with StateFolder(tmp_path) as folder:
        found, kept = folder.load()
        rounds = len(found.course.released)
        assert rounds in (1, 2)
        assert (kept.m["q.lora_A.weight"] == moments(rounds).m["q.lora_A.weight"]).all()
        if new is not None:
            assert found == new
        again = folder.save(after_round(found), moments(rounds + 1))
        assert folder.load()[0] == again


def test_a_damaged_folder_is_refused_and_not_begun_anew(tmp_path):
    with StateFolder(tmp_path) as folder:
        state = folder.save(after_round(saved()), moments(1))
        whole = (tmp_path / STATE).read_bytes()
        for bad in (b"", whole[:-20], whole.replace(b'"rounds": 3', b'"rounds": 0')):
            (tmp_path / STATE).write_bytes(bad)
            with pytest.raises(InvalidRequestError, match="restore the folder"):
                folder.load()
        (tmp_path / STATE).write_bytes(whole)
        data = bytearray((tmp_path / state.moments).read_bytes())
        data[-1] ^= 1
        (tmp_path / state.moments).write_bytes(data)
        with pytest.raises(InvalidRequestError, match="restore the folder"):
            folder.load()


def test_a_full_disk_is_told_and_leaves_the_old_state(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with StateFolder(tmp_path) as folder:
        old = folder.save(saved())
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ServerError, match="No space left"):
            folder.save(after_round(old))
        assert folder.load()[0] == old
        assert not list(tmp_path.glob(".new-*"))


def test_the_result_lies_beside_the_state(tmp_path):
    with StateFolder(tmp_path) as folder:
        folder.write_result('{"a": 1}')
    assert (tmp_path / RESULT).read_text() == '{"a": 1}'
