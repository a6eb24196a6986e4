"""What do the workers on both sides of a gate run? The app of the other tests, with tasks that call further ones.

A worker imports it by the setting `imports`. What each task writes into `effect.phase` is the story that it belongs to,
if the test tells one: a number that goes with every part of a call.
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
def step(self, *values, story=None):
    record(self, story)
    return len(values)


@app.task(bind=True, ignore_result=False)
def plain(self):
    record(self, None)


@app.task(bind=True, ignore_result=False)
def calls(self, story=None):
    record(self, story)
    plain.delay()


@app.task(bind=True, ignore_result=False)
def tries_again(self, story=None):
    if not self.request.retries:
        raise self.retry(countdown=0.1)
    record(self, story)


@app.task(bind=True, ignore_result=False)
def replaced(self, by, story=None):
    record(self, story)
    return self.replace(app.signature(by, kwargs={"story": story}))


@app.task(bind=True, ignore_result=False)
def adds(self):
    record(self, None)
    self.add_to_chord(step.s())


@app.task(bind=True, ignore_result=False)
def fails(self, story=None):
    record(self, story)
    raise ValueError("as asked")


@app.task(bind=True, ignore_result=False)
def endless(self):
    record(self, None)
    time.sleep(60)
