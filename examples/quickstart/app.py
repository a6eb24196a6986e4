"""An ordinary Celery app whose broker is PostgreSQL."""

import os
import tempfile
from pathlib import Path

from celery import Celery

DIRECTORY = Path(os.environ.get("QUICKSTART_DIRECTORY", Path(tempfile.gettempdir()) / "celery-pg-quickstart"))

app = Celery("app", broker=os.environ.get("QUICKSTART_BROKER", f"pg+embedded://{DIRECTORY / 'postgres'}"))
app.conf.broker_connection_retry_on_startup = True


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def report(result: int, label: str) -> None:
    """Write a line that `run.py` waits for."""
    with (DIRECTORY / "reports").open("a") as reports:
        reports.write(f"{label}: {result}\n")
