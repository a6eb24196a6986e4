"""What do the workers run, and the publishers send, while something is broken?

Numbered tasks, each with links: whoever runs link `n` of a number writes one row into the table `effect`, in a database
that no fault touches, and Celery then publishes link `n + 1`. A task that was published and has no row was lost.
"""

import functools
import os
import time

import psycopg2
from celery import Celery
from celery.canvas import Signature

BROKER = "CHAOS_BROKER"
EFFECTS = "CHAOS_EFFECTS"

app = Celery("chaos", broker=os.environ.get(BROKER))
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    task_ignore_result=True,
    # What somebody sets who wants every task to run: the ack after the work, also when the child that did it is gone.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    # Celery gives a link up after three tries, within a second, and acks the task that should have published it; for
    # links, None means three, too.
    task_publish_retry_policy={"max_retries": 10_000, "interval_start": 0, "interval_step": 0.2, "interval_max": 1},
    worker_prefetch_multiplier=4,
    worker_hijack_root_logger=False,
)


@functools.cache
def effects(_pid):
    """A connection of this process's own, to the database of the effects."""
    connection = psycopg2.connect(os.environ[EFFECTS], application_name="effects")
    connection.autocommit = True
    return connection


@app.task(bind=True)
def step(self, number, link, seconds, _padding):
    time.sleep(seconds)
    effects(os.getpid()).cursor().execute(
        "INSERT INTO effect (number, link, pid, redelivered) VALUES (%s, %s, %s, %s)",
        (number, link, os.getpid(), bool(self.request.delivery_info.get("redelivered"))),
    )


def linked(number: int, links: int, seconds: float, padding: str) -> Signature:
    """The task with this number, and its links, each published when the one before has run."""
    signature = step.si(number, links, seconds, padding)
    for link in reversed(range(links)):
        following, signature = signature, step.si(number, link, seconds, padding)
        signature.link(following)
    return signature
