"""Two brokers to run the same case on: ours, and RabbitMQ as the oracle."""

import contextlib
import functools
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import kombu
import psycopg2
import pytest
from amqp.exceptions import NotFound

AMQP_URL = os.environ.get("CELERY_PG_TEST_AMQP_URL", "amqp://guest:guest@127.0.0.1:5672//")
PATIENCE = 20.0


class Broker:
    """One of the two, with whatever a case opened and declared on it."""

    def __init__(self, url: str, database: str | None = None) -> None:
        self.url = url
        self.database = database
        self._connections: list[kombu.Connection] = []
        self._names: list[str] = []

    @functools.cached_property
    def channel(self) -> Any:
        return self.connect().channel()

    def connect(self, **options: Any) -> kombu.Connection:
        # RabbitMQ says what became of a message only if it is asked to confirm.
        connection = kombu.Connection(self.url, transport_options={"confirm_publish": True, **options})
        self._connections.append(connection)
        return connection

    def name(self) -> str:
        self._names.append(f"semantics.{uuid.uuid4().hex}")
        return self._names[-1]

    def queue(self, **declaration: Any) -> str:
        name: str = declaration.setdefault("queue", self.name())
        self._names.append(name)
        self.channel.queue_declare(**{"auto_delete": False, **declaration})
        return name

    def exchange(self, kind: str, **declaration: Any) -> str:
        name = self.name()
        self.channel.exchange_declare(name, kind, **{"auto_delete": False, **declaration})
        return name

    def bound(self, exchange: str, *keys: str) -> str:
        queue = self.queue()
        for key in keys:
            self.channel.queue_bind(queue, exchange, key)
        return queue

    def query(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        assert self.database is not None
        with contextlib.closing(psycopg2.connect(self.database)) as connection, connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            rows = cursor.fetchall()
            connection.commit()
            return rows

    def let_expire(self, queue: str) -> None:
        """The messages of the queue that live for less than half an hour are past it."""
        if self.database is None:
            eventually(lambda: ready(self.channel, queue) == 0)
        else:
            self.query("UPDATE kombu_pg.message SET expires_at = expires_at - interval '30 minutes' RETURNING id")

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        with kombu.Connection(self.url) as connection:
            for name in self._names:
                connection.default_channel.queue_delete(name)
                connection.default_channel.exchange_delete(name)
        if self.database is not None:
            self.query("DELETE FROM kombu_pg.dead_letter RETURNING id")


@pytest.fixture(scope="session")
def rabbitmq() -> str:
    try:
        with kombu.Connection(AMQP_URL, connect_timeout=5) as connection:
            connection.connect()
    except OSError as exc:
        reason = f"no RabbitMQ at {AMQP_URL} ({exc}): set CELERY_PG_TEST_AMQP_URL"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return AMQP_URL


@pytest.fixture
def pg(schema_url: str) -> Iterator[Broker]:
    with contextlib.closing(Broker("pg://" + schema_url.partition("://")[2], schema_url)) as broker:
        yield broker


@pytest.fixture
def amqp(rabbitmq: str) -> Iterator[Broker]:
    with contextlib.closing(Broker(rabbitmq)) as broker:
        yield broker


@pytest.fixture(params=["pg", "amqp"])
def broker(request: pytest.FixtureRequest) -> Broker:
    found: Broker = request.getfixturevalue(request.param)
    return found


class Inbox(list[Any]):
    """What one consumer was given."""

    def __init__(self, channel: Any, queue: str, **options: Any) -> None:
        self._channel = channel
        self.on_message: Callable[[Any], None] = self.append
        self.tag = channel.basic_consume(queue, callback=self._receive, consumer_tag=uuid.uuid4().hex, **options)

    def _receive(self, raw: Any) -> None:
        self.on_message(self._channel.message_to_python(raw))

    def bodies(self) -> list[Any]:
        return [message.body for message in self]

    def wait(self, count: int) -> list[Any]:
        drain(self._channel, lambda: len(self) >= count)
        return self.bodies()

    def cancel(self) -> None:
        self._channel.basic_cancel(self.tag)


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.01)


def drain(channel: Any, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        channel.connection.client.drain_events(timeout=max(0.1, deadline - time.monotonic()))


def is_quiet(channel: Any) -> bool:
    try:
        channel.connection.client.drain_events(timeout=0.2)
    except TimeoutError:
        return True
    return False


def send(channel: Any, to: str, *bodies: Any, exchange: str = "", mandatory: bool = False, **message: Any) -> None:
    headers = message.pop("headers", None)
    priority = message.pop("priority", None)
    for body in bodies:
        encoding = "utf-8" if isinstance(body, str) else "binary"
        draft = channel.prepare_message(body, priority, None, encoding, headers, dict(message))
        channel.basic_publish(draft, exchange=exchange, routing_key=to, mandatory=mandatory)


def take(channel: Any, queue: str, *, no_ack: bool = False) -> Any:
    raw = channel.basic_get(queue, no_ack=no_ack)
    return None if raw is None else channel.message_to_python(raw)


def contents(channel: Any, queue: str) -> list[Any]:
    """Take everything out of the queue. Returns the bodies."""
    return [message.body for message in iter(lambda: take(channel, queue, no_ack=True), None)]


def ready(channel: Any, queue: str) -> int:
    return int(channel.queue_declare(queue, passive=True).message_count)


def consumers(channel: Any, queue: str) -> int:
    return int(channel.queue_declare(queue, passive=True).consumer_count)


def exists(channel: Any, queue: str) -> bool:
    """Look without touching: a passive declaration would count as use."""
    returned: list[Any] = []
    channel.events["basic_return"].add(lambda *what: returned.append(what))
    send(channel, queue, "are you there?", mandatory=True)
    channel.events["basic_return"].clear()
    return not returned


def is_gone(channel: Any, queue: str) -> bool:
    try:
        channel.queue_declare(queue, passive=True)
    except NotFound:
        return True
    return False
