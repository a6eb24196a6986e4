"""How does a task write in the commit that completes it?

`task_transaction()` gives the connection that the task's completion will commit: the function's own writes, its result,
its continuations and its acknowledgement are stored together, or none of them is.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import sqlalchemy
from sqlalchemy import event, orm
from sqlalchemy.exc import DBAPIError, DisconnectionError

from kombu_pg import errors
from kombu_pg.database import Database, Statement, T, forget_after_fork, mapped_errors, still_open

__all__ = ["TaskTransaction"]

logger = logging.getLogger(__name__)

#: Seconds after which an open transaction is warned of: it keeps vacuum from its work, and others from its rows.
LONG = 60.0
#: Under which a connection's `info` says whose it is.
_OWNER = "celery_pg_task_transaction"


class TaskTransaction:
    """The transaction of one run of a task. It begins with the first statement, and the task's completion ends it.

    As a context manager it gives the SQLAlchemy connection; an exception out of the block takes back what it wrote.

    Attributes:
        task: whose it is, for people to read.
        ending: the completion is committing it.
        lost: it was rolled back because its connection was lost, or there was none. Known from `close` on.
    """

    def __init__(self, database: Database, task: str) -> None:
        self.task = task
        self._database = database
        self._connection: sqlalchemy.Connection | None = None
        self._savepoints: list[Any] = []
        self.ending = False
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

    takes_several = True  # statements at once

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
        self.ending = True
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
        _watch.forget(self)
        connection, self._connection = self._connection, None
        if connection is not None:
            self.lost = not _rolled_back(connection) or self.lost
            if not connection.invalidated:
                connection.info.pop(_OWNER, None)
            connection.close()
        self.ending = False
        self._savepoints = [None] * len(self._savepoints)

    def _open(self) -> sqlalchemy.Connection:
        if self._connection is None:
            try:
                with _as_ours():
                    self._connection = _engine(self._database).connect()
            except errors.Unavailable:
                self.lost = True
                raise
            self._connection.info[_OWNER] = self
        return self._connection


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


class _Watch:
    """Warns of transactions that stay open. One thread of the process looks after all of them."""

    def __init__(self) -> None:
        self._open: dict[TaskTransaction, float] = {}
        self._thread: threading.Thread | None = None

    def begin(self, transaction: TaskTransaction) -> None:
        self._open[transaction] = time.monotonic() + LONG
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="celery_pg-open-transactions", daemon=True)
            self._thread.start()

    def forget(self, transaction: TaskTransaction) -> None:
        self._open.pop(transaction, None)

    def _look(self) -> None:
        while True:
            time.sleep(LONG / 10)
            now = time.monotonic()
            for transaction, late_at in list(self._open.items()):
                if now >= late_at and self._open.pop(transaction, None) is not None:
                    logger.warning(
                        "the transaction of task %s has been open for %g s: vacuum waits for it; write at the end of "
                        "the task",
                        transaction.task,
                        LONG,
                    )


_watch = _Watch()
_engines: weakref.WeakKeyDictionary[Database, sqlalchemy.Engine] = weakref.WeakKeyDictionary()
_engines_lock = threading.Lock()


def _engine(database: Database) -> sqlalchemy.Engine:
    """The process's pool of blocking connections to the database, as large as there are threads that use it."""
    with _engines_lock:
        if database not in _engines:
            engine = sqlalchemy.create_engine(
                "postgresql+psycopg2://", creator=database.blocking_connection, max_overflow=-1
            )
            event.listen(engine, "checkout", _require_open)
            event.listen(engine, "begin", _note_begin)
            event.listen(engine, "commit", _refuse_commit)
            _engines[database] = engine
        return _engines[database]


def _require_open(dbapi_connection: Any, *_: Any) -> None:
    """As SQLAlchemy's pre-ping, without the round trip."""
    if not still_open(dbapi_connection):
        raise DisconnectionError


def _note_begin(connection: sqlalchemy.Connection) -> None:
    owner = connection.info.get(_OWNER)
    if owner is not None:
        _watch.begin(owner)


def _refuse_commit(connection: sqlalchemy.Connection) -> None:
    owner = connection.info.get(_OWNER)
    if owner is not None and not owner.ending:
        raise RuntimeError("the task's transaction is committed when the task has ended: leave that to it")


def _forget_engines() -> None:
    global _engines_lock, _watch
    _engines_lock = threading.Lock()
    _watch = _Watch()
    for engine in _engines.values():
        engine.dispose(close=False)  # the connections are the parent's
    _engines.clear()


forget_after_fork(_forget_engines)
