"""Who is measured, and what has survived when a publish of theirs returned?"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kombu
import psycopg2
from celery import Celery

from benchmarks.children import alone
from benchmarks.tasks import BUY
from celery_pg import publish_in
from kombu_pg.url import Url, quoted

# Loaded before the first fork, or each measuring process would load them again.
for _transport in ("pyamqp", "redis", "sqlalchemy"):
    with contextlib.suppress(ImportError):
        importlib.import_module(f"kombu.transport.{_transport}")
importlib.import_module("kombu_pg.transport")

__all__ = ["BODY", "PEERS", "Kombu", "Ours", "Peer", "Servers", "every_peer", "is_local"]

#: What every publish row sends: 1 KB, drawn once.
BODY = os.urandom(1024)
#: What our transport keeps beside such a body; the floor stores as many bytes.
PROPERTIES = b'{"h":{},"p":{"delivery_mode":2,"priority":0},"t":"application/octet-stream","e":"binary"}'

PEERS = (
    "pg", "pg-flushed", "pg-plain", "bare", "bare-rows", "rabbitmq", "rabbitmq-unconfirmed", "redis", "redis-always",
    "sqla",
)  # fmt: skip
#: Those on one PostgreSQL.
_ON_POSTGRES = frozenset({"pg", "pg-flushed", "pg-plain", "bare", "bare-rows", "sqla"})
ALL_ROWS = frozenset({"publish", "publish16", "consume", "latency", "apply_async", "worker", "cpu"})
PUBLISHING = frozenset({"publish", "publish16", "cpu"})
#: Rows that begin with a transaction of somebody's own.
OWN_TRANSACTION = frozenset({"transaction", "transaction16"})
#: Rows that keep results, and those of them that need a backend's chords.
RESULTS = frozenset({"get", "group500", "worker-results"})
CHORDS = frozenset({"chord200"})
#: Rows of ours beside ours.
OURS_ALONE = frozenset({"parts10000", "atomic", "atomic-write"})
_SETTINGS = (
    "server_version fsync synchronous_commit full_page_writes wal_sync_method wal_level commit_delay "
    "shared_buffers max_wal_size"
).split()
#: kombu 5.7 notes in one set for the whole database when the bindings of expiring queues may go.
_DEADLINES = "_kombu.binding_deadlines"
_FLOOR = """
CREATE TABLE IF NOT EXISTS bench_floor (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    queue text NOT NULL,
    enqueued_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    properties bytea NOT NULL,
    body bytea NOT NULL
)
"""

#: As migration 0001 has them.
_FLOOR_ROWS = """
CREATE SEQUENCE IF NOT EXISTS bench_message_id;
CREATE TABLE IF NOT EXISTS bench_message (
    id bigint PRIMARY KEY, queue_id bigint NOT NULL, enqueued_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz, publish_id uuid, returns integer NOT NULL DEFAULT 0, priority smallint NOT NULL,
    band smallint NOT NULL, task text, task_id text, reply_to text, exchange text NOT NULL, routing_key text NOT NULL,
    deaths jsonb, properties bytea NOT NULL, body bytea NOT NULL
);
CREATE INDEX IF NOT EXISTS bench_message_expires ON bench_message (expires_at, id) WHERE expires_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS bench_ready (
    queue_id bigint NOT NULL, position bigint NOT NULL, message_id bigint NOT NULL, size integer NOT NULL,
    band smallint NOT NULL, PRIMARY KEY (queue_id, band, position)
)
"""

#: What a transaction of somebody's own writes besides.
_PURCHASE = "CREATE TABLE IF NOT EXISTS bench_purchase (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, what text)"

Send = Callable[[bytes], object]


@dataclass(frozen=True)
class Peer:
    """One way to keep a queue. Every method connects, and is called in a child process only."""

    name: str
    title: str
    #: What has survived a loss of power when a publish returned.
    durable: str
    url: str
    rows: frozenset[str] = ALL_ROWS
    #: Whether every publish is answered before the next; else `publisher` waits once, at its end.
    confirms: bool = True
    #: How long its consumer sleeps between two looks, where it polls.
    polls: float | None = None

    def server(self) -> dict[str, str]:
        """Return versions and settings of the server. Raises where it cannot be reached."""
        raise NotImplementedError

    def declare(self, queue: str) -> None:
        raise NotImplementedError

    def depth(self, queue: str) -> int:
        raise NotImplementedError

    def remove(self, queue: str) -> None:
        """Nothing of the queue is left."""
        raise NotImplementedError

    @contextlib.contextmanager
    def publisher(self, queue: str) -> Iterator[tuple[Send, Callable[[], object]]]:
        """Yield what sends one durable message, and what waits until all that was sent is answered."""
        raise NotImplementedError

    def buyer(self, queue: str) -> contextlib.AbstractContextManager[tuple[Send, Callable[[], object]]]:
        """Like `publisher`, but each message is sent in a transaction that has inserted a row before."""
        raise NotImplementedError

    def backends(self, application_name: str) -> list[int] | None:
        """Return the pids of the server's processes for this application; None where they are nobody's own."""
        return None

    def named(self, application_name: str) -> Peer:
        """Return the same peer, whose sessions carry a name."""
        return self


@dataclass(frozen=True)
class Kombu(Peer):
    """A transport of kombu, driven by kombu's own Producer and Consumer."""

    options: Mapping[str, Any] = field(default_factory=dict)
    #: Where results go; None: to `url`.
    results: str | None = None
    #: Whether it does without what the row is about.
    plain: bool = False

    def connect(self) -> kombu.Connection:
        return kombu.Connection(self.url, transport_options=dict(self.options), connect_timeout=5)

    def celery(self, queue: str) -> dict[str, Any]:
        """Return the settings of an app on this peer; everything it declares is named after the queue."""
        return {
            "broker_url": self.url,
            "broker_transport_options": dict(self.options),
            "task_default_queue": queue,
            "control_exchange": queue,
            "event_exchange": f"{queue}.ev",
        }

    def with_results(self, queue: str) -> dict[str, Any]:
        """Return the settings of an app that keeps results on this peer, too."""
        kept = {"task_ignore_result": False, "result_backend": self.results or self.url}
        return {**self.celery(queue), **kept, "result_backend_transport_options": {"global_keyprefix": f"{queue}."}}

    def forget(self, replies: str) -> None:
        """Nothing is left of results that a process with this id was sent and has not read."""

    def declare(self, queue: str) -> None:
        with self.connect() as connection:
            _queue(queue)(connection.channel()).declare()

    def depth(self, queue: str) -> int:
        with self.connect() as connection:
            return int(_queue(queue)(connection.channel()).queue_declare(passive=True).message_count)

    def remove(self, queue: str) -> None:
        with self.connect() as connection:
            _queue(queue)(connection.channel()).delete()

    @contextlib.contextmanager
    def publisher(self, queue: str) -> Iterator[tuple[Send, Callable[[], object]]]:
        with self.connect() as connection:
            channel = connection.channel()
            producer = kombu.Producer(channel, routing_key=queue, auto_declare=False)

            def send(body: bytes) -> object:
                return producer.publish(
                    body, delivery_mode=2, content_type="application/octet-stream", content_encoding="binary"
                )

            def answered() -> object:
                return None if self.confirms else _queue(queue)(channel).queue_declare(passive=True)

            yield send, answered


class RabbitMQ(Kombu):
    def remove(self, queue: str) -> None:
        super().remove(queue)
        with self.connect() as connection:
            # What Celery declared; the other peers' stores are dropped, or cleared key by key.
            for exchange in queue, f"{queue}.pidbox", f"reply.{queue}.pidbox", f"{queue}.ev":
                with contextlib.suppress(*connection.channel_errors):
                    kombu.Exchange(exchange, channel=connection.channel()).delete()

    def forget(self, replies: str) -> None:
        super().remove(replies)

    def server(self) -> dict[str, str]:
        with self.connect() as connection:
            properties = connection.connection.server_properties
            return {"server_version": properties["version"], "platform": properties["platform"]}


class Redis(Kombu):
    def server(self) -> dict[str, str]:
        with self.connect() as connection:
            client = connection.channel().client
            settings = {key: client.config_get(key)[key] for key in ("appendonly", "appendfsync", "save")}
            return {"server_version": client.info("server")["redis_version"], **settings}

    def remove(self, queue: str) -> None:
        with self.connect() as connection:
            client = connection.channel().client
            # Each key of ours carries the queue's or the run's name, those of bindings and of unacked too.
            for pattern in f"*{queue}*", self.options["unacked_key"] + "*":
                for key in client.scan_iter(match=pattern, count=1000):
                    client.delete(key)
            for member, _ in client.zscan_iter(_DEADLINES, match=f"*{queue}*"):
                client.zrem(_DEADLINES, member)


class Postgres:
    """What the three peers on one PostgreSQL have in common."""

    dsn: str

    def server(self) -> dict[str, str]:
        with contextlib.closing(psycopg2.connect(self.dsn)) as connection, connection.cursor() as cursor:
            cursor.execute(
                "SELECT name, setting || coalesce(unit, '') FROM pg_settings WHERE name = ANY (%s)", (_SETTINGS,)
            )
            return dict(cursor.fetchall())

    def backends(self, application_name: str) -> list[int] | None:
        with contextlib.closing(psycopg2.connect(self.dsn)) as connection, connection.cursor() as cursor:
            cursor.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s",
                (application_name,),
            )
            return [pid for (pid,) in cursor.fetchall()]


@dataclass(frozen=True)
class Ours(Postgres, Kombu):
    dsn: str = ""

    def declare(self, queue: str) -> None:
        super().declare(queue)
        with contextlib.closing(psycopg2.connect(self.dsn)) as connection, connection, connection.cursor() as cursor:
            cursor.execute(_PURCHASE)

    @contextlib.contextmanager
    def buyer(self, queue: str) -> Iterator[tuple[Send, Callable[[], object]]]:
        app = Celery(broker=self.url, set_as_current=False)
        with self.publisher(queue) as (publish, answered), contextlib.closing(psycopg2.connect(self.dsn)) as connection:

            def send(body: bytes) -> object:
                with connection, connection.cursor() as cursor:
                    cursor.execute(BUY)
                    with publish_in(connection, app):
                        return publish(body)

            yield send, answered

    def named(self, application_name: str) -> Ours:
        return replace(self, url=_named(self.url, application_name))


@dataclass(frozen=True)
class Sqla(Postgres, Kombu):
    dsn: str = ""

    def remove(self, queue: str) -> None:
        # Its queue_delete deletes nothing that another process has bound.
        with contextlib.closing(psycopg2.connect(self.dsn)) as connection, connection, connection.cursor() as cursor:
            cursor.execute("DELETE FROM kombu_message; DELETE FROM kombu_queue")

    def named(self, application_name: str) -> Sqla:
        return replace(self, url=_named(self.url, application_name))


@dataclass(frozen=True)
class Bare(Postgres, Peer):
    """psycopg2 and nothing else: what a commit of one row costs here."""

    dsn: str = ""
    tables = _FLOOR
    insert = "INSERT INTO bench_floor (queue, properties, body) VALUES (%s, %s, %s)"
    depth_of = "SELECT count(*) FROM bench_floor WHERE queue = %s"
    empty = "DELETE FROM bench_floor WHERE queue = %s"

    def named(self, application_name: str) -> Bare:
        return replace(self, url=_named(self.url, application_name))

    @contextlib.contextmanager
    def cursor(self) -> Iterator[Any]:
        with contextlib.closing(psycopg2.connect(self.url)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("SET synchronous_commit = on")
                yield cursor

    def declare(self, queue: str) -> None:
        with self.cursor() as cursor:
            cursor.execute(self.tables + ";" + _PURCHASE)

    def depth(self, queue: str) -> int:
        with self.cursor() as cursor:
            cursor.execute(self.depth_of, (queue,))
            return int(cursor.fetchone()[0])

    def remove(self, queue: str) -> None:
        with self.cursor() as cursor:
            cursor.execute(self.empty, (queue,))

    @contextlib.contextmanager
    def publisher(self, queue: str) -> Iterator[tuple[Send, Callable[[], object]]]:
        with self.cursor() as cursor:
            insert, binary = self.insert, psycopg2.Binary

            def send(body: bytes) -> object:
                return cursor.execute(insert, (queue, binary(PROPERTIES), binary(body)))

            yield send, lambda: None

    @contextlib.contextmanager
    def buyer(self, queue: str) -> Iterator[tuple[Send, Callable[[], object]]]:
        insert, binary = self.insert, psycopg2.Binary
        with contextlib.closing(psycopg2.connect(self.url)) as connection:

            def send(body: bytes) -> object:
                with connection, connection.cursor() as cursor:
                    cursor.execute(BUY)
                    return cursor.execute(insert, (queue, binary(PROPERTIES), binary(body)))

            yield send, lambda: None


@dataclass(frozen=True)
class BareRows(Bare):
    """The same for the two rows that a message is, with their columns and keys: one commit, one round trip."""

    tables = _FLOOR_ROWS
    insert = """
INSERT INTO bench_message (id, queue_id, publish_id, priority, band, exchange, routing_key, properties, body)
VALUES (nextval('bench_message_id'), 1, '9d6cbb1c8e2f4b0fa5cf6e2f5d0f3a7e', 0, 3, '', %s, %s, %s);
INSERT INTO bench_ready (queue_id, band, position, message_id, size)
VALUES (1, 3, currval('bench_message_id'), currval('bench_message_id'), 1112)
"""
    depth_of = "SELECT count(*) FROM bench_message JOIN bench_ready ON message_id = id WHERE routing_key = %s"
    empty = """
WITH gone AS (DELETE FROM bench_message WHERE routing_key = %s RETURNING id)
DELETE FROM bench_ready WHERE message_id IN (SELECT id FROM gone)
"""


@dataclass(frozen=True)
class Servers:
    """Where the servers are, as the caller said."""

    pg: str
    amqp: str
    redis: str
    #: In the name of everything this run creates.
    run: str


@contextlib.contextmanager
def every_peer(servers: Servers, wanted: frozenset[str]) -> Iterator[list[Peer]]:
    """Yield the peers that are wanted, on a database of this run and a Redis of this run; both are gone afterwards."""
    with contextlib.ExitStack() as stack:
        peers: list[Peer] = []
        if wanted & _ON_POSTGRES:
            peers += _on_postgres(stack.enter_context(_database(servers)))
        peers += _on_rabbitmq(servers.amqp)
        if "redis" in wanted:
            peers.append(
                _redis("redis", "Redis as it is", "nothing, unless its configuration says so", servers.redis, servers)
            )
        if "redis-always" in wanted and (always := stack.enter_context(_private_redis())):
            durable = "the message: its AOF is flushed before the answer"
            peers.append(_redis("redis-always", "Redis, appendfsync always", durable, always, servers))
        yield [peer for peer in peers if peer.name in wanted]


def _on_postgres(url: str) -> list[Peer]:
    parts = Url.cut(url)
    message = "the message: one commit, flushed"
    ours = str(replace(parts, start="pg://"))
    flushed = str(replace(parts, start="pg://", query=(*parts.query, "result_synchronous_commit=true")))
    rows = ALL_ROWS | OWN_TRANSACTION | RESULTS | CHORDS | OURS_ALONE
    return [
        Ours("pg", "celery-pg", message, ours, rows, dsn=url),
        Ours(
            "pg-flushed", "celery-pg, results flushed", f"{message}; a result, too", flushed,
            RESULTS | CHORDS | {"atomic", "atomic-write"}, plain=True, dsn=url,
        ),
        Ours("pg-plain", "celery-pg, plain", message, ours, OURS_ALONE, plain=True, dsn=url),
        Bare("bare", "bare INSERT", "the row: one commit, flushed", url, PUBLISHING | OWN_TRANSACTION, dsn=url),
        BareRows("bare-rows", "bare INSERTs, same rows", "the rows: one commit, flushed", url, PUBLISHING, dsn=url),
        # SQLAlchemy 2.1 takes psycopg 3 unless told: the same driver under all three.
        Sqla(
            "sqla", "kombu sqla", message, str(replace(parts, start="sqla+postgresql+psycopg2://")), polls=1.0, dsn=url
        ),
    ]  # fmt: skip


def _on_rabbitmq(url: str) -> list[Peer]:
    lost = "nothing is known: sent, not answered; flushed later"
    return [
        RabbitMQ(
            "rabbitmq", "RabbitMQ, confirmed", "the message: flushed before the confirm", url, ALL_ROWS | RESULTS,
            options={"confirm_publish": True}, results="rpc://",
        ),
        RabbitMQ(
            "rabbitmq-unconfirmed", "RabbitMQ, no confirms", lost, url,
            PUBLISHING | {"apply_async", "get", "group500"}, confirms=False, results="rpc://",
        ),
    ]  # fmt: skip


def _redis(name: str, title: str, durable: str, url: str, servers: Servers) -> Peer:
    prefix = f"{servers.run}.unacked"
    keys = {"unacked_key": prefix, "unacked_index_key": f"{prefix}_index", "unacked_mutex_key": f"{prefix}_mutex"}
    rows = ALL_ROWS | RESULTS | CHORDS if name == "redis" else ALL_ROWS
    return Redis(name, title, durable, url, rows, options=keys)


def _queue(name: str) -> kombu.Queue:
    return kombu.Queue(name, exchange=kombu.Exchange(""), routing_key=name, durable=True)


def _named(url: str, application_name: str) -> str:
    parts = Url.cut(url)
    return str(replace(parts, query=(*parts.query, f"application_name={quoted(application_name)}")))


@contextlib.contextmanager
def _database(servers: Servers) -> Iterator[str]:
    name = servers.run
    alone(_execute, servers.pg, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
    try:
        yield str(replace(Url.cut(servers.pg), path=f"/{name}"))
    finally:
        alone(_execute, servers.pg, f"DROP DATABASE {name} WITH (FORCE)")


def _execute(url: str, statement: str) -> None:
    with contextlib.closing(psycopg2.connect(url, connect_timeout=5)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)


@contextlib.contextmanager
def _private_redis() -> Iterator[str | None]:
    """Yield the URL of a Redis that flushes each write before it answers; None where none is installed."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="bench-redis-") as directory:
        settings = (
            f"--port {port} --bind 127.0.0.1 --appendonly yes --appendfsync always --auto-aof-rewrite-percentage 0"
        )
        server = subprocess.Popen(
            [program, *settings.split(), "--save", "", "--dir", directory],
            stdout=(Path(directory) / "log").open("wb"),
            start_new_session=True,
        )
        try:
            _wait_for_port(port, within=10)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
            server.wait(10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int, within: float) -> None:
    deadline = time.monotonic() + within
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def is_local(url: str) -> bool:
    """Whether the URL leads to this machine: only the loopback is measured."""
    host = urlsplit(url).hostname
    return host in (None, "localhost", "127.0.0.1", "::1")
