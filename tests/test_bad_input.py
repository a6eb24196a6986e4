import contextlib
import random

import kombu
import pytest
from amqp.exceptions import AMQPError
from brokers import send, take
from chaos.checker import ChaosWorker
from chaos.fuzz import names, sabotaged
from watching import eventually

from kombu_pg.errors import Rejected
from kombu_pg.message import unpacked


@pytest.fixture
def ran(store):
    """Numbers of what the worker has begun to run, once for each time."""
    store.execute("CREATE TABLE ran (number bigint)")
    yield lambda: {row[0] for row in store.execute("SELECT DISTINCT number FROM ran")}
    store.execute("DROP TABLE ran")


@pytest.fixture
def start(store, ran, tmp_path):
    """`start(app)`: a worker of that app; it is killed afterwards."""
    with contextlib.ExitStack() as stack:

        def start(app):
            broker = store.broker(poll_interval=5)
            worker = ChaosWorker("fuzzed", broker, store.url, tmp_path / "worker.log", app=app)
            stack.callback(worker.kill)
            return worker.wait_ready()

        yield start


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("app", ["chaos.fuzz_app", "chaos.fuzz_results_app"])
def test_whatever_is_published_the_worker_stays_up_and_it_runs_or_is_a_dead_letter_with_a_reason(
    store, start, ran, app, count
):
    worker = start(app)

    accepted, refused = publish_all(store.broker(), count)

    def lost():
        return accepted - ran() - dead(store)

    with contextlib.suppress(AssertionError):
        eventually(lambda: not (worker.alive and lost()), 60 + count / 40)
    assert worker.alive and "Unrecoverable error" not in worker.output(), worker.log
    assert not lost(), f"these have neither run nor are they dead letters: {worker.log}"
    print(f"{len(ran())} ran, {len(dead(store))} are dead letters, {refused} were refused")
    eventually(lambda: not store.value("SELECT count(*) FROM kombu_pg.message"), 30, "nothing is left")
    unheard = "SELECT id, reason, detail FROM kombu_pg.dead_letter WHERE heard_at IS NULL"
    eventually(lambda: not store.execute(unheard), 30, f"each dead letter is heard: {worker.log}")
    assert not store.execute("SELECT id FROM kombu_pg.dead_letter WHERE reason = '' OR coalesce(detail, '') = ''")
    assert ".anything[" in worker.output() and worker.output().count(" ready.") == 1


def publish_all(broker, count):
    """Publish so many, and one that is well-formed. -> the numbers that were accepted, how many were refused."""
    accepted, refused = {count}, 0
    with kombu.Connection(broker) as connection:
        channel = connection.channel()
        kombu.Queue("celery", channel=channel).declare()
        for number in range(count):
            try:
                publish(channel, sabotaged(number))
                accepted.add(number)
            except (Rejected, AMQPError):
                refused += 1
        headers = {"task": "chaos.fuzz_app.one", "id": "last", "fuzz": count}
        kombu.Producer(channel).publish([[1], {}, {}], routing_key="celery", headers=headers)
    return accepted, refused


def publish(channel, fields):
    channel.basic_publish(channel.prepare_message(**fields), "", "celery")


def dead(store):
    """The numbers of the dead letters; an errback that cannot be run has none."""
    rows = store.execute("SELECT properties FROM kombu_pg.dead_letter")
    return {unpacked(bytes(properties))[0].get("fuzz") for (properties,) in rows}


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_whatever_the_names_a_message_arrives_or_the_name_is_refused(store, count):
    arrived = refused = 0
    with kombu.Connection(store.broker()) as connection:
        for name in names(random.Random(0), count):
            channel = connection.channel()
            try:
                assert goes_round(channel, name)
                arrived += 1
            except (Rejected, AMQPError):
                refused += 1
                assert not name or name.isspace() or len(name) > 255 or {"\0", "\ud800"} & set(name)
            with contextlib.suppress(Rejected):
                channel.queue_delete(name)

    assert arrived > count
    assert refused >= 4
    assert store.value("SELECT count(*) FROM kombu_pg.message") == 0


def goes_round(channel, name):
    """A message arrives, through an exchange and by a key of that name, in a queue of that name."""
    channel.exchange_declare(name, "topic", auto_delete=False)
    channel.queue_declare(name, auto_delete=False)
    channel.queue_bind(name, name, name)
    send(channel, name, "hello", exchange=name)
    return take(channel, name, no_ack=True).body == "hello"


@pytest.mark.parametrize("priority", [True, 2**31, -(2**63), 10**30])
def test_a_priority_that_no_queue_has_counts_as_the_nearest(store, priority):
    with kombu.Connection(store.broker()) as connection:
        channel = connection.channel()
        kombu.Queue("q", channel=channel).declare()

        publish_body = channel.prepare_message("hello", priority=priority)
        channel.basic_publish(publish_body, "", "q")

    assert store.value("SELECT priority FROM kombu_pg.message") == max(0, min(priority, 255))
