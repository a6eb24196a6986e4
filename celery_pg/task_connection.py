"""How does a task write in the commit that completes it?

`task_transaction()` gives the connection that the task's completion will commit: the function's own writes, its result,
its continuations and its acknowledgement are stored together, or none of them is.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import sqlalchemy
from sqlalchemy import event, orm
from sqlalchemy.exc import DBAPIError

from kombu_pg import errors
from kombu_pg.database import Database, Statement, T, forget_after_fork, mapped_errors

__all__ = ["TaskTransaction"]

logger = logging.getLogger(__name__)

#: Seconds after which an open transaction is warned of: it keeps vacuum from its work, and others from its rows.
LONG = 60.0


class TaskTransaction:
    """The transaction of one run of a task. It begins with the first statement, and the task's completion ends it.

    As a context manager it gives the SQLAlchemy connection; an exception out of the block takes back what it wrote.

    Attributes:
        lost: it was rolled back because its connection was lost. Known from `close` on.
    """

    def __init__(self, database: Database, task: str) -> None:
        self._database = database
        self._task = task
        self._connection: sqlalchemy.Connection | None = None
        self._savepoints: list[Any] = []
        self._ending = False
        self._timer: threading.Timer | None = None
        self.lost = False

    @property
    def begun(self) -> bool:
        return self._connection is not None and self._connection.in_transaction()

    def __enter__(self) -> sqlalchemy.Connection:
        connection = self._open()
        self._savepoints.append(connection.begin_nested() if self.begun else None)
        return connection

    def __exit__(self, kind: Any, exc: Any, traceback: Any) -> None:
        savepoint = self._savepoints.pop()
        if kind is None:
            if savepoint is not None:
                savepoint.commit()
        elif savepoint is not None:
            savepoint.rollback()
        else:
            self.close()

    @contextlib.contextmanager
    def session(self) -> Iterator[orm.Session]:
        """The same for the ORM: a session that is flushed when the block ends, and committed with the task."""
        with self as connection:
            if not self.begun:
                connection.begin()  # or the session would begin, and commit, one of its own; nothing is sent for it
            with orm.Session(connection, join_transaction_mode="create_savepoint") as session:
                yield session
                session.commit()

    # For the completion

    def run(self, statement: Statement[T]) -> T:
        """Run a statement of ours in this transaction.

        Raises:
            TransactionLost: the connection was lost; nothing of the transaction is stored.
        """
        try:
            return self._run(statement)
        except errors.Unavailable as exc:
            raise errors.TransactionLost(f"nothing of the transaction is stored: {exc}") from exc

    def _run(self, statement: Statement[T]) -> T:
        self._require_connection()
        assert self._connection is not None
        with mapped_errors(), contextlib.closing(self._connection.connection.cursor()) as cursor:
            cursor.execute(statement.sql, statement.parameters)
            return statement.read(cursor.fetchall() if cursor.description else ())

    def commit(self) -> None:
        """What the task wrote is stored.

        Raises:
            Unavailable: the connection was lost; it is not known whether it is stored.
        """
        self._ending = True
        try:
            self._require_connection()
            assert self._connection is not None
            with _as_ours():
                self._connection.commit()
        finally:
            self.close()

    def _require_connection(self) -> None:
        if self._connection is None or self._connection.invalidated:
            raise errors.Unavailable("the connection of the task's transaction was lost")

    def close(self) -> None:
        """Whatever was not committed is rolled back, and the connection returned to its pool."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        connection, self._connection = self._connection, None
        if connection is not None:
            self.lost = not _rolled_back(connection) or self.lost
            connection.close()
        self._ending = False
        self._savepoints = [None] * len(self._savepoints)

    def _open(self) -> sqlalchemy.Connection:
        if self._connection is None:
            with _as_ours():
                self._connection = _engine(self._database).connect()
            event.listen(self._connection, "begin", self._on_begin)
            event.listen(self._connection, "commit", self._on_commit)
        return self._connection

    def _on_begin(self, _: sqlalchemy.Connection) -> None:
        self._timer = threading.Timer(LONG, self._warn)
        self._timer.daemon = True
        self._timer.start()

    def _on_commit(self, _: sqlalchemy.Connection) -> None:
        if not self._ending:
            raise RuntimeError("the task's transaction is committed when the task has ended: leave that to it")

    def _warn(self) -> None:
        logger.warning(
            "the transaction of task %s has been open for %g s: vacuum waits for it; write at the end of the task",
            self._task,
            LONG,
        )


def _rolled_back(connection: sqlalchemy.Connection) -> bool:
    """Roll back. False: the connection was lost before, or now; the server has done it, and SQLAlchemy knows."""
    if connection.invalidated:
        return False
    try:
        # SQLAlchemy does it too, but not after an exception in a commit.
        with mapped_errors():
            connection.connection.rollback()
    except errors.Unavailable as exc:
        logger.debug("the server rolls back what it has lost: %s", exc)
        connection.invalidate(exc)
        return False
    return True


@contextlib.contextmanager
def _as_ours() -> Iterator[None]:
    try:
        yield
    except DBAPIError as exc:
        with mapped_errors():
            raise (exc.orig or exc) from exc


_engines: weakref.WeakKeyDictionary[Database, sqlalchemy.Engine] = weakref.WeakKeyDictionary()
_engines_lock = threading.Lock()


def _engine(database: Database) -> sqlalchemy.Engine:
    """The process's pool of blocking connections to the database, as large as there are threads that use it."""
    with _engines_lock:
        if database not in _engines:
            _engines[database] = sqlalchemy.create_engine(
                "postgresql+psycopg2://", creator=database.blocking_connection, pool_pre_ping=True, max_overflow=-1
            )
        return _engines[database]


def _forget_engines() -> None:
    global _engines_lock
    _engines_lock = threading.Lock()
    for engine in _engines.values():
        engine.dispose(close=False)  # the connections are the parent's
    _engines.clear()


forget_after_fork(_forget_engines)
