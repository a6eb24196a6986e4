"""A message that finds a consumer idle is leased to it by its publisher, and comes along in the notification."""

import contextlib
import gc
import itertools
import os
import random
import signal
import threading
import time
import uuid

import kombu
import psycopg2
import pytest
from watching import Consuming, eventually, process, publish, publisher, rest, threads

from kombu_pg import delivery, pushes, transport
from kombu_pg.database import Statement

PROMPT = 2.0


@pytest.fixture
def broker(store):
    return store.broker()


@pytest.fixture
def came(monkeypatch):
    """The messages that have come without having been claimed: a test of chance must have met some."""
    came = []
    count = pushes.Pushes.count

    def counting(self, row):
        came.append(row.id)
        return count(self, row)

    monkeypatch.setattr(pushes.Pushes, "count", counting)
    return came


def pushed(store):
    """How many messages are leased that were pushed, not claimed."""
    return store.value("SELECT count(*) FROM kombu_pg.lease WHERE offer IS NOT NULL")


def is_at_rest(store):
    """Nothing is leased, and nothing waits."""
    return store.value(
        "SELECT NOT EXISTS (SELECT FROM kombu_pg.lease) AND NOT EXISTS (SELECT FROM kombu_pg.ready)"
        " AND NOT EXISTS (SELECT FROM kombu_pg.message)"
    )


def test_an_idle_consumer_is_pushed_the_message_and_need_not_claim_it(broker, store, monkeypatch):
    with Consuming(broker) as consumer:
        consumer.rest()
        monkeypatch.setattr(delivery.Delivery, "_claim", None)

        publish(broker, "news")

        assert consumer.until(1, PROMPT) == ["news"]
        assert pushed(store) == 1
        consumer.ack()
        eventually(lambda: is_at_rest(store))


def test_a_pushed_message_is_the_same_as_a_claimed_one(broker, store):
    def send():
        publish(
            broker, b"\x00\xff body", content_type="application/data", content_encoding="binary",
            headers={"h": "\u00e9\U0001f40c"}, correlation_id="c", reply_to="r",
        )  # fmt: skip

    with Consuming(broker) as consumer:
        consumer.rest()
        send()
        consumer.until(1, PROMPT)
        assert pushed(store) == 1
        consumer.rest()
        store.execute("DELETE FROM kombu_pg.session")
        send()
        consumer.until(2, PROMPT)
        assert pushed(store) == 1

        one, other = consumer.received
        assert one.body == other.body
        assert one.headers == other.headers
        own = {"pg_message_id": 0, "delivery_tag": 0}
        assert one.properties | own == other.properties | own
        assert one.delivery_info | own == other.delivery_info | own
        assert (one.content_type, one.content_encoding) == (other.content_type, other.content_encoding)


def test_one_message_at_a_time_is_pushed_to_a_consumer(broker, store):
    with Consuming(broker) as consumer:
        consumer.rest()

        publish(broker, 1, 2, 3)

        assert consumer.until(3, PROMPT) == [1, 2, 3]
        assert pushed(store) == 1
        consumer.ack()
        consumer.rest()
        publish(broker, 4)
        consumer.until(4, PROMPT)
        assert pushed(store) == 1


@pytest.mark.parametrize("why", ["paused", "expires", "large", "revoked", "limited", "its own ttl", "priorities"])
def test_what_must_be_looked_at_when_it_is_delivered_is_not_pushed(broker, store, why):
    arguments = {
        "expires": {"x-message-ttl": 60_000},
        "limited": {"x-max-length": 100},
        "priorities": {"x-max-priority": 3},
    }.get(why, {})
    with kombu.Connection(broker) as connection:
        kombu.Queue("q", channel=connection.channel(), queue_arguments=arguments).declare()
        channel = connection.channel()
        channel.basic_qos(0, 10, True)
        received = []
        kombu.Consumer(channel, [kombu.Queue("q", queue_arguments=arguments)], on_message=received.append).consume()
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.2)
        if why == "paused":
            store.execute("UPDATE kombu_pg.queue SET paused = true")
        if why == "revoked":
            store.execute("INSERT INTO kombu_pg.revoked (task_id, upper) VALUES ('another', 0)")

        publish(broker, "x" * 6000 if why == "large" else "x", **({"expiration": 60} if why == "its own ttl" else {}))

        if why == "paused":
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=0.2)
        else:
            connection.drain_events(timeout=PROMPT)
            assert len(received) == 1
        assert pushed(store) == 0


@pytest.mark.parametrize("size", [4000, 5000, 5500, 5600, 5700, 7000])
def test_a_message_around_the_limit_of_a_notification_arrives(broker, size):
    with Consuming(broker) as consumer:
        consumer.rest()
        body = random.Random(size).randbytes(size)

        publish(broker, body, content_type="application/data", content_encoding="binary")

        consumer.until(1, PROMPT)
        assert consumer.received[0].body == body


def test_pushes_leave_the_order_of_one_publisher(broker, store, came):
    """Between what is pushed, what is told, and what is claimed, as the consumer is idle, or not, or full."""
    count = 1500
    with Consuming(broker, prefetch=3) as consumer, publisher(broker) as producer:
        consumer.rest()
        dice = random.Random(1)
        order = []

        def work(message):
            order.append(message.payload)
            if dice.random() < 0.3:
                time.sleep(dice.random() * 0.002)
            message.ack()

        consumer.work_with(work)

        def send():
            pauses = random.Random(2)
            for number in range(count):
                producer.publish(number, routing_key="q", delivery_mode=1)
                if pauses.random() < 0.5:
                    time.sleep(pauses.random() * 0.003)

        thread = threading.Thread(target=send)
        thread.start()
        while len(order) < count:
            consumer.connection.drain_events(timeout=10)
        thread.join()

    assert order == list(range(count))
    assert len(came) > 50
    assert is_at_rest(store)


@pytest.mark.parametrize("prefetch", [1, 2])
@pytest.mark.parametrize("per_consumer", [False, True])
def test_pushes_respect_the_prefetch(broker, store, came, prefetch, per_consumer):
    count, held, most, done = 600, [], [], []
    with kombu.Connection(broker) as connection:
        channel = connection.channel()
        kombu.Queue("q", channel=channel).declare()
        channel.basic_qos(0, prefetch, not per_consumer)

        def receive(message):
            held.append(message)
            most.append(len(held))

        kombu.Consumer(channel, [kombu.Queue("q")], on_message=receive).consume()

        def send(which, _):
            with publisher(broker) as producer:
                for number in range(which, count, 4):
                    producer.publish(number, routing_key="q", delivery_mode=1)
                    time.sleep(random.random() * 0.02)

        with threads(send, 4):
            while len(done) < count:
                with contextlib.suppress(TimeoutError):
                    connection.drain_events(timeout=0.001)
                if held and random.random() < 0.7:
                    done.append(held.pop(0))
                    done[-1].ack()

    assert max(most) <= prefetch
    assert len(came) > 20
    assert sorted(message.payload for message in done) == list(range(count))
    assert is_at_rest(store)


def test_a_consumer_that_a_push_has_filled_is_not_told_of_more(broker, store):
    with Consuming(broker, prefetch=1) as full, Consuming(broker, prefetch=1) as other:
        full.rest()
        publish(broker, 1)
        full.until(1, PROMPT)
        full.rest(0.05)
        assert store.idle() == 0

        other.rest(0.05)
        publish(broker, 2)

        assert other.until(1, PROMPT) == [2]


def test_a_consumer_that_a_push_has_filled_lets_go_before_it_works(broker, store):
    """A callback may take minutes: who tells the idle must not tell it in place of others meanwhile."""
    idle = []
    with Consuming(broker, prefetch=1) as consumer:
        consumer.rest()

        def work(message):
            with contextlib.suppress(AssertionError):
                eventually(lambda: store.idle() == 0, PROMPT)
            idle.append(store.idle())
            message.ack()

        consumer.work_with(work)
        publish(broker, 1)
        consumer.connection.drain_events(timeout=PROMPT)

    assert idle == [0]


def tell_then_push(broker, store):
    """One message that an idle consumer has been told of, and one that was pushed to it since."""
    store.execute("UPDATE kombu_pg.queue SET paused = true")
    publish(broker, "told")
    store.execute("UPDATE kombu_pg.queue SET paused = false")
    # The publisher looks back only so far.
    store.execute("SELECT setval('kombu_pg.message_id_seq', nextval('kombu_pg.message_id_seq') + 1000)")
    publish(broker, "pushed")
    assert pushed(store) == 1


def test_what_was_told_before_is_delivered_before_what_was_pushed(broker, store):
    with Consuming(broker) as consumer:
        consumer.rest()
        tell_then_push(broker, store)

        assert consumer.until(2, PROMPT) == ["told", "pushed"]


def test_a_push_that_finds_no_room_is_given_back_and_comes_in_its_turn(broker, store):
    with Consuming(broker, prefetch=1) as consumer:
        consumer.rest()
        tell_then_push(broker, store)

        assert consumer.rest() == ["told"]
        assert pushed(store) == 0
        consumer.ack()
        assert consumer.until(2, PROMPT) == ["told", "pushed"]


@contextlib.contextmanager
def about_to_push(store):
    """A publisher that has pushed a message, and not yet committed."""
    with contextlib.closing(psycopg2.connect(store.url)) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT kombu_pg.push(kombu_pg.enqueue_plainly('q', 0, NULL, NULL, NULL, NULL, m.properties, m.body, NULL),"
            " currval('kombu_pg.message_id_seq'), 0, m.properties, m.body) FROM kombu_pg.message m"
        )
        assert cursor.fetchone() == (True,)
        yield connection


def test_who_cancels_waits_for_the_push_that_is_under_way_and_gives_it_back(broker, store):
    with Consuming(broker) as consumer, Consuming(broker, queue="template"):
        publish(broker, "x", queue="template")
        consumer.rest()
        with about_to_push(store) as publishing:
            cancelling = threading.Thread(target=consumer._consumer.cancel)
            cancelling.start()
            eventually(lambda: store.value("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))
            assert cancelling.is_alive()

            publishing.commit()
            cancelling.join()

        assert pushed(store) == 0
        with Consuming(broker) as other:
            assert other.until(1, PROMPT) == ["x"]


def test_two_publishers_do_not_push_to_one_consumer_at_once(broker, store):
    with Consuming(broker) as consumer, Consuming(broker, queue="template"):
        publish(broker, "x", queue="template")
        consumer.rest()
        with about_to_push(store) as publishing:
            publish(broker, "told")
            publishing.commit()

        assert sorted(consumer.until(2, PROMPT)) == ["told", "x"]
        assert pushed(store) == 1


def test_nothing_is_pushed_to_a_session_that_takes_no_more(broker, store):
    with Consuming(broker) as consumer:
        consumer.rest()
        session = consumer.connection.connection.delivery()._session
        session.run(Statement("SELECT pg_advisory_unlock(kombu_pg.lock_key('push', pg_backend_pid()))", (), list))

        publish(broker, "told")

        assert pushed(store) == 0
        assert consumer.until(1, PROMPT) == ["told"]


def test_each_idle_consumer_gets_its_share(broker):
    with Consuming(broker) as one, Consuming(broker) as other, publisher(broker) as producer:
        for number in range(40):
            one.rest(0.01)
            other.rest(0.01)
            producer.publish(number, routing_key="q", delivery_mode=1)
            one.rest(0.01)
            other.rest(0.01)
            one.ack()
            other.ack()

        eventually(lambda: one.rest(0.05) and other.rest(0.05) and len(one.received) + len(other.received) == 40)
        assert len(one.received) > 5
        assert len(other.received) > 5


def test_a_stopped_consumer_keeps_one_message_from_the_others(broker, store):
    program = "c = Consuming(sys.argv[1]); c.rest(); print('idle', flush=True); c.until(1, 60); c.ack(); c.rest(60)"
    with process(program, broker) as stopped, Consuming(broker) as other:
        assert stopped.stdout.readline() == "idle\n"
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            other.rest()
            other.work_with(lambda message: other.received.append(message) or message.ack())
            for number in range(20):
                publish(broker, number)  # each over a connection of its own: none of them is part of a burst
                other.rest(0.01)
            other.rest()
            assert len(other.received) >= 19
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        eventually(lambda: is_at_rest(store))


def test_what_was_pushed_to_a_process_that_is_killed_comes_to_another(broker, store):
    with process("c = Consuming(sys.argv[1]); c.rest(); print('idle', flush=True); c.rest(60)", broker) as killed:
        assert killed.stdout.readline() == "idle\n"
        os.kill(killed.pid, signal.SIGSTOP)
        publish(broker, "pushed")
        assert pushed(store) == 1
    with Consuming(broker) as other:
        assert other.until(1, 30) == ["pushed"]


def test_a_retry_of_a_publish_that_was_pushed_adds_nothing(broker, store):
    """Its connection was lost after the server had committed."""
    with Consuming(broker) as consumer:
        consumer.rest()
        publish(broker, "once")
        (row,) = store.execute("SELECT properties, body, publish_id FROM kombu_pg.message")
        assert pushed(store) == 1

        store.execute(
            "CALL kombu_pg.publish(true, '', 'q', 0, NULL, NULL, NULL, NULL, NULL, %s, %s, %s, 1, false, NULL, false)",
            row,
        )

        assert consumer.rest() == ["once"]
        assert store.value("SELECT count(*) FROM kombu_pg.message") == 1


def test_a_consumers_own_prefetch_holds_while_claims_are_sent_ahead(broker, store):
    with kombu.Connection(broker) as connection:
        channel = connection.channel()
        kombu.Queue("q", channel=channel).declare()
        publish(broker, *range(300), delivery_mode=1)
        channel.basic_qos(0, 100, False)
        received = []
        kombu.Consumer(channel, [kombu.Queue("q")], on_message=received.append).consume()
        rest(connection)

        assert len(received) == 100
        assert store.execute("SELECT band, count(*) FROM kombu_pg.ready GROUP BY band") == [(3, 200)]


def test_who_consumes_beside_a_cancelled_consumer_gets_no_more_than_its_prefetch(broker, store):
    with kombu.Connection(broker) as connection:
        channel = connection.channel()
        kombu.Queue("q", channel=channel).declare()
        publish(broker, *range(10), delivery_mode=1)
        channel.basic_qos(0, 5, False)
        received = []
        one = kombu.Consumer(channel, [kombu.Queue("q")], on_message=received.append)
        two = kombu.Consumer(channel, [kombu.Queue("q")])

        def cancel_the_other(message):
            received.append(message)
            one.cancel()

        two.on_message = cancel_the_other
        one.consume()
        two.consume()
        rest(connection)

        by_tag = [message.delivery_info["consumer_tag"] for message in received]
        assert by_tag.count(next(iter(two._active_tags.values()))) == 5


def test_a_message_that_was_pushed_and_never_came_is_given_back(broker, store, monkeypatch):
    with Consuming(store.broker(poll_interval=0.1)) as consumer:
        consumer.rest()
        pump = consumer.connection.connection.delivery()
        channel, pump._pushes.channel = pump._pushes.channel, "another"
        monkeypatch.setattr(pump, "_told", lambda payload: None)
        publish(broker, "lost on its way")
        assert consumer.rest() == []
        pump._pushes.channel = channel
        monkeypatch.undo()
        assert pushed(store) == 1

        pump._search_at = 0
        store.execute("UPDATE kombu_pg.lease SET claimed_at = claimed_at - interval '1 minute'")

        assert consumer.until(1, PROMPT) == ["lost on its way"]


def test_a_push_that_finds_the_notifications_full_is_published_once_all_the_same(broker, store):
    """They may fill up between the look at them and the commit, which then takes the message with it."""
    (definition,) = store.execute("SELECT pg_get_functiondef('kombu_pg.push'::regproc)")[0]
    body = definition.index("BEGIN")
    with Consuming(broker) as consumer:
        consumer.rest()
        try:
            store.execute(definition[:body] + "BEGIN RAISE program_limit_exceeded; END $function$")
            publish(broker, "once")
        finally:
            store.execute(definition)

        assert consumer.rest() == ["once"]
        assert store.value("SELECT count(*) FROM kombu_pg.message") == 1


def test_a_message_of_which_only_the_tag_was_kept_stays_its_consumers(broker, store):
    """Neither a cancel nor the search takes for lost what was delivered."""
    tags = []
    with Consuming(store.broker(poll_interval=0.1)) as consumer:
        consumer.work_with(lambda message: tags.append(message.delivery_tag))
        kombu.Queue("other", channel=consumer.channel).declare()
        other = kombu.Consumer(consumer.channel, [kombu.Queue("other")])
        other.consume()
        consumer.rest()
        publish(broker, "kept by its tag")
        consumer.connection.drain_events(timeout=PROMPT)
        gc.collect()
        store.execute("UPDATE kombu_pg.lease SET claimed_at = claimed_at - interval '1 minute'")

        other.cancel()
        consumer.connection.connection.delivery()._search_at = 0
        consumer.rest(0.5)

        assert pushed(store) == 1
        assert len(tags) == 1
        consumer.channel.basic_ack(tags[0])
        eventually(lambda: is_at_rest(store))


def test_anybodys_notification_on_a_consumers_channel_does_no_harm(broker, store):
    with Consuming(broker) as consumer:
        consumer.rest()
        pump = consumer.connection.connection.delivery()
        store.execute(f"NOTIFY \"kombu_pg.{pump._session.backend_pid}\", 'not a queue'")
        store.execute(f"NOTIFY \"{pump._pushes.channel}\", 'not a message'")
        consumer.rest()
        publish(broker, 1)
        assert consumer.until(1, PROMPT) == [1]


@contextlib.contextmanager
def publishing(broker, publishers=3):
    """Publishes numbers all the time, each once; the list grows."""
    sent = []
    with kombu.Connection(broker) as connection:
        kombu.Queue("q", channel=connection.channel()).declare()

    def run(which, is_over):
        with publisher(broker) as producer:
            for number in itertools.count():
                if is_over():
                    return
                producer.publish((which, number), routing_key="q", delivery_mode=1)
                sent.append((which, number))
                time.sleep(random.random() * 0.002)

    with threads(run, publishers):
        yield sent


def drained(broker, store, seen, count):
    """Let one more consumer have what is left."""
    with Consuming(broker) as last:

        def work(message):
            seen.append(tuple(message.payload))
            message.ack()

        last.work_with(work)
        deadline = time.monotonic() + 20
        while len(set(seen)) < count:
            assert time.monotonic() < deadline, f"{len(set(seen))} of {count}"
            with contextlib.suppress(TimeoutError):
                last.connection.drain_events(timeout=0.2)
    assert is_at_rest(store)


@pytest.mark.parametrize("how", ["cancels", "cancels one of two queues", "closes its channel", "closes"])
def test_nothing_is_stuck_with_a_consumer_that_goes_while_messages_are_pushed(broker, store, came, how):
    seen, left = [], []
    with publishing(broker) as sent:
        for _ in range(40):
            consumer = Consuming(broker)
            if how == "cancels one of two queues":
                kombu.Queue("other", channel=consumer.channel).declare()
                kombu.Consumer(consumer.channel, [kombu.Queue("other")]).consume()

            def work(message):
                seen.append(tuple(message.payload))
                message.ack()

            consumer.work_with(work)
            consumer.work_for(0.05 * random.random())
            if how.startswith("cancels"):
                consumer._consumer.cancel()
                left.append(consumer)  # its connection stays open, and nobody drains it
            elif how == "closes its channel":
                consumer.channel.close()
                left.append(consumer)
            else:
                consumer.connection.close()
    try:
        drained(broker, store, seen, len(sent))
        assert len(seen) == len(sent)  # and nothing came twice
        assert len(came) > 20
    finally:
        for consumer in left:
            consumer.connection.close()


def test_nothing_is_lost_with_a_session_that_ends_while_messages_are_pushed(store, came):
    broker = store.broker(application_name="cut")
    seen = []
    with publishing(store.broker()) as sent:
        for _ in range(25):
            consumer = Consuming(broker)

            def work(message):
                seen.append(tuple(message.payload))
                message.ack()

            consumer.work_with(work)
            consumer.work_for(0.05 * random.random())
            pid = consumer.connection.connection.delivery()._session.backend_pid
            store.execute("SELECT pg_terminate_backend(%s)", (pid,))
            with pytest.raises(consumer.connection.connection_errors):
                consumer.work_for(10)
            consumer.connection.collect()
    drained(store.broker(), store, seen, len(sent))
    assert len(came) > 10
    eventually(lambda: not store.value("SELECT count(*) FROM kombu_pg.consumer"), 60)


def test_an_offer_is_renewed_before_many_have_used_it(broker, store, monkeypatch):
    monkeypatch.setattr(pushes, "PUSHES_PER_OFFER", 5)
    with Consuming(broker) as consumer, publisher(broker) as producer:
        consumer.rest()
        first = store.value("SELECT offer FROM kombu_pg.session")
        for number in range(20):
            producer.publish(number, routing_key="q")
            consumer.until(number + 1, PROMPT)
            consumer.ack()
            consumer.rest(0.01)
        assert store.value("SELECT offer FROM kombu_pg.session") >= first + 3
        eventually(lambda: is_at_rest(store))


def test_a_push_does_not_slow_down_while_vacuum_is_held_back(broker, store, came, monkeypatch):
    monkeypatch.setattr(transport, "PUSH_PAUSE", 0.0)
    with Consuming(broker) as consumer, publisher(broker) as producer:
        consumer.work_with(lambda message: message.ack())

        def round_trip():
            begun = time.monotonic()
            producer.publish(0, routing_key="q", delivery_mode=1)
            consumer.connection.drain_events(timeout=PROMPT)
            return time.monotonic() - begun

        def median(times):
            return sorted(round_trip() for _ in range(times))[times // 2]

        consumer.rest()
        with contextlib.closing(psycopg2.connect(store.url)) as snapshot:
            snapshot.set_session(isolation_level="REPEATABLE READ")
            snapshot.cursor().execute("SELECT count(*) FROM kombu_pg.lease")
            before = median(100)
            median(6000)
            assert median(100) < 2 * before + 0.0003
    assert len(came) > 3000


def test_who_may_not_read_the_sessions_publishes_all_the_same(broker, store):
    role = f"publisher_{uuid.uuid4().hex[:8]}"
    with Consuming(broker) as consumer:
        publish(broker, "once", queue="q")
        properties = store.value("SELECT properties FROM kombu_pg.message")
        consumer.until(1)
        consumer.ack()
        consumer.rest()
        store.execute(
            f"CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA kombu_pg TO {role};"
            f" GRANT SELECT, INSERT ON kombu_pg.message, kombu_pg.ready TO {role};"
            f" GRANT SELECT ON kombu_pg.queue, kombu_pg.installation TO {role};"
            f" GRANT USAGE ON ALL SEQUENCES IN SCHEMA kombu_pg TO {role}"
        )
        try:
            with store.session() as session, session.cursor() as cursor:
                cursor.execute(f"SET SESSION AUTHORIZATION {role}")
                cursor.execute(
                    "CALL kombu_pg.publish(true, '', 'q', 0, NULL, NULL, NULL, NULL, NULL, %s, %s, %s, NULL, false, "
                    "NULL, true)",
                    (properties, b"again", str(uuid.uuid4())),
                )
            assert consumer.until(2, PROMPT)[1] == "again"
            assert pushed(store) == 0
        finally:
            store.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_what_a_process_that_was_killed_has_offered_is_swept(broker, store):
    with process("c = Consuming(sys.argv[1]); c.rest(); print('idle', flush=True); c.rest(60)", broker) as killed:
        assert killed.stdout.readline() == "idle\n"
        assert store.value("SELECT count(*) FROM kombu_pg.session") == 1
    pid = store.value("SELECT pid FROM kombu_pg.session")
    eventually(lambda: not store.execute("SELECT FROM pg_stat_activity WHERE pid = %s", (pid,)))
    with Consuming(broker) as consumer:
        eventually(lambda: store.value("SELECT count(*) FROM kombu_pg.session") == 1 or consumer.rest(0.1), 30)
        assert store.value("SELECT pid FROM kombu_pg.session") != pid
