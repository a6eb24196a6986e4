"""What does the measured worker run? An ordinary Celery app; the benchmark says by environment which broker."""

import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import psycopg2
import sqlalchemy
from celery import Celery

from celery_pg import task_transaction

__all__ = ["BUY", "SETTINGS", "app", "buy", "configure", "echo", "mark", "mark_parts", "nothing", "total"]

SETTINGS = "BENCH_CELERY_SETTINGS"
#: What a task, or a transaction of somebody's own, writes.
BUY = "INSERT INTO bench_purchase (what) VALUES ('a book')"

app = Celery("bench")


def configure(settings: dict[str, Any]) -> None:
    """The app works with these settings; whatever it sends is durable. Unless they keep results, there are none."""
    app.conf.update({"task_ignore_result": True, "broker_connection_retry_on_startup": True, **settings})


@app.task
def nothing() -> None:
    """The task whose cost is the machinery's alone."""


@app.task
def buy() -> None:
    """A row is written: in the commit that completes the task, or else in one of its own."""
    if app.conf.pg_atomic_completion:
        with task_transaction() as connection:
            connection.exec_driver_sql(BUY)
    else:
        with _shop().begin() as connection:
            connection.exec_driver_sql(BUY)


@functools.cache
def _shop() -> sqlalchemy.Engine:
    return sqlalchemy.create_engine("postgresql+psycopg2://", creator=lambda: psycopg2.connect(app.conf.bench_dsn))


@app.task
def echo(number: int) -> int:
    """The smallest result that can be told from another."""
    return number


@app.task
def total(numbers: list[int]) -> int:
    """The body of a chord."""
    return sum(numbers)


@app.task
def mark(path: str) -> None:
    """The file holds the moment, in nanoseconds of the machine's monotonic clock, that this task ran."""
    written = Path(f"{path}.new")
    written.write_text(str(time.monotonic_ns()))
    written.rename(path)


@app.task
def mark_parts(numbers: list[int], count: int, path: str) -> None:
    """The body of a chord; a mark, where every part is there."""
    if sorted(numbers) == list(range(count)):
        mark(path)


if SETTINGS in os.environ:
    configure(json.loads(os.environ[SETTINGS]))
