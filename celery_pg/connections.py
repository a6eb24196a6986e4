"""How does somebody else's connection run our statements?

Each kind of connection that an application may have a transaction on: psycopg2, psycopg 3, SQLAlchemy, Django. Whatever
is done to it is a statement in the transaction that is open there; its settings are neither changed nor relied upon.
Packages that the application may not have are imported only when an object of theirs has come.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from psycopg2 import extensions as pg

from kombu_pg import errors
from kombu_pg.database import Database, Rows, Statement, T
from kombu_pg.transaction import Wakes, tell

__all__ = ["Foreign", "UnusableConnection", "foreign"]

_KINDS = (
    "a SQLAlchemy Session or Connection, a psycopg2 or psycopg 3 connection, or a Django connection or the name of one"
)
_ASYNCHRONOUS = {
    ("sqlalchemy", "AsyncSession"): "use `await session.run_sync(function)` and give it the Session that function gets",
    ("sqlalchemy", "AsyncConnection"): "use `await connection.run_sync(function)` and give it what that function gets",
    ("psycopg", "AsyncConnection"): "publish from SQL, with the function publish_task",
    ("asyncpg", "Connection"): "publish from SQL, with the function publish_task",
    ("asyncpg", "PoolConnectionProxy"): "publish from SQL, with the function publish_task",
}
_IDLE = 0  # libpq's PQTRANS_IDLE


class UnusableConnection(errors.PGError, ValueError):
    """Nothing can be published in a transaction of this connection: the message says why."""


class Foreign(ABC):
    """A connection that belongs to the application."""

    @abstractmethod
    def raw(self) -> object:
        """The driver's connection: the same object as long as it leads to the same server."""

    @abstractmethod
    def in_autocommit(self) -> bool:
        """Each statement would be a transaction of its own."""

    @abstractmethod
    def rows(self, sql: str, parameters: tuple[Any, ...] | None) -> Rows: ...

    def refuse_autocommit(self) -> None:
        """Raise UnusableConnection where what is published would not be part of a transaction."""
        if self.in_autocommit():
            raise UnusableConnection(
                "this connection is in autocommit mode, outside of a transaction: a task would be published at once; "
                "begin a transaction, or publish without publish_in"
            )

    takes_several = False  # psycopg 3 does not, with parameters

    def run(self, statement: Statement[T]) -> T:
        """Run the statement in the transaction that is open, or that the connection begins with it.

        Raises:
            UnusableConnection: there is none and would be none.
            TransactionLost: in place of an OSError, after which kombu would publish once more. Other errors of the
                driver reach the connection's owner unchanged.
        """
        self.refuse_autocommit()
        try:
            return statement.read(self.rows(statement.sql, statement.parameters))
        except OSError as exc:
            raise errors.TransactionLost(f"the connection was lost inside a transaction: {exc}") from exc

    def enter(self, database: Database) -> Wakes:
        """A block begins. -> where it notes whom to tell after the commit."""
        return Wakes(told=False)

    def leave(self, database: Database, wakes: Wakes) -> None:  # noqa: B027 - nothing, where there is no hook
        """The block is over; where there is a hook, they are told after the commit."""


def foreign(connection: Any) -> Foreign:
    """The way to run statements on the connection.

    Raises:
        UnusableConnection: it is of no kind that is known, or not to PostgreSQL.
    """
    if isinstance(connection, pg.connection):
        return _Psycopg2(connection)
    if isinstance(connection, str):
        return _django(connection)
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in connection.__class__.__mro__}
    for kind, advice in _ASYNCHRONOUS.items():
        if kind in kinds:
            raise UnusableConnection(f"publish_in is for synchronous code, not for {'.'.join(kind)}: {advice}")
    if ("psycopg", "Connection") in kinds:
        return _Psycopg(connection)
    if ("sqlalchemy", "scoped_session") in kinds:
        return _Session(connection())
    if ("sqlalchemy", "Session") in kinds:
        return _Session(connection)
    if ("sqlalchemy", "Connection") in kinds:
        return _Connection(connection)
    if ("sqlalchemy", "PoolProxiedConnection") in kinds:
        return foreign(connection.dbapi_connection)
    if ("django", "BaseDatabaseWrapper") in kinds or ("django", "ConnectionProxy") in kinds:
        return _django(connection.alias)
    raise UnusableConnection(f"publish_in takes {_KINDS}, not {type(connection).__name__}")


class _Psycopg2(Foreign):
    def __init__(self, connection: Any) -> None:
        if connection.async_:
            raise UnusableConnection("publish_in is for synchronous code, and this psycopg2 connection is asynchronous")
        self._connection = connection

    def raw(self) -> object:
        return self._connection

    def in_autocommit(self) -> bool:
        return bool(self._connection.autocommit) and self._connection.info.transaction_status == _IDLE

    def rows(self, sql: str, parameters: tuple[Any, ...] | None) -> Rows:
        # A cursor of the plain kind: the connection's own may return rows as dictionaries.
        with contextlib.closing(self._connection.cursor(cursor_factory=pg.cursor)) as cursor:
            cursor.execute(sql, parameters)
            return cursor.fetchall() if cursor.description else ()


class _Psycopg(Foreign):
    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def raw(self) -> object:
        return self._connection

    def in_autocommit(self) -> bool:
        return bool(self._connection.autocommit) and self._connection.info.transaction_status == _IDLE

    def rows(self, sql: str, parameters: tuple[Any, ...] | None) -> Rows:
        from psycopg import ClientCursor, rows  # optional

        # Parameters become part of the text, as with psycopg2: the server then finds their types by itself.
        with ClientCursor(self._connection, row_factory=rows.tuple_row) as cursor:
            cursor.execute(sql, parameters)
            return cursor.fetchall() if cursor.description else ()


# SQLAlchemy ----------------------------------------------------------------------------------------------------


class _Connection(Foreign):
    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def connection(self) -> Any:
        return self._connection

    def raw(self) -> object:
        return self.connection().connection.driver_connection

    def in_autocommit(self) -> bool:
        connection = self.connection()
        _refuse_dialect(connection.dialect)
        return bool(connection.connection.dbapi_connection.autocommit)

    def rows(self, sql: str, parameters: tuple[Any, ...] | None) -> Rows:
        connection = self.connection()
        if connection.dialect.driver == "asyncpg" and parameters:
            sql, parameters = _numbered(sql, parameters)
        answer = connection.exec_driver_sql(sql, parameters or None)
        return answer.fetchall() if answer.returns_rows else ()


class _Session(_Connection):
    def __init__(self, session: Any) -> None:
        self._session = session

    def connection(self) -> Any:
        # Each time: a commit in the block gives it back, and the next transaction may have another one.
        return self._session.connection()

    def enter(self, database: Database) -> Wakes:
        session = self._session
        if session.autoflush and not session._flushing:
            session.flush()  # as before any statement: in the block, a new object has its key
        if not self._commits():
            return Wakes(told=False)
        hook = session.info.setdefault(__name__, None) or _Hook(session)
        return hook.wakes.setdefault(database, Wakes())

    def leave(self, database: Database, wakes: Wakes) -> None:
        if wakes.told and not self._session.in_transaction():
            tell(database, wakes)  # it was committed in the block

    def _commits(self) -> bool:
        """False: it was given a Connection, whose owner may commit later than the session does."""
        kinds = {kind.__name__ for kind in type(self._session.get_bind()).__mro__}
        return "Connection" not in kinds


class _Hook:
    """What a Session does after its commits, as long as it lives: it tells whom its blocks have noted."""

    def __init__(self, session: Any) -> None:
        from sqlalchemy import event  # not for those who have no Session

        self.wakes: dict[Database, Wakes] = {}
        session.info[__name__] = self
        event.listen(session, "after_commit", self._committed)
        event.listen(session, "after_soft_rollback", self._rolled_back)

    def _committed(self, session: Any) -> None:
        if not session.in_nested_transaction():  # that was a savepoint
            for database, wakes in self.wakes.items():
                tell(database, wakes)

    def _rolled_back(self, _: Any, transaction: Any) -> None:
        if transaction.parent is None:
            for wakes in self.wakes.values():
                wakes.forget()


def _refuse_dialect(dialect: Any) -> None:
    if dialect.name != "postgresql":
        raise UnusableConnection(f"this is a connection to {dialect.name}, not to PostgreSQL")
    if dialect.driver not in ("psycopg2", "psycopg", "asyncpg"):
        raise UnusableConnection(f"the driver {dialect.driver} is not supported: use psycopg2, psycopg or asyncpg")


def _numbered(sql: str, parameters: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
    """The statement for asyncpg, which wants to know a parameter's type where our statements let the server find it.

    So only bytes are parameters, and what the statement itself calls text; the rest becomes part of the statement.
    """
    texts = sql.split("%s")
    data: list[bytes | str] = []
    parts = [texts[0]]
    for value, text in zip(parameters, texts[1:], strict=True):
        if isinstance(value, bytes | bytearray | memoryview):
            data.append(bytes(value))
            parts.append(f"${len(data)}::bytea")
        elif isinstance(value, str) and text.startswith("::text"):
            data.append(value)
            parts.append(f"${len(data)}")
        else:
            parts.append(_literal(value))
        parts.append(text)
    return "".join(parts).replace("%%", "%"), tuple(data)


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return f"({value!r})"
    if isinstance(value, list | tuple):
        return f"ARRAY[{', '.join(map(_literal, value))}]" if value else "'{}'"
    text = str(value).replace("\\", "\\\\").replace("'", "''").replace("%", "%%")
    return f" E'{text}'"


# Django --------------------------------------------------------------------------------------------------------


class _Django(Foreign):
    def __init__(self, connection: Any) -> None:
        if connection.vendor != "postgresql":
            raise UnusableConnection(
                f'the database "{connection.alias}" of Django is {connection.vendor}, not PostgreSQL'
            )
        self._connection = connection

    def raw(self) -> object:
        return self._connection.connection

    def in_autocommit(self) -> bool:
        return bool(self._connection.get_autocommit())

    def rows(self, sql: str, parameters: tuple[Any, ...] | None) -> Rows:
        with self._connection.cursor() as cursor:
            cursor.execute(sql, parameters)
            return cursor.fetchall() if cursor.description else ()

    def enter(self, database: Database) -> Wakes:
        return Wakes(told=self._connection.in_atomic_block)

    def leave(self, database: Database, wakes: Wakes) -> None:
        if wakes.told and self._connection.in_atomic_block:
            # Django forgets it if a savepoint around the block is rolled back.
            self._connection.on_commit(lambda: tell(database, wakes))


def _django(alias: str) -> Foreign:
    try:
        from django.db import connections  # optional
        from django.utils.connection import ConnectionDoesNotExist
    except ImportError as exc:
        raise UnusableConnection(f"{alias!r} would be a connection of Django, which is not installed") from exc
    try:
        return _Django(connections[alias])
    except ConnectionDoesNotExist as exc:
        raise UnusableConnection(f"Django has no database {alias!r}: {exc}") from exc
