"""Does the function publish_task send what Celery itself would have sent?"""

import asyncio
import contextlib
import json
import threading
from datetime import datetime

import asyncpg
import kombu
import psycopg2
import psycopg2.errors
import pytest
from acceptance.workers import hang_up
from celery import Celery
from watching import Consuming, eventually

NOW = "2030-01-31T12:00:00.000500+00:00"

CASES = {
    "nothing but a name": ((), {}, {}),
    "arguments of every kind": (
        [1, -1.5, 10**30, "it's ü €", 'a "quote"', "line\nbreak", None, True, [], {}, [[1, [2]]], {"k": {"x": False}}],
        {"s": "\U0001f40d", "größe": [1, {"a": {"b": {}}}]},
        {},
    ),
    "times": ((), {}, {"eta": NOW, "expires": NOW}),
    "routing": ((), {}, {"queue": "mail", "priority": 7, "reply_to": "me"}),
    "an exchange": ((), {}, {"exchange": "amq.topic", "routing_key": "mail.new"}),
    "limits and counts": ((), {}, {"retries": 2, "time_limit": 30, "soft_time_limit": 2.5, "ignore_result": True}),
    "family": ((), {}, {"root_id": "r", "parent_id": "p", "group_id": "g", "group_index": 3, "shadow": "other"}),
    "headers": ((), {}, {"headers": {"trace": "x", "n": [1, None]}}),
    "a link": ((), {}, {"link": {"task": "a", "args": [None], "options": {"queue": "q"}}, "link_error": {"task": "b"}}),
    "links": ((), {}, {"link": [{"task": "a"}, {"task": "b", "kwargs": {"x": None}}]}),
}


@pytest.fixture
def app(store):
    with Celery("sql", broker=store.broker(), set_as_current=False) as app:
        app.conf.task_default_queue_type = "classic"
        with app.producer_pool.acquire() as producer:
            for name in ("celery", "mail"):
                kombu.Queue(name, channel=producer.channel, durable=True).declare()
            producer.channel.queue_bind("mail", "amq.topic", "mail.*")
        yield app
        hang_up(app)


def call(store, name, args=(), kwargs=None, options=None):
    """The id of a task that was published by SQL."""
    texts = [json.dumps(value) for value in (list(args), kwargs or {}, options or {})]
    return store.value("SELECT kombu_pg.publish_task(%s, %s, %s, %s)", [name, *texts])


def test_through_asyncpg_a_task_is_part_of_the_transaction(app, store):
    async def main():
        connection = await asyncpg.connect(store.url)
        publish = "SELECT kombu_pg.publish_task($1, $2, $3, $4)"
        with contextlib.suppress(ZeroDivisionError):
            async with connection.transaction():
                await connection.fetchval(publish, "t", "[1]", "{}", "{}")
                raise ZeroDivisionError
        async with connection.transaction():
            sent = await connection.fetchval(publish, "t", "[2]", '{"n": 3}', '{"queue": "mail", "priority": 1}')
        await connection.close()
        return sent

    sent = asyncio.run(main())

    (message,) = received(store, "mail", 1)
    assert (message.headers["id"], message.payload[:2]) == (sent, [[2], {"n": 3}])
    assert store.value("SELECT count(*) FROM kombu_pg.message") == 0


def received(store, queue, count):
    """What a consumer gets."""
    with Consuming(store.broker(), queue) as consuming:
        consuming.until(count, 30)
        consuming.ack()
        return consuming.received


def full(signature):
    """A signature as the worker reads it."""
    return {"args": [], "kwargs": {}, "options": {}, "subtask_type": None, "immutable": False, **signature}


@pytest.mark.parametrize("case", CASES)
def test_a_consumer_cannot_tell_it_from_celerys_own(store, app, case):
    args, kwargs, options = CASES[case]
    theirs = {key: value for key, value in options.items() if key not in ("link", "link_error")}
    links = {
        key: [app.signature(one) for one in (value if isinstance(value, list) else [value])]
        for key, value in options.items()
        if key in ("link", "link_error")
    }
    queue = "mail" if options.keys() & {"queue", "exchange"} else "celery"
    task_id = "8d8a08b5-5380-4e92-9b93-8535023dd95e"
    # Without one, it is the sender's own.
    reply_to = options.get("reply_to", "")

    app.send_task(
        "app.task", list(args), kwargs, task_id=task_id, reply_to=reply_to or "x", **links,
        **{"ignore_result": False, **{k: v for k, v in theirs.items() if k != "reply_to"}},
    )  # fmt: skip
    call(store, "app.task", args, kwargs, {"task_id": task_id, **options})
    if options.get("eta"):
        store.execute("UPDATE kombu_pg.scheduled SET due_at = clock_timestamp()")
    messages = received(store, queue, 2)
    # Milliseconds from the moment of each publish on.
    left, left_of_ours = (int(message.properties.get("expiration", 0)) for message in messages)
    assert left_of_ours == pytest.approx(left, abs=10_000)
    own, ours = map(comparable, messages)

    own["properties"]["reply_to"] = reply_to
    assert ours == own


def comparable(message):
    """A message without what tells one publish from another, and with whole signatures."""
    headers = {key: value for key, value in message.headers.items() if key != "origin"}
    ignored = ("pg_message_id", "pg_returns", "delivery_tag", "expiration")
    properties = {key: value for key, value in message.properties.items() if key not in ignored}
    info = {key: value for key, value in message.delivery_info.items() if key not in ignored}
    args, kwargs, embedded = message.payload
    return {
        "headers": headers,
        "properties": properties,
        "info": info,
        "type": (message.content_type, message.content_encoding, type(message.body)),
        "body": (args, kwargs, {key: value and [full(one) for one in value] for key, value in embedded.items()}),
    }


def test_the_columns_are_those_of_celerys_own(store, app):
    app.send_task("app.task", [1], queue="mail", priority=3, eta=NOW, expires=60)
    call(store, "app.task", [1], options={"queue": "mail", "priority": 3, "eta": NOW, "expires": 60})

    rows = store.execute(
        "SELECT m.queue_id, m.priority, m.band, m.task, m.exchange, m.routing_key, s.due_at, m.expires_at "
        "FROM kombu_pg.message m JOIN kombu_pg.scheduled s ON s.message_id = m.id"
    )
    assert len(rows) == 2
    assert rows[0] == rows[1]


def test_seconds_count_from_now(store, app):
    call(store, "app.task", options={"countdown": 60, "expires": 90.5})

    assert store.value(
        "SELECT due_at BETWEEN clock_timestamp() + '20 s' AND clock_timestamp() + '60 s' FROM kombu_pg.scheduled"
    )
    headers = json.loads(store.value("SELECT convert_from(properties, 'UTF8') FROM kombu_pg.message"))["h"]
    apart = datetime.fromisoformat(headers["expires"]) - datetime.fromisoformat(headers["eta"])
    assert 30 < apart.total_seconds() < 31


def test_it_returns_the_id_and_makes_one_where_none_is_given(store, app):
    ids = {call(store, "app.task"), call(store, "app.task"), call(store, "app.task", options={"task_id": "mine"})}

    assert "mine" in ids
    assert ids == {row[0] for row in store.execute("SELECT task_id FROM kombu_pg.message")}
    assert len(ids) == 3


def test_a_name_is_a_signature(store, app):
    call(store, "app.task", options={"link": "app.next", "link_error": ["app.failed"], "queue": None})

    [message] = received(store, "celery", 1)
    callbacks, errbacks = (message.payload[2][key] for key in ("callbacks", "errbacks"))
    assert [app.signature(one).task for one in (*callbacks, *errbacks)] == ["app.next", "app.failed"]


def test_stamps_arrive_as_stamps(store, app):
    app.send_task("app.task", stamped_headers=["customer"], customer="c1")
    call(store, "app.task", options={"stamps": {"customer": "c1"}})

    own, ours = received(store, "celery", 2)
    assert {key: own.headers[key] for key in ("stamps", "stamped_headers")} == {
        key: ours.headers[key] for key in ("stamps", "stamped_headers")
    }


def test_long_arguments_are_shown_shortened(store, app):
    call(store, "app.task", ["x" * 2_000_000], {"rows": list(range(5000))})

    [message] = received(store, "celery", 1)
    assert len(message.payload[0][0]) == 2_000_000
    assert len(message.headers["argsrepr"]) == len(message.headers["kwargsrepr"]) == 1024


def test_it_is_part_of_the_callers_transaction(store, app):
    with psycopg2.connect(store.url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT kombu_pg.publish_task('app.kept'); SAVEPOINT before")
        cursor.execute("SELECT kombu_pg.publish_task('app.undone'); ROLLBACK TO before")
        assert store.value("SELECT count(*) FROM kombu_pg.message") == 0
    connection.close()

    assert store.execute("SELECT task FROM kombu_pg.message") == [("app.kept",)]


def test_a_trigger_publishes_for_each_row(store, app):
    store.execute(
        "CREATE TABLE purchase (id bigint);"
        "CREATE FUNCTION receipt() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " PERFORM kombu_pg.publish_task('shop.receipt', jsonb_build_array(NEW.id)); RETURN NULL; END $$;"
        "CREATE TRIGGER receipt AFTER INSERT ON purchase FOR EACH ROW EXECUTE FUNCTION receipt();"
        "INSERT INTO purchase VALUES (1), (2)"
    )

    assert [message.payload[0] for message in received(store, "celery", 2)] == [[1], [2]]
    store.execute("DROP TABLE purchase; DROP FUNCTION receipt")


@pytest.mark.parametrize("options", [{}, {"wake": True}], ids=["by housekeeping", "wake"])
def test_an_idle_consumer_is_told(store, app, options):
    with Consuming(store.broker(), "celery") as consuming:
        consuming.rest()
        call(store, "app.task", options=options)
        consuming.until(1, 30)


def test_in_a_serializable_transaction_it_finds_the_queues_of_its_snapshot(store, app):
    with psycopg2.connect(store.url) as connection, connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; SELECT kombu_pg.publish_task('app.task')")
        kombu.Queue("late", channel=app.pool.acquire().default_channel).declare()
        with pytest.raises(psycopg2.errors.UndefinedObject, match="READ COMMITTED"):
            cursor.execute("""SELECT kombu_pg.publish_task('app.task', options => '{"queue": "late"}')""")
    connection.close()


REFUSED = {
    "no queue": ({"queue": "none"}, 'no queue "none"', "start a worker"),
    "no exchange": ({"exchange": "none"}, 'exchange "none" does not exist', "declare"),
    "no binding": (
        {"exchange": "amq.direct", "routing_key": "k"},
        'no queue is bound to exchange "amq.direct" with the key "k"',
        "bind a queue",
    ),
    "an unknown option": ({"prio": 1}, 'unknown option "prio"', "priority"),
    "no options": ([], "options are JSON objects", "publish_task('app.add'"),
    "no time": ({"eta": "soon"}, 'option "eta" is "soon"', "seconds from now"),
    "no signature": ({"link": 7}, 'option "link" is 7', "a signature is"),
    "two ways": ({"queue": "q", "exchange": "e"}, "not both", ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_published_raises_with_a_hint(store, app, case):
    options, message, hint = REFUSED[case]

    with pytest.raises(psycopg2.Error) as raised:
        store.execute("SELECT kombu_pg.publish_task('t', options => %s)", [json.dumps(options)])

    assert message in raised.value.diag.message_primary
    assert hint in (raised.value.diag.message_hint or "")
    assert store.value("SELECT count(*) FROM kombu_pg.message") == 0


@pytest.mark.parametrize("arguments", ["''", "NULL", "'t', '{}'", "'t', '[]', '[]'"])
def test_a_task_without_a_name_or_with_malformed_arguments_raises(store, app, arguments):
    with pytest.raises(psycopg2.errors.InvalidParameterValue):
        store.execute(f"SELECT kombu_pg.publish_task({arguments})")


def test_a_full_queue_raises(store, app):
    with app.producer_pool.acquire() as producer:
        arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
        kombu.Queue("small", channel=producer.channel, queue_arguments=arguments).declare()
    call(store, "app.task", options={"queue": "small"})

    with pytest.raises(psycopg2.errors.ProgramLimitExceeded, match='queue "small" is full'):
        call(store, "app.task", options={"queue": "small"})


def test_sessions_that_publish_at_once_do_not_wait_for_each_other(store, app):
    """Sixteen open transactions, each with its task; all of them are still open when the last one publishes."""
    barrier, failures = threading.Barrier(16, timeout=60), []

    def work():
        try:
            with psycopg2.connect(store.url) as connection, connection.cursor() as cursor:
                cursor.execute("SELECT kombu_pg.publish_task('app.task')")
                barrier.wait()
            connection.close()
        except (psycopg2.Error, threading.BrokenBarrierError) as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert eventually(lambda: store.value("SELECT count(*) FROM kombu_pg.message")) == 16
