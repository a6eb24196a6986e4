"""What does a worker run that is sent anything at all?

It writes down the numbers that Celery has begun to run, or has revoked.
"""

import os

from celery import Celery, signals
from chaos.chaos_app import BROKER, effects

app = Celery("fuzz", broker=os.environ.get(BROKER))
app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)


@app.task
def anything(*_args, **_kwargs): ...


@app.task
def one(argument):
    return argument


@signals.task_prerun.connect
def begun(task, **_):
    note(task.request)


@signals.task_internal_error.connect
@signals.task_revoked.connect
def ended(request, **_):
    note(request)


def note(request):
    number = request.get("fuzz") if isinstance(request, dict) else getattr(request, "fuzz", None)
    effects(os.getpid()).cursor().execute("INSERT INTO ran (number) VALUES (%s)", (number,))
