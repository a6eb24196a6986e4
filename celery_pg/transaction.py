"""How do I publish inside my own transaction?"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery, current_app
from kombu import Connection

from celery_pg.connections import Foreign, UnusableConnection, foreign
from kombu_pg import errors, schema
from kombu_pg.database import Database, database_for
from kombu_pg.options import Options, redact
from kombu_pg.store import store_for
from kombu_pg.transaction import borrowed
from kombu_pg.transport import Transport

__all__ = ["UnusableConnection", "publish_in"]


@contextmanager
def publish_in(connection: Any, app: Celery | Connection | None = None, *, wake: bool = False) -> Iterator[None]:
    """A block in which this thread (or asyncio task) publishes in the transaction that is open on `connection`.

    Whoever commits it publishes them; rolled back, to a savepoint too, they never were. Nothing is committed here, and
    nothing else runs in the transaction: queues are declared outside of it.

    Args:
        connection: a SQLAlchemy Session (it is flushed) or Connection, a psycopg2 or psycopg 3 connection, a Django
            connection or its alias.
        app: whose broker is in the same database, the current app where it is None; or a kombu connection to it. Behind
            a gate, it is that one of its brokers; a call for another one raises UnusableConnection.
        wake: tell idle workers by a NOTIFY inside the transaction. Without, they are told after the commit of a Session
            or of Django's `atomic`; else they look by themselves within `poll_interval`.

    Raises:
        UnusableConnection: it is in autocommit mode, leads to another store than the app's broker, or is of no kind
            that is known. Nothing was done to it.
        Unavailable: the app's broker cannot be reached to compare them, the first time.
    """
    theirs = foreign(connection)
    databases = _databases(app or current_app._get_current_object())
    theirs.refuse_autocommit()
    database = _shared(theirs, databases)
    wakes = theirs.enter(database)
    try:
        with borrowed(database, theirs, wakes, asked=True) as opened:
            yield
            tellers = wakes.take(database, clock=False) if wake else None
            if tellers is not None:
                opened.run(tellers)
    finally:
        theirs.leave(database, wakes)


# The app's broker ----------------------------------------------------------------------------------------------

#: The database behind an app's pool of connections, which lives as long as the settings it was made of are in force; or
#: behind a connection.
_known_databases: weakref.WeakKeyDictionary[Any, Database] = weakref.WeakKeyDictionary()


def _databases(app: Celery | Connection) -> list[Database]:
    """The database of the app's broker; behind a gate there may be several."""
    known_by = app if isinstance(app, Connection) else app.pool  # it puts in the gate that a URL asks for
    gate = None if isinstance(app, Connection) else getattr(app.amqp, "pg_gate", None)
    if gate is not None:
        return _of_gate(app, gate)
    known = _known_databases.get(known_by)
    if known is None:
        known = _known_databases[known_by] = database_for(_options(app))
    return [known]


def _of_gate(app: Any, gate: Any) -> list[Database]:
    databases: list[Database] = gate.databases
    if not databases:
        raise UnusableConnection(f"none of the brokers in pg_gate of app {app.main!r} is PostgreSQL")
    return databases


def _options(app: Celery | Connection) -> Options:
    if isinstance(app, Connection):
        return _options_of(app, "this connection")
    with app.connection_for_write() as connection:
        return _options_of(connection, f"app {app.main!r}")


def _options_of(connection: Connection, whose: str) -> Options:
    try:
        ours = issubclass(connection.get_transport_cls(), Transport)
    except (ImportError, KeyError):
        ours = False
    if not ours:
        raise UnusableConnection(f"the broker of {whose} is {redact(connection.as_uri())}, not PostgreSQL: pass app=")
    options: Options = connection.transport.options()
    return options


# The same store ------------------------------------------------------------------------------------------------

#: Which store (schema -> installation) a driver's connection was seen to lead to.
_known_stores: weakref.WeakKeyDictionary[object, dict[str, str]] = weakref.WeakKeyDictionary()


def _shared(theirs: Foreign, databases: list[Database]) -> Database:
    """The one that the connection leads to."""
    refused: errors.PGError | None = None
    for database in databases:
        try:
            if not _is_remembered(theirs, database):
                _refuse_other_store(theirs, database)
        except (UnusableConnection, errors.Unavailable) as exc:
            refused = refused or exc
        else:
            return database
    assert refused is not None
    raise refused


def _refuse_other_store(theirs: Foreign, database: Database) -> None:
    name = database.options.schema
    _installation(database)  # the first use installs it
    found = _installation_of(theirs, name)
    if found != database.installation:
        database.installation = None  # it may have been installed anew
    if found != _installation(database):
        raise UnusableConnection(
            f'this connection leads to another store than the app\'s broker: schema "{name}" is installation {found} '
            f"there and {database.installation} in the broker"
        )
    _remember(theirs, name, found)


def _is_remembered(theirs: Foreign, database: Database) -> bool:
    try:
        known = _known_stores.get(theirs.raw(), {}).get(database.options.schema)
    except TypeError:  # this driver's connections cannot be remembered
        return False
    return known is not None and known == database.installation


def _remember(theirs: Foreign, name: str, installation: str) -> None:
    try:
        _known_stores.setdefault(theirs.raw(), {})[name] = installation
    except TypeError:
        return


def _installation(database: Database) -> str:
    """The id of the store behind the broker URL, which is installed if it is not."""
    if database.installation is None:
        with database.session() as session:
            schema.check(session, database.options)
            database.installation = session.run(store_for(database.options).installation())
    return database.installation


def _installation_of(theirs: Foreign, name: str) -> str:
    """The id of the store behind the connection."""
    statements = store_for(Options(dsn="", schema=name))
    allowed = theirs.run(statements.may_publish())
    if allowed is None:
        raise UnusableConnection(
            f'this connection leads to a database that has no schema "{name}": it is not the one of the app\'s broker'
        )
    if not allowed:
        raise UnusableConnection(
            f"the role of this connection may not publish: GRANT USAGE ON SCHEMA {name} and ALL ON ALL TABLES, "
            f"SEQUENCES and ROUTINES IN SCHEMA {name} to it"
        )
    return theirs.run(statements.installation())
