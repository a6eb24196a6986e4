"""The same calls on PostgreSQL and on RabbitMQ: the same outcome. RabbitMQ is the oracle, cases marked pg have none."""

import contextlib
import struct
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from decimal import Decimal
from typing import Any

import kombu
import psycopg2
import pytest
from amqp.exceptions import (
    AccessRefused,
    AMQPNotImplementedError,
    ConsumerCancelled,
    FrameSyntaxError,
    InvalidCommand,
    NotFound,
    PreconditionFailed,
    ResourceLocked,
)
from brokers import (
    PATIENCE,
    Broker,
    Inbox,
    consumers,
    contents,
    drain,
    eventually,
    exists,
    is_gone,
    is_quiet,
    ready,
    send,
    take,
)
from conftest import execute
from kombu.serialization import loads

import kombu_pg

KEYS = ["", "a", "b", "a.b", "b.a", "a.c", "a.b.c", "a.b.b.c", "a.", ".a", ".", "a..c", "ab"]


# Routing


def test_a_direct_exchange_compares_the_whole_key(broker):
    exchange = broker.exchange("direct")
    queue = broker.bound(exchange, "a.b", "")

    for key in [*KEYS, "a.*", "A.B"]:
        send(broker.channel, key, key, exchange=exchange)

    assert contents(broker.channel, queue) == ["", "a.b"]


@pytest.mark.parametrize(
    ("binding", "matched"),
    [
        ("a", ["a"]),
        ("", [""]),
        ("*", ["a", "b", "ab"]),
        ("#", KEYS),
        ("a.#", ["a", "a.b", "a.c", "a.b.c", "a.b.b.c", "a.", "a..c"]),
        ("#.b", ["b", "a.b"]),
        ("#.a.#", ["a", "a.b", "b.a", "a.c", "a.b.c", "a.b.b.c", "a.", ".a", "a..c"]),
        ("a.#.c", ["a.c", "a.b.c", "a.b.b.c", "a..c"]),
        ("a.*.c", ["a.b.c", "a..c"]),
        ("a.*", ["a.b", "a.c", "a."]),
        ("*.*", ["a.b", "b.a", "a.c", "a.", ".a", "."]),
        ("#.*", KEYS[1:]),
        ("*.#", KEYS[1:]),
        ("#.#", KEYS),
        ("*.a", ["b.a", ".a"]),
        ("a.", ["a."]),
        (".", ["."]),
        ("a..#", ["a.", "a..c"]),
        ("a*", []),
        ("a#", []),
    ],
)
def test_a_topic_exchange_matches_words(broker, binding, matched):
    exchange = broker.exchange("topic")
    queue = broker.bound(exchange, binding)

    for key in KEYS:
        send(broker.channel, key, key, exchange=exchange)

    assert contents(broker.channel, queue) == matched


def test_a_topic_binding_of_many_wildcards_is_matched_in_no_time(pg):
    exchange = pg.exchange("topic")
    queue = pg.bound(exchange, ".".join(["#", "*"] * 63 + ["#"]))  # RabbitMQ tries every way to split the key

    send(pg.channel, ".".join("a" * 62), "too few", exchange=exchange)
    send(pg.channel, ".".join("a" * 63), "enough", exchange=exchange)
    send(pg.channel, ".".join("a" * 128), "more", exchange=exchange)

    assert contents(pg.channel, queue) == ["enough", "more"]


def test_a_fanout_exchange_ignores_the_key(broker):
    exchange = broker.exchange("fanout")
    queues = [broker.bound(exchange, "a"), broker.bound(exchange, "")]

    send(broker.channel, "b", "everybody", exchange=exchange)

    assert [contents(broker.channel, queue) for queue in queues] == [["everybody"], ["everybody"]]


@pytest.mark.parametrize("kind", ["direct", "topic", "fanout"])
def test_a_queue_bound_twice_gets_one_copy(broker, kind):
    exchange = broker.exchange(kind)
    queue = broker.bound(exchange, "a", "#", "a.#", "a")

    send(broker.channel, "a", "once", exchange=exchange)

    assert contents(broker.channel, queue) == ["once"]


def test_an_unbound_queue_gets_nothing_more(broker):
    exchange = broker.exchange("topic")
    queue = broker.bound(exchange, "a.*", "b")

    broker.channel.queue_unbind(queue, exchange, "a.*")
    send(broker.channel, "a.b", "unbound", exchange=exchange)
    send(broker.channel, "b", "bound", exchange=exchange)

    assert contents(broker.channel, queue) == ["bound"]


def test_unbinding_what_is_not_bound_succeeds(broker):
    queue, exchange = broker.queue(), broker.exchange("direct")

    broker.channel.queue_unbind(queue, exchange, "never bound")
    broker.channel.queue_unbind(broker.name(), exchange, "no queue")
    broker.channel.queue_unbind(queue, broker.name(), "no exchange")


def test_the_default_exchange_delivers_to_the_queue_of_that_name(broker):
    queue, other = broker.queue(), broker.queue()

    send(broker.channel, queue, "here")

    assert contents(broker.channel, queue) == ["here"]
    assert contents(broker.channel, other) == []


@pytest.mark.parametrize("exchange", ["amq.direct", "amq.fanout", "amq.topic"])
def test_the_predeclared_exchanges_are_there(broker, exchange):
    queue = broker.queue()

    broker.channel.exchange_declare(exchange, "direct", passive=True)
    broker.channel.queue_bind(queue, exchange, queue)
    send(broker.channel, queue, "found", exchange=exchange)

    assert contents(broker.channel, queue) == ["found"]


@pytest.mark.parametrize(
    "verb",
    [
        lambda channel, queue: channel.queue_bind(queue, "", "key"),
        lambda channel, queue: channel.queue_unbind(queue, "", "key"),
        lambda channel, queue: channel.exchange_declare("", "direct"),
        lambda channel, queue: channel.exchange_delete(""),
        lambda channel, queue: channel.exchange_delete("amq.direct"),
        lambda channel, queue: channel.exchange_declare("amq.mine", "direct"),
    ],
    ids=["bind", "unbind", "declare default", "delete default", "delete amq.", "declare amq."],
)
def test_what_belongs_to_the_broker_is_refused(broker, verb):
    queue = broker.queue()

    with pytest.raises(AccessRefused):
        verb(broker.channel, queue)


def test_redeclaring_a_predeclared_exchange_as_it_is_succeeds(broker):
    broker.channel.exchange_declare("amq.topic", "topic", durable=True, auto_delete=False)


def test_publishing_to_a_missing_exchange_is_not_found(broker):
    with pytest.raises(NotFound):
        send(broker.channel, "key", "lost", exchange=broker.name())


# Mandatory


def test_an_unroutable_mandatory_message_comes_back(broker):
    exchange, returned = broker.exchange("topic"), []
    broker.channel.events["basic_return"].add(lambda *what: returned.append(what))

    send(broker.channel, "no.body", "unwanted", exchange=exchange, mandatory=True, headers={"task": "t", "n": 1})

    ((exc, from_exchange, routing_key, message),) = returned
    assert (exc.reply_code, exc.reply_text, from_exchange, routing_key) == (312, "NO_ROUTE", exchange, "no.body")
    assert (message.body, message.headers["n"]) == ("unwanted", 1)


@pytest.mark.parametrize("exchange", ["", "amq.topic"])
def test_an_unroutable_message_that_is_not_mandatory_is_dropped(broker, exchange):
    returned = []
    broker.channel.events["basic_return"].add(lambda *what: returned.append(what))

    send(broker.channel, broker.name(), "unwanted", exchange=exchange)
    send(broker.channel, broker.queue(), "wanted", mandatory=True)

    assert returned == []


def test_a_producers_on_return_gets_the_message(broker):
    returned = []
    producer = kombu.Producer(broker.channel, on_return=lambda *what: returned.append(what))

    producer.publish({"a": 1}, routing_key=broker.name(), mandatory=True)

    ((exc, exchange, _key, message),) = returned
    assert (exc.reply_code, exchange, kombu_text(message.body)) == (312, "", '{"a": 1}')


def kombu_text(body: str | bytes) -> str:
    return body if isinstance(body, str) else body.decode()


@pytest.mark.parametrize("direct", [False, True])
def test_a_task_to_a_missing_queue_is_rejected_and_the_queue_is_named(pg, direct):
    exchange, key = pg.exchange("direct") if direct else "", pg.name()

    with pytest.raises(kombu_pg.Rejected, match=key):
        send(pg.channel, key, "[]", exchange=exchange, headers={"task": "app.add", "id": "1"})


@pytest.mark.parametrize("kind", ["topic", "fanout"])
def test_a_task_that_no_topic_or_fanout_queue_wants_is_dropped(broker, kind):
    send(broker.channel, "key", "[]", exchange=broker.exchange(kind), headers={"task": "app.add", "id": "1"})


def test_a_retry_of_a_publish_adds_no_second_copy(pg):
    queue, properties = pg.queue(), {"correlation_id": "1"}

    for _attempt in range(3):
        draft = pg.channel.prepare_message("once", properties=properties)
        pg.channel.basic_publish(draft, routing_key=queue)
    send(pg.channel, queue, "another", correlation_id="1")

    assert contents(pg.channel, queue) == ["once", "another"]


# Passive, equivalence, access


@pytest.mark.parametrize(
    "verb",
    [
        lambda channel, missing: channel.queue_declare(missing, passive=True),
        lambda channel, missing: channel.exchange_declare(missing, "direct", passive=True),
        lambda channel, missing: channel.queue_bind(missing, "amq.direct", "key"),
        lambda channel, missing: channel.basic_consume(missing),
        lambda channel, missing: channel.basic_get(missing),
        lambda channel, missing: channel.queue_purge(missing),
    ],
    ids=["queue", "exchange", "bind", "consume", "get", "purge"],
)
def test_what_is_missing_is_not_found(broker, verb):
    with pytest.raises(NotFound) as raised:
        verb(broker.channel, broker.name())

    assert raised.value.reply_code == 404


def test_binding_to_a_missing_exchange_is_not_found(broker):
    queue = broker.queue()

    with pytest.raises(NotFound):
        broker.channel.queue_bind(queue, broker.name(), "key")


def test_deleting_what_is_missing_succeeds(broker):
    broker.channel.exchange_delete(broker.name())

    assert broker.channel.queue_delete(broker.name()) == 0


def test_a_passive_declaration_needs_no_arguments(broker):
    queue = broker.queue(durable=True, arguments={"x-max-priority": 5})
    exchange = broker.exchange("topic", durable=True)

    assert broker.channel.queue_declare(queue, passive=True).queue == queue
    broker.channel.exchange_declare(exchange, "fanout", passive=True)


QUEUE = {
    "durable": True,
    "auto_delete": False,
    "arguments": {
        "x-message-ttl": 60_000,
        "x-expires": 70_000,
        "x-max-priority": 5,
        "x-max-length": 80,
        "x-max-length-bytes": 90,
        "x-overflow": "drop-head",
        "x-dead-letter-exchange": "dlx",
        "x-dead-letter-routing-key": "dead",
    },
}


def test_a_queue_redeclared_as_it_is_keeps_its_messages(broker):
    queue = broker.queue(**QUEUE)
    send(broker.channel, queue, "kept")

    declared = broker.channel.queue_declare(queue, **QUEUE)

    assert declared == (queue, 1, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"durable": False},
        {"auto_delete": True},
        *({"arguments": {**QUEUE["arguments"], key: "other"}} for key, v in QUEUE["arguments"].items() if v == str(v)),
        *({"arguments": {**QUEUE["arguments"], key: 7}} for key, v in QUEUE["arguments"].items() if v != str(v)),
        *({"arguments": {k: v for k, v in QUEUE["arguments"].items() if k != key}} for key in QUEUE["arguments"]),
    ],
)
def test_a_queue_redeclared_otherwise_is_refused(broker, change):
    queue = broker.queue(**QUEUE)

    with pytest.raises(PreconditionFailed) as raised:
        broker.channel.queue_declare(queue, **{**QUEUE, **change})

    assert raised.value.reply_code == 406


def test_arguments_that_mean_nothing_to_the_broker_may_differ(broker):
    queue = broker.queue(arguments={"x-note": "one"})

    broker.channel.queue_declare(queue, auto_delete=False, arguments={"x-note": "two"})


@pytest.mark.parametrize(
    "arguments",
    [
        {"x-message-ttl": -1},
        {"x-message-ttl": "1000"},
        {"x-expires": 0},
        {"x-max-priority": -1},
        {"x-max-priority": 256},
        {"x-max-length": -1},
        {"x-max-length-bytes": -1},
        {"x-overflow": "burst"},
        {"x-dead-letter-exchange": 1},
        {"x-dead-letter-routing-key": "no exchange"},
    ],
)
def test_a_queue_argument_that_makes_no_sense_is_refused(broker, arguments):
    with pytest.raises(PreconditionFailed):
        broker.queue(arguments=arguments)


@pytest.mark.parametrize("argument", ["x-message-ttl", "x-expires"])
def test_a_time_past_the_end_of_the_calendar_is_refused(pg, argument):
    with pytest.raises(PreconditionFailed):
        pg.queue(arguments={argument: 2**62})


@pytest.mark.parametrize("change", [{"type": "fanout"}, {"durable": True}, {"auto_delete": True}])
def test_an_exchange_redeclared_otherwise_is_refused(broker, change):
    exchange = broker.exchange("topic", durable=False)
    as_it_is = {"type": "topic", "durable": False, "auto_delete": False}

    broker.channel.exchange_declare(exchange, **as_it_is)
    with pytest.raises(PreconditionFailed):
        broker.channel.exchange_declare(exchange, **{**as_it_is, **change})


def test_an_unknown_exchange_type_is_refused(broker):
    with pytest.raises(InvalidCommand):
        broker.exchange("carrier-pigeon")


def test_an_exchange_in_use_is_not_deleted_if_unused(broker):
    exchange = broker.exchange("direct")
    queue = broker.bound(exchange, "key")

    with pytest.raises(PreconditionFailed):
        broker.channel.exchange_delete(exchange, if_unused=True)

    broker.channel.queue_unbind(queue, exchange, "key")
    broker.channel.exchange_delete(exchange, if_unused=True)
    with pytest.raises(NotFound):
        broker.channel.exchange_declare(exchange, "direct", passive=True)


def test_a_deleted_exchange_forgets_its_bindings(broker):
    exchange = broker.exchange("direct")
    queue = broker.bound(exchange, "key")

    broker.channel.exchange_delete(exchange)
    broker.channel.exchange_declare(exchange, "direct", auto_delete=False)
    send(broker.channel, "key", "lost", exchange=exchange)

    assert contents(broker.channel, queue) == []


# Exclusive and auto-delete


@pytest.mark.parametrize(
    "verb",
    [
        lambda channel, queue: channel.queue_declare(queue, exclusive=True, auto_delete=False),
        lambda channel, queue: channel.queue_declare(queue, auto_delete=False),
        lambda channel, queue: channel.queue_declare(queue, passive=True),
        lambda channel, queue: channel.queue_bind(queue, "amq.direct", queue),
        lambda channel, queue: channel.queue_unbind(queue, "amq.direct", queue),
        lambda channel, queue: channel.basic_consume(queue),
        lambda channel, queue: channel.basic_get(queue),
        lambda channel, queue: channel.queue_purge(queue),
        lambda channel, queue: channel.queue_delete(queue),
    ],
    ids=["exclusive", "shared", "passive", "bind", "unbind", "consume", "get", "purge", "delete"],
)
def test_an_exclusive_queue_is_locked_to_others_while_its_owner_lives(broker, verb):
    queue = broker.queue(exclusive=True)
    broker.channel.queue_bind(queue, "amq.direct", queue)

    with pytest.raises(ResourceLocked) as raised:
        verb(broker.connect().channel(), queue)

    assert raised.value.reply_code == 405
    assert broker.channel.queue_declare(queue, exclusive=True, auto_delete=False) == (queue, 0, 0)


def test_anybody_may_publish_to_an_exclusive_queue(broker):
    queue = broker.queue(exclusive=True)

    send(broker.connect().channel(), queue, "from outside")

    assert contents(broker.channel, queue) == ["from outside"]


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_queue_does_not_become_exclusive_or_shared_by_a_redeclaration(broker, exclusive):
    queue = broker.queue(exclusive=exclusive)

    with pytest.raises(ResourceLocked):
        broker.channel.queue_declare(queue, exclusive=not exclusive, auto_delete=False)


def test_an_exclusive_queue_goes_with_its_connection(broker):
    owner = broker.connect()
    queue = broker.name()
    owner.channel().queue_declare(queue, exclusive=True, auto_delete=False)
    owner.channel().close()
    assert exists(broker.channel, queue)

    owner.close()

    eventually(lambda: is_gone(broker.channel, queue))


def test_an_exclusive_queue_of_a_dead_owner_is_free(pg):
    queue = pg.queue(exclusive=True)
    execute(pg.database, "UPDATE kombu_pg.queue SET owner_id = 0 WHERE owner_id IS NOT NULL")

    declared = pg.connect().channel().queue_declare(queue, exclusive=True, auto_delete=False)

    assert declared == (queue, 0, 0)


def test_an_auto_delete_queue_goes_with_its_last_consumer(broker):
    queue = broker.queue(auto_delete=True)
    first, second = Inbox(broker.channel, queue), Inbox(broker.channel, queue)

    first.cancel()
    assert consumers(broker.channel, queue) == 1

    second.cancel()
    eventually(lambda: is_gone(broker.channel, queue))


def test_an_auto_delete_queue_without_consumers_stays(broker):
    connection = broker.connect()
    queue = broker.queue(auto_delete=True)
    connection.channel().queue_declare(queue, auto_delete=True)
    send(broker.channel, queue, "waits")

    connection.close()

    assert contents(broker.channel, queue) == ["waits"]


@pytest.mark.parametrize("of", ["channel", "connection"])
def test_an_auto_delete_queue_goes_when_its_consumers_end(broker, of):
    queue = broker.queue(auto_delete=True)
    connection = broker.connect()
    channel = connection.channel()
    Inbox(channel, queue)

    (channel if of == "channel" else connection).close()

    eventually(lambda: is_gone(broker.channel, queue))


def test_an_auto_delete_exchange_goes_with_its_last_binding(broker):
    exchange = broker.exchange("topic", auto_delete=True)
    first, second = broker.bound(exchange, "a"), broker.bound(exchange, "b")

    broker.channel.queue_unbind(first, exchange, "a")
    broker.channel.exchange_declare(exchange, "direct", passive=True)

    broker.channel.queue_delete(second)
    with pytest.raises(NotFound):
        broker.channel.exchange_declare(exchange, "direct", passive=True)


def test_a_queue_without_a_name_is_given_one(broker):
    names = {broker.channel.queue_declare("", exclusive=True).queue for _ in range(2)}

    assert len(names) == 2
    assert all(name.startswith("amq.gen-") for name in names)


# Priority


def test_higher_priorities_come_first_and_equal_ones_in_order(broker):
    queue = broker.queue(arguments={"x-max-priority": 5})

    for n, priority in enumerate([0, 5, None, 3, 5, 1, 3]):
        send(broker.channel, queue, f"{priority}-{n}", priority=priority)

    expected = ["5-1", "5-4", "3-3", "3-6", "1-5", "0-0", "None-2"]
    assert contents(broker.channel, queue) == expected


def test_priorities_above_the_highest_are_the_highest(broker):
    queue = broker.queue(arguments={"x-max-priority": 5})

    for priority in (4, 5, 255, 9, 5):
        send(broker.channel, queue, priority.to_bytes(1, "big"), priority=priority)

    assert contents(broker.channel, queue) == [b"\5", b"\xff", b"\x09", b"\5", b"\4"]


@pytest.mark.parametrize("arguments", [None, {"x-max-priority": 0}])
def test_without_priorities_a_queue_is_first_in_first_out(broker, arguments):
    queue = broker.queue(arguments=arguments)

    for priority in (0, 9, 3, 5):
        send(broker.channel, queue, str(priority), priority=priority)

    assert contents(broker.channel, queue) == ["0", "9", "3", "5"]


def test_a_consumer_gets_the_highest_priority_first(broker):
    queue = broker.queue(arguments={"x-max-priority": 9})
    for priority in (1, 9, 5):
        send(broker.channel, queue, str(priority), priority=priority)

    inbox = Inbox(broker.channel, queue)

    assert inbox.wait(3) == ["9", "5", "1"]
    assert inbox[0].properties["priority"] == 9


def test_a_returned_message_stands_before_its_priority_but_not_before_higher_ones(broker):
    queue = broker.queue(arguments={"x-max-priority": 5})
    send(broker.channel, queue, "low", priority=1)
    returned = take(broker.channel, queue)
    send(broker.channel, queue, "later", priority=1)
    send(broker.channel, queue, "high", priority=4)

    returned.reject(requeue=True)

    assert contents(broker.channel, queue) == ["high", "low", "later"]


# Time to live


@pytest.mark.parametrize("ttl", ["0", "20"])
def test_a_message_past_its_own_expiration_is_not_delivered(broker, ttl):
    queue = broker.queue()
    send(broker.channel, queue, "late", expiration=ttl)

    broker.let_expire(queue)
    send(broker.channel, queue, "fresh", expiration="3600000")

    assert contents(broker.channel, queue) == ["fresh"]


@pytest.mark.parametrize("ttl", [0, 20])
def test_a_message_past_its_queues_ttl_is_not_delivered(broker, ttl):
    queue = broker.queue(arguments={"x-message-ttl": ttl})
    send(broker.channel, queue, "late")

    broker.let_expire(queue)

    assert take(broker.channel, queue) is None
    eventually(lambda: ready(broker.channel, queue) == 0)


@pytest.mark.parametrize(("of_queue", "of_message"), [(20, "3600000"), (3_600_000, "20")])
def test_the_shorter_of_two_ttls_counts(broker, of_queue, of_message):
    queue = broker.queue(arguments={"x-message-ttl": of_queue})
    send(broker.channel, queue, "late", expiration=of_message)

    broker.let_expire(queue)

    assert contents(broker.channel, queue) == []


def test_a_consumer_gets_no_expired_message(broker):
    queue = broker.queue()
    send(broker.channel, queue, "late", expiration="20")
    broker.let_expire(queue)
    inbox = Inbox(broker.channel, queue)

    send(broker.channel, queue, "fresh")

    assert inbox.wait(1) == ["fresh"]


def test_a_requeued_message_keeps_its_old_expiration(broker):
    queue = broker.queue()
    send(broker.channel, queue, "held", "clock", expiration="200")
    held = take(broker.channel, queue)

    broker.let_expire(queue)
    held.reject(requeue=True)

    assert take(broker.channel, queue) is None


def test_a_message_that_expires_while_it_is_held_can_be_acked(broker):
    queue = broker.queue()
    send(broker.channel, queue, "held", "clock", expiration="200")
    held = take(broker.channel, queue)
    assert held.body == "held"

    broker.let_expire(queue)
    held.ack()

    assert take(broker.channel, queue) is None


@pytest.mark.parametrize("expiration", ["soon", "-1", str(2**62)])
def test_an_expiration_that_makes_no_sense_is_refused(broker, expiration):
    with pytest.raises(PreconditionFailed):
        send(broker.channel, broker.queue(), "when?", expiration=expiration)


# x-expires


def test_a_queue_that_nobody_uses_expires(amqp):
    queue = amqp.queue(arguments={"x-expires": 50})

    eventually(lambda: not exists(amqp.channel, queue))


def test_a_queue_that_nobody_uses_is_swept_by_any_consumer(pg):
    queue, used = pg.queue(arguments={"x-expires": 60_000}), pg.queue(arguments={"x-expires": 3_600_000})
    Inbox(pg.channel, used)
    for name in (queue, used):
        age(pg, name, 120)

    eventually(lambda: not exists(pg.channel, queue))
    assert exists(pg.channel, used)


def test_a_server_that_was_away_for_longer_than_x_expires_keeps_the_queue(pg):
    queue = pg.queue(arguments={"x-expires": 60_000})
    Inbox(pg.channel, pg.queue())
    age(pg, queue, 120)
    pg.query("UPDATE kombu_pg.installation SET epoch_since = clock_timestamp() RETURNING 1")

    pg.query("SELECT kombu_pg.expire_queues()")

    assert exists(pg.channel, queue)


@pytest.mark.parametrize("argument", [{"auto_delete": True}, {"arguments": {"x-expires": 60_000}}], ids=str)
def test_a_queue_outlives_a_consumer_that_was_only_cut_off(pg, argument):
    queue = pg.queue(**argument)
    pg.query(
        "INSERT INTO kombu_pg.consumer (hostname, pid, heartbeat, epoch, grace, heartbeat_timeout, seen_at) "
        "VALUES ('cut off', 1, true, '', 1, 1, now() - interval '1 day') RETURNING id"
    )
    pg.query(
        "INSERT INTO kombu_pg.subscription (consumer_id, token, tag, queue_id) SELECT c.id, 1, 'its', q.id "
        "FROM kombu_pg.queue q, kombu_pg.consumer c WHERE q.name = %s AND c.hostname = 'cut off' RETURNING 1",
        queue,
    )
    Inbox(pg.channel, queue).cancel()
    age(pg, queue, 120)

    pg.query("SELECT kombu_pg.expire_queues()")

    assert exists(pg.channel, queue)
    eventually(lambda: pg.query("SELECT FROM kombu_pg.consumer WHERE hostname = 'cut off'") == [])
    age(pg, queue, 120)
    pg.query("SELECT kombu_pg.expire_queues()")
    assert not exists(pg.channel, queue)


@pytest.mark.parametrize(
    "use",
    [
        lambda channel, queue: channel.queue_declare(queue, auto_delete=False, arguments={"x-expires": 60_000}),
        lambda channel, queue: channel.queue_declare(queue, passive=True),
        lambda channel, queue: channel.basic_get(queue),
        lambda channel, queue: Inbox(channel, queue),
        lambda channel, queue: Inbox(channel, queue).cancel(),
    ],
    ids=["declare", "passive", "get", "consume", "cancel"],
)
def test_use_keeps_a_queue_from_expiring(pg, use):
    queue = pg.queue(arguments={"x-expires": 60_000})
    age(pg, queue, 45)

    use(pg.channel, queue)
    age(pg, queue, 45)
    pg.query("SELECT kombu_pg.expire_queues()")

    assert exists(pg.channel, queue)


def test_a_queue_is_not_swept_by_its_own_consumer(pg):
    queue = pg.queue(arguments={"x-expires": 60_000})
    inbox = Inbox(pg.channel, queue)
    age(pg, queue, 120)

    eventually(lambda: pg.query("SELECT used_at > now() - interval '1 minute' FROM kombu_pg.queue") != [(False,)])
    send(pg.channel, queue, "still there")

    assert inbox.wait(1) == ["still there"]


def test_a_publish_does_not_keep_a_queue_from_expiring(pg):
    queue = pg.queue(arguments={"x-expires": 60_000})
    age(pg, queue, 120)

    send(pg.channel, queue, "forgotten")
    pg.query("SELECT kombu_pg.expire_queues()")

    assert not exists(pg.channel, queue)


def test_a_queue_declared_while_it_expires_is_there_afterwards(pg):
    queue = pg.queue(arguments={"x-expires": 60_000})
    age(pg, queue, 120)

    with contextlib.closing(psycopg2.connect(pg.database)) as sweep, sweep.cursor() as cursor:
        cursor.execute("SELECT kombu_pg.expire_queues()")
        with ThreadPoolExecutor() as pool:
            arguments = {"x-expires": 60_000}
            declared = pool.submit(pg.channel.queue_declare, queue, auto_delete=False, arguments=arguments)
            eventually(lambda: pg.query("SELECT FROM pg_locks WHERE NOT granted AND database IS NULL") != [])
            sweep.commit()

    assert declared.result() == (queue, 0, 0)
    assert exists(pg.channel, queue)


@pytest.mark.parametrize(("seconds", "written"), [(14, False), (16, True)])
def test_a_redeclaration_writes_once_in_a_quarter_of_the_queues_life(pg, seconds, written):
    queue = pg.queue(arguments={"x-expires": 60_000})
    age(pg, queue, seconds)
    row = "SELECT xmin::text, used_at FROM kombu_pg.queue WHERE name = %s"
    before = pg.query(row, queue)

    for _ in range(3):
        pg.channel.queue_declare(queue, auto_delete=False, arguments={"x-expires": 60_000})

    assert (pg.query(row, queue) != before) is written


def age(pg: Broker, queue: str, seconds: int) -> None:
    pg.query(
        "UPDATE kombu_pg.installation SET epoch_since = epoch_since - make_interval(secs => %s) RETURNING 1", seconds
    )
    pg.query(
        "UPDATE kombu_pg.queue SET used_at = used_at - make_interval(secs => %s) WHERE name = %s RETURNING id",
        seconds,
        queue,
    )


# basic.get, ack, reject, recover


def test_an_empty_queue_gives_nothing(broker):
    assert take(broker.channel, broker.queue()) is None


def test_a_message_says_where_it_came_from(broker):
    exchange = broker.exchange("topic")
    queue = broker.bound(exchange, "a.*")
    send(broker.channel, "a.b", "one", "two", exchange=exchange)

    got = take(broker.channel, queue)
    inbox = Inbox(broker.channel, queue)
    inbox.wait(1)

    assert got.delivery_info["message_count"] == 1
    for message, n in ((got, 1), (inbox[0], 2)):
        seen = {key: message.delivery_info[key] for key in ("exchange", "routing_key", "redelivered", "delivery_tag")}
        assert seen == {"exchange": exchange, "routing_key": "a.b", "redelivered": False, "delivery_tag": n}
    assert inbox[0].delivery_info["consumer_tag"] == inbox.tag


def test_an_unacked_message_is_neither_ready_nor_given_to_another(broker):
    queue = broker.queue()
    send(broker.channel, queue, "mine")

    message = take(broker.channel, queue)

    assert ready(broker.channel, queue) == 0
    assert take(broker.connect().channel(), queue) is None
    message.ack()


def test_an_acked_message_does_not_come_back(broker):
    queue = broker.queue()
    send(broker.channel, queue, "a", "b")

    take(broker.channel, queue).ack()
    take(broker.channel, queue, no_ack=True)
    broker.channel.close()

    assert is_empty_soon(broker.connect().channel(), queue)


def is_empty_soon(channel: Any, queue: str) -> bool:
    """Nothing is ready; a deletion that only succeeds on an empty queue proves that it stays so."""
    return ready(channel, queue) == 0 and channel.queue_delete(queue, if_empty=True) == 0


def test_an_ack_of_several_covers_everything_before_it(broker):
    queue, channel = broker.queue(), broker.connect().channel()
    send(broker.channel, queue, *"abcde")
    messages = [take(channel, queue) for _ in "abcde"]

    messages[1].ack()
    messages[3].ack(multiple=True)
    channel.close()

    eventually(lambda: ready(broker.channel, queue) == 1)
    assert contents(broker.channel, queue) == ["e"]


def test_an_ack_of_several_with_tag_0_covers_everything(broker):
    queue, channel = broker.queue(), broker.connect().channel()
    send(broker.channel, queue, "a", "b")
    for _ in "ab":
        take(channel, queue)

    channel.basic_ack(0, multiple=True)
    channel.close()

    assert contents(broker.channel, queue) == []


def test_a_second_ack_is_refused(broker):
    queue = broker.queue()
    send(broker.channel, queue, "once")
    message = take(broker.channel, queue)
    broker.channel.basic_ack(message.delivery_tag)

    with pytest.raises(PreconditionFailed):
        answered(broker.channel, lambda channel: channel.basic_ack(message.delivery_tag))


def answered(channel: Any, verb: Callable[[Any], None]) -> None:
    """RabbitMQ's refusal of what has no answer comes instead of the next answer."""
    verb(channel)
    channel.exchange_declare("amq.direct", "direct", passive=True)


def test_a_message_rejected_without_requeue_is_gone(broker):
    queue = broker.queue()
    send(broker.channel, queue, "bad", "good")

    take(broker.channel, queue).reject()

    assert contents(broker.channel, queue) == ["good"]


def test_requeued_messages_stand_where_they_stood(broker):
    queue = broker.queue()
    send(broker.channel, queue, *"abcd")
    first, second, third = (take(broker.channel, queue) for _ in "abc")

    third.reject(requeue=True)
    first.requeue()
    second.ack()

    assert contents(broker.channel, queue) == ["a", "c", "d"]


def test_only_what_was_delivered_before_is_marked_redelivered(broker):
    queue = broker.queue()
    send(broker.channel, queue, "a", "b")
    take(broker.channel, queue).requeue()

    messages = [take(broker.channel, queue) for _ in "ab"]

    assert [(m.body, m.delivery_info["redelivered"]) for m in messages] == [("a", True), ("b", False)]


def test_a_consumer_gets_its_requeued_message_again(broker):
    queue = broker.queue()
    send(broker.channel, queue, "again")
    inbox = Inbox(broker.channel, queue)

    inbox.wait(1)
    inbox[0].requeue()
    inbox.wait(2)

    assert [message.delivery_info["redelivered"] for message in inbox] == [False, True]
    inbox[1].ack()


def test_recover_requeues_everything_unacked_in_order(broker):
    queue = broker.queue()
    send(broker.channel, queue, *"abcd")
    messages = [take(broker.channel, queue) for _ in "abc"]
    messages[1].ack()

    broker.channel.basic_recover(requeue=True)

    again = [take(broker.channel, queue) for _ in "acd"]
    assert [(m.body, m.delivery_info["redelivered"]) for m in again] == [("a", True), ("c", True), ("d", False)]


def test_recover_gives_a_consumer_everything_again(broker):
    queue = broker.queue()
    send(broker.channel, queue, *"ab")
    inbox = Inbox(broker.channel, queue)
    inbox.wait(2)

    kombu.Consumer(broker.channel).recover(requeue=True)

    assert inbox.wait(4) == ["a", "b", "a", "b"]


def test_recover_without_requeue_is_not_implemented(broker):
    with pytest.raises(AMQPNotImplementedError):
        answered(broker.channel, lambda channel: channel.basic_recover(requeue=False))


@pytest.mark.parametrize("of", ["channel", "connection"])
def test_closing_requeues_what_is_unacked_in_order(broker, of):
    queue, connection = broker.queue(), broker.connect()
    channel = connection.channel()
    send(broker.channel, queue, *"abcd")
    take(channel, queue)
    take(channel, queue).ack()
    take(channel, queue)

    (channel if of == "channel" else connection).close()

    eventually(lambda: ready(broker.channel, queue) == 3)
    again = [take(broker.channel, queue) for _ in "acd"]
    assert [(m.body, m.delivery_info["redelivered"]) for m in again] == [("a", True), ("c", True), ("d", False)]


# Consume


def test_messages_arrive_in_the_order_they_were_published(broker):
    queue = broker.queue()
    inbox = Inbox(broker.channel, queue)
    bodies = [f"{n}" for n in range(500)]

    send(broker.connect().channel(), queue, *bodies)

    assert inbox.wait(500) == bodies


def test_two_consumers_of_a_queue_take_turns(broker):
    queue = broker.queue()
    inboxes = [Inbox(broker.channel, queue), Inbox(broker.channel, queue)]

    for n in range(8):
        send(broker.channel, queue, str(n))
        drain(broker.channel, lambda: sum(map(len, inboxes)) > n)  # noqa: B023

    assert sorted(inbox.bodies() for inbox in inboxes) == [["0", "2", "4", "6"], ["1", "3", "5", "7"]]


def test_two_consumers_of_a_queue_share_a_batch(broker):
    queue = broker.queue()
    inboxes = [Inbox(broker.channel, queue), Inbox(broker.channel, queue)]

    send(broker.connect().channel(), queue, *map(str, range(100)))
    drain(broker.channel, lambda: sum(map(len, inboxes)) == 100)

    assert [len(inbox) for inbox in inboxes] == [50, 50]


def test_a_consumer_without_room_is_passed_over(broker):
    queue = broker.queue()
    broker.channel.basic_qos(0, 1, False)
    full, busy = Inbox(broker.channel, queue), Inbox(broker.channel, queue)
    busy.on_message = lambda message: (busy.append(message), message.ack())

    send(broker.channel, queue, *"abcdef")
    drain(broker.channel, lambda: len(full) + len(busy) == 6)

    assert (len(full), len(busy)) == (1, 5)


def test_consumers_on_two_connections_share_a_queue(broker):
    queue = broker.queue()
    channels = [broker.connect().channel() for _ in range(2)]
    for channel in channels:
        channel.basic_qos(0, 1, False)
    inboxes = [Inbox(channel, queue) for channel in channels]

    send(broker.channel, queue, *"abc")

    assert sorted(inboxes[0].wait(1) + inboxes[1].wait(1)) == ["a", "b"]
    assert contents(broker.channel, queue) == ["c"]


def test_a_consumer_holds_at_most_its_prefetch_count(broker):
    queue = broker.queue()
    broker.channel.basic_qos(0, 2, False)
    inbox = Inbox(broker.channel, queue)
    send(broker.channel, queue, *"abcd")

    inbox.wait(2)
    assert is_quiet(broker.channel)
    assert ready(broker.channel, queue) == 2

    inbox[0].ack()
    assert inbox.wait(3) == ["a", "b", "c"]


def test_a_prefetch_count_is_for_each_consumer_begun_after_it(broker):
    queues = [broker.queue(), broker.queue(), broker.queue()]
    inboxes = []
    for queue, count in zip(queues, (0, 1, 2), strict=True):
        broker.channel.basic_qos(0, count, False)
        inboxes.append(Inbox(broker.channel, queue))
        send(broker.channel, queue, *"abc")

    drain(broker.channel, lambda: sum(map(len, inboxes)) == 6)

    assert is_quiet(broker.channel)
    assert [len(inbox) for inbox in inboxes] == [3, 1, 2]


def test_a_global_prefetch_count_is_for_the_whole_channel(broker):
    queues = [broker.queue(), broker.queue()]
    broker.channel.basic_qos(0, 3, True)
    inboxes = [Inbox(broker.channel, queue) for queue in queues]
    for queue in queues:
        send(broker.channel, queue, *"abc")

    drain(broker.channel, lambda: sum(map(len, inboxes)) == 3)

    assert is_quiet(broker.channel)
    assert sum(ready(broker.channel, queue) for queue in queues) == 3


def test_both_prefetch_counts_hold_together(broker):
    queues = [broker.queue(), broker.queue()]
    broker.channel.basic_qos(0, 2, False)
    broker.channel.basic_qos(0, 3, True)
    inboxes = [Inbox(broker.channel, queue) for queue in queues]
    for queue in queues:
        send(broker.channel, queue, *"abc")

    drain(broker.channel, lambda: sum(map(len, inboxes)) == 3)

    assert is_quiet(broker.channel)
    assert sorted(map(len, inboxes)) == [1, 2]


def test_a_global_prefetch_count_can_be_raised_while_consuming(broker):
    queue = broker.queue()
    broker.channel.basic_qos(0, 1, True)
    inbox = Inbox(broker.channel, queue)
    send(broker.channel, queue, *"abcd")
    inbox.wait(1)

    broker.channel.basic_qos(0, 3, True)

    assert inbox.wait(3) == ["a", "b", "c"]
    assert is_quiet(broker.channel)


def test_a_consumer_without_acks_owes_none(broker):
    queue, channel = broker.queue(), broker.connect().channel()
    channel.basic_qos(0, 1, False)
    inbox = Inbox(channel, queue, no_ack=True)
    send(broker.channel, queue, *"abc")

    assert inbox.wait(3) == ["a", "b", "c"]
    channel.close()

    assert is_empty_soon(broker.channel, queue)


def test_a_cancelled_consumer_gets_nothing_more_and_keeps_what_it_holds(broker):
    queue = broker.queue()
    inbox = Inbox(broker.channel, queue)
    send(broker.channel, queue, "held")
    inbox.wait(1)

    inbox.cancel()
    send(broker.channel, queue, "not for it")

    assert contents(broker.channel, queue) == ["not for it"]
    inbox[0].ack()
    assert is_empty_soon(broker.channel, queue)


def test_what_was_prefetched_and_not_delivered_goes_back_on_cancel(pg):
    queue = pg.queue()
    send(pg.channel, queue, *"abcd")
    inbox = Inbox(pg.channel, queue)
    inbox.on_message = lambda message: (inbox.append(message), inbox.cancel())  # py-amqp delivers what it has read

    assert inbox.wait(1) == ["a"]

    assert is_quiet(pg.channel)
    again = [take(pg.connect().channel(), queue) for _ in "bcd"]
    assert [(m.body, m.properties["pg_returns"]) for m in again] == [("b", 0), ("c", 0), ("d", 0)]


def test_what_a_claim_under_way_brings_after_the_cancel_goes_back_at_once(pg):
    queue = pg.queue()
    send(pg.channel, queue, *range(400))
    inbox = Inbox(pg.channel, queue)
    inbox.wait(1)  # the next claim is sent before this returns

    inbox.cancel()

    assert ready(pg.connect().channel(), queue) + len(inbox) == 400


def test_a_consumer_hears_that_its_queue_was_deleted(broker):
    queue, cancelled = broker.queue(), []
    inbox = Inbox(broker.channel, queue, on_cancel=cancelled.append)

    broker.connect().channel().queue_delete(queue)
    while not cancelled:
        with contextlib.suppress(TimeoutError):
            broker.channel.connection.client.drain_events(timeout=PATIENCE)

    assert cancelled == [inbox.tag]


def test_a_consumer_whose_queue_was_deleted_is_told_to_start_again(broker):
    queue = broker.queue()
    Inbox(broker.channel, queue)

    broker.connect().channel().queue_delete(queue)

    with pytest.raises(ConsumerCancelled):
        drain(broker.channel, lambda: False)


# Purge, delete, counts


def test_a_declaration_counts_messages_and_consumers(broker):
    queue = broker.queue()
    send(broker.channel, queue, "a", "b", "c")
    take(broker.channel, queue)
    broker.channel.basic_qos(0, 1, False)
    inbox = Inbox(broker.channel, queue)
    inbox.wait(1)

    assert broker.channel.queue_declare(queue, auto_delete=False) == (queue, 1, 1)
    assert broker.channel.queue_declare(queue, passive=True) == (queue, 1, 1)


def test_purge_drops_and_counts_what_is_ready(broker):
    queue = broker.queue()
    send(broker.channel, queue, *"abcd")
    held = take(broker.channel, queue)

    assert broker.channel.queue_purge(queue) == 3
    assert broker.channel.queue_purge(queue) == 0

    held.requeue()
    assert contents(broker.channel, queue) == ["a"]


def test_delete_counts_what_was_ready(broker):
    queue = broker.queue()
    send(broker.channel, queue, *"abc")
    take(broker.channel, queue)

    assert broker.channel.queue_delete(queue) == 2
    assert is_gone(broker.channel, queue)


def test_a_deleted_queue_comes_back_empty_and_unbound(broker):
    queue = broker.queue()
    broker.channel.queue_bind(queue, "amq.direct", queue)
    send(broker.channel, queue, "old")

    broker.channel.queue_delete(queue)
    broker.channel.queue_declare(queue, auto_delete=False)
    send(broker.channel, queue, "unbound", exchange="amq.direct")

    assert contents(broker.channel, queue) == []


def test_a_message_of_a_deleted_queue_can_still_be_settled(broker):
    queue, channel = broker.queue(), broker.connect().channel()
    send(broker.channel, queue, *"abc")
    messages = [take(channel, queue) for _ in "abc"]

    broker.channel.queue_delete(queue)
    messages[0].ack()
    messages[1].requeue()
    channel.close()

    assert broker.channel.queue_declare(queue, auto_delete=False) == (queue, 0, 0)


def test_a_queue_in_use_is_not_deleted_if_unused(broker):
    queue = broker.queue()
    inbox = Inbox(broker.connect().channel(), queue)

    with pytest.raises(PreconditionFailed):
        broker.channel.queue_delete(queue, if_unused=True)

    inbox.cancel()
    assert broker.channel.queue_delete(queue, if_unused=True) == 0


def test_a_queue_with_messages_is_not_deleted_if_empty(broker):
    queue = broker.queue()
    send(broker.channel, queue, "a")

    with pytest.raises(PreconditionFailed):
        broker.channel.queue_delete(queue, if_empty=True)

    assert contents(broker.channel, queue) == ["a"]
    assert broker.channel.queue_delete(queue, if_empty=True) == 0


# Names


@pytest.mark.parametrize("name", ["n" * 224, "ü漢🐘.a b/c%d'\"\\;--", "..", "#.*", " "])
def test_a_queue_may_have_any_name_of_255_bytes(broker, name):
    queue = broker.queue(queue=uuid.uuid4().hex[:31] + name)

    send(broker.channel, queue, "named")
    inbox = Inbox(broker.channel, queue)

    assert inbox.wait(1) == ["named"]
    inbox.cancel()
    assert broker.channel.queue_delete(queue) == 0


@pytest.mark.parametrize("name", ["n" * 256, "ü" * 128], ids=["ascii", "two bytes each"])
@pytest.mark.parametrize(
    "verb",
    [
        lambda channel, name: channel.queue_declare(name),
        lambda channel, name: channel.exchange_declare(name, "direct"),
        lambda channel, name: channel.queue_bind("queue", "amq.direct", name),
        lambda channel, name: send(channel, name, "to nowhere"),
    ],
    ids=["queue", "exchange", "binding", "publish"],
)
def test_a_name_of_more_than_255_bytes_is_refused(broker, name, verb):
    with pytest.raises((kombu_pg.Rejected, FrameSyntaxError, struct.error)):
        verb(broker.channel, name)


# Bodies, headers, properties


@pytest.mark.parametrize(
    "body",
    [b"", "", "text: ü漢🐘\n\0", bytes(range(256)), b"\0" * 16 * 1024**2],
    ids=["empty", "empty text", "text", "binary", "16 MB"],
)
def test_a_body_arrives_as_it_was_sent(broker, body):
    queue = broker.queue()
    send(broker.channel, queue, body)
    inbox = Inbox(broker.channel, queue)

    inbox.wait(1)

    assert inbox[0].body == body or (not body and inbox[0].body == "")


def test_a_body_above_the_limit_is_rejected_at_the_publisher(pg):
    queue = pg.queue()

    with pytest.raises(kombu_pg.Rejected, match=r"16,777,217 .* 16,777,216"):
        send(pg.channel, queue, b"x" * (16 * 1024**2 + 1))

    assert ready(pg.channel, queue) == 0


def test_the_limit_of_bodies_is_an_option(pg):
    queue, channel = pg.queue(), pg.connect(max_message_size=10).channel()

    with pytest.raises(kombu_pg.Rejected, match="max_message_size"):
        send(channel, queue, "x" * 11)
    send(channel, queue, "x" * 10)

    assert contents(channel, queue) == ["x" * 10]


@pytest.mark.parametrize(
    "value",
    [
        "a\0b",
        "\ud800 \udfff",
        "ü漢🐘",
        b"\0\xff",
        datetime(2024, 2, 29, 12, 30, 1),
        Decimal("-3.14"),
        {"a": [1, {"b": [None, True, 2.5, {}]}], "": []},
        None,
        -(2**63),
        "x" * 100_000,
    ],
    ids=["NUL", "surrogate", "unicode", "bytes", "datetime", "Decimal", "nested", "None", "integer", "long"],
)
def test_a_header_arrives_as_it_was_sent(broker, value):
    queue = broker.queue()

    send(broker.channel, queue, "", headers={"value": value, "other": 1})

    assert take(broker.channel, queue).headers == {"value": value, "other": 1}


def test_properties_arrive_as_they_were_sent(broker):
    queue = broker.queue()
    properties = {
        "correlation_id": "c", "reply_to": "r", "message_id": "m", "type": "t", "app_id": "a",
        "delivery_mode": 1,
    }  # fmt: skip

    kombu.Producer(broker.channel).publish({"a": 1}, routing_key=queue, priority=3, **properties)
    message = take(broker.channel, queue)

    assert {key: message.properties[key] for key in properties} == properties
    assert (message.properties["priority"], message.payload) == (3, {"a": 1})
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")


@pytest.mark.parametrize("serializer", ["json", "pickle", "raw"])
def test_kombu_serializers_round_trip(broker, serializer):
    queue, body = broker.queue(), b"\0\xff" if serializer == "raw" else {"a": [1, "ü\0"]}

    kombu.Producer(broker.channel).publish(body, routing_key=queue, serializer=serializer)
    raw = take(broker.channel, queue)

    assert loads(raw.body, raw.content_type, raw.content_encoding, force=True) == body
