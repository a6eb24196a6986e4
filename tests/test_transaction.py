"""In whose transaction does a statement run?"""

import asyncio
import contextlib
import os
import threading
from datetime import datetime, timedelta, timezone

import kombu
import pytest
from watching import Consuming, eventually, publish, publisher

from kombu_pg import errors
from kombu_pg.database import Statement, database_for
from kombu_pg.options import Options
from kombu_pg.transaction import current, transaction


@pytest.fixture
def queue(store):
    with kombu.Connection(store.broker()) as connection:
        kombu.Queue("q", channel=connection.default_channel).declare()
    return store


@pytest.fixture
def database(queue):
    database = database_for(Options.parse(queue.broker()))
    database.retain()
    yield database
    database.release()


def stored(store):
    return store.value("SELECT count(*) FROM kombu_pg.message")


def test_what_is_published_in_a_block_is_stored_when_the_block_ends(queue, database):
    with publisher(queue.broker()) as producer:
        with transaction(database):
            producer.publish(1, routing_key="q")
            producer.publish(2, routing_key="q")
            assert stored(queue) == 0

        assert stored(queue) == 2


def test_an_exception_out_of_a_block_leaves_nothing(queue, database):
    def fail(producer):
        with transaction(database):
            producer.publish(1, routing_key="q")
            raise RuntimeError

    with publisher(queue.broker()) as producer:
        with pytest.raises(RuntimeError):
            fail(producer)
        producer.publish(2, routing_key="q")

    assert stored(queue) == 1


def test_an_inner_block_commits_with_the_outer_one(queue, database):
    with publisher(queue.broker()) as producer, transaction(database) as outer:
        with transaction(database) as inner:
            producer.publish(1, routing_key="q")
        assert inner is outer
        assert stored(queue) == 0


def test_a_url_with_other_options_leads_into_the_same_transaction(queue, database):
    with publisher(queue.broker(poll_interval=1)) as producer, transaction(database):
        producer.publish(1, routing_key="q")
        assert stored(queue) == 0


def test_an_idle_consumer_is_told_after_the_commit(queue, database):
    with Consuming(queue.broker()) as consuming, publisher(queue.broker()) as producer:
        consuming.rest()
        with transaction(database):
            producer.publish("now", routing_key="q")

        assert consuming.until(1) == ["now"]


def test_an_eta_that_was_published_in_a_block_is_delivered_when_due(queue, database):
    due = datetime.now(timezone.utc) + timedelta(seconds=0.5)
    with Consuming(queue.broker()) as consuming, publisher(queue.broker()) as producer:
        consuming.rest()
        with transaction(database):
            producer.publish("later", routing_key="q", headers={"task": "t", "id": "i", "eta": due.isoformat()})

        assert consuming.until(1) == ["later"]
        assert datetime.now(timezone.utc) >= due


def test_another_thread_does_not_publish_into_the_block(queue, database):
    with transaction(database):
        thread = threading.Thread(target=publish, args=(queue.broker(), 1))
        thread.start()
        thread.join()

        assert stored(queue) == 1


def test_a_task_begun_in_a_block_is_outside_of_it(database):
    async def block():
        with transaction(database) as opened:
            here = current(database)
            child = asyncio.create_task(asyncio.to_thread(current, database))
            return opened is here, await child, await asyncio.create_task(inside())

    async def inside():
        return current(database)

    assert asyncio.run(block()) == (True, None, None)


def test_a_forked_child_is_outside_of_the_block(database):
    with transaction(database):
        child = os.fork()
        if not child:
            os._exit(0 if current(database) is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_connection_lost_in_a_block_stores_nothing_and_says_so_once(queue, database):
    def publish_around_a_loss(producer):
        with transaction(database):
            producer.publish(1, routing_key="q")
            queue.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND state = 'idle in transaction'"
            )
            producer.publish(2, routing_key="q", retry=True)

    with publisher(queue.broker()) as producer:
        with pytest.raises(errors.Unavailable, match="nothing of"):
            publish_around_a_loss(producer)
        assert stored(queue) == 0

        producer.publish(3, routing_key="q")
    assert stored(queue) == 1


def test_a_refused_publish_leaves_the_transaction_usable(queue, database):
    with publisher(queue.broker()) as producer, transaction(database):
        with pytest.raises(errors.Rejected):
            producer.publish(1, routing_key="nowhere", headers={"task": "t", "id": "i"})
        producer.publish(2, routing_key="q")

    assert stored(queue) == 1


def test_a_block_in_which_a_statement_failed_is_not_taken_for_committed(queue, database):
    def swallow():
        with transaction(database) as opened, contextlib.suppress(errors.Rejected):
            opened.run(Statement("SELECT 1 / 0", None, list))

    with pytest.raises(errors.Unavailable, match="failed"):
        swallow()

    with publisher(queue.broker()) as producer, transaction(database):
        producer.publish(1, routing_key="q")
    assert stored(queue) == 1


def test_a_block_without_a_statement_opens_no_transaction(queue, database):
    idle = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"
    with transaction(database) as opened:
        assert queue.value(idle) == 0
        opened.run(Statement("SELECT 1", None, list))
        assert queue.value(idle) == 1


def test_a_batch_is_part_of_the_transaction(queue, database):
    with publisher(queue.broker()) as producer, transaction(database):
        with producer.batch():
            producer.publish(1, routing_key="q")
            producer.publish(2, routing_key="q")
        assert stored(queue) == 0

    assert eventually(lambda: stored(queue)) == 2


def test_a_deferred_statement_runs_before_the_next_one(queue, database):
    with transaction(database) as opened:
        opened.defer(Statement("CREATE TEMPORARY TABLE note (text text)", None, list))
        opened.defer(Statement("INSERT INTO note VALUES (%s)", ("deferred",), list))
        assert opened.run(Statement("SELECT text FROM note", None, list)) == [("deferred",)]


def test_a_deferred_statement_that_is_refused_rolls_everything_back(queue, database):
    def fail(producer):
        with transaction(database) as opened:
            producer.publish(1, routing_key="q")
            opened.defer(Statement("SELECT 1 / 0", None, list))

    with publisher(queue.broker()) as producer:
        with pytest.raises(errors.Rejected):
            fail(producer)
        producer.publish(2, routing_key="q")
    assert stored(queue) == 1


def test_a_transaction_of_deferred_statements_is_one_round_trip_and_commits(queue, database):
    with transaction(database) as opened:
        opened.defer(Statement("CREATE TABLE note (text text)", None, list))
        opened.defer(Statement("INSERT INTO note VALUES (%s)", ("100 %",), list))

    assert queue.value("SELECT text FROM note") == "100 %"
    queue.execute("DROP TABLE note")
