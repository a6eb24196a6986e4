"""How does kombu drive us?"""

import time
from concurrent.futures import ThreadPoolExecutor

import kombu
import pytest

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
