"""What do workers run whose results are looked at? Imported by them next to acceptance_app (`imports`)."""

import os
import threading

from acceptance_app import app
from celery import group
from celery.result import allow_join_result
from celery.utils.nodenames import gethostname


class Refused(Exception):
    """Neither picklable nor made from its args."""

    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")
        self.lock = threading.Lock()


@app.task
def add(x, y):
    return x + y


@app.task
def fail(number):
    raise KeyError("no such thing", number)


@app.task
def refuse(number):
    raise Refused(number, "refused")


@app.task
def heard(task_id):
    """The errback that looks at what it is called for."""
    result = app.AsyncResult(task_id)
    return [result.state, type(result.result).__name__, *map(str, result.result.args), bool(result.traceback)]


@app.task(bind=True)
def steps(self, count):
    for step in range(count):
        self.update_state(state="PROGRESS", meta={"step": step, "host": gethostname()})
    return os.getpid()


@app.task(bind=True, max_retries=1)
def again(self):
    if not self.request.retries:
        raise self.retry(countdown=0, exc=ValueError("once"))
    return self.request.retries


@app.task(bind=True)
def parent(self):
    return [add.delay(number, number).id for number in range(3)]


@app.task
def joining(count):
    """Waits inside of a task, which Celery advises against."""
    with allow_join_result():
        return group(add.s(number, number) for number in range(count))().get(timeout=60)


@app.task(ignore_result=True)
def unheard():
    return 1


@app.task(ignore_result=True, store_errors_even_if_ignored=True)
def heard_if_it_fails():
    raise ValueError("no")
