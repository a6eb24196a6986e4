import concurrent.futures
import contextlib
import logging
import re
import subprocess
import sys

import kombu
import psycopg2
import pytest
from conftest import execute
from watching import Consuming, Store, publish

from kombu_pg import schema
from kombu_pg.errors import SchemaMissing, SchemaOutdated, SchemaTooNew


def connect(broker):
    with kombu.Connection(broker) as connection:
        connection.connect()


def tables(store, name="kombu_pg"):
    return store.value("SELECT count(*) FROM pg_tables WHERE schemaname = %s", (name,))


def test_an_empty_database_is_installed_on_first_use_and_says_so(empty, caplog):
    connect(empty.broker())

    assert empty.execute("SELECT version, serves FROM kombu_pg.installation") == [
        (max(schema.migrations()), schema.SERVES[max(schema.migrations())])
    ]
    (record,) = [record for record in caplog.records if record.name == "kombu_pg.schema"]
    assert record.levelno == logging.WARNING
    assert re.fullmatch(
        r'installed schema "kombu_pg" in database "celery_pg_store_\w+", owner "\w+"', record.getMessage()
    )


def test_what_is_installed_is_not_touched_again(store):
    before = store.value("SELECT id FROM kombu_pg.installation")

    connect(store.broker())

    assert store.value("SELECT id FROM kombu_pg.installation") == before


def test_every_migration_says_whom_it_still_serves():
    assert schema.SERVES.keys() == schema.migrations().keys()
    assert schema.NEEDS in schema.migrations()
    assert list(schema.migrations()) == list(range(1, len(schema.migrations()) + 1))


def test_of_many_threads_at_once_one_installs(empty, caplog):
    # Different names: threads that share their options share their sessions, too.
    brokers = [empty.broker(application_name=f"t{number}") for number in range(25)]

    with concurrent.futures.ThreadPoolExecutor(len(brokers)) as pool:
        list(pool.map(connect, brokers))

    assert [record.name for record in caplog.records].count("kombu_pg.schema") == 1


@pytest.mark.parametrize("count", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_of_many_processes_at_once_one_installs(empty, count):
    program = (
        "import logging, sys, kombu, kombu_pg; logging.basicConfig(); sys.stdin.readline(); "
        "connection = kombu.Connection(sys.argv[1]); connection.connect(); connection.close()"
    )
    command = [sys.executable, "-c", program, empty.broker()]
    streams = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(subprocess.Popen(command, **streams)) for _ in range(count)]
        said = [process.communicate("go\n", timeout=60)[1] for process in processes]

    assert [process.returncode for process in processes] == [0] * count
    assert "".join(said).count("installed schema") == 1


def test_a_missing_schema_is_refused_where_it_may_not_be_installed(empty):
    with pytest.raises(SchemaMissing) as refusal:
        connect(empty.broker(auto_install="false"))

    assert str(refusal.value) == (
        'schema "kombu_pg" is not installed and auto_install is off: run "celery -A app pg migrate"'
    )
    assert tables(empty) == 0


def test_an_outdated_schema_is_refused_and_not_altered(store):
    store.execute("UPDATE kombu_pg.installation SET version = 1, serves = 1")

    with pytest.raises(SchemaOutdated) as refusal:
        connect(store.broker())

    assert str(refusal.value) == (
        f'schema "kombu_pg" is at version 1 but this release needs {schema.NEEDS}: run "celery -A app pg migrate"'
    )
    assert store.value("SELECT version FROM kombu_pg.installation") == 1


def test_a_newer_schema_that_still_serves_us_is_used(store):
    store.execute("UPDATE kombu_pg.installation SET version = 99")

    connect(store.broker())


def test_a_schema_that_no_longer_serves_us_is_refused(store):
    store.execute("UPDATE kombu_pg.installation SET version = 99, serves = 98")

    with pytest.raises(SchemaTooNew) as refusal:
        connect(store.broker())

    assert str(refusal.value) == (
        'schema "kombu_pg" is at version 99 and no longer serves code older than version 98, '
        f"this release is at {max(schema.migrations())}: upgrade celery-pg"
    )


@pytest.fixture
def poor(empty):
    """A role that may connect, and no more; the store as it sees it."""
    name = "wake_poor"
    database = empty.value("SELECT current_database()")
    with contextlib.suppress(psycopg2.errors.DuplicateObject):
        empty.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'poor-secret'")
    empty.execute(f"REVOKE CREATE ON DATABASE {database} FROM PUBLIC")
    yield Store(re.sub(r"//[^@/]*@", f"//{name}:poor-secret@", empty.url))
    empty.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_a_role_that_may_not_create_is_told_what_to_do(empty, poor):
    with pytest.raises(SchemaMissing) as refusal:
        connect(poor.broker())

    said = str(refusal.value)
    assert said.startswith('this role may not install or use schema "kombu_pg" (permission denied for database')
    assert 'let an owner of the database run "celery -A app pg migrate", then GRANT USAGE ON SCHEMA kombu_pg' in said
    assert "poor-secret" not in said


def test_a_role_that_may_not_use_the_schema_is_told_what_to_do(store, poor):
    with pytest.raises(SchemaMissing, match="GRANT USAGE ON SCHEMA kombu_pg and ALL ON ALL TABLES") as refusal:
        connect(poor.broker())

    assert "permission denied for schema kombu_pg" in str(refusal.value)


def test_a_role_that_was_granted_what_the_message_says_may_publish_and_consume(store, poor):
    store.execute("GRANT USAGE ON SCHEMA kombu_pg TO wake_poor")
    for kind in ("TABLES", "SEQUENCES", "ROUTINES"):
        store.execute(f"GRANT ALL ON ALL {kind} IN SCHEMA kombu_pg TO wake_poor")

    with Consuming(poor.broker()) as consumer:
        publish(poor.broker(), "allowed")

        assert consumer.until(1) == ["allowed"]


def test_a_database_that_cannot_hold_every_name_is_refused(server_url, empty):
    name = empty.value("SELECT current_database()") + "_latin"
    execute(server_url, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
    try:
        latin = Store(empty.url.replace(name.removesuffix("_latin"), name))

        with pytest.raises(SchemaMissing) as refusal:
            connect(latin.broker())

        assert str(refusal.value) == (
            f'database "{name}" has the encoding LATIN1: names and headers need a UTF8 database'
        )
        assert tables(latin) == 0
    finally:
        execute(server_url, f"DROP DATABASE {name} WITH (FORCE)")


def test_two_schemas_of_one_database_neither_see_nor_wake_each_other(store):
    here, there = store.broker(), store.broker(schema="other")
    with Consuming(here) as ours, Consuming(there) as theirs:
        ours.rest()
        theirs.rest()

        publish(there, "for them")

        assert theirs.until(1) == ["for them"]
        assert ours.rest() == []
        assert store.value("SELECT count(*) FROM kombu_pg.message") == 0


def test_a_schema_of_another_name_holds_nothing_that_names_ours(empty):
    script = schema.script("other")

    assert "kombu_pg" not in re.sub(r"--.*", "", script)
    assert schema.script("kombu_pg").replace("kombu_pg", "other") == script
