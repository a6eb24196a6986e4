"""How does a test learn what became of a task: its result, its errback, its chord, its message?"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from acceptance.conftest import broker_url
from acceptance.heard_queues import queues
from acceptance.workers import Store, Worker, eventually, hang_up
from celery import Celery, chord
from conftest import own_database

__all__ = ["Lab", "lab"]


class Lab:
    """A store with results in it, an app to send with, and workers of `heard_app` that are killed at the end."""

    def __init__(self, url: str, directory: Path, **settings: Any) -> None:
        self.store = Store(url)
        self.broker = broker_url(url)
        self.backend = broker_url(url).replace("reconnect_grace=1", "application_name=results")
        self.workers: list[Worker] = []
        self._directory = directory
        self._settings = settings
        self.app = Celery("lab", broker=self.broker, backend=self.backend, set_as_current=False)
        self.app.conf.task_queues = queues()
        for name in self.app.amqp.queues:
            self.declare(name)
        self.errback = self.sig("heard")

    def start(self, *options: str, broker: str = "", **settings: Any) -> Worker:
        """A worker with one process, unless the options say otherwise."""
        name = f"w{len(self.workers) + 1}"
        settings = {"result_backend": self.backend, "imports": ["heard_app"], **self._settings, **settings}
        worker = Worker(name, broker or self.broker, self.store.url, self._directory / f"{name}.log",
                        ("-c", "1", *(() if "-Q" in options else ("-Q", "celery")), *options), settings)  # fmt: skip
        self.workers.append(worker)
        return worker.wait_ready()

    def settle_down(self, worker: Worker) -> None:
        """Let the worker end in order."""
        worker.signal(signal.SIGTERM)
        worker.wait(30)

    def close(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
        hang_up(self.app)
        self.app.close()

    def sig(self, task: str, *args: Any, **options: Any) -> Any:
        return self.app.signature(f"heard_app.{task}", args=args, options=options, app=self.app)

    def send(self, task: str, *args: Any, **options: Any) -> Any:
        """Send a task whose link_error is `heard`; returns its AsyncResult."""
        return self.sig(task, *args).apply_async(link_error=self.errback.clone(), **options)

    def send_in_chord(self, task: str, *args: Any, **options: Any) -> tuple[Any, Any]:
        """The same as a part of a chord whose other part succeeds. -> its AsyncResult, that of the chord's body."""
        part = self.sig(task, *args, **options)
        part.link_error(self.errback.clone())
        body = chord([self.sig("note", 1), part], app=self.app)(self.sig("joined"))
        return body.parent.results[1], body

    def tamper(self, queue: str, change: Callable[[dict[str, Any]], None], target: str = "celery") -> None:
        """Take a message out of a queue that no worker consumes, change it, and send it on."""
        with self.app.connection_for_write() as connection:
            channel = connection.default_channel
            message = eventually(lambda: channel.basic_get(queue, no_ack=True), 30, f"a message is in {queue}")
            fields = {"body": message.body, "content_type": message.content_type, "headers": message.headers,
                      "content_encoding": message.content_encoding}  # fmt: skip
            change(fields)
            fields["properties"] = {k: v for k, v in message.properties.items() if not k.startswith("pg_")}
            prepared = channel.prepare_message(fields.pop("body"), **fields)
            channel.basic_publish(prepared, exchange="", routing_key=target)

    def redeliver(self, queue: str) -> None:
        """Let the next message of a queue that no worker consumes come to the worker as one that came back."""
        with self.app.connection_for_write() as connection:
            eventually(lambda: connection.default_channel.basic_get(queue), 30).requeue()
        self.app.control.add_consumer(queue, reply=True, timeout=10, limit=1)

    def declare(self, name: str) -> None:
        with self.app.connection_for_write() as connection:
            self.app.amqp.queues[name].bind(connection.default_channel).declare()

    def pause(self, *names: str) -> None:
        """Let nobody claim from these queues."""
        self.store.execute("UPDATE kombu_pg.queue SET paused = true WHERE name = ANY (%s)", (list(names),))

    # What became of it

    def end(self, result: Any) -> tuple[str, Any]:
        """State and result of a task that has come to its end."""
        eventually(result.ready, 30, f"{result.id} has ended")
        return result.state, result.result

    def heard(self, task_id: str) -> int:
        """How often the errback of that task has run."""
        return int(self.store.value("SELECT count(*) FROM effect WHERE phase = %s", (f"heard {task_id}",)))

    def runs(self, task_id: str, phase: str = "start") -> int:
        return int(self.store.value("SELECT count(*) FROM effect WHERE task_id = %s AND phase = %s", (task_id, phase)))

    def letters(self, task_id: str) -> list[tuple[str, bool]]:
        """Reason, and whether it was heard of, of the task's dead letters."""
        return self.store.execute(
            "SELECT reason, heard_at IS NOT NULL FROM kombu_pg.dead_letter WHERE task_id = %s", (task_id,)
        )

    def letter(self, task_id: str) -> str:
        """The reason of the task's only dead letter, which was heard of."""
        eventually(lambda: self.letters(task_id) and all(heard for _, heard in self.letters(task_id)), 30)
        ((reason, _),) = self.letters(task_id)
        return str(reason)

    def is_gone(self, task_id: str) -> bool:
        """No message of the task is left."""
        return not self.store.value("SELECT count(*) FROM kombu_pg.message WHERE task_id = %s", (task_id,))

    def settle(self, *task_ids: str) -> None:
        """Wait until the messages of these tasks are gone, and until whatever was sent before has run."""
        eventually(lambda: all(map(self.is_gone, task_ids)), 30, "the messages are gone")
        assert self.end(self.send("note")) == ("SUCCESS", [])


@contextlib.contextmanager
def lab(server_url: str, worker_id: str, directory: Path, **settings: Any) -> Iterator[Lab]:
    with own_database(server_url, "lab", worker_id) as url:
        laboratory = Lab(url, directory, **settings)
        try:
            yield laboratory
        finally:
            laboratory.close()
