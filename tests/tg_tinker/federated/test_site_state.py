"""What a site remembers: on disk when told, one holder at a time, secrets apart and gone when they are."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tests.tg_tinker.federated.site_lab import site_job
from tg_tinker.errors import ServerError
from tg_tinker.federated.site_state import StateFolder

JOB = site_job()
DIGEST = JOB.digest()
UPDATE = {"b.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.float32([np.pi])}


@pytest.fixture
def folder(tmp_path):
    return StateFolder(tmp_path / "state")


def test_jobs_rounds_and_updates_are_there_for_the_next_process(folder):
    with folder.open(wait_s=0) as state:
        assert state.job(DIGEST) is None
        state.accept(JOB, 1.25, 16)
        state.accept(JOB, 9.0, 16)  # noise is solved once
        state.set_layout(DIGEST, {"a": (1,), "b.weight": (2, 3)})
        state.set_run_id(DIGEST, "a", "")
        state.begin_round(DIGEST, 1, "base")
    with folder.open(wait_s=0) as state:
        record = state.job(DIGEST)
        assert (record.job, record.noise_multiplier, record.last_round) == (JOB, 1.25, 1)
        assert record.job.digest() == DIGEST
        assert record.layout == {"a": (1,), "b.weight": (2, 3)}
        assert not record.counted
        assert state.run_id(DIGEST, "a") == ""
        assert state.run_id(DIGEST, "b") is None
        assert state.run_ids(DIGEST) == []
        with pytest.raises(LookupError):
            state.update(DIGEST, 1)
        state.set_phase(DIGEST, 1, "imported", artifact_id="ckpt")
        assert state.artifacts(DIGEST) == ["ckpt"]
        state.store_update(DIGEST, 1, UPDATE, 2)
    with folder.open(wait_s=0) as state:
        for name, array in state.update(DIGEST, 1).items():
            np.testing.assert_array_equal(array, UPDATE[name])
        assert (state.round(DIGEST, 1).phase, state.round(DIGEST, 1).base) == ("trained", "base")
        assert state.artifacts(DIGEST) == []
        assert state.rounds_trained(DIGEST) == [1]
        record = state.job(DIGEST)
        assert (record.charges, record.counted, record.finished) == (2, True, False)
        assert [r.digest for r in state.unfinished()] == [DIGEST]
        state.finish(DIGEST, {"payload": "first"}, b"report")
        state.finish(DIGEST, {"payload": "second"}, b"other")
        assert state.statement(DIGEST) == {"payload": "first"}
        assert state.report(DIGEST) == b"report"
        assert state.job(DIGEST).finished
        assert state.unfinished() == []


def test_a_round_begins_once(folder):
    with folder.open(wait_s=0) as state:
        state.accept(JOB, 1.0, 16)
        state.begin_round(DIGEST, 1, "base")
        with pytest.raises(sqlite3.IntegrityError):
            state.begin_round(DIGEST, 1, "other")
        assert state.round(DIGEST, 1).base == "base"


def test_what_fails_half_way_leaves_no_half(folder):
    with folder.open(wait_s=0) as state:
        state.accept(JOB, 1.0, 16)
        state.begin_round(DIGEST, 1, "base")
        bad = {"a": np.zeros(1, np.complex64)}  # has no name in safetensors
        with pytest.raises(ValueError):
            state.store_update(DIGEST, 1, bad, 2)
        state._db.execute("CREATE TRIGGER t BEFORE UPDATE ON jobs BEGIN SELECT RAISE(ABORT, 'disk'); END")
        with pytest.raises(sqlite3.IntegrityError, match="disk"):
            state.store_update(DIGEST, 1, UPDATE, 2)
        assert state.round(DIGEST, 1).phase == "begun"
        assert state.round(DIGEST, 1).base == "base"


def test_the_file_is_flushed_with_every_change(folder):
    with folder.open(wait_s=0) as state:
        assert state._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_only_the_owner_can_read_it(folder, tmp_path):
    with folder.open(wait_s=0) as state:
        state.accept(JOB, 1.0, 16)
        state.set_masking(DIGEST, {"secret": "s"})
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in [tmp_path / "state", *(tmp_path / "state").rglob("*")]}
    assert all(mode & 0o077 == 0 for mode in modes.values()), modes


def test_one_holder_at_a_time_among_threads(folder):
    order = []

    def hold():
        with folder.open(wait_s=10):
            order.append("in")
            time.sleep(0.05)
            order.append("out")

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["in", "out"] * 4


def test_another_process_waits_and_then_says_why(folder, tmp_path):
    code = (
        "import sys; from pathlib import Path; from tg_tinker.federated.site_state import StateFolder\n"
        "with StateFolder(Path(sys.argv[1])).open(wait_s=0.2): print('held')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "state")]
    with folder.open(wait_s=0):
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "another process has used the state folder" in refused.stderr
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "held\n"
    with folder.open(wait_s=0), pytest.raises(ServerError, match="one message"), folder.open(wait_s=0):
        pass


def test_a_holder_that_was_killed_holds_nothing(folder, tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from tg_tinker.federated.site_state import StateFolder\n"
        "with StateFolder(Path(sys.argv[1])).open(wait_s=0): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "state")], check=False)
    assert killed.returncode == -9
    with folder.open(wait_s=0) as state:
        assert state.unfinished() == []


def test_a_file_of_another_version_is_left_alone(folder, tmp_path):
    with folder.open(wait_s=0):
        pass
    with sqlite3.connect(tmp_path / "state" / "state.sqlite3") as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(ServerError, match="format 99"), folder.open(wait_s=0):
        pass


def test_secrets_of_masks_are_replaced_whole_and_leave_nothing(folder, tmp_path):
    with folder.open(wait_s=0) as state:
        assert state.masking(DIGEST) is None
        state.set_masking(DIGEST, {"secret": "old-secret"})
        state.set_masking(DIGEST, {"secret": None})
        assert state.masking(DIGEST) == {"secret": None}
        found = [p for p in (tmp_path / "state").rglob("*") if p.is_file() and b"old-secret" in p.read_bytes()]
        assert found == []
        state.forget_masking(DIGEST)
        state.forget_masking(DIGEST)
        assert state.masking(DIGEST) is None


def test_a_folder_that_cannot_be_used_is_an_error_for_people(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerError, match="state folder"), StateFolder(tmp_path / "file" / "state").open(wait_s=0):
        pass
