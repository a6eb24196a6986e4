"""How does kombu drive us?"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from amqp import exceptions as amqp
from kombu.transport import base
from kombu.utils.url import parse_url

from kombu_pg import errors, schema, transaction
from kombu_pg.channel import Channel
from kombu_pg.consumer import consumer_for
from kombu_pg.database import Database, Session, Statement, T, database_for, driver_version
from kombu_pg.delivery import Delivery
from kombu_pg.feed import Feed, Subscription
from kombu_pg.options import Options, from_components, join_password, redact, split_password
from kombu_pg.plugins import WORKERS, plugins
from kombu_pg.store import Caller, Outgoing, Row, Settlement, refused, store_for

__all__ = ["Connection", "Transport"]

logger = logging.getLogger(__name__)

#: Seconds after a publish from which on the next one of the connection may be pushed: of a burst, the consumer claims
#: many at once, which costs less than to push one by one.
PUSH_PAUSE = 0.0005
_NOTIFICATIONS_FULL = "54000"
_SOME_QUEUE = 0  # which one is not known
_NO_ROUTE = "no route"
_WORKER = "celery.worker.worker"


class Connection:
    """What kombu calls a connection: channels that share a place in the store.

    Sessions are borrowed from the process's pool for single statements; only consuming takes one for itself.
    """

    def __init__(self, client: Any, database: Database) -> None:
        self.client = client
        self.options = database.options
        self.store = store_for(database.options)
        self.consumer = consumer_for(database, self.store)
        self.token = self.consumer.open_token()
        self.connected = True
        self.channels: list[Channel] = []
        self._channel_ids = itertools.count(1)
        self._database = database
        self._delivery: Delivery | None = None
        self._loose = Settlement()
        self._hub: Any = None
        self._pid = os.getpid()
        self._published_at = 0.0
        database.retain()

    def channel(self) -> Channel:
        channel = Channel(self, next(self._channel_ids))
        self.channels.append(channel)
        return channel

    @property
    def database(self) -> Database:
        return self._database

    def attach(self) -> None:
        """Make this process a consumer; blocks for the first connection of the process, then returns at once."""
        self.consumer.attach(self.token)

    def delivery(self) -> Delivery:
        """The pump of this connection, made on first use."""
        if self._delivery is None:
            self.attach()
            self._delivery = Delivery(self._database, self.store, self.consumer, self.token)
            if self._hub is not None:
                self._delivery.register(self._hub)
        return self._delivery

    @property
    def _epoch(self) -> str | None:
        return None if self._delivery is None else self._delivery.epoch

    def caller(self) -> Caller:
        return self.consumer.caller(self.token)

    def run(self, statement: Statement[T]) -> T:
        """Run a statement after everything that was settled before it on this connection."""
        if not self.connected:
            raise amqp.RecoverableConnectionError("this connection is closed")
        if self._delivery is not None:
            self._delivery.flush()
        return self._database.run(statement, timeout=None)

    def publish(self, message: Outgoing, timeout: float | None) -> tuple[list[int], str | None]:
        """Store the message, in this thread's transaction if one is open. -> (queue ids, refusal)."""
        if not self.connected:
            raise amqp.RecoverableConnectionError("this connection is closed")
        opened = transaction.current(self._database)
        if opened is not None:
            return opened.enqueue(message)
        push = message.is_plain and time.monotonic() - self._published_at > PUSH_PAUSE
        with self._database.session() as session:
            self._publish(session, message, push, timeout)
            self._published_at = time.monotonic()
            refusal = None
            for notice in session.take_notices():
                said = refused(notice)
                if said is None:
                    self._heed(notice, message)
                refusal = said or refusal
            if refusal is None:
                return [_SOME_QUEUE], None
            return [], None if refusal == _NO_ROUTE else refusal

    def _publish(self, session: Session, message: Outgoing, push: bool, timeout: float | None) -> None:
        began = time.monotonic()
        try:
            session.run(self.store.publish(message, push=push), timeout)
        except errors.Rejected as exc:
            if getattr(exc.__cause__, "pgcode", None) != _NOTIFICATIONS_FULL:
                raise
            if push:
                # The notification was perhaps in the message's own transaction: a second attempt can tell, unless the
                # first one's message has been consumed already.
                self._publish(session, replace(message, retry_age=time.monotonic() - began), False, timeout)
                return
            # Only the second transaction notifies: the first, with the message, is committed, perhaps not flushed.
            if message.persistent:
                session.run(self.store.flush(), timeout)
            logger.warning("the message is stored, but idle consumers were not told: %s", exc)

    def publish_batch(self, messages: list[Outgoing]) -> tuple[int, str | None]:
        """Store all messages or none. -> (how many, or the index of the refused one; refusal).

        In an open transaction those before a refused one are stored if it is committed all the same.
        """
        if not self.connected:
            raise amqp.RecoverableConnectionError("this connection is closed")
        opened = transaction.current(self._database)
        if opened is not None:
            for index, message in enumerate(messages):
                queue_ids, refusal = opened.enqueue(message)
                if refusal is not None or (message.mandatory and not queue_ids):
                    return index, refusal or "no route"
            return len(messages), None
        with self._database.session() as session:
            answer = session.run(self.store.publish_batch(messages), timeout=None)
            for notice in session.take_notices():
                self._heed(notice, messages[0])
            return answer

    def _heed(self, notice: str, message: Outgoing) -> None:
        if "synchron" in notice:
            raise errors.Unavailable(f"the message is on the primary, but perhaps on no standby: {notice.strip()}")
        logger.warning("while publishing to %r: %s", message.routing_key, notice.strip())

    def settle(self, feed: Feed, subscription: Subscription | None, row: Row, what: str | None) -> None:
        """Note what was decided about a message (None: the store knows already).

        Over a lost connection, the consumer's thread tells the store.
        """
        if self.connected and self._delivery is not None:
            self._delivery.settle(feed, subscription, row, what)
            return
        decided = Settlement() if what is None else Settlement(**{what: [row.id]})
        if self.connected:
            self.consumer.let_go(row.id)
            decided.leases.append(row.lease_id)
            self._loose.add(decided)
        else:
            # In this order: what is neither held nor about to be settled is given back.
            self.consumer.settle_late(decided, self._epoch)
            self.consumer.let_go(row.id)

    def settled(self) -> None:
        """Send what was noted, as soon as that is possible without waiting for a consumer's loop."""
        if self._loose:
            loose, self._loose = self._loose, Settlement()
            if self.connected and self.consumer.id is not None:
                try:
                    self.run(self.store.settle(self.consumer.id, loose))
                except errors.Unavailable as exc:
                    logger.warning("what was settled is sent once more, when the server is back: %s", exc)
                    self.consumer.settle_late(loose, self._epoch)
            else:
                self.consumer.settle_late(loose, self._epoch)
        elif self._delivery is not None and self.connected:
            self._delivery.settled_outside_a_loop()

    def register(self, hub: Any) -> None:
        self._hub = hub
        if self._delivery is not None:
            self._delivery.register(hub)

    def drain_events(self, timeout: float | None = None) -> None:
        """Deliver what there is; wait if there is nothing. Raises socket.timeout where nothing came in time."""
        if not self.connected:
            raise amqp.RecoverableConnectionError("this connection is closed")
        if self._delivery is None:
            time.sleep(timeout or 0)
            raise TimeoutError("this connection consumes nothing")
        self._delivery.drain(timeout)

    def close_channel(self, channel: Channel) -> None:
        if channel in self.channels:
            self.channels.remove(channel)
        if not self.connected or self._is_inherited():
            return
        if self._delivery is not None:
            for tag in list(channel.feed.subscriptions):
                self._delivery.unsubscribe(channel.feed, tag)
                if self.consumer.id is not None:
                    self.run(self.store.unsubscribe(self.consumer.id, self.token, tag))
        channel.abandon_unacked()
        if self._delivery is not None:
            self._delivery.flush()

    def close(self) -> None:
        """Close in order: what is unacked goes back, exclusive queues go. Blocks; may be called twice."""
        if self._is_inherited():
            self.collect()
        if not self.connected:
            return
        try:
            for channel in list(self.channels):
                channel.close()
            if self.consumer.is_attached(self.token) and self.consumer.id is not None:
                self.run(self.store.close_connection(self.consumer.id, self.token))
        except (errors.Unavailable, OSError) as exc:
            logger.warning("the connection was lost while it was closed: %s", exc)
            self.collect()
            return
        self.connected = False
        if self._delivery is not None:
            self._delivery.close()
        self.consumer.detach(self.token)
        self._database.release()

    def collect(self) -> None:
        """Drop the connection without a word to the server: it is lost, or this is a forked child.

        Tasks that run go on; their acks are sent over another session, and what no task holds is given back.
        """
        if not self.connected:
            return
        self.connected = False
        if self._is_inherited():
            return
        if self._delivery is not None:
            settlement = self._delivery.hand_over()
            self._delivery.close()
            if settlement:
                self.consumer.settle_late(settlement, self._epoch)
        self.consumer.drop_token(self.token)
        self._database.release()

    def _is_inherited(self) -> bool:
        """This is a forked child: the session, and what it holds, are the parent's."""
        return self._pid != os.getpid()


class Management(base.Management):
    """What `celery list bindings` asks."""

    def get_bindings(self) -> list[dict[str, str]]:
        bindings = self.transport.client.default_channel.get_bindings()
        return [{"source": source, "routing_key": key, "destination": queue} for source, key, queue in bindings]


class Transport(base.Transport):
    """kombu's way in: `pg://`, `postgresql://`, `postgres://`, `pg+embedded://`."""

    Management = Management

    #: kombu's own parser knows neither libpq's parameters nor several hosts.
    can_parse_url = True

    #: Neither 'amqp' (Celery would declare quorum queues) nor 'redis' (events by fanout) nor 'sql' (no events at all).
    driver_type = "postgresql"
    driver_name = "psycopg2"

    connection_errors = (errors.Unavailable, amqp.ConnectionError, OSError)
    channel_errors = (amqp.ChannelError,)
    # Not given, kombu would retry every error, and give up at the second.
    recoverable_connection_errors = (errors.Unavailable, amqp.RecoverableConnectionError, OSError)
    recoverable_channel_errors = (amqp.RecoverableChannelError,)

    implements = base.Transport.implements.extend(asynchronous=True, batch_publish=True, heartbeats=False)

    def __init__(self, client: Any, **_: Any) -> None:
        self.client = client
        if client.hostname and "://" in client.hostname:
            # kombu shows the hostname (inspect stats, repr) and hides the password.
            client.hostname, password = split_password(client.hostname)
            client.password = password or client.password
        if client.alt and not isinstance(client.cycle, _Alternates):
            client.cycle = _Alternates(client.cycle)
        self._open_to_workers()

    def _open_to_workers(self) -> None:
        """Let Celery's workers mingle over this transport, gossip where the option says so, and be wrapped by plug-ins.

        Class attributes of theirs decide, and nothing is called that could be asked; but they make the transport inside
        their check.
        """
        for module, step, wanted in _worker_steps():
            if module in sys.modules and wanted(self):
                getattr(sys.modules[module], step).compatible_transports.add(self.driver_type)
        if _WORKER in sys.modules:
            for install in plugins(WORKERS):
                install()

    def wants_gossip(self) -> bool:
        try:
            return self.options().gossip
        except errors.OptionError:
            return False  # said when it connects

    def establish_connection(self) -> Connection:
        """Connect and check the schema, which is installed where the database is empty.

        Raises:
            Unavailable: the server cannot be reached, or refuses for now.
            SchemaError, OptionError: somebody must act.
        """
        options = self.options()
        database = database_for(options)
        connection = Connection(self.client, database)
        try:
            with database.session() as session:
                schema.check(session, options)
        except BaseException:
            connection.collect()
            raise
        return connection

    def options(self) -> Options:
        """What this connection's URL and transport options say; nothing is connected for that."""
        client = self.client
        password = client.password() if callable(client.password) else client.password
        if "://" in (client.hostname or ""):
            url = client.hostname
        else:
            url = self._alternate() or from_components(
                client.hostname, client.port, client.userid, password, client.virtual_host
            )
        return Options.parse(
            url, client.transport_options, password=password, connect_timeout=client.connect_timeout or None
        )

    def _alternate(self) -> str | None:
        """The URL of the `;` list that kombu has switched to: it hands over only parts of it."""
        client = self.client
        now = (client.hostname, client.port, client.userid, client.virtual_host)
        for url in client.alt or ():
            parts = parse_url(_without_query(url))
            if now == (parts["hostname"], parts["port"], parts["userid"], parts["virtual_host"]):
                return str(url)
        return None

    def create_channel(self, connection: Connection) -> Channel:
        return connection.channel()

    def close_connection(self, connection: Connection) -> None:
        connection.close()

    def _collect(self, connection: Connection | None) -> None:
        if connection is not None:
            connection.collect()

    def verify_connection(self, connection: Connection) -> bool:
        return connection.connected

    def drain_events(self, connection: Connection, timeout: float | None = None, **_: Any) -> None:
        connection.drain_events(timeout)

    def register_with_event_loop(self, connection: Connection, loop: Any) -> None:
        connection.register(loop)

    def qos_semantics_matches_spec(self, connection: Connection) -> bool:
        """False, as for RabbitMQ 3: basic.qos counts per channel only where it is global.

        So Celery sets one limit over all queues of a worker, and a later change (autoscale, pool_grow) holds at once.
        """
        return False

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        prefix = self.client.uri_prefix
        uri = join_password(uri, self.client.password) if include_password else redact(uri, mask)
        return f"{prefix}+{uri}" if prefix else uri

    def driver_version(self) -> str:
        return driver_version()

    @property
    def default_connection_params(self) -> dict[str, Any]:
        return {}


class _Alternates:
    """kombu's failover cycle without queries: it would pass them to itself as keyword arguments (TypeError)."""

    def __init__(self, urls: Iterator[str]) -> None:
        self._urls = urls

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return _without_query(next(self._urls))


def _without_query(url: str) -> str:
    return url.partition("?")[0]


def _worker_steps() -> Iterator[tuple[str, str, Callable[[Transport], bool]]]:
    yield "celery.worker.consumer.mingle", "Mingle", lambda _: True
    yield "celery.worker.consumer.gossip", "Gossip", Transport.wants_gossip
