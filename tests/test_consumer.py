import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import kombu
import pytest
from conftest import through
from watching import Consuming, eventually, publish

from kombu_pg.consumer import SUSPECT_RETURNS
from kombu_pg.errors import Unavailable

pytestmark = pytest.mark.ownership


@pytest.fixture
def broker(store, monkeypatch):
    """Afterwards this process is no consumer: the next test is to begin as a new one."""
    monkeypatch.setattr("kombu_pg.consumer.LINGER", 0.2)
    yield store.broker(reconnect_grace=1)
    gc.collect()
    eventually(lambda: "kombu_pg-liveness" not in [thread.name for thread in threading.enumerate()], 10)


@pytest.fixture
def watching(broker):
    """A connection that keeps the process registered, whatever happens to others."""
    with Consuming(broker, "elsewhere") as watching:
        yield watching


def transport_of(consuming):
    return consuming.connection.connection


def lose(consuming):
    """What kombu does with a connection after an error."""
    consuming.connection.collect()


def claim(store, consumer_id, token):
    """What a claim of this connection does that the server executes, and that nobody reads the answer of."""
    store.execute(
        "SELECT kombu_pg.claim(%s, %s, ARRAY[q.id], ARRAY[q.id], '{100}', 100, 1000000, 1, false, '{f}', '{0}', false)"
        " FROM kombu_pg.queue q WHERE q.name = 'q'",
        (consumer_id, token),
    )


def leased(store):
    return store.value("SELECT coalesce(sum(cardinality(message_ids)), 0) FROM kombu_pg.lease")


def ready(store):
    return store.value("SELECT count(*) FROM kombu_pg.ready")


def returns(store):
    return [row[0] for row in store.execute("SELECT DISTINCT returns FROM kombu_pg.message")]


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_lost_connection_had_claimed_unheard_is_given_back(store, broker, watching, when):
    lost = Consuming(broker)
    consumer, token = transport_of(lost).consumer, transport_of(lost).token
    lost.channel.basic_cancel(next(iter(lost.channel.feed.subscriptions)))
    publish(broker, *range(14))

    if when == "before":
        claim(store, consumer.id, token)
    lose(lost)
    if when == "after":
        claim(store, consumer.id, token)

    eventually(lambda: ready(store) == 14, 5, "all are ready again")
    assert leased(store) == 0
    assert returns(store) == [0]


def test_what_still_runs_when_its_connection_is_lost_stays_leased_and_its_late_ack_counts(store, broker, watching):
    lost = Consuming(broker)
    publish(broker, "runs", "waits")
    lost.until(2)
    runs = lost.received[0]
    lost.received.clear()

    lose(lost)
    eventually(lambda: ready(store) == 1, 5, "what nobody works on is given back")
    assert leased(store) == 1
    runs.ack()

    eventually(lambda: store.value("SELECT count(*) FROM kombu_pg.message") == 1, 5, "the ack has counted")
    eventually(lambda: leased(store) == 0, 5)


def test_what_is_let_go_of_only_later_is_given_back_then(store, broker, watching):
    lost = Consuming(broker)
    publish(broker, "reserved")
    lost.until(1)

    lose(lost)
    time.sleep(1)  # longer than the first look takes
    assert leased(store) == 1
    lost.received.clear()

    eventually(lambda: ready(store) == 1, 5, "it is given back")


def test_closing_another_connection_does_not_give_back_what_runs_over_a_lost_one(store, broker):
    lost = Consuming(broker)
    publish(broker, "runs")
    lost.until(1)

    lose(lost)
    with kombu.Connection(broker) as other:
        other.connect()
        other.default_channel.queue_declare("another", exclusive=True)

    assert leased(store) == 1
    assert ready(store) == 0
    lost.ack()
    eventually(lambda: store.value("SELECT count(*) FROM kombu_pg.message") == 0, 5, "the ack has counted")


def test_a_process_whose_connections_were_all_lost_leaves_once_nothing_runs(store, broker):
    lost = Consuming(broker)
    publish(broker, "runs")
    lost.until(1)

    lose(lost)
    time.sleep(1)  # longer than it would linger
    assert store.value("SELECT count(*) FROM kombu_pg.consumer") == 1
    lost.ack()
    lost.received.clear()

    eventually(lambda: store.value("SELECT count(*) FROM kombu_pg.consumer") == 0, 5, "it has left")
    with Consuming(broker) as again:
        publish(broker, "more")
        assert again.until(1) == ["more"]


def test_a_suspect_that_was_lost_with_its_connection_does_not_keep_out_the_next_one(store, broker, watching):
    lost = Consuming(broker)
    publish(broker, "suspect")
    store.execute("UPDATE kombu_pg.message SET returns = %s", (SUSPECT_RETURNS,))
    lost.until(1)
    assert transport_of(lost).consumer.suspects_allowed == 0

    lose(lost)
    lost.received.clear()
    gc.collect()

    eventually(lambda: ready(store) == 1, 5)
    assert transport_of(watching).consumer.suspects_allowed == 1


def test_of_several_suspects_the_next_comes_when_the_one_before_is_settled(store, broker):
    with Consuming(broker, prefetch=10) as consuming:
        consuming.rest()
        publish(broker, *range(3))
        consuming.until(3)
        for _ in range(SUSPECT_RETURNS):
            for message in consuming.received:
                message.requeue()
            consuming.received.clear()
            consuming.rest()

        assert len(consuming.received) == 1
        for expected in (2, 3):
            consuming.received[-1].ack()
            consuming.until(expected, within=2)


def test_a_window_more_than_half_full_is_filled_without_waiting_for_an_ack(store, broker):
    with Consuming(broker, prefetch=10) as consuming:
        for count in range(1, 11):
            publish(broker, count)
            consuming.until(count, within=2)


def test_a_queue_whose_consumer_is_full_does_not_make_its_channel_ask_for_ever(store, broker):
    with kombu.Connection(broker) as connection:
        channel = connection.channel()
        received = []
        for name in ("full", "empty"):
            kombu.Queue(name, channel=channel).declare()
            kombu.Consumer(channel, [kombu.Queue(name)], on_message=received.append, prefetch_count=1).consume()
        publish(broker, 1, 2, queue="full")
        eventually(lambda: not drain(connection), 5)
        assert len(received) == 1

        used = time.process_time()
        for _ in range(5):
            drain(connection)

        assert time.process_time() - used < 0.1
        received[0].ack()
        eventually(lambda: drain(connection) and len(received) == 2, 5)


def drain(connection):
    try:
        connection.drain_events(timeout=0.2)
    except TimeoutError:
        return False
    return True


def test_no_function_that_pins_its_plans_is_compiled_for_it(store):
    functions = "SELECT proname FROM pg_proc WHERE pronamespace = 'kombu_pg'::regnamespace"

    compiled = store.execute(
        f"{functions} AND 'enable_seqscan=off' = ANY (proconfig) AND NOT 'jit=off' = ANY (proconfig)"
    )

    assert compiled == []


def test_a_forked_child_that_closes_what_it_inherited_takes_nothing_from_its_parent(store, broker):
    with kombu.Connection(broker) as connection:
        channel = connection.channel()
        channel.queue_declare("q", auto_delete=False)
        publish(broker, "held")
        message = channel.basic_get("q")

        child = os.fork()
        if not child:
            try:
                channel.close()
                connection.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)

        assert leased(store) == 1
        assert ready(store) == 0
        message.ack()
        assert store.value("SELECT count(*) FROM kombu_pg.message") == 0


@pytest.fixture
def cut(broker, tcp_proxy):
    """A connection over a proxy, with one message that it got and that is not settled."""
    with kombu.Connection(through(tcp_proxy, broker)) as connection:
        channel = connection.channel()
        channel.queue_declare("q", auto_delete=False)
        publish(broker, "got", "next")
        yield channel, channel.basic_get("q")


def test_an_ack_that_meets_a_lost_connection_is_said_again(store, tcp_proxy, cut):
    _, message = cut
    tcp_proxy.cut()

    message.ack()
    tcp_proxy.resume()

    eventually(lambda: ready(store) == store.value("SELECT count(*) FROM kombu_pg.message") == 1, 10)


def interrupted_get(store, tcp_proxy, channel, table, *, no_ack):
    """A get whose connection is cut while a statement of it waits for this table; the server executes it afterwards."""
    with store.session() as session, ThreadPoolExecutor() as pool:
        session.autocommit = False
        session.cursor().execute(f"LOCK TABLE kombu_pg.{table} IN SHARE MODE")
        got = pool.submit(channel.basic_get, "q", no_ack=no_ack)
        eventually(lambda: store.execute("SELECT 1 FROM pg_locks WHERE NOT granted"), 5, "it is under way")
        tcp_proxy.drop()
        session.rollback()
        with pytest.raises(Unavailable):
            got.result(10)
    busy = "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid()"
    running = f"{busy} AND query ~ '[.](claim|settle)'"
    eventually(lambda: not store.execute(running), 10, "the server has executed it all the same")


def test_what_a_get_has_claimed_that_heard_no_answer_goes_back(store, tcp_proxy, cut):
    channel, message = cut

    interrupted_get(store, tcp_proxy, channel, "lease", no_ack=False)

    eventually(lambda: ready(store) == 1, 10, "it is given back")
    assert leased(store) == 1
    message.ack()
    eventually(lambda: leased(store) == 0, 5)


def test_a_get_without_ack_whose_settlement_heard_no_answer_leaves_nothing_leased(store, tcp_proxy, cut):
    channel, message = cut

    interrupted_get(store, tcp_proxy, channel, "message", no_ack=True)

    assert not channel.connection.connected
    eventually(lambda: leased(store) == 1, 10, "what is unacked, and nothing else")
    message.ack()


def test_queues_and_subscriptions_of_a_lost_connection_end_while_its_process_lives_on(
    store, broker, watching, monkeypatch
):
    monkeypatch.setattr("kombu_pg.consumer.ENDING", 0.5)
    lost = Consuming(broker)
    lost.channel.queue_declare("exclusive", exclusive=True)
    lost.channel.queue_declare("auto-delete")
    lost.channel.basic_consume("auto-delete", callback=print)

    lose(lost)

    eventually(lambda: queues(store) == ["elsewhere", "q"], 10)
    assert store.execute("SELECT q.name FROM kombu_pg.subscription s JOIN kombu_pg.queue q ON q.id = s.queue_id") == [
        ("elsewhere",)
    ]


def queues(store):
    return [row[0] for row in store.execute("SELECT name FROM kombu_pg.queue ORDER BY name")]


def test_messages_that_are_held_past_their_time_keep_no_others_from_expiring(store, broker):
    with Consuming(broker, prefetch=5) as consuming:
        publish(broker, *range(8), expiration=3600)
        consuming.until(5)
        store.execute("UPDATE kombu_pg.message SET expires_at = now() - interval '1 hour' + id * interval '1 ms'")

        assert store.value("SELECT expired FROM kombu_pg.expire_messages('-infinity', 2)") == 3

        eventually(lambda: ready(store) == 0, 5)
        assert leased(store) == 5


def test_expiry_waits_for_nobodys_open_transaction(store, broker):
    arguments = {"x-message-ttl": 1, "x-max-length": 1}
    with kombu.Connection(broker) as connection:
        for name in ("full", "other"):
            kombu.Queue(name, queue_arguments=arguments, channel=connection.default_channel).declare()
    publish(broker, "head", queue="full")
    publish(broker, "also late", queue="other")
    enqueue = "SELECT kombu_pg.enqueue('', 'full', 0, NULL, NULL, NULL, NULL, NULL, '{}', 'x', NULL, NULL, false)"
    expire = "SET statement_timeout = '5s'; SELECT expired FROM kombu_pg.expire_messages('-infinity', 10)"
    with store.session() as theirs, theirs.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute(enqueue)  # it drops the head of the queue, unless it is rolled back
        eventually(lambda: store.value("SELECT bool_and(expires_at < clock_timestamp()) FROM kombu_pg.message"))

        assert store.value(expire) == 1
        cursor.execute("ROLLBACK")

    assert store.value(expire) == 1
    assert ready(store) == 0


def test_an_exclusive_queue_whose_owner_is_just_being_reaped_can_be_declared_anew(store, broker):
    dead = store.value(
        "INSERT INTO kombu_pg.consumer (hostname, pid, heartbeat, epoch, grace, heartbeat_timeout, lost_at)"
        " VALUES ('gone', 1, false, kombu_pg.current_epoch(), 1, 30, now() - interval '2 s') RETURNING id"
    )
    store.execute(
        "INSERT INTO kombu_pg.queue (name, durable, exclusive, auto_delete, owner_id, owner_token)"
        f" VALUES ('mine', false, true, false, {dead}, 1)"
    )
    with store.session() as session, kombu.Connection(broker) as connection, ThreadPoolExecutor() as pool:
        session.autocommit = False
        session.cursor().execute("SELECT kombu_pg.reap(0, 0, 20)")
        declared = pool.submit(connection.default_channel.queue_declare, "mine", exclusive=True)
        eventually(lambda: declared.done() or store.execute("SELECT 1 FROM pg_locks WHERE NOT granted"), 10)
        session.commit()

        assert declared.result(10).queue == "mine"
