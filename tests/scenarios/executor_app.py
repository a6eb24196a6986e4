"""What do the workers of examples/executor_rpc run in its tests?

Everything of the example, and a model that misbehaves.
"""

import contextlib
import os
import signal
import uuid
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path

import psycopg2
from acceptance import atomic_app  # its signals strike where a task's `fault` says
from celery import current_task, signals
from kombu.utils.json import dumps
from watching import eventually

from examples.executor_rpc import callbacks, executor  # noqa: F401 - their tasks
from examples.executor_rpc.app import app

NOTES = "EXECUTOR_NOTES"
PREFIX = "EXECUTOR_PREFIX"
#: What JSON knows nothing of, and Celery's serializer does.
VALUES = {
    "uuid": uuid.UUID(int=7),
    "at": datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=timezone.utc),
    "price": Decimal("12.340"),
    "bytes": b"\x00\xff\xfe",
    "text": "a\x00b",
}

app.conf.worker_lost_wait = 0.1
app.conf.worker_hijack_root_logger = False
if PREFIX in os.environ:
    app.conf.task_routes = {
        name: {"queue": os.environ[PREFIX] + route["queue"]} for name, route in app.conf.task_routes.items()
    }
    app.conf.control_exchange = app.conf.event_exchange = os.environ[PREFIX] + "control"


def note(what, **fields):
    """Outside of any transaction of the task."""
    with contextlib.closing(psycopg2.connect(os.environ[NOTES])) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO note (what, fields) VALUES (%s, %s)", (what, dumps(fields)))


def _runs(task_id, task, **_):
    request = task.request
    note("run", task=task.name, id=task_id, worker=request.hostname, queue=request.delivery_info["routing_key"],
         prompt=(request.kwargs or {}).get("prompt_id"), done=app.AsyncResult(task_id).ready())  # fmt: skip


if NOTES in os.environ:  # in a worker, not in the tests' own process
    signals.task_prerun.connect(_runs)


def kill_executor():
    """The worker, and the process of its pool that runs the task."""
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


atomic_app.STRIKES["executor"] = kill_executor


def misbehave(document, fault=None):
    """The model that EXTRACTION_MODEL names: it does what the document says."""
    what = document.pop("do") if isinstance(document, dict) and "do" in document else "return"
    if what == "die":
        if document.get("who") == "executor":
            kill_executor()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "until":
        flag = Path(os.environ["PG_QUEUE_ENABLED"])
        eventually(lambda: flag.read_text() == document["flag"], 30)
        what = document["then"]
    if what == "raise":
        raise LookupError(*document["args"])
    if what == "where":
        return current_task.request.hostname
    if what == "values":
        return VALUES
    if what == "unencodable":
        return object()
    atomic_app.strike("returned")
    return document


@app.task(name="ide_probe")
def ide_probe(*args, **kwargs):
    """A callback that says what it was given."""
    note("probe", args=args, kwargs=kwargs)


@app.task(name="ide_probe_error")
def ide_probe_error(failed_task_id, **kwargs):
    """An errback that says what it finds when it starts."""
    found = app.AsyncResult(failed_task_id)
    note("error", id=failed_task_id, state=found.state, type=type(found.result).__name__, text=str(found.result),
         kwargs=kwargs)  # fmt: skip
