"""What does the measured worker run? An ordinary Celery app; the benchmark says by environment which broker."""

import json
import os
import time
from pathlib import Path
from typing import Any

from celery import Celery

__all__ = ["SETTINGS", "app", "configure", "echo", "mark", "mark_parts", "nothing", "total"]

SETTINGS = "BENCH_CELERY_SETTINGS"

app = Celery("bench")


def configure(settings: dict[str, Any]) -> None:
    """The app works with these settings; whatever it sends is durable. Unless they keep results, there are none."""
    app.conf.update({"task_ignore_result": True, "broker_connection_retry_on_startup": True, **settings})


@app.task
def nothing() -> None:
    """The task whose cost is the machinery's alone."""


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
