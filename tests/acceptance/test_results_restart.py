"""Does a result survive the server's restart, and does a lost one mean that its task runs again?"""

import contextlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import psycopg2
import pytest
from acceptance.conftest import broker_url
from acceptance.test_restart import private_server, server_url  # noqa: F401 - fixtures
from acceptance.test_results import RESULTS, WITHIN, task
from acceptance.workers import eventually
from celery import Celery
from kombu.exceptions import OperationalError

pytestmark = pytest.mark.timeout(180)

STORED = "SELECT count(*) FROM kombu_pg.result WHERE task_id = %s AND state = 'SUCCESS'"


@pytest.fixture
def app(store):
    broker = broker_url(store.url, reconnect_grace=1, restart_grace=2)
    app = Celery("acceptance", broker=broker, backend=broker, set_as_current=False)
    yield app
    app.backend.result_consumer.stop()
    app.close()


def start(start_worker, app, **settings):
    url = app.conf.broker_url
    return start_worker("-c", "2", broker=url, result_backend=url, **settings, **RESULTS)


def delay(app, **options):
    """Send a task, if the server is there; its id."""
    try:
        return task(app, "add").clone((2, 3)).apply_async(retry=False, **options).id
    except OperationalError:
        return None


def title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # what served a moment ago
        return ""


@contextlib.contextmanager
def nothing_flushed(server):
    """What is committed asynchronously in the block, which ends with a crash, does not survive that."""
    names = ("walwriter", "background writer", "checkpointer", "autovacuum launcher")
    children = psutil.Process(server.postmaster).children()
    stopped = [child for child in children if any(name in title(child) for name in names)]
    try:
        for process in stopped:
            process.suspend()
        yield
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def restart(server):
    server.restart(signal.SIGQUIT)


def kill_a_session(server):
    """The server goes through a recovery, without being started anew."""
    with contextlib.closing(psycopg2.connect(server.url)) as victim:
        os.kill(victim.info.backend_pid, signal.SIGKILL)
        gone = psutil.Process(server.postmaster).children()
        psutil.wait_procs(gone, timeout=WITHIN)
    eventually(lambda: answers(server), WITHIN, "the server has recovered")


def answers(server):
    try:
        psycopg2.connect(server.url).close()
    except psycopg2.OperationalError:
        return False
    return True


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
def test_a_get_that_waits_survives_a_restart_of_the_server(app, start_worker, private_server, how):  # noqa: F811
    start(start_worker, app)
    assert task(app, "add").delay(1, 1).get(timeout=WITHIN) == 2
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(app.AsyncResult("afterwards").get, timeout=WITHIN)
        eventually(lambda: app.backend.result_consumer._sources.held, WITHIN, "it waits")
        private_server.restart(how)
        eventually(lambda: delay(app, task_id="afterwards"), WITHIN, "the task is sent")

        assert waiting.result(WITHIN) == 5


def test_after_a_crash_under_load_every_task_has_a_result(app, store, start_worker, private_server):  # noqa: F811
    """Results do not wait for the flush, nor do late acks: whatever forgets a result forgets its ack, too."""
    start(start_worker, app, task_acks_late=True)
    published, stop = [], threading.Event()

    def publish():
        while not stop.is_set():
            published.append(delay(app))

    publisher = threading.Thread(target=publish)
    publisher.start()
    eventually(lambda: store.value("SELECT count(*) FROM kombu_pg.result") > 200, WITHIN, "the worker is at work")
    private_server.restart(signal.SIGQUIT)
    stop.set()
    publisher.join()
    acknowledged = list(filter(None, published))

    missing = "SELECT count(*) FROM unnest(%s) AS t (id) WHERE id NOT IN (SELECT task_id FROM kombu_pg.result)"
    eventually(lambda: store.value(missing, (acknowledged,)) == 0, WITHIN, "every task has a result")
    eventually(lambda: store.messages() == 0, WITHIN, "every message is acknowledged")
    assert len(acknowledged) > 200


@pytest.mark.parametrize(("crash", "kept"), [(restart, False), (kill_a_session, False), (restart, True)])
def test_a_late_ack_after_a_crash_counts_only_if_the_result_was_kept(
    app,
    store,
    start_worker,
    private_server,  # noqa: F811
    crash,
    kept,
):
    """The worker's process has stored the result; its parent says so only when the server is there again."""
    url = broker_url(store.url, reconnect_grace=1, restart_grace=60)
    worker = start_worker("-c", "1", broker=url, result_backend=url, task_acks_late=True, **RESULTS)
    sent = app.signature("acceptance_app.nap", (1,)).delay()
    eventually(lambda: store.started() == [sent.id], WITHIN, "it runs")
    worker.signal(signal.SIGSTOP)
    with nothing_flushed(private_server):
        eventually(lambda: store.value(STORED, (sent.id,)), WITHIN, "the result is stored")
        if kept:
            store.execute("CREATE TABLE flushed ()")
        crash(private_server)
    assert store.value(STORED, (sent.id,)) == kept
    worker.signal(signal.SIGCONT)

    assert sent.get(timeout=WITHIN) is None
    eventually(lambda: store.messages() == 0, WITHIN, "its message is acknowledged")
    assert store.started() == [sent.id] * (1 if kept else 2)
