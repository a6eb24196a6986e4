"""What do the header and the body of a chord run in these tests?"""

import os
import signal
import time

from acceptance_app import record
from celery import chord, group, shared_task


@shared_task(name="chords.add")
def add(*numbers):
    return sum(numbers)


@shared_task(name="chords.listed")
def listed(results):
    return results


@shared_task(name="chords.total")
def total(results):
    return sum(results)


@shared_task(name="chords.later", bind=True)
def later(self, value, seconds):
    record(self, "start")
    time.sleep(seconds)
    record(self, "end")
    return value


@shared_task(name="chords.silent", ignore_result=True)
def silent(value):
    return value


@shared_task(name="chords.failing")
def failing(*_):
    raise ValueError("no")


@shared_task(name="chords.again", bind=True, max_retries=2)
def again(self, value):
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return value


@shared_task(name="chords.replaced", bind=True)
def replaced(self, value):
    return self.replace(add.s(value, 1000))


@shared_task(name="chords.replaced_by_group", bind=True)
def replaced_by_group(self, value):
    return self.replace(group(add.s(value, n) for n in range(2)))


@shared_task(name="chords.replaced_by_chord", bind=True)
def replaced_by_chord(self, value):
    return self.replace(chord([add.s(value, n) for n in range(2)], total.s()))


@shared_task(name="chords.adding", bind=True)
def adding(self, value):
    self.add_to_chord(add.s(value, 1))
    return value


@shared_task(name="chords.dying")
def dying():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@shared_task(name="chords.endless", soft_time_limit=None, time_limit=1)
def endless():
    time.sleep(60)


@shared_task(name="chords.late", bind=True, acks_late=True)
def late(self, value, seconds):
    record(self, "start")
    if not self.request.delivery_info.get("redelivered"):
        time.sleep(seconds)
    record(self, "end")
    return value


@shared_task(name="chords.errback", bind=True)
def errback(self, _task_id):
    record(self, "end")
