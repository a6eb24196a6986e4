"""What do the workers under test run? An ordinary Celery app: only its broker_url is unusual.

The test says by environment variables which broker, and which settings; every task writes what it does, with the
server's clock, into the table `effect` of the same database, over a connection of its own.
"""

import contextlib
import json
import os
import signal
import time

import psycopg2
from celery import Celery

BROKER = "ACCEPTANCE_BROKER"
EFFECTS = "ACCEPTANCE_EFFECTS"
SETTINGS = "ACCEPTANCE_SETTINGS"

app = Celery("acceptance", broker=os.environ.get(BROKER))
app.conf.update(
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
    **{"task_ignore_result": True, **json.loads(os.environ.get(SETTINGS, "{}"))},
)


def record(task, phase, late=None):
    """Write one effect, whatever happens to the server meanwhile."""
    while True:
        try:
            with contextlib.closing(psycopg2.connect(os.environ[EFFECTS])) as connection:
                connection.autocommit = True
                connection.cursor().execute(
                    "INSERT INTO effect (task_id, task, phase, pid, parent, redelivered, late)"
                    " VALUES (%s, %s, %s, %s, %s, %s, extract(epoch FROM clock_timestamp() - %s::timestamptz))",
                    (
                        task.request.id, task.name, phase, os.getpid(), os.getppid(),
                        bool(task.request.delivery_info.get("redelivered")), late,
                    ),
                )  # fmt: skip
                return
        except psycopg2.OperationalError:
            time.sleep(0.1)


@app.task(bind=True)
def note(self, *_args):
    record(self, "end")


@app.task(bind=True)
def nap(self, seconds):
    record(self, "start")
    time.sleep(seconds)
    record(self, "end")


@app.task(bind=True)
def passed_on(self, value):
    record(self, "end")
    return value


@app.task(bind=True, max_retries=3)
def retried(self):
    if self.request.retries == 0:
        raise self.retry(countdown=0.5)
    record(self, "end")


@app.task(bind=True)
def poison(self):
    record(self, "start")
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


@app.task(bind=True)
def due(self, sent=None):
    record(self, "end", late=self.request.eta or sent)


@app.task(bind=True)
def publishing(self):
    note.delay()
    record(self, "end")
