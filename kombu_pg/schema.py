"""Do the tables fit this code?

Numbered SQL files, applied in order, in one transaction, under an advisory lock. A released file is never edited.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources

from kombu_pg import errors
from kombu_pg.database import Session, Statement
from kombu_pg.options import Options

__all__ = ["check", "deployment", "install", "installed", "migrate", "migrations", "script", "verify"]

logger = logging.getLogger(__name__)

#: The oldest schema version this code can work on.
NEEDS = 12
#: Per migration, the oldest schema version whose code still works after it (itself, where older code breaks).
SERVES = {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1, 10: 1, 11: 1, 12: 1}


@functools.cache
def migrations() -> dict[int, str]:
    """Version -> SQL as written, that is for the schema `kombu_pg`."""
    files = sorted(
        (
            entry
            for entry in resources.files("kombu_pg").joinpath("migrations").iterdir()
            if entry.name.endswith(".sql")
        ),
        key=lambda entry: entry.name,
    )
    return {int(entry.name[:4]): entry.read_text(encoding="utf-8") for entry in files}


def script(schema: str, since: int = 0) -> str:
    """The SQL that brings `schema` from version `since` (0 = nothing there) to this release's."""
    newest = max(migrations())
    parts = [f"CREATE SCHEMA IF NOT EXISTS {schema};"] if since == 0 else []
    parts += [_for_schema(sql, schema) for version, sql in migrations().items() if version > since]
    if since == 0:
        parts.append(f"INSERT INTO {schema}.installation (version, serves) VALUES ({newest}, {SERVES[newest]});")
    else:
        parts.append(f"UPDATE {schema}.installation SET version = {newest}, serves = {SERVES[newest]};")
    return "\n".join(parts)


def deployment(schema: str, since: int = 0) -> str:
    """The same as a file for psql: one transaction, in which nobody else installs or alters the schema."""
    newest = max(migrations())
    if since >= newest:
        return f'-- schema "{schema}" is at version {since}: nothing to do\n'
    lock = f"SELECT pg_advisory_xact_lock(hashtextextended('{schema}.install', 0));"
    title = f'-- schema "{schema}", from version {since} to {newest}; run it as the owner of the schema'
    return "\n".join([title, "BEGIN;", lock, script(schema, since), "COMMIT;", ""])


def _for_schema(sql: str, schema: str) -> str:
    # Also inside string literals: lock keys, channels and set-up calls must differ between two installations.
    return re.sub(r"\bkombu_pg\b", schema, sql)


def check(session: Session, options: Options) -> None:
    """Return if the schema fits; an empty database is installed first, where `auto_install` allows it.

    Raises:
        SchemaMissing: there is none, and it may not be created.
        SchemaOutdated: it is older than this release needs; it is never altered behind the user's back.
        SchemaTooNew: it no longer serves code this old.
    """
    versions = installed(session, options.schema)
    if versions is None:
        if not options.auto_install:
            raise errors.SchemaMissing(
                f'schema "{options.schema}" is not installed and auto_install is off: run "celery -A app pg migrate"'
            )
        versions = install(session, options.schema)
    _refuse_misfit(options.schema, *versions)


def verify(session: Session, schema: str) -> tuple[int, int]:
    """-> the schema's version and the oldest it serves; like `check`, but nothing is ever installed."""
    versions = installed(session, schema)
    if versions is None:
        raise errors.SchemaMissing(f'schema "{schema}" is not installed: run "celery -A app pg migrate"')
    _refuse_misfit(schema, *versions)
    return versions


def _refuse_misfit(schema: str, version: int, serves: int) -> None:
    if version < NEEDS:
        raise errors.SchemaOutdated(
            f'schema "{schema}" is at version {version} but this release needs {NEEDS}: run "celery -A app pg migrate"'
        )
    _refuse_too_new(schema, version, serves)


def _refuse_too_new(schema: str, version: int, serves: int) -> None:
    if serves > max(migrations()):
        raise errors.SchemaTooNew(
            f'schema "{schema}" is at version {version} and no longer serves code older than version {serves}, '
            f"this release is at {max(migrations())}: upgrade celery-pg"
        )


def install(session: Session, schema: str) -> tuple[int, int]:
    """Create the schema unless somebody else just has; commits. Returns its version and the oldest it serves.

    Raises:
        SchemaMissing: this role may not create it, or the database cannot hold it.
    """
    with _alone(session, schema):
        return installed(session, schema) or _create(session, schema)


def migrate(session: Session, schema: str) -> tuple[int, int]:
    """Bring the schema to this release's version, or leave a newer one that serves this release; commits.

    Blocks for as long as a migration takes. -> the version it had (0 = none) and the version it has.

    Raises:
        SchemaMissing: this role may not create or alter it, or the database cannot hold it.
        SchemaTooNew: it no longer serves code this old.
    """
    with _alone(session, schema):
        versions = installed(session, schema)
        if versions is None:
            return 0, _create(session, schema)[0]
        version, serves = versions
        _refuse_too_new(schema, version, serves)
        if version >= max(migrations()):
            return version, version
        session.run(_command(script(schema, since=version)), timeout=None)
        logger.warning('migrated schema "%s" from version %s to %s', schema, version, max(migrations()))
        return version, max(migrations())


@contextmanager
def _alone(session: Session, schema: str) -> Iterator[None]:
    """One transaction in which nobody else installs or alters the schema; a failure closes the session."""
    with _rights_explained(schema):
        session.run(_command("BEGIN"))
        try:
            lock = "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))"
            session.run(Statement(lock, (f"{schema}.install",), lambda _: None), timeout=None)
            yield
            session.run(_command("COMMIT"))
        except BaseException:
            session.close()
            raise


def _create(session: Session, schema: str) -> tuple[int, int]:
    asked = "SELECT current_setting('server_encoding'), current_database(), current_user"
    encoding, database, owner = session.run(Statement(asked, (), lambda rows: rows[0]))
    if encoding != "UTF8":
        raise errors.SchemaMissing(
            f'database "{database}" has the encoding {encoding}: names and headers need a UTF8 database'
        )
    session.run(_command(script(schema)), timeout=None)
    logger.warning('installed schema "%s" in database "%s", owner "%s"', schema, database, owner)
    newest = max(migrations())
    return newest, SERVES[newest]


def installed(session: Session, schema: str) -> tuple[int, int] | None:
    """-> the schema's version and the oldest version whose code it serves; None where there is no schema."""
    # Not to_regclass: it asks the session's cache, which waiting for another one's installation does not refresh.
    asked = "SELECT EXISTS (SELECT FROM pg_tables WHERE schemaname = %s AND tablename = 'installation')"
    if not session.run(Statement(asked, (schema,), lambda rows: bool(rows[0][0]))):
        return None
    with _rights_explained(schema):
        return session.run(
            Statement(f"SELECT version, serves FROM {schema}.installation", (), lambda rows: (rows[0][0], rows[0][1]))
        )


def _command(sql: str) -> Statement[None]:
    return Statement(sql, None, lambda _: None)


@contextmanager
def _rights_explained(schema: str) -> Iterator[None]:
    try:
        yield
    except errors.SchemaError as exc:
        if isinstance(exc, errors.SchemaMissing):
            raise
        raise errors.SchemaMissing(
            f'this role may not install or use schema "{schema}" ({exc.__cause__}): let an owner of the database run '
            f'"celery -A app pg migrate", then GRANT USAGE ON SCHEMA {schema} and ALL ON ALL TABLES, SEQUENCES and '
            f"ROUTINES IN SCHEMA {schema} to this role"
        ) from exc
