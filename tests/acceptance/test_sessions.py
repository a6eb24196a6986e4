import os
import subprocess
import sys

import pytest
from acceptance.workers import HERE, eventually, hang_up, worker_environment

PUBLISHER = """
import sys
from acceptance_app import note
for _ in range(3):
    note.delay()
print("sent", flush=True)
sys.stdin.read()
"""
INSTALLERS = """
import logging, os, sys, time
from kombu import Connection
import kombu_pg.transport
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
url, go = sys.argv[1], time.time() + 1
children = []
for _ in range(100):
    pid = os.fork()
    if not pid:
        time.sleep(max(0, go - time.time()))
        with Connection(url) as connection:
            connection.ensure_connection(interval_start=0.1, interval_step=0.1, interval_max=0.5, timeout=60)
        os._exit(0)
    children.append(pid)
sys.exit(sum(os.waitpid(pid, 0)[1] != 0 for pid in children))
"""


def test_an_idle_prefork_worker_has_three_sessions_and_each_child_one_once_it_has_published(app, store, start_worker):
    start_worker("-c", "2", "--without-mingle", "-E")
    eventually(lambda: len(store.sessions()) <= 3, 5, "the parent has at most 3")

    for _ in range(20):
        app.send_task("acceptance_app.publishing")
    eventually(lambda: len(store.ended()) == 40, 20)
    hang_up(app)

    publishers = store.value("SELECT count(DISTINCT pid) FROM effect WHERE task = 'acceptance_app.publishing'")
    eventually(lambda: len(store.sessions()) <= 3 + publishers, 5, "at most one more for each child")


def test_a_publishing_process_has_one_session(app, store, broker, start_worker):
    app.amqp.queues.add("celery")
    with app.connection_for_write() as connection:
        app.amqp.queues["celery"].bind(connection.default_channel).declare()
    before = store.sessions()
    environment = worker_environment(broker, store.url, {})

    with subprocess.Popen(
        [sys.executable, "-c", PUBLISHER], env=environment, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as publisher:
        assert publisher.stdout.readline() == b"sent\n"

        assert len(store.sessions() - before) == 1


@pytest.mark.timeout(120)
def test_of_a_hundred_processes_that_connect_to_an_empty_database_one_installs(store, broker):
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}

    ended = subprocess.run(
        [sys.executable, "-c", INSTALLERS, broker], env=environment, capture_output=True, text=True, timeout=100
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("WARNING installed schema") == 1
    assert "WARNING" not in ended.stdout.replace("WARNING installed schema", "", 1)
