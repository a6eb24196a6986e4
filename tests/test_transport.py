"""How does kombu drive us?"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import kombu
import pytest
from celery import Celery
from watching import Consuming, eventually, publisher

import kombu_pg
from kombu_pg.database import Statement, database_for
from kombu_pg.options import Options
from kombu_pg.store import store_for

DEAD = "pg://nobody@127.0.0.1:1/nowhere?sslmode=prefer&application_name=dead"


def with_options(url, **options):
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return f"{url}{'&' if '?' in url else '?'}{query}"


def test_a_list_of_urls_goes_on_to_the_next_one_with_all_of_its_query(database_url):
    alive = with_options(database_url, schema="second", delivery_limit=7)

    with kombu.Connection(f"{DEAD};{alive}") as connection:
        connection.ensure_connection(max_retries=3, interval_start=0)

        assert connection.connection.options.schema == "second"
        assert connection.connection.options.delivery_limit == 7


def test_a_connection_shows_its_password_nowhere(database_url):
    connection = kombu.Connection("pg://somebody:s3cret@127.0.0.1:5432/db?sslmode=require&password=s3cret")

    assert connection.transport.client is connection
    shown = [connection.as_uri(), repr(connection), str(connection.info()["hostname"])]
    assert [text for text in shown if "s3cret" in text] == []


def test_a_clone_of_a_connection_still_knows_its_password():
    connection = kombu.Connection("pg://somebody:s3cret@127.0.0.1:5432/db")

    assert connection.clone().as_uri(include_password=True) == "pg://somebody:s3cret@127.0.0.1:5432/db"


@pytest.mark.parametrize("scheme", ["pg", "postgresql+psycopg2"])
def test_neither_celerys_report_nor_what_a_worker_says_of_its_connection_shows_a_password(scheme):
    url = f"{scheme}://user:s3cret@127.0.0.1:1/db"
    broker = f"{url}?sslpassword=s3cret&listen_url=pg://user:s3cret@127.0.0.1:2"
    app = Celery("shown", broker=broker, backend=url, set_as_current=False)

    report = app.bugreport()
    with app.connection_for_read() as connection:
        stats = connection.info()
    del stats["password"]  # as a worker does

    assert "127.0.0.1" in report
    assert "127.0.0.1" in str(stats)
    assert "s3cret" not in report + str(stats) + repr(app.backend)
    assert app.backend.as_uri() == f"{scheme}://user:**@127.0.0.1:1/db"


@pytest.mark.parametrize("query", ["password=s3cret", "sslpassword=s3cret", "listen_url=pg://user:s3cret@host"])
def test_a_password_that_celery_would_show_in_its_report_is_warned_of(query, caplog):
    backend = Celery("shown", backend=f"pg://user@127.0.0.1:1/db?{query}", set_as_current=False).backend

    assert "put it in front of the @" in caplog.text
    assert "s3cret" not in caplog.text + backend.as_uri()


@contextlib.contextmanager
def missing_standby(run):
    """While the block runs, whatever waits for the flush waits for a standby, too, and there is none."""

    def standbys(setting, expected):
        run(Statement(f"ALTER SYSTEM {setting}", None, list))
        run(Statement("SELECT pg_reload_conf()", None, list))
        eventually(lambda: run(Statement("SHOW synchronous_standby_names", None, list)) == [(expected,)])

    standbys("SET synchronous_standby_names = 'nobody'", "nobody")
    try:
        yield
    finally:
        standbys("RESET synchronous_standby_names", "")


@pytest.mark.parametrize("idle", [False, True])
def test_a_publish_whose_wait_for_the_standby_is_cancelled_is_unavailable(tmp_path, idle):
    url = f"pg+embedded://{tmp_path}/postgres"
    cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"

    with kombu.Connection(url) as operator, Consuming(url) as consumer, publisher(url) as producer:
        consumer.rest()
        if not idle:
            consumer.channel.basic_cancel(next(iter(consumer.channel.feed.subscriptions)))
        run = operator.connection.run
        with missing_standby(run), ThreadPoolExecutor() as threads:
            published = threads.submit(producer.publish, {}, routing_key="q", retry=False)
            if idle:
                assert consumer.until(1) == [{}]  # as with RabbitMQ: before its publisher knows that it is safe
                assert not published.done()
            eventually(lambda: published.done() or run(Statement(cancel, None, lambda _: False)))

        with pytest.raises(kombu_pg.Unavailable, match="standby"):
            published.result()


def test_a_flush_covers_what_was_committed_before_without_one(store):
    options = Options.parse(store.broker())
    for _ in range(20):
        before = store.value("SELECT pg_current_wal_insert_lsn()")
        with store.session() as session, session.cursor() as cursor:
            cursor.execute("SET synchronous_commit = off")
            cursor.execute("SELECT pg_logical_emit_message(true, 'test', %s)", (os.urandom(4000),))

        database_for(options).run(store_for(options).flush())

        assert store.value("SELECT pg_current_wal_flush_lsn() - %s::pg_lsn > 4000", (before,))


@contextlib.contextmanager
def committing(store, level):
    """Sessions that begin in the block commit like this, unless they say otherwise."""
    alter = f"ALTER DATABASE {store.value('SELECT current_database()')}"
    store.execute(f"{alter} SET synchronous_commit = {level}")
    try:
        yield
    finally:
        store.execute(f"{alter} RESET synchronous_commit")


def test_a_retry_that_finds_its_message_waits_for_the_flush(store):
    with kombu.Connection(store.broker()) as connection:
        kombu.Queue("q", channel=connection.default_channel).declare()
    values = f"'', 'q', 0, NULL, NULL, NULL, NULL, NULL, '{{}}', decode('{os.urandom(4000).hex()}', 'hex')"
    for _ in range(20):
        publish_id = store.value("SELECT gen_random_uuid()::text")
        before = store.value("SELECT pg_current_wal_insert_lsn()")
        with store.session() as session, session.cursor() as cursor:
            # An attempt whose connection was lost between its first commit and the flush.
            cursor.execute("SET synchronous_commit = off")
            cursor.execute(f"SELECT kombu_pg.enqueue({values}, '{publish_id}', NULL, false)")

        store.execute(f"CALL kombu_pg.publish(true, {values}, '{publish_id}', 1, false, NULL, false)")

        assert store.value("SELECT pg_current_wal_flush_lsn() - %s::pg_lsn > 4000", (before,))
    assert store.value("SELECT count(*) FROM kombu_pg.message") == 20


@pytest.mark.parametrize("level", ["on", "off", "local"])
@pytest.mark.parametrize("idle", [False, True])
def test_a_publish_that_returned_is_flushed(store, level, idle):
    with committing(store, level), Consuming(store.broker()) as consumer, publisher(store.broker()) as producer:
        consumer.rest()
        if not idle:
            consumer.channel.basic_cancel(next(iter(consumer.channel.feed.subscriptions)))
        assert store.idle() == idle
        for _ in range(20):
            before = store.value("SELECT pg_current_wal_insert_lsn()")

            producer.publish(os.urandom(4000), routing_key="q", content_type="x/y", content_encoding="binary")

            # The message is at least as long in the log.
            assert store.value("SELECT pg_current_wal_flush_lsn() - %s::pg_lsn > 4000", (before,))
            if idle:
                consumer.until(1)
                consumer.ack()
                consumer.received.clear()
                consumer.rest(0.02)
