"""Transactions: one writer thread, durable when a write returns; readers beside it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import alembic.command
import alembic.config
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from tg_tinker.errors import ServerError

T = TypeVar("T")
Transaction = Connection
Work = tuple[Callable[[Connection], Any], "Future[Any]"]
_GROUP = 64  # writes that share one commit at most
_BUSY_S = 30.0


class Database:
    """A database with exactly one writing thread.

    Guarantees: when ``write`` returns, the change is on disk (SQLite: WAL with ``synchronous=FULL``, asserted at
    start); when it raises, nothing of it is. Other processes may use the same file.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._failure: str | None = None
        self._writer = threading.Thread(target=self._write_forever, name="db-writer", daemon=True)
        self._writer.start()

    @classmethod
    def open(cls, url: str) -> Database:
        """Connect, migrate, and refuse a configuration that could forget a charge.

        Raises:
            ServerError: it cannot be opened or migrated, or is not durable.
        """
        try:
            engine = create_engine(url, poolclass=NullPool) if _is_sqlite(url) else create_engine(url)
            if _is_sqlite(url):
                event.listen(engine, "connect", _make_durable)
                event.listen(engine, "begin", _begin)
            with engine.connect() as connection:
                if _is_sqlite(url):
                    _assert_durable(connection)
                _migrate(connection)
                connection.commit()
        except SQLAlchemyError as e:
            raise ServerError(f"cannot open the database at {_shown(url)}: {type(e).__name__}") from e
        return cls(engine)

    def write(self, fn: Callable[[Connection], T]) -> T:
        """Run ``fn`` in one transaction on the writer thread; returns once it is durable. Never on an event loop.

        Raises:
            ServerError: the commit failed; nothing was changed.
        """
        return self.submit(fn).result()

    def submit(self, fn: Callable[[Connection], T]) -> Future[T]:
        """The same without waiting. Writes that wait together may share one commit; each stands or falls alone."""
        done: Future[T] = Future()
        self._queue.put((fn, done))
        return done

    def read(self, fn: Callable[[Connection], T]) -> T:
        """Run ``fn`` on a connection of its own; it sees what is committed.

        Raises:
            ServerError: the database cannot be read.
        """
        try:
            with self._engine.connect().execution_options(tg_read=True) as connection:
                return fn(connection)
        except SQLAlchemyError as e:
            raise ServerError(f"the database cannot be read: {type(e).__name__}") from e

    def check_healthy(self) -> None:
        """Refuse to go on after a write nobody waited for failed.

        Raises:
            ServerError: naming what failed.
        """
        if self._failure is not None:
            raise ServerError(f"the audit store cannot be written ({self._failure}); restart the server")

    def close(self) -> None:
        """Finish what was submitted, then stop."""
        self._queue.put(None)
        self._writer.join()
        self._engine.dispose()

    def _write_forever(self) -> None:
        connection: Connection | None = None
        while (work := self._queue.get()) is not None:
            group = [work]
            stop = False
            while len(group) < _GROUP and not self._queue.empty():
                more = self._queue.get()
                if more is None:
                    stop = True
                    break
                group.append(more)
            try:
                if connection is None:
                    connection = self._engine.connect()
                self._commit(connection, group)
            except Exception as e:  # noqa: BLE001 - the writer must outlive every failure; each is reported
                if connection is not None:
                    connection.invalidate()
                    connection.close()
                    connection = None
                self._fail(group, e)
            if stop:
                break
        if connection is not None:
            connection.close()

    def _commit(self, connection: Connection, group: list[Work]) -> None:
        outcomes: list[tuple[Future[Any], Any]] = []
        with connection.begin():
            for fn, done in group:
                try:
                    with connection.begin_nested():
                        outcomes.append((done, fn(connection)))
                except SQLAlchemyError as e:
                    done.set_exception(_refusal(e))
                except Exception as e:  # noqa: BLE001 - it rolled back its own savepoint and is handed over
                    done.set_exception(e)
        for done, value in outcomes:
            done.set_result(value)

    def _fail(self, group: list[Work], error: Exception) -> None:
        self._failure = type(error).__name__
        for _, done in group:
            if not done.done():
                done.set_exception(_refusal(error))


def _refusal(error: Exception) -> ServerError:
    failure = ServerError(f"the database refused a write ({type(error).__name__}); nothing was changed")
    failure.__cause__ = error
    return failure


def _is_sqlite(url: str) -> bool:
    return url.startswith("sqlite")


def _shown(url: str) -> str:
    return url if _is_sqlite(url) else url.split("://", maxsplit=1)[0] + "://..."


def _make_durable(dbapi_connection: Any, _record: Any) -> None:
    dbapi_connection.isolation_level = None  # we say BEGIN ourselves
    cursor = dbapi_connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={int(_BUSY_S * 1000)}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _begin(connection: Connection) -> None:
    reading = connection.get_execution_options().get("tg_read", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _assert_durable(connection: Connection) -> None:
    journal = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
    synchronous = connection.exec_driver_sql("PRAGMA synchronous").scalar_one()
    if journal != "wal" or synchronous != 2:
        raise ServerError(
            f"the database runs with journal_mode={journal}, synchronous={synchronous}; charges could be lost at a "
            "power cut. It must be WAL and FULL (2): use a local file on a local disk"
        )


def _migrate(connection: Connection) -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")
