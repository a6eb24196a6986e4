"""How does a test see the store from outside, consume from it, and wait for what happens there?"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import kombu
import psycopg2

import kombu_pg  # noqa: F401
from kombu_pg.database import Session
from kombu_pg.options import Options
from kombu_pg.schema import check
from kombu_pg.url import Url

__all__ = ["Consuming", "Store", "eventually", "process", "publish", "publisher", "rest", "seconds", "threads"]

T = TypeVar("T")


def eventually(condition: Callable[[], T], within: float = 10.0, what: str = "") -> T:
    """Return the first true value of the condition; fail when it has none within so many seconds."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within:g} s: {what or condition}"
        time.sleep(0.005)
    return value


def seconds(act: Callable[[], Any]) -> float:
    """How long it takes."""
    begun = time.monotonic()
    act()
    return time.monotonic() - begun


class Store:
    """A database of the tests' own, seen from outside."""

    def __init__(self, url: str) -> None:
        self.url = url

    def broker(self, **options: Any) -> str:
        """A pg:// URL. The safety poll is off unless the test says otherwise: nothing but a wake-up delivers."""
        given = {"poll_interval": 0, **options}
        parts = Url.cut(self.url)
        return str(replace(parts, start="pg://", query=parts.query + tuple(f"{k}={v}" for k, v in given.items())))

    def install(self, **options: Any) -> None:
        broker = Options.parse(self.broker(**options))
        with contextlib.closing(Session(broker.dsn, None)) as session:
            check(session, broker)

    @contextlib.contextmanager
    def session(self) -> Iterator[Any]:
        """A session in autocommit mode."""
        with contextlib.closing(psycopg2.connect(self.url, application_name="test")) as connection:
            connection.autocommit = True
            yield connection

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self.session() as connection, connection.cursor() as cursor:
            cursor.execute(statement, parameters or None)
            return cursor.fetchall() if cursor.description else []

    def value(self, statement: str, parameters: Sequence[Any] = ()) -> Any:
        return self.execute(statement, parameters)[0][0]

    def idle(self, queue: str = "q") -> int:
        """How many sessions hold the idle lock of the queue."""
        return int(
            self.value(
                "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database,"
                " (SELECT kombu_pg.lock_key('idle', id) FROM kombu_pg.queue WHERE name = %s) AS k (key) "
                "WHERE d.datname = current_database() AND l.locktype = 'advisory' AND l.mode = 'ShareLock' "
                "AND l.granted AND l.classid = ((key >> 32) & 4294967295)::oid AND l.objid = (key & 4294967295)::oid",
                (queue,),
            )
        )


class Consuming:
    """A kombu consumer of one queue."""

    def __init__(self, broker: str, queue: str = "q", prefetch: int = 10) -> None:
        self.received: list[Any] = []
        self.connection = kombu.Connection(broker)
        self.channel = self.connection.channel()
        self.channel.basic_qos(0, prefetch, True)
        kombu.Queue(queue, channel=self.channel).declare()
        self._consumer = kombu.Consumer(self.channel, [kombu.Queue(queue)], on_message=self._receive)
        self._consumer.consume()

    def __enter__(self) -> "Consuming":
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def _receive(self, message: Any) -> None:
        self.received.append(message)

    def work_with(self, callback: Callable[[Any], None]) -> None:
        """From now on the callback gets the messages."""
        self._consumer.on_message = callback

    @property
    def bodies(self) -> list[Any]:
        return [message.payload for message in self.received]

    def until(self, count: int, within: float = 5.0) -> list[Any]:
        """Consume until so many messages have been received; returns their bodies."""
        deadline = time.monotonic() + within
        while len(self.received) < count:
            left = deadline - time.monotonic()
            assert left > 0, f"{len(self.received)} of {count} messages within {within:g} s"
            with contextlib.suppress(TimeoutError):
                self.connection.drain_events(timeout=left)
        return self.bodies

    def rest(self, quiet: float = 0.2) -> list[Any]:
        """Consume until nothing has come for so many seconds; then this consumer is idle."""
        rest(self.connection, quiet)
        return self.bodies

    def work_for(self, seconds: float) -> None:
        """Consume for so long, however much comes."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                self.connection.drain_events(timeout=left)

    def ack(self) -> None:
        for message in self.received:
            if not message.acknowledged:
                message.ack()


def rest(connection: kombu.Connection, quiet: float = 0.2) -> None:
    """Consume until nothing has come for so many seconds."""
    with contextlib.suppress(TimeoutError):
        while True:
            connection.drain_events(timeout=quiet)


@contextlib.contextmanager
def threads(work: Callable[[int, Callable[[], bool]], None], count: int) -> Iterator[None]:
    """Threads that run work(number, is_over) beside the block; at its end is_over says so, and they are waited for."""
    over = threading.Event()
    running = [threading.Thread(target=work, args=(number, over.is_set)) for number in range(count)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in running:
            thread.join()


@contextlib.contextmanager
def publisher(broker: str) -> Iterator[kombu.Producer]:
    with kombu.Connection(broker) as connection:
        yield kombu.Producer(connection.channel())


def publish(broker: str, *bodies: Any, queue: str = "q", **properties: Any) -> None:
    """Send each body to the queue."""
    with publisher(broker) as producer:
        for body in bodies:
            producer.publish(body, routing_key=queue, **properties)


@contextlib.contextmanager
def process(program, *arguments):
    """A Python process with the names of this module; it is killed afterwards."""
    command = [sys.executable, "-c", "import sys, time; from watching import *; " + program, *arguments]
    path = os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        try:
            yield running
        finally:
            running.kill()
