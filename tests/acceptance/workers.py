"""How does a test run real workers, lose them, and learn what they did?"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import psycopg2
from acceptance.acceptance_app import BROKER, EFFECTS, SETTINGS
from celery import Celery

__all__ = ["Store", "Worker", "answers", "assert_works", "eventually", "hang_up", "sender", "worker_environment"]

T = TypeVar("T")
HERE = Path(__file__).parent
START = 60.0
OURS = "datname = current_database() AND application_name = 'kombu_pg'"


def eventually(condition: Callable[[], T], within: float, what: str = "") -> T:
    """Return the first true value of the condition; fail when it has none within so many seconds."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within:g} s: {what or condition}"
        time.sleep(0.02)
    return value


class Store:
    """The database under test, seen from outside."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.execute(
            "CREATE TABLE IF NOT EXISTS effect (id bigserial, at timestamptz DEFAULT clock_timestamp(), task_id text,"
            " task text, phase text, pid integer, parent integer, redelivered boolean, late double precision)"
        )

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run a statement on a session of its own, which is closed afterwards."""
        with contextlib.closing(psycopg2.connect(self.url, application_name="test")) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement, parameters or None)
                return cursor.fetchall() if cursor.description else []

    def value(self, statement: str, parameters: Sequence[Any] = ()) -> Any:
        return self.execute(statement, parameters)[0][0]

    def started(self) -> list[str]:
        """Ids of the tasks that were begun, once for each time."""
        return [row[0] for row in self.execute("SELECT task_id FROM effect WHERE phase = 'start' ORDER BY id")]

    def ended(self) -> list[str]:
        """Ids of the tasks that came to their end, once for each time."""
        return [row[0] for row in self.execute("SELECT task_id FROM effect WHERE phase = 'end' ORDER BY id")]

    def messages(self) -> int:
        """How many task messages are in the store, wherever they stand."""
        return int(self.value("SELECT count(*) FROM kombu_pg.message WHERE task IS NOT NULL"))

    def ready(self) -> int:
        return int(self.value("SELECT count(*) FROM kombu_pg.ready r JOIN kombu_pg.message m ON m.id = r.message_id"))

    def unacked(self) -> int:
        return int(self.value("SELECT count(*) FROM kombu_pg.task_message WHERE state = 'unacked'"))

    def returns(self) -> list[int]:
        """The counts of returns of all messages."""
        return [row[0] for row in self.execute("SELECT returns FROM kombu_pg.message ORDER BY id")]

    def sessions(self) -> set[int]:
        """The server processes that the transport's connections have now."""
        return {row[0] for row in self.execute(f"SELECT pid FROM pg_stat_activity WHERE {OURS}")}

    def terminate(self, sessions: set[int]) -> None:
        """End these sessions; they are gone when this returns."""
        self.execute("SELECT pg_terminate_backend(pid, 5000) FROM unnest(%s) AS pid", (list(sessions),))


class Worker:
    """A `celery worker` in a process group of its own, with a log."""

    def __init__(self, name: str, broker: str, effects: str, log: Path, options: Sequence[str], settings: dict) -> None:
        self.name = f"{name}@test"
        self.log = log
        self._command = worker_command(self.name, options)
        self._environment = worker_environment(broker, effects, settings)
        self.start()

    def start(self) -> None:
        """Start it; again, if it has ended."""
        with self.log.open("ab") as out:
            self._seen = out.tell()
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=HERE,
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def children(self) -> list[int]:
        try:
            return [child.pid for child in psutil.Process(self.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def output(self) -> str:
        """What it has logged since it was last started."""
        return self.log.read_bytes()[self._seen :].decode(errors="replace")

    def wait_ready(self) -> "Worker":
        eventually(lambda: " ready." in self.output() or not self.alive, START, f"{self.name} is ready: see {self.log}")
        assert self.alive, self.output()
        return self

    def signal(self, number: int) -> None:
        """Send it to the main process."""
        os.kill(self.pid, number)

    def signal_all(self, number: int) -> None:
        """Send it to the main process and to every child, as a machine that dies or sleeps does."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """The whole group is gone when this returns, without a word."""
        with contextlib.suppress(ProcessLookupError):
            self.signal_all(signal.SIGKILL)
        self.process.wait(10)

    def wait(self, within: float) -> int:
        """Its exit code."""
        return self.process.wait(within)


def worker_command(name: str, options: Sequence[str]) -> list[str]:
    return [
        sys.executable, "-m", "celery", "-A", "acceptance_app", "worker", "-n", name, "-l", "INFO", *options,
    ]  # fmt: skip


def worker_environment(broker: str, effects: str, settings: dict[str, Any]) -> dict[str, str]:
    effects += ("&" if "?" in effects else "?") + "application_name=effects"
    variables = {BROKER: broker, EFFECTS: effects, SETTINGS: json.dumps(settings), "PYTHONWARNINGS": "ignore"}
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **variables, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def sender(broker: str) -> Iterator[Celery]:
    """An app to send and control with; afterwards its connections are closed."""
    app = Celery("acceptance", broker=broker, set_as_current=False)
    app.conf.task_ignore_result = True
    try:
        yield app
    finally:
        hang_up(app)
        app.close()


def hang_up(app: Celery) -> None:
    """Close the app's connection in order; the pool's own way is to drop it, as if it were lost."""
    with app.pool.acquire(block=True) as connection:
        connection._close()


def assert_works(app: Celery, store: Store, worker: Worker, within: float = 15) -> None:
    """The worker takes tasks and answers control, without having been restarted."""
    assert worker.alive
    eventually(lambda: answers(app, worker), within, f"{worker.name} answers")
    app.control.add_consumer("only-here", destination=[worker.name], reply=True, timeout=5, limit=1)
    sent = app.send_task("acceptance_app.note", queue="only-here").id
    eventually(lambda: sent in store.ended(), within, f"{worker.name} runs tasks")


def answers(app: Celery, worker: Worker) -> Any:
    """What it replied to a ping; false if it did not."""
    with app.connection_for_write() as connection:
        return app.control.broadcast(
            "ping", destination=[worker.name], reply=True, timeout=2, limit=1, connection=connection
        )
