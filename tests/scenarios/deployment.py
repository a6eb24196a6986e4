"""How is examples/executor_rpc deployed for a test: database, flag, workers, and what they noted?"""

import contextlib
import os
import signal
import subprocess
import sys

import kombu
from acceptance.workers import hang_up
from kombu.utils.json import loads
from scenarios.executor_app import NOTES, PREFIX
from scenarios.running import PYTHONPATH, TOP, database
from watching import eventually

from examples.executor_rpc.app import CALLBACKS, EXTRACT, EXTRACTIONS, make_app
from examples.executor_rpc.dispatch import Dispatcher
from examples.executor_rpc.events import Events

PATIENCE = 60.0
#: Where no RabbitMQ is.
DEAD = "amqp://guest:guest@127.0.0.1:9//"


class Place:
    """A database, a flag, and the workers of one module: what a deployment of the example is."""

    def __init__(self, store, directory, rabbitmq=DEAD, prefix=""):
        self.store = store
        self.url = self.store.broker(poll_interval=1, reconnect_grace=0.5, restart_grace=1, delivery_limit=2)
        self.rabbitmq = rabbitmq
        self.prefix = prefix
        self.directory = directory
        self.flag = directory / "flag"
        self.flag.write_text("on")
        self.store.install()
        self.store.execute("CREATE TABLE note (id bigserial, what text, fields text)")
        self.app = self.make_app()
        self.dispatcher = Dispatcher(self.app)
        self.events = Events(self.url)
        self.workers = []

    def make_app(self):
        app = make_app(self.url, self.rabbitmq, self.flag)
        app.conf.task_routes = {
            name: {"queue": self.prefix + route["queue"]} for name, route in app.conf.task_routes.items()
        }
        app.conf.task_routes["unknown_extraction"] = app.conf.task_routes[EXTRACT]
        return app

    def start(self, name, *options, reads=None):
        environment = {
            **os.environ,
            "EXAMPLE_STORE": self.url,
            "RABBITMQ_URL": self.rabbitmq,
            "PG_QUEUE_ENABLED": str(self.flag),
            "EXTRACTION_MODEL": "scenarios.executor_app:misbehave",
            "CELERY_BROKER_READ_URL": reads or self.url,
            NOTES: self.store.url,
            "ATOMIC_SERVER": self.store.url,
            "PYTHONPATH": PYTHONPATH,
            "PYTHONWARNINGS": "ignore",
            **({PREFIX: self.prefix} if self.prefix else {}),
        }
        queues = ",".join(self.prefix + queue for queue in (EXTRACTIONS, CALLBACKS))
        command = [sys.executable, "-m", "celery", "-A", "scenarios.executor_app", "worker", "-n", f"{name}@test",
                   "-l", "INFO", *(options or ("-c", "3", "-Q", queues))]  # fmt: skip
        self.workers.append(Worker(command, environment, self.directory / f"{name}.log"))
        return self.workers[-1]

    def stop(self):
        for worker in self.workers:
            worker.kill()
        hang_up(self.app)
        self.app.close()
        if self.prefix:
            self.clear_rabbitmq()

    def clear_rabbitmq(self):
        with kombu.Connection(self.rabbitmq) as connection, connection.channel() as channel:
            for queue in (EXTRACTIONS, CALLBACKS):
                channel.queue_delete(self.prefix + queue)
                channel.exchange_delete(self.prefix + queue)
            control = f"{self.prefix}control"
            for exchange in (control, f"{control}.pidbox", f"reply.{control}.pidbox"):
                channel.exchange_delete(exchange)

    @contextlib.contextmanager
    def flagged(self, state):
        """The flag is on, off, or nobody can be asked."""
        if state == "unreachable":
            self.flag.unlink()
        else:
            self.flag.write_text(state)
        try:
            yield
        finally:
            self.flag.write_text("on")

    def signature(self, name, *args, **kwargs):
        return self.app.signature(name, args=args, kwargs=kwargs)

    def notes(self, what):
        rows = self.store.execute("SELECT fields FROM note WHERE what = %s ORDER BY id", (what,))
        return [loads(fields) for (fields,) in rows]

    def note(self, what, **fields):
        """The first such note; waits for it."""

        def found():
            return next((note for note in self.notes(what) if fields.items() <= note.items()), None)

        return eventually(found, PATIENCE, f"{what} {fields}")

    def errors(self, task_id):
        """Type and text of what its errback found when it started."""
        error = self.note("error", id=task_id)
        assert error["state"] == "FAILURE"
        return error["type"], error["text"]

    def call(self, document, task=EXTRACT, **kwargs):
        """Dispatch with callbacks that say what they were given. -> the task's id."""
        return self.dispatcher.dispatch_with_callback(
            task,
            {"document": document, **kwargs},
            on_success=self.signature("ide_probe"),
            on_error=self.signature("ide_probe_error"),
        ).task_id

    def messages(self, task):
        """How many messages of that task are in the store."""
        return self.store.value("SELECT count(*) FROM kombu_pg.message WHERE task = %s", (task,))

    def keep_workers(self):
        for worker in self.workers:
            worker.keep()


class Worker:
    """Started again whenever it has ended."""

    def __init__(self, command, environment, log):
        self._command, self._environment, self.log = command, environment, log
        self.process = None
        self.keep()

    def keep(self):
        if self.process is None or self.process.poll() is not None:
            with self.log.open("ab") as out:
                self.process = subprocess.Popen(
                    self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=TOP,
                    start_new_session=True,
                )  # fmt: skip

    def kill(self):
        """It and the processes of its pool are gone when this returns."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def placed(server_url, worker_id, directory, **given):
    with database(server_url, worker_id) as store:
        place = Place(store, directory, **given)
        try:
            yield place
        finally:
            place.stop()
