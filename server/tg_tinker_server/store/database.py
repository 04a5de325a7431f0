"""One durable database: a single writer thread, and transactions that are on disk before anyone is told.

SQLite in WAL mode with ``synchronous=FULL``: when a write returns, a power cut cannot take it back. Both
settings are read back when a connection is opened, and the database refuses to work without them.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import alembic.command
import alembic.config
import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from tg_tinker.errors import ServerError, TGTinkerError

T = TypeVar("T")
Transaction = Connection

BUSY_TIMEOUT_S: Final = 30.0
MAX_GROUP: Final = 64  # writes that may share one commit, and so one flush to disk
COMPANY_S: Final = 0.005  # how long writes that nobody waits for look out for one whose flush they can share
_FULL: Final = 2
_TRUNCATE_TRIES: Final = 2
_MIGRATING: Final = threading.Lock()  # Alembic's context is one per process
_MIGRATIONS: Final = Path(__file__).parent / "migrations"


@dataclass(frozen=True, slots=True)
class _Job:
    fn: Callable[[Connection], Any]
    awaited: bool
    future: Future[Any] = field(default_factory=Future)


class _GroupAborted(Exception):
    """SQLite gave up the whole transaction because of one statement; the jobs are run again one by one."""


class Database:
    """All tables behind two verbs: ``write`` (one durable transaction) and ``read`` (a consistent snapshot).

    Functions handed to ``write`` and ``submit`` run on the writer thread, must not block on anything else,
    and may be run again from the start when a transaction had to be rolled back: they touch nothing but the
    connection they are given.
    """

    def __init__(self, url: str) -> None:
        """Use :meth:`open`."""
        self._writer_engine = _engine(url, begin="BEGIN IMMEDIATE", read_only=False)
        self._reader_engine = _engine(url, begin="BEGIN", read_only=True)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._failure: Exception | None = None
        self._connection: Connection | None = None  # the writer thread's
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._write_forever, name="tg-tinker-writer", daemon=True)

    @classmethod
    def open(cls, url: str) -> Database:
        """Open, or create, the database at ``url`` (``sqlite:///path``), bring it up to date, check it.

        Raises:
            ServerError: not a SQLite file, or SQLite would not keep it in WAL mode with synchronous=FULL.
        """
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
            raise ServerError(
                f"the database must be a SQLite file (sqlite:////path/to/server.db), got "
                f"{parsed.render_as_string(hide_password=True)}: only there is durability checked",
                details={"setting": "database"},
            )
        database = cls(url)
        with _server_errors(), database._writer_engine.connect() as connection, connection.begin():
            _migrate(connection)
        database._thread.start()
        return database

    def write(self, fn: Callable[[Connection], T]) -> T:
        """Run ``fn`` in one transaction and return its result once the commit is durable.

        Blocks; never call it on an event loop. An exception from ``fn`` rolls its work back and is raised
        here; when the commit itself fails a ServerError is raised and nothing that ``fn`` returned counts.
        """
        return cast(T, self._enqueue(_Job(fn, awaited=True)).result())

    def submit(self, fn: Callable[[Connection], T]) -> Future[T]:
        """As :meth:`write`, without waiting. Writes that wait together may share a commit, and this one looks out for
        company for a few milliseconds; each keeps its own savepoint, so one that raises rolls back only itself. A
        write that is lost is also remembered: :meth:`check_healthy` raises from then on.
        """
        return self._enqueue(_Job(fn, awaited=False))

    def read(self, fn: Callable[[Connection], T]) -> T:
        """Run ``fn`` on a read-only connection that sees one consistent state of the database."""
        with _server_errors(), self._reader_engine.connect() as connection, connection.begin():
            return fn(connection)

    def forget_deleted(self) -> None:
        """Bring the write-ahead log into the database file and empty it: older versions of pages are gone then.

        Together with ``secure_delete`` nothing that was deleted before is left in either file. What the files gave
        back, a file system or a disk may keep until it writes over it, and in snapshots. A server also does this
        when it starts, for what was deleted right before a crash. Blocks.

        Raises:
            ServerError: somebody reads an older state all the time; try again.
        """
        with _server_errors(), self._writer_engine.connect() as connection:
            raw = connection.connection.dbapi_connection
            assert raw is not None
            for _ in range(_TRUNCATE_TRIES):
                busy = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[
                    0
                ]  # waits BUSY_TIMEOUT_S for readers
                if not busy:
                    return
        raise ServerError(
            "what was erased is gone from the database, but its write-ahead log could not be emptied because "
            "somebody keeps reading; call it again",
            details={"component": "database"},
        )

    def check_healthy(self) -> None:
        """Raise ServerError if a write that nobody waited for was lost; a restart is then needed."""
        if self._failure is not None:
            raise ServerError(
                f"the database lost a write ({type(self._failure).__name__}); nothing more is accepted. "
                "Check disk space and health, then restart the server",
                details={"component": "database"},
            ) from self._failure

    def close(self) -> None:
        """Finish what was submitted, then close every connection."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._jobs.put(None)
        self._thread.join()
        self._reader_engine.dispose()
        self._writer_engine.dispose()

    def _enqueue(self, job: _Job) -> Future[Any]:
        if threading.current_thread() is self._thread:
            raise RuntimeError("a write inside a write would wait for itself: use the connection at hand")
        with self._lock:
            if self._closed:
                raise ServerError("the database is closed", details={"component": "database"})
            self._jobs.put(job)
        return job.future

    def _write_forever(self) -> None:
        last = False
        while not last:
            group, last = self._gather()
            try:
                self._commit(group)
            except _GroupAborted:
                for job in group:
                    self._commit([job])
        if self._connection is not None:
            self._connection.close()

    def _gather(self) -> tuple[list[_Job], bool]:
        """Wait for work; the jobs that share the next commit, and whether they are the last."""
        group: list[_Job] = []
        leave_s = math.inf
        while len(group) < MAX_GROUP:
            try:
                job = self._jobs.get(timeout=max(0.0, leave_s - time.monotonic()) if group else None)
            except queue.Empty:
                break
            if job is None:
                return group, True
            group.append(job)
            leave_s = min(leave_s, time.monotonic() + (0.0 if job.awaited else COMPANY_S))
        return group, False

    def _commit(self, group: list[_Job]) -> None:
        """Run the jobs in one transaction; only after its commit is anybody told."""
        outcomes: list[tuple[_Job, Any, Exception | None]] = []
        try:
            if self._connection is None:
                self._connection = self._writer_engine.connect()
            with self._connection.begin():
                for job in group:
                    outcomes.append(self._run(self._connection, job, alone=len(group) == 1))
        except _GroupAborted:
            self._drop_connection()
            raise
        except Exception as e:  # noqa: BLE001 - handed to every waiting caller; the thread must outlive it
            if not isinstance(e, TGTinkerError):
                self._drop_connection()
            outcomes = [(job, None, e) for job in group]
        for job, result, error in outcomes:
            if error is None:
                job.future.set_result(result)
                continue
            if not job.awaited and not isinstance(error, TGTinkerError):
                self._failure = self._failure or error
            job.future.set_exception(_as_server_error(error))

    def _drop_connection(self) -> None:
        """After a failure nothing is known about the connection's transaction: start with a fresh one."""
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None

    @staticmethod
    def _run(connection: Connection, job: _Job, *, alone: bool) -> tuple[_Job, Any, Exception | None]:
        if alone:  # its exception rolls back the transaction, which holds nothing else
            return job, job.fn(connection), None
        try:
            with connection.begin_nested():
                return job, job.fn(connection), None
        except Exception as e:
            # A full disk or an I/O error makes SQLite drop the whole transaction, the neighbours included.
            if not _in_transaction(connection):
                raise _GroupAborted from e
            return job, None, e


def _in_transaction(connection: Connection) -> bool:
    return bool(getattr(connection.connection.dbapi_connection, "in_transaction", False))


def _as_server_error(error: Exception) -> Exception:
    """SQL text and parameters stay inside; a person gets what happened and what to do."""
    if not isinstance(error, SQLAlchemyError):
        return error
    cause = getattr(error, "orig", None) or error
    wrapped = ServerError(
        f"the database could not do that ({type(cause).__name__}: {cause}); nothing was changed",
        details={"component": "database"},
    )
    wrapped.__cause__ = error
    return wrapped


@contextlib.contextmanager
def _server_errors() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as e:
        raise _as_server_error(e) from e


def _engine(url: str, *, begin: str, read_only: bool) -> Engine:
    engine = sa.create_engine(
        url,
        **({"pool_size": 4, "max_overflow": -1} if read_only else {"poolclass": NullPool}),
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
    )

    def on_connect(dbapi_connection: Any, _record: Any) -> None:
        dbapi_connection.isolation_level = None  # we say BEGIN ourselves: the driver's is too late
        make_durable(dbapi_connection, read_only=read_only)

    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
    return engine


def make_durable(dbapi_connection: Any, *, read_only: bool) -> None:
    """Ask SQLite for WAL and synchronous=FULL, then read both back.

    Raises:
        ServerError: SQLite answers with anything else (measured: with NORMAL, three power cuts in five lost
            a charge that had been reported as paid).
    """
    cursor = dbapi_connection.cursor()
    try:
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                mode = str(cursor.execute("PRAGMA journal_mode=WAL").fetchone()[0]).lower()
                break
            except Exception as e:
                # Switching a new file to WAL does not honour the busy timeout.
                if "locked" not in str(e) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        cursor.execute("PRAGMA synchronous=FULL")
        # What is deleted is overwritten with zeros: erased records must not be read from free pages.
        cursor.execute("PRAGMA query_only=ON" if read_only else "PRAGMA secure_delete=ON")
        synchronous = int(cursor.execute("PRAGMA synchronous").fetchone()[0])
    finally:
        cursor.close()
    if mode != "wal" or synchronous != _FULL:
        raise ServerError(
            f"SQLite offers journal_mode={mode} and synchronous={synchronous}; the ledger needs WAL and "
            "FULL (2), or a power cut could take back a charge. Put the database on a local disk",
            details={"journal_mode": mode, "synchronous": synchronous},
        )


def _migrate(connection: Connection) -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    with _MIGRATING:
        alembic.command.upgrade(config, "head")
