"""What do the workers run whose tasks complete atomically?

Each task writes into the table `counter` in the transaction that completes it; a `fault` says what dies, and where, in
the first run of the task.
"""

import json
import os
import signal

import sqlalchemy
from celery import Celery, current_task, signals
from celery.exceptions import Ignore, Reject

from celery_pg import publish_in, task_transaction

STORE = "ATOMIC_STORE"
SETTINGS = "ATOMIC_SETTINGS"
#: Where a task may be hit, from the end of its function to the worker's acknowledgement. "stored": its result is there,
#: and not committed; it waits for STOPPED, an advisory lock, and the test hits it.
POINTS = ("returned", "before publish", "after publish", "stored", "succeeded", "ended")
STOPPED = 4242
#: Who dies there.
VICTIMS = ("child", "parent", "backend")

app = Celery("atomic", broker=os.environ.get(STORE), backend=os.environ.get(STORE))
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    pg_atomic_completion=True,
    worker_hijack_root_logger=False,
    **json.loads(os.environ.get(SETTINGS, "{}")),
)


def write(note):
    with task_transaction() as connection:
        connection.execute(
            sqlalchemy.text("INSERT INTO counter (task_id, task, note) VALUES (:id, :task, :note)"),
            {"id": current_task.request.id, "task": current_task.name, "note": note},
        )


def strike(point):
    """Whoever the running task's fault names dies, if this is the point, and its first run."""
    request = current_task.request if current_task else None
    fault = (request.kwargs or {}).get("fault") if request else None
    if fault and fault[0] == point and not request.retries and not request.delivery_info.get("redelivered"):
        STRIKES[fault[1]]()


def kill_backend():
    """Every session of this process, and of the parent, too: they are the same server's."""
    with sqlalchemy.create_engine(os.environ["ATOMIC_SERVER"]).connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND application_name IN ('kombu_pg') "
            "AND (state = 'idle in transaction' OR state = 'idle')"
        )


STRIKES = {
    "child": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "parent": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "backend": kill_backend,
}


@signals.before_task_publish.connect
def _before_publish(**_):
    strike("before publish")


@signals.after_task_publish.connect
def _after_publish(**_):
    strike("after publish")


@signals.task_success.connect
@signals.task_failure.connect
@signals.task_retry.connect
def _succeeded(**_):
    strike("succeeded")


@signals.task_postrun.connect
def _ended(**_):
    strike("ended")


@app.task
def work(number, fault=None):
    write(f"work {number}")
    strike("returned")
    return number


@app.task
def broken(number, fault=None):
    write("rolled back")
    strike("returned")
    raise ValueError("on purpose")


@app.task(bind=True, max_retries=1)
def again(self, number, fault=None):
    write(f"again {number}" if self.request.retries else "rolled back")
    strike("returned")
    if not self.request.retries:
        raise self.retry(countdown=0)
    return number


@app.task(bind=True)
def handing_over(self, number, fault=None):
    write("rolled back")
    strike("returned")
    raise self.replace(work.s(number))


def survived(number, fault=None):
    """Its process dies behind the commit."""
    write(f"survived {number}")
    return number


SURVIVED = {
    "survived": {},
    "survived_quietly": {"ignore_result": True},
    "survived_retrying": {"ignore_result": True, "retry_on_worker_lost": True},
}
for _name, _options in SURVIVED.items():
    app.task(survived, name=f"atomic_app.{_name}", reject_on_worker_lost=False, **_options)


@app.task
def callback(result):
    write(f"callback {result}")


@app.task
def errback(task_id):
    write(f"errback {task_id} {app.AsyncResult(task_id).state}")


@app.task
def failing(how):
    write("rolled back")
    raise {"error": ValueError("on purpose"), "ignore": Ignore(), "reject": Reject("on purpose", requeue=False)}[how]


@app.task(bind=True, max_retries=3, default_retry_delay=0)
def retried(self):
    write(f"attempt {self.request.retries}")
    if self.request.retries < 2:
        raise self.retry()
    return self.request.retries


@app.task(bind=True)
def replaced(self):
    write("rolled back")
    raise self.replace(work.s(7))


@app.task(ignore_result=True)
def quiet(number):
    write(f"quiet {number}")


@app.task
def immediate():
    """A plain call inside a task is a call of its own: it does not wait for the completion."""
    callback.delay("immediate")
    write("rolled back")
    raise ValueError("on purpose")


@app.task(soft_time_limit=1)
def slow():
    write("rolled back")
    while True:
        signal.pause()


@app.task(time_limit=1)
def stuck():
    write("rolled back")
    while True:
        signal.pause()


@app.task(reject_on_worker_lost=False)
def lost():
    write("rolled back")
    os.kill(os.getpid(), signal.SIGKILL)


@app.task
def caught():
    """Only what the block wrote is taken back."""
    write("kept")
    try:
        with task_transaction() as connection:
            connection.exec_driver_sql("INSERT INTO counter (task_id, task, note) VALUES ('x', 'x', 'taken back')")
            raise ValueError
    except ValueError:
        pass
    with task_transaction().session() as session:
        session.execute(sqlalchemy.text("INSERT INTO counter (task_id, task, note) VALUES ('x', 'x', 'by the ORM')"))


@app.task
def cut_off(how):
    """Loses the connection of its transaction in its first run, in the middle of its function."""
    write("rolled back" if not current_task.request.delivery_info.get("redelivered") else "written")
    if not current_task.request.delivery_info.get("redelivered"):
        kill_backend()
        try:
            write("nowhere")
        except sqlalchemy.exc.DBAPIError as exc:
            if how == "raised":
                raise
            if how == "translated":
                raise ValueError("the database is gone") from exc
    return how


@app.task
def committing():
    with task_transaction() as connection:
        connection.exec_driver_sql("INSERT INTO counter (task_id, task, note) VALUES ('x', 'x', 'committed')")
        connection.commit()


@app.task
def publishing(fails):
    """Publishes in the transaction of its completion."""
    with task_transaction() as connection, publish_in(connection, app):
        callback.delay("published")
    if fails:
        raise ValueError("on purpose")
