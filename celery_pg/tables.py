"""How do I query the store with SQLAlchemy?

Core tables of what users read: results, and the messages that carry tasks. They describe the migrations, they do not
create anything::

    from celery_pg.tables import task_result
    failed = select(task_result.c.id, task_result.c.traceback).where(task_result.c.state == "FAILURE")

Another schema than `kombu_pg`: `tables("shop").task_result`, or SQLAlchemy's `schema_translate_map`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import BigInteger, Boolean, Column, DateTime, Integer, Interval, MetaData, SmallInteger, Table, Text

__all__ = ["Tables", "queue_status", "tables", "task_message", "task_result"]


@dataclass(frozen=True, slots=True)
class Tables:
    """The views of one installation."""

    task_result: Table
    task_message: Table
    queue_status: Table


def tables(schema: str = "kombu_pg") -> Tables:
    """The views in this schema, with a `MetaData` of their own: nothing else's create_all() touches them."""
    metadata = MetaData(schema=schema)
    return Tables(_task_result(metadata), _task_message(metadata), _queue_status(metadata))


def _task_result(metadata: MetaData) -> Table:
    return Table(
        "task_result",
        metadata,
        Column("id", Text, primary_key=True),
        Column("name", Text),
        Column("state", Text),
        Column("date_done", DateTime(timezone=True)),
        Column("worker", Text),
        Column("queue", Text),
        Column("retries", Integer),
        Column("runtime", Interval),
        Column("started_at", DateTime(timezone=True)),
        Column("stored_at", DateTime(timezone=True)),
        Column("expires_at", DateTime(timezone=True)),
        Column("group_id", Text),
        Column("parent_id", Text),
        Column("traceback", Text),
    )


def _task_message(metadata: MetaData) -> Table:
    return Table(
        "task_message",
        metadata,
        Column("id", BigInteger, primary_key=True),
        Column("queue", Text),
        Column("task", Text),
        Column("task_id", Text),
        Column("enqueued_at", DateTime(timezone=True)),
        Column("due_at", DateTime(timezone=True)),
        Column("expires_at", DateTime(timezone=True)),
        Column("priority", SmallInteger),
        Column("returns", Integer),
        Column("reply_to", Text),
        Column("state", Text),
    )


def _queue_status(metadata: MetaData) -> Table:
    return Table(
        "queue_status",
        metadata,
        Column("name", Text, primary_key=True),
        *(Column(name, BigInteger) for name in ("ready", "scheduled", "unacked", "dead", "consumers")),
        Column("paused", Boolean),
    )


_default = tables()
task_result, task_message, queue_status = _default.task_result, _default.task_message, _default.queue_status
