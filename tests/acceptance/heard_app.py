"""The tasks of the tests about dead letters, revoke and Celery's knobs: an ordinary app, whose results are kept, too.

`heard` writes down of which task it was called as errback, `joined` what a chord's body was called with.
"""

import os
import signal
import time

from acceptance_app import app, record
from celery import signals
from celery.exceptions import Ignore, Reject
from heard_queues import queues

app.conf.task_ignore_result = False
app.conf.task_queues = queues()


@app.task(bind=True)
def heard(self, task_id):
    record(self, "heard " + task_id)


@app.task(bind=True)
def joined(self, results):
    record(self, "joined")
    return results


@app.task(bind=True)
def note(self, *args, **kwargs):
    record(self, "end")
    return list(args)


@app.task(bind=True)
def nap(self, seconds):
    record(self, "start")
    time.sleep(seconds)
    record(self, "end")
    return seconds


@app.task(bind=True)
def nap_once(self, seconds):
    record(self, "start")
    if not self.request.delivery_info.get("redelivered"):
        time.sleep(seconds)


@app.task(bind=True)
def fail(self):
    record(self, "start")
    raise RuntimeError("as it was told to")


@app.task(bind=True)
def reject(self, requeue=False):
    record(self, "start")
    if requeue and self.request.delivery_info.get("redelivered"):
        return "the second time"
    raise Reject("as it was told to", requeue=requeue)


@app.task(bind=True)
def reject_always(self):
    record(self, "start")
    raise Reject("as it was told to", requeue=True)


@app.task(bind=True)
def ignore(self):
    record(self, "start")
    raise Ignore


@app.task(bind=True, max_retries=3)
def retry(self, countdown=0.2):
    record(self, "start")
    if self.request.retries == 0:
        raise self.retry(countdown=countdown)
    return self.request.retries


@app.task(bind=True)
def die(self):
    """Its process is killed, the worker is not."""
    record(self, "start")
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(bind=True)
def poison(self):
    """The worker is killed."""
    record(self, "start")
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


@app.task(bind=True)
def grow(self, megabytes):
    record(self, "end")
    grow.kept = b"x" * (megabytes * 1024 * 1024)


@signals.task_revoked.connect
def write_down(sender, request, terminated, signum, expired, **_):
    sender.push_request(id=request.id, delivery_info={})
    record(sender, "revoked")
    sender.pop_request()
