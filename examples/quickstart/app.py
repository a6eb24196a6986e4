"""An ordinary Celery app whose broker and result store are PostgreSQL."""

from celery import Celery

from examples.running import store_url

URL = store_url("quickstart")  # yours: pg://user:secret@host/database

app = Celery("quickstart", broker=URL, backend=URL)
app.conf.broker_connection_retry_on_startup = True


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def report(result: int, label: str) -> str:
    return f"{label}: {result}"
