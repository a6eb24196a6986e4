"""What does a worker say of the tasks that wait in the database?

They are listed as `inspect` lists a worker's own: ETA tasks, which Celery would hold in the worker's memory, and those
that are ready and that no worker has claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery.utils.nodenames import gethostname
from kombu.message import Message
from kombu.serialization import prepare_accept_content

from celery_pg.store.revoke import RevokeStore, WaitingTask
from kombu_pg.database import Database
from kombu_pg.message import decode
from kombu_pg.store import Row

__all__ = ["info", "waiting"]

#: The most tasks that are listed.
LISTED = 1_000
#: Bytes of a body beyond which its arguments are shown as the sender has written them down for people to read.
LARGEST = 16 * 1024


def waiting(database: Database, queues: Sequence[str], *, ready: bool) -> list[WaitingTask]:
    """The tasks in these queues that are not due yet and, if `ready`, those that nobody has claimed; at most LISTED."""
    return database.run(RevokeStore(database.options).waiting(list(queues), LISTED, LARGEST, ready=ready))


def info(consumer: Any, task: WaitingTask) -> dict[str, Any]:
    """As Celery's `Request.info` of a task that is not begun."""
    row = Row(task.id, 0, task.returns > 0, task.returns, task.priority, False, task.exchange, task.routing_key,
              task.properties, task.body or b"", 0, None)  # fmt: skip
    raw = decode(row, "", 0)
    args, kwargs = _written_down(raw) if task.body is None else _arguments(consumer.app, raw)
    return {
        "id": task.task_id,
        "name": raw.headers.get("shadow") or task.task,
        "args": args,
        "kwargs": kwargs,
        "type": task.task,
        "hostname": consumer.hostname or gethostname(),
        "time_start": None,
        "acknowledged": False,
        "delivery_info": {
            "exchange": task.exchange,
            "routing_key": task.routing_key,
            "priority": raw.properties.get("priority"),
            "redelivered": task.returns > 0,
        },
        "worker_pid": None,
    }


def _arguments(app: Any, raw: Any) -> tuple[Any, Any]:
    message = Message(
        body=raw.body, content_type=raw.content_type, content_encoding=raw.content_encoding, headers=raw.headers,
        accept=prepare_accept_content(app.conf.accept_content),
    )  # fmt: skip
    try:
        args, kwargs, _ = message.decode()
    except Exception:  # noqa: BLE001 - any decoder's
        return _written_down(raw)
    return args, kwargs


def _written_down(raw: Any) -> tuple[Any, Any]:
    return raw.headers.get("argsrepr"), raw.headers.get("kwargsrepr")
