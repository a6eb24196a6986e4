"""What do the workers on both sides of a gate run? The app of the other tests, with tasks that call further ones.

A worker imports it by the setting `imports`. What each task writes into `effect.phase` is the root id of its request.
"""

import time
import zlib
from pathlib import Path

from acceptance_app import app, record


def broker_for(task_name, args, kwargs, options):
    """The flag is a file: how many percent of the calls go to PostgreSQL."""
    return (
        "postgres"
        if zlib.crc32(options["task_id"].encode()) % 100 < int(Path(app.conf.gate_flag).read_text())
        else None
    )


@app.task(bind=True, ignore_result=False)
def step(self, *values):
    record(self, self.request.root_id)
    return len(values)


@app.task(bind=True, ignore_result=False)
def plain(self):
    record(self, self.request.root_id)


@app.task(bind=True, ignore_result=False)
def calls(self):
    record(self, self.request.root_id)
    plain.delay()


@app.task(bind=True, ignore_result=False)
def tries_again(self):
    if not self.request.retries:
        raise self.retry(countdown=0.1)
    record(self, self.request.root_id)


@app.task(bind=True, ignore_result=False)
def replaced(self, by):
    record(self, self.request.root_id)
    return self.replace(app.signature(by))


@app.task(bind=True, ignore_result=False)
def adds(self):
    record(self, self.request.root_id)
    self.add_to_chord(step.s())


@app.task(bind=True, ignore_result=False)
def fails(self):
    record(self, self.request.root_id)
    raise ValueError("as asked")


@app.task(bind=True, ignore_result=False)
def endless(self):
    record(self, self.request.root_id)
    time.sleep(60)
