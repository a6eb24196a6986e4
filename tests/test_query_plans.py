import contextlib
import datetime
import re
import threading
import time

import kombu
import psycopg2
import pytest
from watching import Consuming, eventually, publish, publisher, seconds

from celery_pg.store.results import Results
from kombu_pg.database import Session
from kombu_pg.feed import MARK_PERIOD, Marks
from kombu_pg.options import Options
from kombu_pg.store import Claim, Settlement, Store

TABLES = ("message", "ready", "scheduled", "lease", "queue", "binding", "consumer")
# What is allowed to be read as a whole: how many rows it has depends on how much is installed, not on the traffic.
# (unannounced: on that of a quarter of a second, and its rows are wanted all.)
SMALL = {"queue", "binding", "exchange", "consumer", "session", "installation", "message_id_seq", "unannounced"}


class Claiming:
    """A consumer's session, and what it tells the store."""

    def __init__(self, store, queue_id):
        options = Options.parse(store.broker())
        self.store = Store(options)
        self.queue_id = queue_id
        self.session = Session(options.dsn, None)
        self.session.run(self.store.prepare_claims())
        self.consumer = self.session.run(self.store.attach(None, "here", 1, heartbeat=False)).consumer_id
        self.marks = Marks()
        self.armed = False

    def claimed(self, limit=10):
        """What one claim answers."""
        claim = Claim(
            consumer_id=self.consumer, token=1, queues=[self.queue_id], keys=[self.queue_id], limits=[limit],
            armed=[self.armed], marks=self.marks.of([self.queue_id]), limit=limit, max_bytes=2**24, suspects=1,
            gate=True, advance=self.marks.worth_advancing,
        )  # fmt: skip
        return self.session.run(self.store.claim(claim))

    def claim(self, limit=10):
        """One claim that keeps its marks, its messages acked; returns their ids."""
        claimed = self.claimed(limit)
        self.armed = bool(claimed.armed[0])
        self.marks.count(len(claimed.rows))
        self.marks.advance([self.queue_id], claimed)
        ids = [row.id for row in claimed.rows]
        if ids:
            leases = [claimed.rows[0].lease_id]
            self.session.run(self.store.settle(self.consumer, Settlement(acked=ids, leases=leases)))
        return ids

    def median(self, act, times=15):
        """Seconds that it usually takes."""
        return sorted(seconds(act) for _ in range(times))[times // 2]


@pytest.fixture
def queue_id(store):
    with kombu.Connection(store.broker()) as connection:
        for name in ("q", "template"):
            kombu.Queue(name, channel=connection.channel()).declare()
    publish(store.broker(), "x", queue="template")
    return store.value("SELECT id FROM kombu_pg.queue WHERE name = 'q'")


@pytest.fixture
def claiming(store, queue_id):
    claiming = Claiming(store, queue_id)
    with contextlib.closing(claiming.session):
        yield claiming


def fill(store, count, analyse=True):
    """So many ready messages, written by SQL."""
    store.execute(
        "WITH one AS (SELECT id FROM kombu_pg.queue WHERE name = 'q'), copy AS ("
        " INSERT INTO kombu_pg.message (id, queue_id, priority, band, exchange, routing_key, properties, body)"
        " SELECT nextval('kombu_pg.message_id_seq'), one.id, 0, 3, '', 'q', m.properties, m.body"
        " FROM one, kombu_pg.message m, generate_series(1, %s) WHERE m.routing_key = 'template'"
        " RETURNING id, queue_id, band)"
        "INSERT INTO kombu_pg.ready (queue_id, band, position, message_id, size)"
        " SELECT queue_id, band, id, id, 3 FROM copy",
        (count,),
    )
    if analyse:
        store.execute("ANALYZE kombu_pg.ready, kombu_pg.message")


@contextlib.contextmanager
def explained(store):
    """A session whose nested statements are explained; the function gives the tables read whole since the last call."""
    with store.session() as connection, connection.cursor() as cursor:
        try:
            cursor.execute("LOAD 'auto_explain'")
        except psycopg2.errors.UndefinedFile:
            pytest.skip("this server has no auto_explain")
        cursor.execute(
            "SET auto_explain.log_min_duration = 0; SET auto_explain.log_nested_statements = on;"
            " SET auto_explain.log_level = 'notice'; SET auto_explain.log_analyze = on"
        )
        connection.notices = plans = []

        def read_whole():
            text = "\n".join(plans)
            assert "Query Text" in text
            assert "JIT:" not in text  # what costs more than the statement
            plans.clear()
            return set(re.findall(r"Seq Scan on (\w+)", text)) - SMALL

        yield cursor, read_whole


CLAIM = (
    "SELECT count(*) FROM kombu_pg.claim({consumer}, 1, '{{{queue}}}', '{{{queue}}}', '{{10}}', 10, 1000000, 1,"
    " true, '{{f}}', '{{0}}', true)"
)
PUBLISH = (
    "CALL kombu_pg.publish(true, {exchange}, 'q', 0, NULL, {due}, 't', 'i', NULL, '{{}}', 'x', gen_random_uuid(),"
    " {age}, false, NULL, true)"
)


def plans_of_the_hot_statements(store, claiming):
    """The tables that claim, settle, publish, promote and upkeep read whole."""
    found = {}
    with explained(store) as (cursor, read_whole):
        statements = {
            "claim": CLAIM.format(consumer=claiming.consumer, queue=claiming.queue_id),
            "settle": f"SELECT kombu_pg.settle({claiming.consumer}, {', '.join(['ARRAY[1, 2]::bigint[]'] * 7)}, 20)",
            "publish": PUBLISH.format(exchange="''", due="NULL", age="NULL"),
            "publish with an eta": PUBLISH.format(exchange="'amq.direct'", due="now() + '1 hour'", age="NULL"),
            "publish again": PUBLISH.format(exchange="''", due="NULL", age="0.1"),
            "push": f"SELECT kombu_pg.push({claiming.queue_id}, 1, 0, '{{}}', 'x')",
            "promote": "CALL kombu_pg.promote_and_wake(10)",
            "next due": "SELECT kombu_pg.next_due()",
            "upkeep": f"CALL kombu_pg.upkeep_and_wake({claiming.consumer}, 30, 20, true)",
        }
        for name, statement in statements.items():
            cursor.execute(statement)
            if whole := read_whole():
                found[name] = whole
    return found


def test_hot_statements_use_their_indexes_on_empty_tables_that_were_just_analysed(store, claiming):
    store.execute("ANALYZE " + ", ".join(f"kombu_pg.{table}" for table in TABLES))

    assert plans_of_the_hot_statements(store, claiming) == {}


def test_hot_statements_use_their_indexes_on_a_million_ready_rows_whose_statistics_say_empty(store, claiming):
    store.execute("ANALYZE kombu_pg.ready, kombu_pg.message")
    fill(store, 1_000_000, analyse=False)

    assert plans_of_the_hot_statements(store, claiming) == {}
    assert claiming.median(claiming.claim) < 0.02


def test_hot_statements_use_their_indexes_on_a_million_ready_rows(store, claiming):
    fill(store, 1_000_000)

    assert plans_of_the_hot_statements(store, claiming) == {}
    assert claiming.median(claiming.claim) < 0.02


@contextlib.contextmanager
def snapshot(store):
    """A transaction that only looks: vacuum may remove nothing that dies from now on."""
    with contextlib.closing(psycopg2.connect(store.url)) as connection:
        connection.set_session(isolation_level="REPEATABLE READ")
        connection.cursor().execute("SELECT count(*) FROM kombu_pg.ready")
        yield


def test_a_claim_does_not_walk_a_million_dead_rows_under_an_open_snapshot(store, claiming):
    empty = claiming.median(claiming.claim)
    fill(store, 1_000_000)
    with snapshot(store):
        store.execute("DELETE FROM kombu_pg.ready")
        store.execute("DELETE FROM kombu_pg.message")

        eventually(lambda: claiming.median(claiming.claim) < 3 * empty + 0.0005, 30)

        publish(store.broker(), *range(5))
        assert len(claiming.claim()) == 5


def test_marks_move_while_acks_ride_along_with_every_claim(store, queue_id):
    fill(store, 5000)
    with Consuming(store.broker(), prefetch=10) as consumer:
        consumer.received = Acked()
        consumer.until(3000, 30)

        delivery = consumer.connection.connection.delivery()
        (feed,) = delivery._feeds
        assert feed.marks.of([queue_id])[0] > 1000


class Acked(list):
    """Acknowledges what it is given."""

    def append(self, message):
        message.ack()
        super().append(message)


def test_a_mark_never_passes_what_a_running_transaction_may_still_fill(store, claiming):
    with store.session() as late, late.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT pg_current_xact_id(), nextval('kombu_pg.message_id_seq')")
        position = cursor.fetchone()[1]
        for number in range(20):
            publish(store.broker(), number)
            claiming.claim()
        cursor.execute(
            f"INSERT INTO kombu_pg.message (id, queue_id, priority, band, exchange, routing_key, properties, body)"
            f" VALUES ({position}, {claiming.queue_id}, 0, 3, '', 'q', '{{}}', 'x')"
        )
        cursor.execute(
            f"INSERT INTO kombu_pg.ready (queue_id, band, position, message_id, size)"
            f" VALUES ({claiming.queue_id}, 3, {position}, {position}, 3)"
        )
        cursor.execute("COMMIT")

    assert claiming.claim() == [position]


def test_claims_of_an_idle_store_take_no_transaction_ids(store, claiming):
    publish(store.broker(), "x")

    def settles():
        claiming.marks.count(MARK_PERIOD)
        claiming.claim()
        return claiming.claimed().xid is None

    # A transaction of any database may hold the marks up.
    eventually(settles, 20)


def test_no_message_is_passed_over_by_marks_while_many_publish(store, claiming):
    """Positions are filled out of order; every claim asks to move the mark."""
    stop = threading.Event()
    sent = []

    def send():
        with publisher(store.broker()) as producer:
            while not stop.is_set():
                producer.publish("x", routing_key="q", delivery_mode=1)
                sent.append(1)

    senders = [threading.Thread(target=send) for _ in range(6)]
    for sender in senders:
        sender.start()
    claimed = 0
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        claiming.marks.count(MARK_PERIOD)
        claimed += len(claiming.claim(20))
    stop.set()
    for sender in senders:
        sender.join()
    while more := len(claiming.claim(200)):
        claimed += more

    assert claimed == len(sent)


def test_a_queue_that_is_gone_does_not_shift_the_marks_of_the_others(store, claiming):
    publish(store.broker(), "x")
    gone = claiming.queue_id + 1000
    options = [gone, claiming.queue_id]
    claim = Claim(
        consumer_id=claiming.consumer, token=1, queues=options, keys=options, limits=[1, 1], armed=[False, False],
        marks=[0, 0], limit=10, max_bytes=2**24, suspects=1, gate=True, advance=True,
    )  # fmt: skip

    claimed = claiming.session.run(claiming.store.claim(claim))

    assert len(claimed.firsts) == 2
    assert claimed.armed[0] is None


def test_an_eta_walks_neither_what_was_due_long_ago_nor_what_is_due_later(store, claiming):
    statements = [
        "SELECT kombu_pg.wake_clock(now() + interval '1 second')", "SELECT kombu_pg.next_due()",
        "CALL kombu_pg.promote_and_wake(10)", "SELECT kombu_pg.expire_messages('-infinity', 10)",
    ]  # fmt: skip
    with store.session() as session, snapshot(store), session.cursor() as cursor:
        empty = [claiming.median(lambda sql=sql: cursor.execute(sql)) for sql in statements]
        store.execute(
            "INSERT INTO kombu_pg.scheduled (due_at, message_id, queue_id) "
            "SELECT now() + interval '1 hour' * sign(n), n, 1 FROM generate_series(-300000, 300000) AS n"
        )
        store.execute("DELETE FROM kombu_pg.scheduled WHERE due_at < now()")
        store.execute(
            "INSERT INTO kombu_pg.message"
            " (id, queue_id, priority, band, exchange, routing_key, properties, body, expires_at)"
            " SELECT -n, 1, 0, 3, '', '', '', '', now() + interval '1 hour' FROM generate_series(1, 300000) AS n"
        )
        full = [claiming.median(lambda sql=sql: cursor.execute(sql)) for sql in statements]

    assert [now < 3 * then + 0.002 for now, then in zip(full, empty, strict=True)] == [True] * 4


def test_a_message_is_taken_out_of_its_place_at_the_same_cost_however_many_wait_for_their_eta(store, claiming):
    take = "SELECT kombu_pg.withdraw(ARRAY(SELECT generate_series(-100, -1)))"
    store.execute(
        "INSERT INTO kombu_pg.message (id, queue_id, priority, band, exchange, routing_key, properties, body)"
        " SELECT -n, 1, 0, 3, '', '', '', '' FROM generate_series(1, 100) AS n"
    )
    with store.session() as session, session.cursor() as cursor:
        empty = claiming.median(lambda: cursor.execute(take))
        store.execute(
            "INSERT INTO kombu_pg.scheduled (due_at, message_id, queue_id) "
            "SELECT now() + interval '1 hour', n, 1 FROM generate_series(1, 200000) AS n"
        )
        full = claiming.median(lambda: cursor.execute(take))

    assert full < 3 * empty + 0.002


@pytest.mark.parametrize(
    ("span", "messages"),
    [(5.0, 20_000), pytest.param(60.0, 100_000, marks=[pytest.mark.slow, pytest.mark.timeout(300)])],
)
def test_nothing_is_late_while_messages_pass_under_a_transaction_that_stays_open(store, queue_id, span, messages):
    """It has a transaction id: no mark may move. The oldest message comes back; an eta is due; both go first."""
    begun = time.monotonic()
    with contextlib.closing(psycopg2.connect(store.url)) as open_, Consuming(store.broker(), prefetch=100) as consumer:
        open_.cursor().execute("SELECT pg_current_xact_id()")
        publish(store.broker(), "oldest")
        consumer.until(1)
        (oldest,) = consumer.received
        passed = 0
        while passed < messages or time.monotonic() - begun < span:
            fill(store, 1000, analyse=False)
            consumer.received = Acked()
            store.execute("SELECT kombu_pg.wake(ARRAY(SELECT id FROM kombu_pg.queue))")
            consumer.until(1000, 30)
            passed += 1000
        consumer.received = []
        consumer.rest(0.05)

        due = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=0.3)
        publish(store.broker(), "due", headers={"task": "t", "id": "1", "eta": due.isoformat()})
        consumer.until(1)
        late = datetime.datetime.now(datetime.timezone.utc) - due
        given_back = seconds(lambda: (oldest.requeue(), consumer.until(2)))

        assert consumer.bodies == ["due", "oldest"]
        assert datetime.timedelta(0) <= late < datetime.timedelta(seconds=0.1)
        assert given_back < 0.1


def test_everything_is_explained_where_it_runs(store):
    """Guards the guard: a sequential scan is found when there is one."""
    with explained(store) as (cursor, read_whole):
        cursor.execute("DO $$ BEGIN PERFORM count(*) FROM kombu_pg.ready; END $$")

        assert read_whole() == {"ready"}


RESULT_STATEMENTS = {
    "read": "SELECT count(*) FROM kombu_pg.get_results(ARRAY['t1', 't2', 'none'])",
    "look": "SELECT count(*) FROM kombu_pg.look_for_results(ARRAY['t1', 't2', 'none'], NULL, '{1}')",
    "store": (
        "SELECT kombu_pg.store_result('t1', 'SUCCESS', true, 60, 'json', 'x', NULL, NULL, NULL, NULL, NULL, 0, NULL,"
        " NULL, NULL)"
    ),
    "expire": "SELECT kombu_pg.expire_results(100)",
    "what a crash forgot": (
        "SELECT m.id FROM kombu_pg.message m WHERE m.id = ANY ('{1,2,3}') AND NOT EXISTS"
        " (SELECT FROM kombu_pg.result r WHERE r.task_id = m.task_id AND r.date_done >= m.enqueued_at)"
    ),
}


@pytest.mark.parametrize(
    ("what", "results"),
    # The last is no function, but planned anew each time: there an empty table may be read.
    [(what, results) for what in RESULT_STATEMENTS for results in (0, 20_000) if results or what[:4] != "what"],
)
def test_results_are_never_read_whole(store, queue_id, what, results):
    fill(store, min(results, 5_000), analyse=False)
    for table, key in (("result", "task_id, state"), ("group_result", "group_id")):
        values = "'t' || n, 'FAILURE'" if table == "result" else "'t' || n"
        store.execute(
            f"INSERT INTO kombu_pg.{table} ({key}, stored_at, expires_at, content_type, result)"
            f" SELECT {values}, now(), now() + n * interval '1 second' - interval '50 seconds', 'json', 'x'"
            " FROM generate_series(1, %s) AS n",
            (results,),
        )
    if results:
        store.execute("ANALYZE kombu_pg.result, kombu_pg.group_result, kombu_pg.message")
    with explained(store) as (cursor, read_whole):
        cursor.execute(RESULT_STATEMENTS[what])

        assert read_whole() == set()


def test_the_latest_results_are_found_without_reading_the_others(store, monkeypatch):
    monkeypatch.setattr("celery_pg.store.results.LATEST", 50)
    store.execute(
        "INSERT INTO kombu_pg.result (task_id, stored_at, state, name, content_type, result)"
        " SELECT 't' || n, now() + n * interval '1 second', CASE WHEN n < 30 THEN 'FAILURE' ELSE 'SUCCESS' END,"
        " 'shop.pay', 'json', 'x' FROM generate_series(1, 20000) AS n"
    )
    store.execute("ANALYZE kombu_pg.result")
    results = Results(Options.parse(store.broker()))
    with explained(store) as (cursor, read_whole):

        def latest(**filters):
            statement = results.latest(3, **filters)
            cursor.execute(statement.sql, statement.parameters)
            found = [row[0] for row in cursor.fetchall()]
            assert read_whole() == set()
            return found

        assert latest() == ["t20000", "t19999", "t19998"]
        assert latest(state="FAILURE") == []
        assert latest(name="none") == []
        assert latest(task_ids=["t1", "none"]) == ["t1"]
