"""What a site remembers between messages, each of which may be handled by a fresh process.

One SQLite file, one writer at a time, every change on disk before it is built upon. It holds jobs, run ids and
updates that were released: nothing of the data, no loss, no norm. Secrets of masks are kept beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

from tg_tinker.errors import ServerError
from tg_tinker.federated.job import Job
from tg_tinker.federated.updates import Layout
from tg_tinker.tensor_file import read_tensors, write_tensors

VERSION = 2
_POLL_S = 0.05
_SCHEMA = """
CREATE TABLE jobs (
  digest TEXT PRIMARY KEY, job TEXT NOT NULL, noise_multiplier REAL, public_units INTEGER NOT NULL, layout TEXT,
  round INTEGER NOT NULL DEFAULT 0, charges INTEGER NOT NULL DEFAULT 0, counted INTEGER NOT NULL DEFAULT 1,
  closed INTEGER NOT NULL DEFAULT 0, statement TEXT, report BLOB
) STRICT;
CREATE TABLE runs (
  digest TEXT NOT NULL REFERENCES jobs, factor TEXT NOT NULL, run_id TEXT NOT NULL, PRIMARY KEY (digest, factor)
) STRICT;
CREATE TABLE rounds (
  digest TEXT NOT NULL REFERENCES jobs, round INTEGER NOT NULL, base TEXT NOT NULL, phase TEXT NOT NULL,
  artifact_id TEXT NOT NULL DEFAULT '', arrays BLOB, PRIMARY KEY (digest, round)
) STRICT;
"""

Phase = Literal["begun", "imported", "loaded", "trained", "told"]
"""Of a round: noted; its model is a checkpoint; the run holds it; the update is stored; and the audit log knows."""
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job that the site agreed to.

    Attributes:
        noise_multiplier: of every local step; ``None`` where the job trains without privacy of records.
        public_units: number of privacy units that noise and statement rest on.
        layout: of the adapter, once the site's server made one.
        last_round: that was begun.
        charges: steps paid for by the job.
        counted: whether ``charges`` is exact; otherwise the ledger must be asked.
        finished: whether it was asked to finish: no step is taken any more, and its statement is signed or will be.
    """

    digest: str
    job: Job
    noise_multiplier: float | None
    public_units: int
    layout: Layout | None
    last_round: int
    charges: int
    counted: bool
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """A round of a job; ``base`` is the digest of the weights that it began with."""

    round: int
    base: str
    phase: Phase
    artifact_id: str


class StateFolder:
    """Where a site's state lies. Only the site's own user can read it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def open(self, *, wait_s: float) -> Iterator[SiteState]:
        """The state, for one process and thread at a time.

        Raises:
            ServerError: another process held it for ``wait_s`` seconds, or it cannot be read or written.
        """
        with self._locked(wait_s), contextlib.closing(self._connect()) as db:
            yield SiteState(db, self._folder)

    @contextlib.contextmanager
    def _locked(self, wait_s: float) -> Iterator[None]:
        deadline = time.monotonic() + wait_s
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise ServerError(f"cannot use the state folder {self._folder}: {e.strerror}") from e
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise ServerError(
                            f"another process has used the state folder {self._folder} for {wait_s:g} s; a site has "
                            "one folder, and one message is handled at a time"
                        ) from None
                    time.sleep(_POLL_S)
            yield
        finally:
            os.close(lock)  # gives the lock up

    def _connect(self) -> sqlite3.Connection:
        path = self._folder / "state.sqlite3"
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            db = sqlite3.connect(path, isolation_level=None)
            db.execute("PRAGMA synchronous=FULL")
            db.execute("PRAGMA foreign_keys=ON")
            found = db.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={VERSION}; COMMIT;")
        except (OSError, sqlite3.Error) as e:
            raise ServerError(f"cannot open {path}: {e}") from e
        if found not in (0, VERSION):
            db.close()
            raise ServerError(f"{path} was written by another version of tg-tinker (format {found}, not {VERSION})")
        return db


class SiteState:
    """The state while it is open. Every method that changes something has it on disk when it returns."""

    def __init__(self, db: sqlite3.Connection, folder: Path) -> None:
        self._db = db
        self._folder = folder

    # Jobs.

    def job(self, digest: str) -> JobRecord | None:
        """A job that was agreed to."""
        row = self._db.execute(
            "SELECT job, noise_multiplier, public_units, layout, round, charges, counted, closed FROM jobs "
            "WHERE digest = ?",
            (digest,),
        ).fetchone()
        if row is None:
            return None
        job, noise, units, shapes, last, charges, counted, finished = row
        return JobRecord(
            digest=digest,
            job=Job.model_validate_json(job),
            noise_multiplier=noise,
            public_units=units,
            layout=None if shapes is None else {name: tuple(shape) for name, shape in json.loads(shapes).items()},
            last_round=last,
            charges=charges,
            counted=bool(counted),
            finished=bool(finished),
        )

    def unfinished(self) -> list[JobRecord]:
        """Every job that was agreed to and not closed with a statement."""
        rows = self._db.execute("SELECT digest FROM jobs WHERE statement IS NULL ORDER BY digest").fetchall()
        return [found for (digest,) in rows if (found := self.job(digest)) is not None]

    def accept(self, job: Job, noise_multiplier: float | None, public_units: int) -> JobRecord:
        """Agree to a job; one that was agreed to keeps its noise and what that rests on."""
        digest = job.digest()
        self._write(
            "INSERT INTO jobs (digest, job, noise_multiplier, public_units) VALUES (?, ?, ?, ?) "
            "ON CONFLICT DO NOTHING",
            (digest, job.model_dump_json(), noise_multiplier, public_units),
        )
        found = self.job(digest)
        assert found is not None
        return found

    def digest_of(self, job_id: str) -> str | None:
        """The job that was agreed to under this name."""
        row = self._db.execute("SELECT digest FROM jobs WHERE job ->> '$.job_id' = ?", (job_id,)).fetchone()
        return None if row is None else row[0]

    def set_layout(self, digest: str, shapes: Layout) -> None:
        """Note the adapter's names and shapes."""
        self._write("UPDATE jobs SET layout = ? WHERE digest = ?", (json.dumps(shapes), digest))

    def close_job(self, digest: str) -> None:
        """Note that no step is taken for a job any more."""
        self._write("UPDATE jobs SET closed = 1 WHERE digest = ?", (digest,))

    def finish(self, digest: str, statement: Mapping[str, Any], report: bytes) -> None:
        """Keep the signed statement, and the report that it names. The first one stays."""
        self._write(
            "UPDATE jobs SET closed = 1, statement = ?, report = ? WHERE digest = ? AND statement IS NULL",
            (json.dumps(statement), report, digest),
        )

    def statement(self, digest: str) -> dict[str, Any] | None:
        """The statement that closed a job."""
        row = self._db.execute("SELECT statement FROM jobs WHERE digest = ?", (digest,)).fetchone()
        return None if row is None or row[0] is None else dict(json.loads(row[0]))

    def report(self, digest: str) -> bytes | None:
        """The site's full privacy report as it was when the job was closed."""
        row = self._db.execute("SELECT report FROM jobs WHERE digest = ?", (digest,)).fetchone()
        return None if row is None else row[0]

    # Runs: one for each factor that is frozen, "" for none.

    def run_id(self, digest: str, factor: str) -> str | None:
        """The training client of a factor; empty if one was about to be made, ``None`` if none was."""
        row = self._db.execute("SELECT run_id FROM runs WHERE digest = ? AND factor = ?", (digest, factor)).fetchone()
        return None if row is None else row[0]

    def set_run_id(self, digest: str, factor: str, run_id: str) -> None:
        """Note a training client, or with an empty id that one is about to be made."""
        self._write("INSERT OR REPLACE INTO runs (digest, factor, run_id) VALUES (?, ?, ?)", (digest, factor, run_id))

    def run_ids(self, digest: str) -> list[str]:
        """Every training client of a job."""
        rows = self._db.execute("SELECT run_id FROM runs WHERE digest = ? AND run_id != ''", (digest,)).fetchall()
        return sorted(run_id for (run_id,) in rows)

    def other_run_ids(self, digest: str) -> set[str]:
        """Every training client of every other job."""
        rows = self._db.execute("SELECT run_id FROM runs WHERE digest != ? AND run_id != ''", (digest,)).fetchall()
        return {run_id for (run_id,) in rows}

    # Rounds.

    def round(self, digest: str, round_: int) -> RoundRecord | None:
        """A round that was begun."""
        row = self._db.execute(
            "SELECT base, phase, artifact_id FROM rounds WHERE digest = ? AND round = ?", (digest, round_)
        ).fetchone()
        return None if row is None else RoundRecord(round=round_, base=row[0], phase=row[1], artifact_id=row[2])

    def begin_round(self, digest: str, round_: int, base: str) -> None:
        """Note that a round begins; from here on the number of charges is in doubt."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO rounds (digest, round, base, phase) VALUES (?, ?, ?, 'begun')", (digest, round_, base)
            )
            self._db.execute("UPDATE jobs SET round = ?, counted = 0 WHERE digest = ?", (round_, digest))

    def set_phase(self, digest: str, round_: int, phase: Phase, *, artifact_id: str = "") -> None:
        """Move a round on."""
        self._write(
            "UPDATE rounds SET phase = ?, artifact_id = ? WHERE digest = ? AND round = ?",
            (phase, artifact_id, digest, round_),
        )

    def store_update(self, digest: str, round_: int, update: Mapping[str, npt.NDArray[Any]], charges: int) -> None:
        """Keep the update of a round, together with the exact number of the job's charges."""
        blob = b"".join(write_tensors(update, {}))
        with self._transaction():
            self._db.execute(
                "UPDATE rounds SET phase = 'trained', artifact_id = '', arrays = ? WHERE digest = ? AND round = ?",
                (blob, digest, round_),
            )
            self._db.execute("UPDATE jobs SET charges = ?, counted = 1 WHERE digest = ?", (charges, digest))

    def update(self, digest: str, round_: int) -> Arrays:
        """The stored update of a round, read-only."""
        row = self._db.execute(
            "SELECT arrays FROM rounds WHERE digest = ? AND round = ? AND arrays IS NOT NULL", (digest, round_)
        ).fetchone()
        if row is None:
            raise LookupError(f"round {round_} has no update")
        return dict(read_tensors(memoryview(row[0]))[0])

    def rounds_trained(self, digest: str) -> list[int]:
        """Rounds with a stored update, in order."""
        rows = self._db.execute(
            "SELECT round FROM rounds WHERE digest = ? AND arrays IS NOT NULL ORDER BY round", (digest,)
        ).fetchall()
        return [round_ for (round_,) in rows]

    def artifacts(self, digest: str) -> list[str]:
        """Checkpoints of rounds that were begun and not trained to the end."""
        rows = self._db.execute(
            "SELECT artifact_id FROM rounds WHERE digest = ? AND artifact_id != ''", (digest,)
        ).fetchall()
        return sorted(artifact_id for (artifact_id,) in rows)

    # Secrets of masks, in a file of their own, because deleting a row leaves its bytes in the database.

    def masking(self, digest: str) -> dict[str, Any] | None:
        """The state of secure aggregation for a job: secret."""
        try:
            return dict(json.loads(self._masking_file(digest).read_bytes()))
        except FileNotFoundError:
            return None

    def set_masking(self, digest: str, state: Mapping[str, Any]) -> None:
        """Replace that state; on disk, or as it was."""
        path = self._masking_file(digest)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        draft = path.with_suffix(".new")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(json.dumps(dict(state)).encode())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        _sync_folder(path.parent)

    def forget_masking(self, digest: str) -> None:
        """Delete that state."""
        self._masking_file(digest).unlink(missing_ok=True)

    def _masking_file(self, digest: str) -> Path:
        return self._folder / "masking" / f"{digest}.json"

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        with self._transaction():
            self._db.execute(statement, values)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
