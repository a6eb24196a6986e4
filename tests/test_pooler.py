import contextlib
import os
import pathlib
import pwd
import shutil
import socket
import subprocess
import tempfile
from urllib.parse import quote

import celery
import kombu
import pytest
from conftest import address
from proxy import TcpProxy
from psycopg2.extensions import parse_dsn
from watching import Consuming, Store, eventually, process, publish, publisher

PROMPT = 5.0


@pytest.fixture(scope="module")
def pooler(server_url):
    """The address of a PgBouncer in transaction mode, with two server connections."""
    program = shutil.which("pgbouncer", path=os.environ["PATH"] + ":/usr/sbin")
    if program is None:
        missing = "there is no pgbouncer here: apt-get install pgbouncer"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="wake-pooler-"))
    port = free_port()
    # The embedded server has a unix socket only, which is closed to the user that pgbouncer runs as.
    with TcpProxy(*address(server_url)) as server:
        configure(directory, port, server, parse_dsn(server_url))
        user = "nobody" if os.getuid() == 0 else None
        if user is not None:
            for path in (directory, *directory.iterdir()):
                os.chown(path, pwd.getpwnam(user).pw_uid, -1)
        with subprocess.Popen(
            [program, directory / "pgbouncer.ini"], user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as running:
            eventually(lambda: listens(port), 10, f"pgbouncer listens: see {directory}/log")
            yield f"127.0.0.1:{port}"
            running.terminate()
    shutil.rmtree(directory)


def configure(directory, port, server, login):
    (directory / "users.txt").write_text(f'"{login["user"]}" "{login.get("password", "")}"\n')
    (directory / "pgbouncer.ini").write_text(
        f"[databases]\n* = host={server.host} port={server.port}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"pool_mode = transaction\ndefault_pool_size = 2\nmax_client_conn = 100\n"
        f"auth_type = trust\nauth_file = {directory}/users.txt\n"
        f"logfile = {directory}/log\npidfile = {directory}/pid\n"
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def pooled(store, pooler):
    """The store as it is seen through the pooler."""
    login = parse_dsn(store.url)
    return Store(f"postgresql://{login['user']}@{pooler}/{login['dbname']}")


@pytest.fixture
def queue(store):
    with kombu.Connection(store.broker()) as connection:
        kombu.Queue("q", channel=connection.channel()).declare()


def test_a_producer_behind_a_pooler_wakes_a_consumer_that_is_not(store, pooled):
    with Consuming(store.broker()) as consumer:
        consumer.rest()

        publish(pooled.broker(), "through the pooler")

        assert consumer.until(1, 2) == ["through the pooler"]


def test_producers_behind_a_pooler_leave_no_lock_on_its_sessions(store, pooled, queue):
    with contextlib.ExitStack() as stack:
        producers = [stack.enter_context(publisher(pooled.broker(application_name=f"p{n}"))) for n in range(8)]
        for number in range(20):
            producers[number % 8].publish(number, routing_key="q")

    assert store.value("SELECT count(*) FROM kombu_pg.message") == 20
    assert (
        store.value(
            "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database "
            "WHERE d.datname = current_database() AND l.locktype = 'advisory'"
        )
        == 0
    )


def test_a_second_attempt_of_a_publish_through_a_pooler_adds_no_copy(store, pooled, queue):
    with publisher(pooled.broker()) as producer:
        channel = producer.channel
        message = channel.prepare_message("once", content_type="text/plain", content_encoding="utf-8", properties={})

        channel.basic_publish(message, "", "q")
        channel.basic_publish(message, "", "q")

    assert store.value("SELECT count(*) FROM kombu_pg.message") == 1


def test_celery_sends_tasks_and_retries_behind_a_pooler(store, pooled, queue):
    with contextlib.closing(celery.Celery("pooled", broker=pooled.broker(), set_as_current=False)) as app:

        @app.task(name="t", shared=False)
        def task():
            raise AssertionError

        task.apply_async(queue="q", retry=True)
        with app.connection_for_write() as connection:
            task.apply_async(queue="q", connection=connection, countdown=60)

    states = store.execute("SELECT state FROM kombu_pg.task_message ORDER BY id")
    assert states == [("ready",), ("scheduled",)]


def test_a_consumer_behind_a_pooler_lives_by_heartbeats_and_polls(store, pooled):
    with Consuming(pooled.broker(heartbeat_interval=0.2, heartbeat_timeout=1)) as consumer:
        assert store.execute("SELECT heartbeat FROM kombu_pg.consumer") == [(True,)]

        publish(store.broker(), "polled")

        assert consumer.until(1, PROMPT) == ["polled"]
        seen = store.value("SELECT seen_at FROM kombu_pg.consumer")
        eventually(lambda: store.value("SELECT seen_at FROM kombu_pg.consumer") > seen)
        consumer.ack()
        consumer.rest()
    assert store.value("SELECT count(*) FROM kombu_pg.message") == 0


def test_a_consumer_behind_a_pooler_is_reaped_when_its_heart_stops(store, pooled):
    options = {"heartbeat_interval": 0.2, "heartbeat_timeout": 1, "reconnect_grace": 0.2}
    program = "Consuming(sys.argv[1]).until(1, 30); print('held', flush=True); sys.stdin.read()"
    with process(program, pooled.broker(**options)) as victim:
        eventually(lambda: store.value("SELECT count(*) FROM kombu_pg.queue"), 20)
        publish(pooled.broker(), "inherited")
        assert victim.stdout.readline() == "held\n"

        victim.kill()

        with Consuming(pooled.broker(**options)) as heir:
            assert heir.until(1, 10) == ["inherited"]
            assert heir.received[0].delivery_info["redelivered"]


def test_a_consumer_behind_a_pooler_that_is_alive_keeps_what_it_works_on(store, pooled):
    options = {"heartbeat_interval": 0.1, "heartbeat_timeout": 0.5, "reconnect_grace": 0.1}
    with Consuming(pooled.broker(**options)) as holder:
        publish(store.broker(), "held")
        holder.until(1, PROMPT)

        with Consuming(store.broker(**options)) as other:
            assert other.rest(2.0) == []


def test_a_consumer_with_a_session_of_its_own_beside_the_pooler_is_a_full_consumer(store, pooled):
    with Consuming(pooled.broker(listen_url=quote(store.url, safe=""))) as consumer:
        consumer.rest()
        assert store.execute("SELECT heartbeat FROM kombu_pg.consumer") == [(False,)]
        assert store.idle() == 1

        publish(pooled.broker(), "told")

        assert consumer.until(1, 2) == ["told"]


def test_a_consumer_whose_heart_may_pause_for_longer_than_the_reapers_lives_on(store):
    store.execute(
        "INSERT INTO kombu_pg.consumer (hostname, pid, heartbeat, epoch, grace, heartbeat_timeout, seen_at)"
        " SELECT name, 1, true, kombu_pg.current_epoch(), 0, timeout, now() - interval '1 minute'"
        " FROM (VALUES ('patient', 180), ('dead', 30)) AS c (name, timeout)"
    )

    for _ in range(2):
        store.execute("SELECT kombu_pg.reap(0, 0, 20)")

    assert store.execute("SELECT hostname FROM kombu_pg.consumer") == [("patient",)]
