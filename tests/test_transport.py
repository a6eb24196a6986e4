"""How does kombu drive us?"""

import time
from concurrent.futures import ThreadPoolExecutor

import kombu
import pytest
from celery import Celery

import kombu_pg
from kombu_pg.database import Statement

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


def test_a_publish_whose_wait_for_the_standby_is_cancelled_is_unavailable(tmp_path):
    url = f"pg+embedded://{tmp_path}/postgres"
    waiting = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"

    with kombu.Connection(url) as connection, kombu.Connection(url) as operator:
        producer = kombu.Producer(connection.channel())
        kombu.Queue("q", routing_key="q", channel=connection.default_channel).declare()
        run = operator.connection.run
        run(Statement("ALTER SYSTEM SET synchronous_standby_names = 'nobody'", None, list))
        run(Statement("SELECT pg_reload_conf()", None, list))
        eventually = time.monotonic() + 10
        while run(Statement("SHOW synchronous_standby_names", None, list)) != [("nobody",)]:
            assert time.monotonic() < eventually
        with ThreadPoolExecutor() as threads:
            published = threads.submit(producer.publish, {}, routing_key="q", retry=False)
            while not published.done():
                assert time.monotonic() < eventually
                run(Statement(waiting, None, list))

        with pytest.raises(kombu_pg.Unavailable, match="standby"):
            published.result()
