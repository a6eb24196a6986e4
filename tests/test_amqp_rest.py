"""The rest of AMQP, the same on PostgreSQL and on RabbitMQ: dead letters, limits, headers, bindings between exchanges.

Cases marked pg have no oracle: batches, delayed requeues, and what becomes of tasks.
"""

import contextlib
import itertools
import random
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from typing import Any

import kombu
import psycopg2
import pytest
from amqp.exceptions import AccessRefused, ChannelError, MessageNacked, NotFound, PreconditionFailed
from brokers import Broker, Inbox, contents, eventually, ready, send, take
from kombu.exceptions import BatchPublishError

import kombu_pg

TASK = {"task": "app.add", "id": "1"}


def dying(broker: Broker, dlx: str | None = None, **arguments: Any) -> tuple[str, str]:
    """A queue, and the one that gets its dead letters (by a fanout exchange, unless `dlx` is another one)."""
    if dlx is None:
        dlx = broker.exchange("fanout")
    dead = broker.bound(dlx, "") if dlx else broker.queue()
    options = {key: arguments.pop(key) for key in ("durable", "queue") if key in arguments}
    named = {f"x-{key.replace('_', '-')}": value for key, value in arguments.items()}
    if not dlx:
        named.setdefault("x-dead-letter-routing-key", dead)
    return broker.queue(arguments={"x-dead-letter-exchange": dlx, **named}, **options), dead


def reject(broker: Broker, queue: str, count: int = 1) -> None:
    for _ in range(count):
        take(broker.channel, queue).reject()


def arrived(broker: Broker, queue: str, count: int = 1) -> list[Any]:
    """Take that many messages, which need not be there yet, and nothing more."""
    eventually(lambda: ready(broker.channel, queue) == count)
    return [take(broker.channel, queue, no_ack=True) for _ in range(count)]


def expire(broker: Broker, queue: str) -> None:
    """The one message of the queue, which may be on its way to it, is past its time (RabbitMQ: 20 ms)."""
    if broker.database is not None:
        eventually(lambda: ready(broker.channel, queue) == 1)
        broker.let_expire(queue)
        assert take(broker.channel, queue) is None


def deaths(message: Any) -> list[tuple[Any, ...]]:
    return [(death["queue"], death["reason"], death["count"]) for death in message.headers["x-death"]]


def buried(pg: Broker, count: int = 1) -> list[tuple[Any, ...]]:
    """Task, reason and detail of that many messages in the table dead_letter, which need not be there yet."""
    eventually(lambda: len(pg.query("SELECT FROM kombu_pg.dead_letter")) == count)
    return pg.query("SELECT task, reason, detail FROM kombu_pg.dead_letter ORDER BY id")


def is_settled(broker: Broker, queue: str) -> bool:
    """Nothing is ready in the queue, and stays so for long enough that what was under way would have arrived."""
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        if ready(broker.channel, queue):
            return False
    return True


# Dead letters


def test_a_dead_letter_says_where_and_why_it_died(broker):
    queue, dead = dying(broker)
    send(broker.channel, queue, "no")

    reject(broker, queue)

    (message,) = arrived(broker, dead)
    (death,) = message.headers["x-death"]
    death.pop("time")
    assert death == {"count": 1, "queue": queue, "reason": "rejected", "exchange": "", "routing-keys": [queue]}
    first = {key: value for key, value in message.headers.items() if key.startswith("x-first-death")}
    assert first == {"x-first-death-queue": queue, "x-first-death-reason": "rejected", "x-first-death-exchange": ""}


@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), "\0", "\udfff", "\\u0000", b"\0", [float("inf")]], ids=ascii
)
def test_a_header_that_cannot_be_compared_does_not_hide_the_others(pg, value):
    exchange, queue = pg.exchange("headers"), pg.queue()
    pg.channel.queue_bind(queue, exchange, "", arguments={"x-match": "all", "kind": "ü", "other": None})
    dying = pg.queue(arguments={"x-dead-letter-exchange": exchange})
    send(pg.channel, dying, "no", headers={"kind": "ü", "other": value, "n": 1})

    reject(pg, dying)

    assert arrived(pg, queue)[0].body == "no"


def test_the_time_of_a_death_has_whole_seconds_and_is_utc(broker):
    queue, dead = dying(broker)
    send(broker.channel, queue, "no")

    reject(broker, queue)

    (message,) = arrived(broker, dead)
    ago = datetime.now(timezone.utc).replace(tzinfo=None) - message.headers["x-death"][0]["time"]
    assert timedelta(0) <= ago < timedelta(minutes=1)
    assert message.headers["x-death"][0]["time"].microsecond == 0


def test_a_dead_letter_keeps_its_body_headers_and_properties(broker):
    queue, dead = dying(broker)
    properties = {"correlation_id": "c", "reply_to": "r", "type": "t", "priority": 3}
    send(broker.channel, queue, b"\0\xff", headers={"a": {"b": [1]}, "n": "\0"}, **properties)

    reject(broker, queue)

    (message,) = arrived(broker, dead)
    assert (message.body, message.headers["a"], message.headers["n"]) == (b"\0\xff", {"b": [1]}, "\0")
    assert {key: message.properties[key] for key in properties} == properties
    assert message.delivery_info["redelivered"] is False


@pytest.mark.parametrize("of", ["queue", "message"])
def test_an_expired_message_dies(broker, of):
    queue, dead = dying(broker, **({"message_ttl": 20} if of == "queue" else {}))
    send(broker.channel, queue, "late", **({"expiration": "20"} if of == "message" else {}))

    expire(broker, queue)

    (message,) = arrived(broker, dead)
    assert deaths(message) == [(queue, "expired", 1)]


def test_a_dead_letter_does_not_expire_again_by_its_own_time_to_live(broker):
    queue, dead = dying(broker)
    send(broker.channel, queue, "late", expiration="20")

    expire(broker, queue)

    (message,) = arrived(broker, dead)
    assert "expiration" not in message.properties
    assert message.headers["x-death"][0]["original-expiration"] == "20"


def test_a_dead_letter_lives_as_long_as_its_new_queue_says(broker):
    exchange = broker.exchange("fanout")
    last = broker.bound(exchange, "")
    middle = broker.queue(arguments={"x-message-ttl": 20, "x-dead-letter-exchange": exchange})
    queue = broker.queue(arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": middle})
    send(broker.channel, queue, "no")

    reject(broker, queue)
    expire(broker, middle)

    (message,) = arrived(broker, last)
    assert deaths(message) == [(middle, "expired", 1), (queue, "rejected", 1)]
    assert message.headers["x-first-death-queue"] == queue


def test_an_expired_message_dies_without_being_asked_for(broker):
    queue, dead = dying(broker, message_ttl=20)
    send(broker.channel, queue, "late")
    inbox = Inbox(broker.channel, dead)  # any consumer sweeps

    broker.let_expire(queue)

    assert inbox.wait(1) == ["late"]


def test_a_queue_with_a_time_to_live_delays_what_it_passes_on_by_little_more(pg):
    queue, dead = dying(pg, message_ttl=200)
    inbox = Inbox(pg.channel, dead)
    late = []

    for count in range(1, 5):
        send(pg.channel, queue, "delayed")
        begun = time.monotonic()
        inbox.wait(count)
        late.append(time.monotonic() - begun - 0.2)

    assert max(late) < 1


def test_dead_letters_keep_their_routing_key(broker):
    topic = broker.exchange("topic")
    queue, matching, other = broker.queue(arguments={"x-dead-letter-exchange": topic}), broker.queue(), broker.queue()
    broker.channel.queue_bind(matching, topic, queue)
    broker.channel.queue_bind(other, topic, "other.#")
    send(broker.channel, queue, "no")

    reject(broker, queue)

    (message,) = arrived(broker, matching)
    assert (message.delivery_info["exchange"], message.delivery_info["routing_key"]) == (topic, queue)
    assert ready(broker.channel, other) == 0


def test_a_dead_letter_routing_key_replaces_the_messages_own(broker):
    direct = broker.exchange("direct")
    matching = broker.bound(direct, "dead")
    queue, _ = dying(broker, dlx=direct, dead_letter_routing_key="dead")
    send(broker.channel, queue, "no")

    reject(broker, queue)

    (message,) = arrived(broker, matching)
    assert message.delivery_info["routing_key"] == "dead"
    assert message.headers["x-death"][0]["routing-keys"] == [queue]


def test_the_default_exchange_can_be_the_dead_letter_exchange(broker):
    queue, dead = dying(broker, dlx="")
    send(broker.channel, queue, "no")

    reject(broker, queue)

    (message,) = arrived(broker, dead)
    assert (message.body, message.delivery_info["exchange"]) == ("no", "")


def test_a_dead_letter_is_copied_to_every_queue_of_its_exchange(broker):
    exchange, chained = broker.exchange("fanout"), broker.exchange("topic")
    broker.channel.exchange_bind(chained, exchange)
    copies = [broker.bound(exchange, ""), broker.bound(chained, "#")]
    queue = broker.queue(arguments={"x-dead-letter-exchange": exchange})
    send(broker.channel, queue, "no")

    reject(broker, queue)

    assert [arrived(broker, copy)[0].body for copy in copies] == ["no", "no"]


def test_a_dead_letter_exchange_may_compare_headers(broker):
    exchange, wanted, other = broker.exchange("headers"), broker.queue(), broker.queue()
    broker.channel.queue_bind(wanted, exchange, "", arguments={"x-match": "all", "kind": "ü", "n": 1})
    broker.channel.queue_bind(other, exchange, "", arguments={"x-match": "all", "kind": "other"})
    queue = broker.queue(arguments={"x-dead-letter-exchange": exchange})
    send(broker.channel, queue, "no", headers={"kind": "ü", "n": 1, "other": "\0 \ud800"})

    reject(broker, queue)

    assert arrived(broker, wanted)[0].body == "no"
    assert ready(broker.channel, other) == 0


def test_a_headers_exchange_can_tell_dead_letters_by_why_they_died(broker):
    exchange, rejected, expired = broker.exchange("headers"), broker.queue(), broker.queue()
    for queue, reason in ((rejected, "rejected"), (expired, "expired")):
        arguments = {"x-match": "all-with-x", "x-first-death-reason": reason}
        broker.channel.queue_bind(queue, exchange, "", arguments=arguments)
    queue = broker.queue(arguments={"x-dead-letter-exchange": exchange})
    send(broker.channel, queue, "no")

    reject(broker, queue)

    assert arrived(broker, rejected)[0].body == "no"
    assert ready(broker.channel, expired) == 0


def test_deaths_are_counted_by_queue_and_reason_and_tell_of_the_first_of_each(broker):
    direct, second = broker.exchange("direct"), broker.name()
    first = broker.queue(arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": second})
    broker.queue(queue=second, arguments={"x-dead-letter-exchange": direct, "x-dead-letter-routing-key": "back"})
    broker.channel.queue_bind(first, direct, "back")
    send(broker.channel, first, "round")

    for queue, other in ((first, second), (second, first), (first, second)):
        reject(broker, queue)
        eventually(lambda: ready(broker.channel, other) == 1)  # noqa: B023

    (message,) = arrived(broker, second)
    assert deaths(message) == [(first, "rejected", 2), (second, "rejected", 1)]
    again = message.headers["x-death"][0]
    assert (again["exchange"], again["routing-keys"]) == ("", [first])
    first_death = [message.headers[f"x-first-death-{what}"] for what in ("queue", "reason", "exchange")]
    assert first_death == [first, "rejected", ""]


def test_a_message_that_expires_round_and_round_is_dropped(broker):
    queue = broker.name()
    arguments = {"x-message-ttl": 20, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue}
    broker.queue(queue=queue, arguments=arguments)
    send(broker.channel, queue, "round")

    expire(broker, queue)

    eventually(lambda: is_settled(broker, queue))


def test_a_retry_loop_of_two_queues_goes_round_for_ever(broker):
    waiting, work = broker.name(), broker.name()
    back = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": work}
    broker.queue(queue=waiting, arguments={"x-message-ttl": 20, **back})
    broker.queue(queue=work, arguments={**back, "x-dead-letter-routing-key": waiting})
    send(broker.channel, work, "retry")

    for _ in range(3):
        reject(broker, work)
        expire(broker, waiting)
        eventually(lambda: ready(broker.channel, work) == 1)

    (message,) = arrived(broker, work)
    assert deaths(message) == [(waiting, "expired", 3), (work, "rejected", 3)]


def test_a_rejection_before_the_cycle_does_not_excuse_it(broker):
    waiting = broker.name()
    there = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": waiting}
    broker.queue(queue=waiting, arguments={**there, "x-message-ttl": 20})
    queue = broker.queue(arguments=there)
    send(broker.channel, queue, "round")

    reject(broker, queue)
    expire(broker, waiting)

    eventually(lambda: is_settled(broker, waiting))


@pytest.mark.parametrize("exchange", ["missing", "unbound"])
def test_a_message_whose_dead_letter_exchange_leads_nowhere_is_gone(broker, exchange):
    name = broker.exchange("direct") if exchange == "unbound" else broker.name()
    queue = broker.queue(arguments={"x-dead-letter-exchange": name})
    send(broker.channel, queue, "no")

    reject(broker, queue)

    assert is_settled(broker, queue)


@pytest.mark.parametrize("dlx", [None, "missing", "unbound"])
def test_a_task_that_nobody_gets_as_a_dead_letter_is_kept(pg, dlx):
    name = pg.exchange("direct") if dlx == "unbound" else pg.name()
    queue = pg.queue(arguments={"x-dead-letter-exchange": name} if dlx else {})
    send(pg.channel, queue, "[]", headers=TASK)

    reject(pg, queue)
    pg.channel.close()

    assert buried(pg) == [("app.add", "rejected", None)]


def test_a_task_that_would_go_round_is_kept(pg):
    queue = pg.name()
    pg.queue(queue=queue, arguments={"x-message-ttl": 20, "x-dead-letter-exchange": "", "x-max-priority": 1})
    send(pg.channel, queue, "[]", headers=TASK)

    pg.let_expire(queue)

    assert take(pg.channel, queue) is None
    assert buried(pg) == [("app.add", "expired", None)]


@pytest.mark.parametrize("verb", ["queue_purge", "queue_delete"])
def test_purged_and_deleted_messages_do_not_die(broker, verb):
    queue, dead = dying(broker)
    send(broker.channel, queue, *"abc")

    assert getattr(broker.channel, verb)(queue) == 3

    assert is_settled(broker, dead)


def test_a_message_rejected_after_its_queue_was_deleted_is_gone(broker):
    queue, dead = dying(broker)
    send(broker.channel, queue, "no")
    message = take(broker.channel, queue)

    broker.channel.queue_delete(queue)
    message.reject()

    assert is_settled(broker, dead)


# x-delivery-limit (RabbitMQ: quorum queues)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_message_dies_when_it_came_back_more_often_than_its_limit(broker, limit):
    queue, dead = dying(broker, durable=True, delivery_limit=limit, queue_type="quorum")
    send(broker.channel, queue, "poison", delivery_mode=2)
    inbox = Inbox(broker.channel, queue)

    for deliveries in range(1, limit + 2):
        inbox.wait(deliveries)
        inbox[-1].requeue()
        inbox.cancel() if deliveries > limit else None

    (message,) = arrived(broker, dead)
    assert deaths(message) == [(queue, "delivery_limit", 1)]
    assert len(inbox) == limit + 1


def test_a_dead_letter_has_not_come_back_yet(pg):
    queue, dead = dying(pg, delivery_limit=0)
    send(pg.channel, queue, "poison")

    take(pg.channel, queue).requeue()

    assert arrived(pg, dead)[0].properties["pg_returns"] == 0


def test_a_task_over_its_queues_limit_is_kept(pg):
    queue = pg.queue(arguments={"x-delivery-limit": 1})
    send(pg.channel, queue, "[]", headers=TASK)

    for _ in range(2):
        take(pg.channel, queue).requeue()

    assert take(pg.channel, queue) is None
    assert buried(pg) == [("app.add", "delivery_limit", None)]


# x-max-length, x-max-length-bytes


def test_a_queue_over_its_length_drops_the_oldest(broker):
    queue = broker.queue(arguments={"x-max-length": 2})

    send(broker.channel, queue, *"abcd")

    assert contents(broker.channel, queue) == ["c", "d"]


def test_a_queue_over_its_bytes_drops_the_oldest_and_counts_bodies_only(broker):
    queue = broker.queue(arguments={"x-max-length-bytes": 100})

    send(broker.channel, queue, "a" * 40, "b" * 40, "c" * 20, "d" * 30, headers={"long": "x" * 1000})

    assert [body[0] for body in contents(broker.channel, queue)] == ["b", "c", "d"]


def test_a_message_larger_than_its_queue_drops_everything(broker):
    queue = broker.queue(arguments={"x-max-length-bytes": 100})

    send(broker.channel, queue, "a", "b" * 101)

    assert contents(broker.channel, queue) == []


@pytest.mark.parametrize(("length", "size", "left"), [(3, 100, "de"), (1, 1000, "e"), (9, 39, "")])
def test_the_narrower_of_two_limits_counts(broker, length, size, left):
    queue = broker.queue(arguments={"x-max-length": length, "x-max-length-bytes": size})

    send(broker.channel, queue, *(letter * 40 for letter in "abcde"))

    assert [body[0] for body in contents(broker.channel, queue)] == list(left)


def test_what_is_unacked_does_not_count(broker):
    queue = broker.queue(arguments={"x-max-length": 1})
    send(broker.channel, queue, "a")
    held = take(broker.channel, queue)

    send(broker.channel, queue, "b")

    held.ack()
    assert contents(broker.channel, queue) == ["b"]


def test_what_comes_back_to_a_full_queue_is_the_oldest(broker):
    queue, dead = dying(broker, max_length=2)
    send(broker.channel, queue, "a", "b")
    held = take(broker.channel, queue)
    send(broker.channel, queue, "c")

    held.requeue()

    assert arrived(broker, dead)[0].body == "a"
    assert contents(broker.channel, queue) == ["b", "c"]


def test_a_queue_of_length_0_keeps_nothing(broker):
    queue = broker.queue(arguments={"x-max-length": 0})

    send(broker.channel, queue, "a", "b")

    assert contents(broker.channel, queue) == []


def test_what_a_full_queue_drops_dies_in_order(broker):
    queue, dead = dying(broker, max_length=1)

    send(broker.channel, queue, *"abc")

    messages = arrived(broker, dead, 2)
    assert [(message.body, deaths(message)) for message in messages] == [
        ("a", [(queue, "maxlen", 1)]), ("b", [(queue, "maxlen", 1)]),
    ]  # fmt: skip


def test_a_dead_letter_queue_may_be_full_itself(broker):
    last = broker.queue()
    middle = broker.queue(
        arguments={"x-max-length": 1, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": last}
    )
    queue = broker.queue(
        arguments={"x-max-length": 1, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": middle}
    )

    send(broker.channel, queue, *"abc")

    (message,) = arrived(broker, last)
    assert (message.body, deaths(message)) == ("a", [(middle, "maxlen", 1), (queue, "maxlen", 1)])
    assert contents(broker.channel, middle) + contents(broker.channel, queue) == ["b", "c"]


def test_two_full_queues_that_are_each_others_dead_letters_drop_in_the_end(broker):
    first, second = broker.name(), broker.name()
    for queue, other in ((first, second), (second, first)):
        arguments = {"x-max-length": 1, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": other}
        broker.queue(queue=queue, arguments=arguments)

    send(broker.channel, first, *"abc")

    eventually(lambda: ready(broker.channel, first) + ready(broker.channel, second) == 2)
    assert contents(broker.channel, first) == ["c"]
    assert contents(broker.channel, second) == ["b"]


def test_a_full_queue_takes_nothing_from_the_others(broker):
    exchange = broker.exchange("fanout")
    full = broker.queue(arguments={"x-max-length": 1})
    broker.channel.queue_bind(full, exchange)
    other = broker.bound(exchange, "")

    send(broker.channel, "", *"ab", exchange=exchange)

    assert (contents(broker.channel, full), contents(broker.channel, other)) == (["b"], ["a", "b"])


def test_a_task_that_a_full_queue_drops_is_kept(pg):
    queue = pg.queue(arguments={"x-max-length": 1})

    send(pg.channel, queue, "[1]", "[2]", headers=TASK)

    assert buried(pg) == [("app.add", "maxlen", None)]
    assert contents(pg.channel, queue) == ["[2]"]


def test_the_lowest_priority_is_dropped_first(pg):
    """RabbitMQ drops the highest, which its own documentation finds surprising."""
    queue = pg.queue(arguments={"x-max-length-bytes": 70, "x-max-priority": 2})

    for body, priority in (("h" * 40, 2), ("l" * 10, 0), ("m" * 30, 1), ("l" * 10, 0)):
        send(pg.channel, queue, body, priority=priority)

    assert [body[0] for body in contents(pg.channel, queue)] == ["h", "m"]


def test_what_becomes_due_counts_too(pg):
    queue = pg.queue(arguments={"x-max-length": 1})
    inbox = Inbox(pg.connect().channel(), pg.queue())  # somebody who keeps the clock
    send(pg.channel, queue, "[1]", headers={**TASK, "eta": datetime.now(timezone.utc).isoformat()})
    soon = datetime.now(timezone.utc) + timedelta(seconds=0.1)
    send(pg.channel, queue, "[2]", headers={**TASK, "eta": soon.isoformat()})

    eventually(lambda: not pg.query("SELECT FROM kombu_pg.scheduled"))

    assert [reason for _, reason, _ in buried(pg)] == ["maxlen"]
    assert (len(contents(pg.channel, queue)), len(inbox)) == (1, 0)


def test_publishers_at_once_exceed_the_limit_by_no_more_than_their_number(pg):
    queue = pg.queue(arguments={"x-max-length": 5})

    def publish(_: int) -> None:
        channel = pg.connect().channel()
        for n in range(20):
            send(channel, queue, str(n))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(publish, range(4)))

    assert 5 <= len(contents(pg.channel, queue)) <= 5 + 4


# x-overflow


def full(broker: Broker, overflow: str = "reject-publish", **arguments: Any) -> str:
    return broker.queue(arguments={"x-overflow": overflow, **arguments})


def refused(broker: Broker, queue: str, *bodies: str, **options: Any) -> None:
    for body in bodies:
        with pytest.raises((kombu_pg.Rejected, MessageNacked)):
            send(broker.channel, queue, body, **options)


def test_a_full_queue_may_refuse_what_is_published(broker):
    queue = full(broker, **{"x-max-length": 2})
    send(broker.channel, queue, *"ab")

    refused(broker, queue, "c")

    assert contents(broker.channel, queue) == ["a", "b"]
    send(broker.channel, queue, "d")
    assert contents(broker.channel, queue) == ["d"]


def test_a_queue_refuses_what_would_be_too_many_bytes(broker):
    queue = full(broker, **{"x-max-length-bytes": 100})
    send(broker.channel, queue, "a" * 60)

    refused(broker, queue, "b" * 41)
    send(broker.channel, queue, "c" * 40, headers={"long": "x" * 1000})

    assert [body[0] for body in contents(broker.channel, queue)] == ["a", "c"]


def test_what_comes_back_to_a_queue_that_refuses_is_taken(broker):
    queue = full(broker, **{"x-max-length": 1})
    send(broker.channel, queue, "a")
    held = take(broker.channel, queue)
    send(broker.channel, queue, "b")

    held.requeue()

    assert contents(broker.channel, queue) == ["a", "b"]


def test_a_refused_message_is_no_dead_letter(broker):
    queue, dead = dying(broker, max_length=1, overflow="reject-publish")
    send(broker.channel, queue, "a")

    refused(broker, queue, "b")

    assert is_settled(broker, dead)


def test_a_refused_message_may_be_a_dead_letter(broker):
    queue, dead = dying(broker, max_length=1, overflow="reject-publish-dlx")
    send(broker.channel, queue, "a")

    refused(broker, queue, "b")

    (message,) = arrived(broker, dead)
    assert (message.body, deaths(message)) == ("b", [(queue, "maxlen", 1)])
    assert contents(broker.channel, queue) == ["a"]


def test_a_message_that_one_queue_refuses_reaches_none(pg):
    """RabbitMQ gives it to the others, and a retry then gives it to them once more."""
    exchange = pg.exchange("fanout")
    queue, other = full(pg, **{"x-max-length": 0}), pg.bound(exchange, "")
    pg.channel.queue_bind(queue, exchange)

    with pytest.raises(kombu_pg.Rejected, match=f"{queue}.*full"):
        send(pg.channel, "", "a", exchange=exchange)

    assert contents(pg.channel, other) == []


def test_a_dead_letter_is_not_refused(broker):
    dead = full(broker, **{"x-max-length": 1})
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    queue = broker.queue(arguments=arguments)
    send(broker.channel, queue, *"ab")

    reject(broker, queue, 2)

    eventually(lambda: ready(broker.channel, dead) >= 1)
    assert contents(broker.channel, dead)[0] == "a"


@pytest.mark.parametrize(
    "arguments",
    [
        {"x-max-length": -1},
        {"x-max-length-bytes": "many"},
        {"x-overflow": "drop-tail"},
        {"x-dead-letter-routing-key": "key"},
        {"x-dead-letter-exchange": 1},
    ],
    ids=str,
)
def test_a_limit_that_makes_no_sense_is_refused(broker, arguments):
    with pytest.raises(PreconditionFailed):
        broker.queue(arguments=arguments)


# Headers exchanges

UNIVERSE: dict[str, dict[str, Any]] = {
    "none": {},
    "a=1": {"a": 1},
    "a=1.0": {"a": 1.0},
    "a=text 1": {"a": "1"},
    "a=true": {"a": True},
    "a=null": {"a": None},
    "a=list": {"a": [1, "x"]},
    "a=table": {"a": {"b": 1}},
    "a=bytes": {"a": b"\xff"},
    "a=NUL": {"a": "\0"},
    "ab": {"a": 1, "b": "x"},
    "abc": {"a": 1, "b": "x", "c": 0},
    "b=y": {"a": 1, "b": "y"},
    "x-": {"x-a": 1},
    "x-, a=1": {"x-a": 1, "a": 1},
    "empty key": {"": 1},
}
ONE = ["a=1", "a=1.0", "ab", "abc", "b=y", "x-, a=1"]
ANY_A = [key for key, headers in UNIVERSE.items() if "a" in headers]


@pytest.mark.parametrize(
    ("binding", "matched"),
    [
        ({}, list(UNIVERSE)),
        ({"x-match": "all"}, list(UNIVERSE)),
        ({"x-match": "any"}, []),
        ({"a": 1}, ONE),
        ({"a": None}, ANY_A),
        ({"x-match": "any", "a": None}, ANY_A),
        ({"a": 1.0}, ONE),
        ({"a": "1"}, ["a=text 1"]),
        ({"a": True}, ["a=true"]),
        ({"a": "\0"}, ["a=NUL"]),
        ({"a": b"\xff"}, ["a=bytes"]),
        ({"a": [1, "x"]}, ["a=list"]),
        ({"a": [2]}, []),
        ({"a": {"b": 1}}, ["a=table"]),
        ({"x-match": "all", "a": 1, "b": "x"}, ["ab", "abc"]),
        ({"x-match": "any", "a": True, "b": "x"}, ["a=true", "ab", "abc"]),
        ({"x-match": "all", "x-a": 2, "a": 1}, ONE),
        ({"x-match": "any", "x-a": 1}, []),
        ({"x-match": "all-with-x", "x-a": 1}, ["x-", "x-, a=1"]),
        ({"x-match": "all-with-x", "x-a": 1, "a": 1}, ["x-, a=1"]),
        ({"x-match": "any-with-x", "x-a": 1, "b": "y"}, ["b=y", "x-", "x-, a=1"]),
        ({"": 1}, ["empty key"]),
    ],
    ids=str,
)
def test_a_headers_exchange_compares_headers(broker, binding, matched):
    exchange, queue = broker.exchange("headers"), broker.queue()
    broker.channel.queue_bind(queue, exchange, "ignored", arguments=binding)

    for name, headers in UNIVERSE.items():
        send(broker.channel, "key", name, exchange=exchange, headers=dict(headers))

    assert contents(broker.channel, queue) == matched


@pytest.mark.parametrize("match", ["some", "", 1])
def test_an_unknown_match_is_refused(broker, match):
    with pytest.raises(PreconditionFailed):
        broker.channel.queue_bind(broker.queue(), broker.exchange("headers"), "", arguments={"x-match": match})


def test_a_header_that_cannot_be_compared_can_be_sent_through_a_headers_exchange(pg):
    exchange, queue = pg.exchange("headers"), pg.queue()
    pg.channel.queue_bind(queue, exchange, "", arguments={"a": float("nan"), "b": None})

    send(pg.channel, "", "a", exchange=exchange, headers={"a": float("nan"), "b": "\ud800", "\ud800": 1})

    assert contents(pg.channel, queue) == ["a"]


def test_two_bindings_of_a_queue_give_one_copy_and_are_unbound_one_by_one(broker):
    exchange, queue = broker.exchange("headers"), broker.queue()
    bindings = [{"a": 1}, {"b": 2}]
    for arguments in bindings:
        broker.channel.queue_bind(queue, exchange, "", arguments=arguments)

    send(broker.channel, "", "both", exchange=exchange, headers={"a": 1, "b": 2})
    broker.channel.queue_unbind(queue, exchange, "", arguments=bindings[0])
    send(broker.channel, "", "a", exchange=exchange, headers={"a": 1})
    send(broker.channel, "", "b", exchange=exchange, headers={"b": 2})

    assert contents(broker.channel, queue) == ["both", "b"]


def test_the_predeclared_headers_exchange_is_there(broker):
    queue, value = broker.queue(), uuid.uuid4().hex
    broker.channel.queue_bind(queue, "amq.headers", "", arguments={"test": value})

    send(broker.channel, "", "found", exchange="amq.headers", headers={"test": value})

    assert contents(broker.channel, queue) == ["found"]


def test_an_unroutable_mandatory_message_of_a_headers_exchange_comes_back(broker):
    exchange, returned = broker.exchange("headers"), []
    broker.channel.queue_bind(broker.queue(), exchange, "", arguments={"a": 1})
    broker.channel.events["basic_return"].add(lambda *what: returned.append(what))

    send(broker.channel, "", "unwanted", exchange=exchange, headers={"a": 2}, mandatory=True)

    assert [exc.reply_code for exc, *_ in returned] == [312]


# Bindings between exchanges


@pytest.mark.parametrize(
    ("source", "key", "destination", "arrive"),
    [
        ("direct", "a.b", "fanout", ["a.b"]),
        ("topic", "a.*", "fanout", ["a.b", "a.c"]),
        ("fanout", "", "direct", ["a.b"]),
        ("topic", "#.b", "direct", ["a.b"]),
    ],
)
def test_a_message_passes_both_exchanges(broker, source, key, destination, arrive):
    source, destination = broker.exchange(source), broker.exchange(destination)
    queue = broker.bound(destination, "a.b")
    broker.channel.exchange_bind(destination, source, key)

    for published in ("a.b", "a.c", "b"):
        send(broker.channel, published, published, exchange=source)

    assert contents(broker.channel, queue) == arrive


def test_a_message_passes_a_headers_exchange_on_its_way(broker):
    source, destination, queue = broker.exchange("fanout"), broker.exchange("headers"), broker.queue()
    broker.channel.exchange_bind(destination, source)
    broker.channel.queue_bind(queue, destination, "", arguments={"a": 1})

    send(broker.channel, "", "other", exchange=source, headers={"a": 2})
    send(broker.channel, "", "wanted", exchange=source, headers={"a": 1})

    assert contents(broker.channel, queue) == ["wanted"]


def test_a_headers_binding_may_lead_to_an_exchange(broker):
    source, destination = broker.exchange("headers"), broker.exchange("direct")
    queue = broker.bound(destination, "key")
    broker.channel.exchange_bind(destination, source, "", arguments={"a": 1})

    send(broker.channel, "key", "other", exchange=source, headers={"a": 2})
    send(broker.channel, "key", "wanted", exchange=source, headers={"a": 1})

    assert contents(broker.channel, queue) == ["wanted"]


def test_a_queue_that_is_reached_by_many_ways_gets_one_copy(broker):
    exchanges = [broker.exchange(kind) for kind in ("fanout", "topic", "fanout")]
    queue = broker.queue()
    for source, destination in itertools.permutations(exchanges, 2):  # cycles of every length
        broker.channel.exchange_bind(destination, source, "#")
    for exchange in exchanges:
        broker.channel.queue_bind(queue, exchange, "#")
        broker.channel.exchange_bind(exchange, exchange, "#")

    send(broker.channel, "key", "once", exchange=exchanges[0])

    assert contents(broker.channel, queue) == ["once"]


def test_an_unbound_exchange_gets_nothing_more(broker):
    source, destination = broker.exchange("direct"), broker.exchange("fanout")
    queue = broker.bound(destination, "")
    for key in "ab":
        broker.channel.exchange_bind(destination, source, key)

    broker.channel.exchange_unbind(destination, source, "a")
    for key in "ab":
        send(broker.channel, key, key, exchange=source)

    assert contents(broker.channel, queue) == ["b"]


@pytest.mark.parametrize("end", ["source", "destination"])
def test_a_deleted_exchange_comes_back_unbound(broker, end):
    source, destination = broker.exchange("fanout"), broker.exchange("fanout")
    queue = broker.bound(destination, "")
    broker.channel.exchange_bind(destination, source)
    deleted = source if end == "source" else destination

    broker.channel.exchange_delete(deleted)
    broker.channel.exchange_declare(deleted, "fanout", auto_delete=False)
    if end == "destination":
        broker.channel.queue_bind(queue, destination)
    send(broker.channel, "", "lost", exchange=source)

    assert contents(broker.channel, queue) == []


def test_auto_delete_exchanges_go_one_after_the_other(broker):
    first, second, third = (broker.exchange("fanout", auto_delete=True) for _ in range(3))
    broker.channel.exchange_bind(second, first)
    broker.channel.exchange_bind(third, second)
    queue = broker.bound(third, "")

    broker.channel.queue_unbind(queue, third, "")

    for exchange in (third, second, first):
        with pytest.raises(NotFound):
            broker.channel.exchange_declare(exchange, "fanout", passive=True)


def test_an_exchange_deleted_with_its_last_binding_comes_back_unbound(broker):
    source, destination = broker.exchange("fanout"), broker.exchange("fanout", auto_delete=True)
    queue = broker.bound(destination, "")
    broker.channel.exchange_bind(destination, source)

    broker.channel.queue_delete(queue)
    broker.channel.exchange_declare(destination, "fanout", auto_delete=False)
    queue = broker.bound(destination, "")
    send(broker.channel, "", "lost", exchange=source)

    assert contents(broker.channel, queue) == []


def test_a_source_exchange_in_use_is_not_deleted_if_unused(broker):
    source, destination = broker.exchange("fanout"), broker.exchange("fanout")
    broker.channel.exchange_bind(destination, source)

    with pytest.raises(PreconditionFailed):
        broker.channel.exchange_delete(source, if_unused=True)
    broker.channel.exchange_delete(destination, if_unused=True)
    broker.channel.exchange_delete(source, if_unused=True)


@pytest.mark.parametrize("missing", ["source", "destination"])
def test_binding_a_missing_exchange_is_not_found(broker, missing):
    ends = {end: broker.name() if end == missing else broker.exchange("fanout") for end in ("source", "destination")}

    with pytest.raises(NotFound):
        broker.channel.exchange_bind(**ends)


def test_unbinding_an_exchange_that_is_not_bound_succeeds(broker):
    broker.channel.exchange_unbind(broker.exchange("fanout"), broker.exchange("fanout"), "never bound")
    broker.channel.exchange_unbind(broker.name(), broker.name(), "never declared")


@pytest.mark.parametrize("verb", ["exchange_bind", "exchange_unbind"])
@pytest.mark.parametrize("ends", [("", "amq.direct"), ("amq.direct", "")])
def test_the_default_exchange_is_not_bound(broker, verb, ends):
    with pytest.raises(AccessRefused):
        getattr(broker.channel, verb)(*ends)


def test_a_kombu_exchange_can_be_bound(broker):
    names = broker.exchange("topic"), broker.exchange("topic")
    source, destination = (kombu.Exchange(name, "topic", durable=False)(broker.channel) for name in names)
    queue = broker.bound(destination.name, "#")

    destination.bind_to(source, "a.*")
    send(broker.channel, "a.b", "through", exchange=source.name)
    destination.unbind_from(source, "a.*")
    send(broker.channel, "a.b", "not through", exchange=source.name)

    assert contents(broker.channel, queue) == ["through"]


# Batches: kombu publishes at once where there are none


def test_a_batch_arrives_in_order(broker):
    queue, exchange = broker.queue(), broker.exchange("topic")
    broker.channel.queue_bind(queue, exchange, "#")
    producer = kombu.Producer(broker.channel)

    with producer.batch(max_size=3):
        for n in range(8):
            producer.publish(n, exchange=exchange if n % 2 else "", routing_key=queue)

    assert [int(body) for body in contents(broker.channel, queue)] == list(range(8))


def test_a_batch_is_stored_when_it_is_full_flushed_or_left(pg):
    queue, producer = pg.queue(), kombu.Producer(pg.channel)

    with producer.batch(max_size=2) as batch:
        counts = []
        for n in range(5):
            producer.publish(n, routing_key=queue)
            counts.append(ready(pg.channel, queue))
        batch.flush()
        counts.append(ready(pg.channel, queue))

    assert counts == [0, 2, 2, 4, 4, 5]
    assert ready(pg.channel, queue) == 5


def test_an_exception_discards_what_is_not_stored_yet(pg):
    queue, producer = pg.queue(), kombu.Producer(pg.channel)

    def publish() -> None:
        with producer.batch(max_size=2):
            for n in range(3):
                producer.publish(n, routing_key=queue)
            raise KeyError

    with pytest.raises(KeyError):
        publish()
    assert ready(pg.channel, queue) == 2


@pytest.mark.parametrize("kind", ["no exchange", "no queue", "full", "no route"])
def test_nothing_of_a_batch_is_stored_if_one_message_is_refused(pg, kind):
    queue, producer = pg.queue(), kombu.Producer(pg.channel)
    refusal: dict[str, dict[str, Any]] = {
        "no exchange": {"exchange": pg.name()},
        "no queue": {"routing_key": pg.name(), "headers": TASK},
        "full": {"routing_key": full(pg, **{"x-max-length": 0})},
        "no route": {"routing_key": pg.name(), "mandatory": True},
    }

    def publish() -> None:
        with producer.batch():
            producer.publish("before", routing_key=queue)
            producer.publish("refused", **refusal[kind])
            producer.publish("after", routing_key=queue)

    with pytest.raises((NotFound, kombu_pg.Rejected, ChannelError)):
        publish()
    assert contents(pg.channel, queue) == []


def test_a_batch_goes_on_after_a_message_that_cannot_be_encoded(pg):
    queue, producer = pg.queue(), kombu.Producer(pg.channel)

    with producer.batch():
        producer.publish("before", routing_key=queue)
        with pytest.raises(kombu_pg.Rejected):
            producer.publish("refused", routing_key="\0")
        producer.publish("after", routing_key=queue)

    assert contents(pg.channel, queue) == [b"before", b"after"]


def test_a_batch_takes_every_kind_of_message(pg):
    exchange, queue = pg.exchange("headers"), pg.queue(arguments={"x-max-priority": 2})
    pg.channel.queue_bind(queue, exchange, "", arguments={"a": 1})
    producer = kombu.Producer(pg.channel)
    later = (datetime.now(timezone.utc) + timedelta(hours=1)).isoformat()

    with producer.batch():
        producer.publish("low", routing_key=queue, priority=0, expiration=3600)
        producer.publish("later", routing_key=queue, headers={**TASK, "eta": later})
        producer.publish("by headers", exchange=exchange, headers={"a": 1}, priority=1)
        producer.publish("not wanted", exchange=exchange, headers={"a": float("nan"), "b": "\0"})
        producer.publish("high", routing_key=queue, priority=2)

    assert contents(pg.channel, queue) == [b"high", b"by headers", b"low"]
    assert pg.query("SELECT count(*) FROM kombu_pg.scheduled") == [(1,)]


def test_a_batch_wakes_idle_consumers_and_the_clock(pg):
    queue, channel = pg.queue(), pg.connect().channel()
    inbox = Inbox(channel, queue)
    producer = kombu.Producer(pg.channel)
    soon = (datetime.now(timezone.utc) + timedelta(seconds=0.5)).isoformat()

    with producer.batch():
        producer.publish("later", routing_key=queue, headers={**TASK, "eta": soon})
        producer.publish("now", routing_key=queue)

    assert inbox.wait(2) == [b"now", b"later"]


def test_a_batch_whose_fate_is_unknown_cannot_be_used_any_more(pg):
    queue, batch = pg.queue(), pg.channel.create_publish_batch(max_size=10)
    batch.publish(pg.channel.prepare_message("lost"), routing_key=queue)

    with blocked(pg) as cut:
        cut()
        with pytest.raises(BatchPublishError):
            batch.flush()

    with pytest.raises(BatchPublishError):
        batch.publish(pg.channel.prepare_message("lost, too"), routing_key=queue)
    assert contents(pg.channel, queue) == []


@contextlib.contextmanager
def blocked(pg: Broker) -> Iterator[Callable[[], object]]:
    """Nobody gets past the queues' table; what it yields cuts the session of whoever comes to wait there."""
    waiting = "SELECT pid FROM pg_locks WHERE NOT granted AND relation = 'kombu_pg.queue'::regclass"
    cut = f"SELECT pg_terminate_backend(pid, 5000) FROM ({waiting}) AS w"
    with (
        contextlib.closing(psycopg2.connect(pg.database)) as locking,
        locking.cursor() as cursor,
        ThreadPoolExecutor(1) as thread,
    ):
        cursor.execute("LOCK TABLE kombu_pg.queue IN ACCESS EXCLUSIVE MODE")
        yield lambda: thread.submit(eventually, lambda: bool(pg.query(cut)))


# What a plain consumer may say besides ack and reject


def test_a_message_requeued_with_a_delay_comes_back_after_it_and_counts(pg):
    queue = pg.queue()
    inbox = Inbox(pg.channel, queue)
    send(pg.channel, queue, "later")
    inbox.wait(1)
    began = time.monotonic()

    inbox[0].requeue(delay=0.3)

    assert inbox.wait(2) == ["later", "later"]
    assert time.monotonic() - began >= 0.3
    assert (inbox[1].properties["pg_returns"], inbox[1].delivery_info["redelivered"]) == (1, True)


@pytest.mark.parametrize("delay", [0, -3600])
def test_a_message_requeued_without_a_real_delay_comes_back_at_once(pg, delay):
    queue = pg.queue()
    inbox = Inbox(pg.channel, queue)
    send(pg.channel, queue, "again")
    inbox.wait(1)

    inbox[0].requeue(delay=delay)

    assert inbox.wait(2) == ["again", "again"]


def test_a_message_requeued_with_a_delay_is_settled_once(pg):
    queue = pg.queue()
    send(pg.channel, queue, "later")
    message = take(pg.channel, queue)
    message.requeue(delay=60)

    for verb in (message.ack, message.requeue, lambda: message.requeue(delay=1), lambda: message.dead_letter("again")):
        with pytest.raises(message.MessageStateError):
            verb()
    pg.channel.close()

    assert pg.query("SELECT count(*) FROM kombu_pg.scheduled") == [(1,)]


def test_a_message_requeued_with_a_delay_too_often_dies(pg):
    queue, dead = dying(pg, delivery_limit=0)
    send(pg.channel, queue, "poison")

    take(pg.channel, queue).requeue(delay=60)

    assert deaths(*arrived(pg, dead)) == [(queue, "delivery_limit", 1)]
    assert pg.query("SELECT count(*) FROM kombu_pg.scheduled") == [(0,)]


def test_a_message_requeued_with_a_delay_into_a_full_queue_waits(pg):
    queue, dead = dying(pg, max_length=1)
    send(pg.channel, queue, "a")
    held = take(pg.channel, queue)
    send(pg.channel, queue, "b")

    held.requeue(delay=60)

    assert pg.query("SELECT count(*) FROM kombu_pg.scheduled") == [(1,)]
    assert (contents(pg.channel, queue), contents(pg.channel, dead)) == (["b"], [])


@pytest.mark.parametrize("delay", [float("nan"), float("inf"), 1e300])
def test_a_delay_that_makes_no_sense_is_refused_and_the_message_stays(pg, delay):
    queue = pg.queue()
    send(pg.channel, queue, "kept")
    message = take(pg.channel, queue)

    with pytest.raises((ValueError, kombu_pg.Rejected)):
        message.requeue(delay=delay)

    message.requeue()
    assert contents(pg.channel, queue) == ["kept"]


@pytest.mark.parametrize("headers", [{}, TASK])
def test_a_dead_letter_with_a_reason_is_kept(pg, headers):
    queue = pg.queue()
    send(pg.channel, queue, "[]", headers=headers)

    take(pg.channel, queue).dead_letter("bad\0 ü \ud800")

    assert buried(pg) == [(headers.get("task"), "rejected", "bad ü ?")]


def test_a_dead_letter_with_a_reason_takes_its_queues_way(pg):
    queue, dead = dying(pg)
    inbox = Inbox(pg.connect().channel(), dead)
    send(pg.channel, queue, "no")

    take(pg.channel, queue).dead_letter("because")

    assert inbox.wait(1) == ["no"]
    assert deaths(inbox[0]) == [(queue, "rejected", 1)]


@pytest.mark.parametrize("headers", [{}, TASK])
def test_a_dead_letter_with_a_reason_whose_way_leads_nowhere_is_kept(pg, headers):
    queue = pg.queue(arguments={"x-dead-letter-exchange": pg.name()})
    send(pg.channel, queue, "[]", headers=headers)

    take(pg.channel, queue).dead_letter("because")

    assert buried(pg) == [(headers.get("task"), "rejected", "because")]


def test_a_consumer_goes_on_after_a_dead_letter(pg):
    queue = pg.queue()
    pg.channel.basic_qos(0, 1, False)
    inbox = Inbox(pg.channel, queue)
    inbox.on_message = lambda message: (inbox.append(message), message.dead_letter("bad"))
    send(pg.channel, queue, *"abc")

    assert inbox.wait(3) == ["a", "b", "c"]
    assert len(buried(pg, 3)) == 3


# Nothing is lost


LOST = """
SELECT m.id FROM kombu_pg.message m
 WHERE NOT EXISTS (SELECT FROM kombu_pg.ready r WHERE r.message_id = m.id)
   AND NOT EXISTS (SELECT FROM kombu_pg.scheduled s WHERE s.message_id = m.id)
   AND NOT EXISTS (SELECT FROM kombu_pg.lease l WHERE m.id = ANY (l.message_ids))
"""
TWICE = """
SELECT held.id, count(*) FROM (
    SELECT r.message_id AS id FROM kombu_pg.ready r
    UNION ALL SELECT s.message_id FROM kombu_pg.scheduled s
    UNION ALL SELECT unnest(l.message_ids) FROM kombu_pg.lease l) AS held
  JOIN kombu_pg.message m ON m.id = held.id GROUP BY held.id HAVING count(*) > 1
"""


@pytest.mark.parametrize("seed", range(3))
def test_every_message_stands_in_one_place_whatever_is_done(pg, seed):
    dice, queues = random.Random(seed), [pg.name() for _ in range(4)]
    for n, queue in enumerate(queues):
        key = {"x-dead-letter-routing-key": queues[(n + 1) % 4], "x-message-ttl": 60_000}
        limits = [{}, {"x-max-length": 3}, {"x-max-length-bytes": 150, "x-max-priority": 2}, {"x-delivery-limit": 1}]
        pg.queue(queue=queue, arguments={"x-dead-letter-exchange": "", **key, **limits[n]})
    later = {**TASK, "eta": (datetime.now(timezone.utc) + timedelta(hours=1)).isoformat()}
    published = 0

    def work(dice: random.Random) -> int:
        connection, count, held = pg.connect(), 0, []
        channel = connection.channel()
        for _ in range(150):
            queue, what = dice.choice(queues), dice.random()
            if what < 0.4:
                send(channel, queue, "x" * dice.randrange(100), headers=dice.choice([TASK, later]), priority=2)
                count += 1
            elif what < 0.65:
                held += filter(None, [take(channel, queue)])
            elif what < 0.95 and held:
                verb = dice.choice(["reject", "requeue", "requeue", "later", "dead"])
                message = held.pop(dice.randrange(len(held)))
                {"later": lambda m: m.requeue(delay=dice.choice([0, 9])), "dead": lambda m: m.dead_letter("x")}.get(
                    verb,
                    lambda m: getattr(m, verb)(),  # noqa: B023
                )(message)
            elif what < 0.97:
                pg.query(
                    "UPDATE kombu_pg.message SET expires_at = now() WHERE id IN "
                    "(SELECT id FROM kombu_pg.message WHERE random() < 0.1 FOR UPDATE SKIP LOCKED) RETURNING id"
                )
            else:
                channel.close()
                held, channel = [], connection.channel()
        return count

    with ThreadPoolExecutor(3) as pool:
        published = sum(pool.map(work, [random.Random(dice.random()) for _ in range(3)]))

    assert pg.query(LOST) == []
    assert pg.query(TWICE) == []
    # Every one was a task: it is still there, or a dead letter.
    assert pg.query("SELECT (SELECT count(*) FROM kombu_pg.message) + (SELECT count(*) FROM kombu_pg.dead_letter)") == [
        (published,)
    ]
