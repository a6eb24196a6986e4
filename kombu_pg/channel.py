"""What does each AMQP verb do?"""

from __future__ import annotations

import itertools
import json
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from amqp.exceptions import (
    AccessRefused,
    AMQPNotImplementedError,
    ChannelError,
    ConsumerCancelled,
    InvalidCommand,
    NotFound,
    PreconditionFailed,
    RecoverableConnectionError,
    ResourceLocked,
    error_for_code,
)
from amqp.protocol import queue_declare_ok_t
from kombu.transport import base

from kombu_pg import errors, routing
from kombu_pg import message as messages
from kombu_pg.delivery import BATCH_BYTES
from kombu_pg.feed import Feed, Subscription
from kombu_pg.message import LONGEST_TTL, Draft, Raw, checked_name, decode, encode
from kombu_pg.plugins import CONTROL, plugins
from kombu_pg.store import Claim, Outgoing, QueueDefinition, Row, Settlement

if TYPE_CHECKING:
    from kombu_pg.batch import PublishBatch
    from kombu_pg.transport import Connection

__all__ = ["Channel"]

_PURGE_BATCH = 10_000
_NO_ROUTE = 312
#: What the names of kombu's mailboxes end with, and those of the answers begin with.
_CONTROL, _REPLIES = ".pidbox", "reply."
_EXCHANGE_TYPES = ("direct", "topic", "fanout", "headers")
_MATCHES = ("all", "any", "all-with-x", "any-with-x")
_OVERFLOWS = ("drop-head", "reject-publish", "reject-publish-dlx")


class _Unacked:
    """A delivery that was not settled yet."""

    __slots__ = ("acked", "failed", "row", "subscription")

    def __init__(self, row: Row, subscription: Subscription | None) -> None:
        self.row = row
        self.subscription = subscription
        self.failed = False
        self.acked = "acked"


class Channel(base.StdChannel):
    """One AMQP channel. Publishing and declaring block for one round trip; settling never waits for the server."""

    Message = messages.Message

    def __init__(self, connection: Connection, channel_id: int) -> None:
        self.connection: Connection | None = connection
        #: Stays when the channel is closed: a late ack must still find its way.
        self.connection_of_messages = connection
        self.channel_id = channel_id
        self.no_ack_consumers: set[str] = set()
        self.events: defaultdict[str, set[Callable[..., None]]] = defaultdict(set)
        #: Whoever rejects a task here without requeueing it has recorded its end himself: nobody else need hear of it.
        self.records_rejected = False
        self.feed = Feed()
        self._prefetch = 0
        self._delivery_tags = itertools.count(1)
        self._consumer_tags = itertools.count(1)
        self._unacked: dict[int, _Unacked] = {}
        self._own_names = (f"amq.gen-{uuid.uuid4().hex}" for _ in itertools.count())

    # Exchanges

    def exchange_declare(
        self,
        exchange: str = "",
        type: str = "direct",  # noqa: A002 - kombu passes it by name
        durable: bool = False,
        auto_delete: bool = True,
        arguments: Mapping[str, Any] | None = None,
        nowait: bool = False,
        passive: bool = False,
        **_: Any,
    ) -> None:
        """The exchange exists. `passive` only looks.

        Raises:
            NotFound: passive, and it does not exist.
            PreconditionFailed: it exists with another type, durability or auto-delete flag.
            InvalidCommand: there is no such type.
            AccessRefused: it is the default exchange, or would be a new one whose name begins with "amq.".
        """
        name = _checked_exchange(exchange, (40, 10))
        if not passive and type not in _EXCHANGE_TYPES:
            raise InvalidCommand(f"exchange {name!r}: unknown exchange type {type!r}", (40, 10), reply_code=503)
        statement = self._store.declare_exchange(
            name,
            type,
            durable=bool(durable),
            auto_delete=bool(auto_delete),
            arguments=_packed(arguments),
            passive=passive,
        )
        self._raise(self._run(statement), f"exchange {name!r}", (40, 10))

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False, **_: Any) -> None:
        """The exchange and its bindings are gone, if they were there.

        Raises:
            PreconditionFailed: `if_unused`, and something is bound to it.
            AccessRefused: it is the default exchange, or its name begins with "amq.".
        """
        statement = self._store.delete_exchange(_checked_exchange(exchange, (40, 20)), if_unused=if_unused)
        self._raise(self._run(statement), f"exchange {exchange!r}", (40, 20))

    def exchange_bind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """What reaches the source exchange with this key reaches the destination exchange, too.

        Raises:
            NotFound: one of them does not exist.
            AccessRefused: one of them is the default exchange.
        """
        key = checked_name("routing key", routing_key)
        statement = self._store.bind_exchange(
            _checked_exchange(destination, (40, 30)), _checked_exchange(source, (40, 30)), key,
            routing.topic_pattern(key), _wanted_headers(source, arguments), _packed(arguments),
        )  # fmt: skip
        refusal = self._run(statement)
        self._raise(refusal, f"exchange {source if refusal == 'no exchange' else destination!r}", (40, 30))

    def exchange_unbind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """The binding is gone, if it was there.

        Raises:
            AccessRefused: one of them is the default exchange.
        """
        statement = self._store.unbind_exchange(
            _checked_exchange(destination, (40, 40)), _checked_exchange(source, (40, 40)),
            checked_name("routing key", routing_key), _packed(arguments),
        )  # fmt: skip
        self._run(statement)

    # Queues

    def prepare_queue_arguments(self, arguments: Mapping[str, Any], **options: Any) -> Mapping[str, Any]:
        return base.to_rabbitmq_queue_arguments(arguments, **options)  # type: ignore[no-any-return]

    def queue_declare(
        self,
        queue: str = "",
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = True,
        arguments: Mapping[str, Any] | None = None,
        nowait: bool = False,
        **_: Any,
    ) -> queue_declare_ok_t:
        """The queue exists; returns its name, ready messages and live consumers.

        The message count is exact where `passive`; otherwise it stops at 10,000.

        Raises:
            NotFound: passive, and it does not exist.
            ResourceLocked: it is exclusive to another, live connection.
            PreconditionFailed: it exists with other properties.
        """
        name = checked_name("queue", queue) or next(self._own_names)
        if exclusive and not passive:
            self._connection().attach()
        definition = _definition(name, durable, exclusive, auto_delete, arguments or {})
        declared = self._run(self._store.declare_queue(definition, self._caller(), passive=passive))
        self._raise(declared.refusal, f"queue {name!r}", (50, 10))
        return queue_declare_ok_t(name, declared.message_count, declared.consumer_count)

    def queue_bind(
        self,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Messages that are published to the exchange with this key reach the queue.

        Raises:
            NotFound: there is no such queue or exchange.
            AccessRefused: the default exchange cannot be bound to.
        """
        key = checked_name("routing key", routing_key)
        statement = self._store.bind_queue(
            checked_name("queue", queue), _checked_exchange(exchange, (50, 20)), key, routing.topic_pattern(key),
            _wanted_headers(exchange, arguments), _packed(arguments), self._caller(),
        )  # fmt: skip
        refusal = self._run(statement)
        what = f"exchange {exchange!r}" if refusal == "no exchange" else f"queue {queue!r}"
        self._raise(refusal, what, (50, 20))

    def queue_unbind(
        self,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        arguments: Mapping[str, Any] | None = None,
        nowait: bool = False,
        **_: Any,
    ) -> None:
        """The binding is gone, if it was there.

        Raises:
            ResourceLocked: the queue is exclusive to another, live connection.
            AccessRefused: the default exchange's bindings are its own.
        """
        statement = self._store.unbind_queue(
            checked_name("queue", queue), _checked_exchange(exchange, (50, 50)),
            checked_name("routing key", routing_key), _packed(arguments), self._caller(),
        )  # fmt: skip
        self._raise(self._run(statement), f"queue {queue!r}", (50, 50))

    def queue_purge(self, queue: str, nowait: bool = False, **_: Any) -> int:
        """Drop what waits in the queue, scheduled messages included; returns how many. Unacked messages stay.

        Raises:
            NotFound, ResourceLocked: as queue_declare.
        """
        queue_id, _ready = self._use(queue, (50, 30))
        purged = total = self._run(self._store.purge(queue_id, _PURGE_BATCH))
        while purged == _PURGE_BATCH:
            purged = self._run(self._store.purge(queue_id, _PURGE_BATCH))
            total += purged
        return int(total)

    def queue_delete(
        self, queue: str = "", if_unused: bool = False, if_empty: bool = False, nowait: bool = False, **_: Any
    ) -> int:
        """The queue is gone, with what waited in it; returns how many messages that were.

        Raises:
            PreconditionFailed: `if_unused` and it has a live consumer, or `if_empty` and something waits in it.
            ResourceLocked: it is exclusive to another, live connection.
        """
        name = checked_name("queue", queue)
        count, refusal = self._run(
            self._store.delete_queue(name, self._caller(), if_unused=if_unused, if_empty=if_empty)
        )
        self._raise(refusal, f"queue {queue!r}", (50, 40))
        return int(count)

    # Publish

    def prepare_message(
        self,
        body: str | bytes,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
    ) -> Draft:
        return Draft(
            body=body,
            priority=priority,
            content_type=content_type,
            content_encoding=content_encoding,
            headers=headers if headers is not None else {},
            properties=properties if properties is not None else {},
        )

    def basic_publish(
        self,
        message: Draft,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
        **_: Any,
    ) -> None:
        """The message is stored, durably unless delivery_mode is 1, and idle consumers know. Blocks for one round trip.

        A message that no queue gets is dropped, as AMQP says; unless it is `mandatory` (it comes back as a
        basic_return event), or a task sent to the default or a direct exchange: somebody waits for that.

        Raises:
            Unavailable: it is not known whether the message was stored. A retry of the same publish adds no second copy
                while the first is in the store.
            Rejected: the message can never be accepted.
            NotFound: there is no such exchange.
        """
        connection = self._connection()
        outgoing = encode(
            message, exchange, routing_key, mandatory=mandatory, max_size=connection.options.max_message_size
        )
        if exchange and exchange.endswith(_CONTROL) and not exchange.startswith(_REPLIES):
            for heed in plugins(CONTROL):
                heed(connection.database, message)
        queue_ids, refusal = connection.publish(outgoing, timeout or confirm_timeout)
        if refusal == "headers":
            # Only a headers exchange has to know them: every other publish is spared that.
            outgoing = replace(outgoing, headers=messages.routing_headers(message.headers))
            queue_ids, refusal = connection.publish(outgoing, timeout or confirm_timeout)
        self.raise_refusal(refusal, outgoing)
        if mandatory and not queue_ids:
            self._return(message, exchange, routing_key)

    def raise_refusal(self, refusal: str | None, message: Outgoing) -> None:
        """Raise what the store has answered to a publish; nothing if it took the message."""
        exchange, key = message.exchange, message.routing_key
        if refusal == "no exchange":
            self._raise(refusal, f"exchange {exchange!r}", (60, 40))
        elif refusal == "no queue":
            where = f"queue {key!r}" if not exchange else f"queue bound to exchange {exchange!r} with key {key!r}"
            raise errors.Rejected(
                f"task {message.task} would be lost: there is no {where}; start a worker for it or declare it"
            )
        elif refusal is not None:
            queue = refusal.partition(": ")[2]
            raise errors.Rejected(
                f"queue {queue!r} is full (x-max-length, x-overflow): consume from it, or raise the limit"
            )

    #: kombu's Producer.batch(): see `PublishBatch`.
    supports_batch_publish = True

    def create_publish_batch(self, max_size: int) -> PublishBatch:
        from kombu_pg.batch import PublishBatch  # not with kombu 5.6, which has neither batches nor their error

        return PublishBatch(self, max_size)

    def encode(self, message: Draft, exchange: str, routing_key: str, *, mandatory: bool) -> Outgoing:
        """The message as a row; every header is in it, for whatever exchange it meets."""
        limit = self._connection().options.max_message_size
        outgoing = encode(message, exchange, routing_key, mandatory=mandatory, max_size=limit)
        return replace(outgoing, headers=messages.routing_headers(message.headers) if exchange else None)

    def publish_many(self, batch: list[Outgoing]) -> None:
        """Store all of them in one transaction, or none.

        Raises:
            Unavailable, Rejected, NotFound: as basic_publish, and for a mandatory message that no queue gets.
        """
        done, refusal = self._connection().publish_batch(batch)
        if refusal == "no route":
            raise error_for_code(_NO_ROUTE, "NO_ROUTE", (60, 50), ChannelError)
        if refusal is not None:
            self.raise_refusal(refusal, batch[done])

    def _return(self, message: Draft, exchange: str, routing_key: str) -> None:
        exc = error_for_code(_NO_ROUTE, "NO_ROUTE", (60, 50), ChannelError)
        if not self.events["basic_return"]:
            raise exc
        for callback in list(self.events["basic_return"]):
            callback(exc, exchange, routing_key, message)

    # Consume

    def basic_qos(self, prefetch_size: int = 0, prefetch_count: int = 0, a_global: bool = False, **_: Any) -> None:
        """The most unacked messages: of the channel (`a_global`), or of each consumer begun later. 0 = no limit."""
        if a_global:
            self.feed.prefetch = prefetch_count
            self.feed.look_into(())  # there may be room now, without anything being settled
        else:
            self._prefetch = prefetch_count

    def basic_consume(
        self,
        queue: str = "",
        no_local: bool = False,
        no_ack: bool = False,
        exclusive: bool = False,
        nowait: bool = False,
        callback: Callable[[Raw], None] | None = None,
        arguments: Mapping[str, Any] | None = None,
        on_cancel: Callable[[str], None] | None = None,
        consumer_tag: str = "",
        **_: Any,
    ) -> str:
        """Messages of the queue go to `callback` from now on. Returns the consumer tag.

        When the queue is deleted, `on_cancel` is called with the tag, or else whoever waits for messages gets
        ConsumerCancelled: kombu and Celery then connect and declare again.

        Raises:
            NotFound, ResourceLocked: as queue_declare.
        """
        connection = self._connection()
        delivery = connection.delivery()
        tag = consumer_tag or f"ctag{self.channel_id}.{next(self._consumer_tags)}"
        queue_id, refusal = self._run(self._store.subscribe(checked_name("queue", queue), tag, self._caller()))
        self._raise(refusal, f"queue {queue!r}", (60, 20))

        def deliver(row: Row, subscription: Subscription) -> None:
            self._deliver(row, subscription, callback)

        subscription = Subscription(
            tag, queue, queue_id, no_ack, self._prefetch, deliver, on_cancel or _raise_cancelled
        )
        if no_ack:
            self.no_ack_consumers.add(tag)
        delivery.subscribe(self.feed, subscription)
        return tag

    def _deliver(self, row: Row, subscription: Subscription, callback: Callable[[Raw], None] | None) -> None:
        delivery_tag = next(self._delivery_tags)
        unacked = _Unacked(row, subscription)
        if not subscription.no_ack:
            self._unacked[delivery_tag] = unacked
        raw = decode(row, subscription.tag, delivery_tag)
        try:
            if callback is not None:
                callback(raw)
        except BaseException:
            unacked.failed = True
            raise

    def basic_cancel(self, consumer_tag: str, nowait: bool = False, **_: Any) -> None:
        """Nothing more is delivered to the tag. What it holds stays its own."""
        self.no_ack_consumers.discard(consumer_tag)
        connection = self._connection()
        connection.delivery().unsubscribe(self.feed, consumer_tag)
        assert connection.consumer.id is not None
        self._run(self._store.unsubscribe(connection.consumer.id, connection.token, consumer_tag))

    def basic_get(self, queue: str = "", no_ack: bool = False, **_: Any) -> messages.Message | None:
        """The next message of the queue, None if there is none. Blocks for the round trips.

        Raises:
            NotFound, ResourceLocked: as queue_declare.
            Unavailable: the connection is lost; what the server may have claimed goes back.
        """
        connection = self._connection()
        connection.attach()
        queue_id, ready = self._use(queue, (60, 70))
        try:
            row = self._claim_next(queue_id, no_ack=no_ack)
        except errors.Unavailable:
            connection.collect()  # only a connection that is lost gives back what nobody here knows of
            raise
        if row is None:
            return None
        delivery_tag = next(self._delivery_tags)
        raw = decode(row, "", delivery_tag)
        raw.delivery_info["message_count"] = max(0, ready - 1)
        message = messages.Message(raw, self)
        if no_ack:
            connection.consumer.let_go(row.id)
        else:
            self._unacked[delivery_tag] = _Unacked(row, None)
        return message

    def _claim_next(self, queue_id: int, *, no_ack: bool) -> Row | None:
        consumer_id = self._connection().consumer.id
        while True:
            rows = self._run(self._store.claim(self._claim_one(queue_id))).rows
            if not rows:
                return None
            row: Row = rows[0]
            if row.expired:
                self._run(self._store.settle(consumer_id, Settlement(expired=[row.id], leases=[row.lease_id])))
                continue
            if no_ack:
                self._run(self._store.settle(consumer_id, Settlement(acked=[row.id], leases=[row.lease_id])))
            return row

    def _claim_one(self, queue_id: int) -> Claim:
        connection = self._connection()
        assert connection.consumer.id is not None
        return Claim(
            consumer_id=connection.consumer.id, token=connection.token, queues=[queue_id], keys=[queue_id], limits=[1],
            armed=[False], marks=[0], limit=1, max_bytes=BATCH_BYTES, suspects=connection.consumer.suspects_allowed,
            gate=False, advance=False,
        )  # fmt: skip

    def message_to_python(self, raw: Raw | messages.Message) -> messages.Message:
        return raw if isinstance(raw, messages.Message) else messages.Message(raw, channel=self)

    # Settle

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        """The message is done with. Leaves with the next thing that is sent; safe from any thread.

        `multiple`: so is everything delivered before it on this channel (tag 0: everything).
        """
        self._settle(delivery_tag, "acked", multiple)

    def expect_result(self, delivery_tag: int) -> None:
        """An ack is to count only with the task's result: a crash may come between them, and forget the result."""
        unacked = self._unacked.get(delivery_tag)
        if unacked is not None:
            unacked.acked = "completed"

    def basic_reject(self, delivery_tag: int, requeue: bool = False, **_: Any) -> None:
        """The message goes back to its queue, counted; or, without `requeue`, a task becomes a dead letter."""
        final = "recorded" if self.records_rejected else "rejected"
        self._settle(delivery_tag, "requeued" if requeue else final)

    def basic_recover(self, requeue: bool = False) -> None:
        """Everything unacked on this channel goes back to its queues, counted.

        AMQP's requeue=False (deliver again to the same consumer) is done as RabbitMQ does it: not at all.
        """
        if not requeue:
            raise AMQPNotImplementedError(
                "basic.recover with requeue=False is not implemented (neither in RabbitMQ)", (60, 110), reply_code=540
            )
        for tag in list(self._unacked):
            self._settle(tag, "requeued")

    basic_recover_async = basic_recover

    def requeue_later(self, delivery_tag: int, delay: float) -> None:
        """The message is back in its queue, counted, for `delay` seconds or more. Blocks for a round trip."""
        store, consumer_id = self._store, self._connection().consumer.id
        self._settle_at_once(delivery_tag, lambda row: store.requeue_later(consumer_id, row.id, delay))

    def dead_letter(self, delivery_tag: int, reason: str, kind: str) -> None:
        """The message is a dead letter of this kind, for this reason. Blocks for a round trip."""
        store, consumer_id = self._store, self._connection().consumer.id
        text = reason.replace("\0", "").encode("utf-8", "replace").decode()
        self._settle_at_once(delivery_tag, lambda row: store.dead_letter(consumer_id, row.id, text, kind))

    def _settle_at_once(self, delivery_tag: int, statement: Callable[[Row], Any]) -> None:
        unacked = self._unacked.get(delivery_tag)
        if unacked is None:
            raise self._unknown_tag(delivery_tag)
        self._run(statement(unacked.row))
        # Only now: as long as it was in its lease, the lease had to stay.
        self._unacked.pop(delivery_tag, None)
        self.connection_of_messages.settle(self.feed, unacked.subscription, unacked.row, None)

    def _settle(self, delivery_tag: int, what: str, multiple: bool = False) -> None:
        if multiple:
            for tag in sorted(tag for tag in self._unacked if tag <= delivery_tag or not delivery_tag):
                self._let_go(tag, what)
        elif not self._let_go(delivery_tag, what) and self.connection is not None:
            raise self._unknown_tag(delivery_tag)
        self.connection_of_messages.settled()

    def _let_go(self, delivery_tag: int, what: str) -> bool:
        unacked = self._unacked.pop(delivery_tag, None)
        if unacked is None:
            return False  # another thread was faster, or it was settled before
        final = unacked.acked if what == "acked" else what
        self.connection_of_messages.settle(self.feed, unacked.subscription, unacked.row, final)
        return True

    def _unknown_tag(self, tag: int) -> PreconditionFailed:
        return PreconditionFailed(f"unknown delivery tag {tag}: it was settled before", (60, 80), reply_code=406)

    # The channel itself

    def flow(self, active: bool = True) -> None:
        """Accepted and without effect, as on RabbitMQ: prefetch is what limits deliveries."""

    def close(self) -> None:
        """Consumers end; what is unacked goes back, uncounted, unless its callback raised. May be called twice."""
        connection, self.connection = self.connection, None
        if connection is None:
            return
        try:
            connection.close_channel(self)
        finally:
            self.no_ack_consumers.clear()

    def abandon_unacked(self) -> None:
        """Note everything unacked as given back (a message whose callback raised: as returned, counted)."""
        for tag in list(self._unacked):
            self._settle(tag, "requeued" if self._unacked[tag].failed else "given_back")

    def get_bindings(self) -> list[tuple[str, str, str]]:
        return self._run(self._store.bindings())  # type: ignore[no-any-return]

    def _connection(self) -> Connection:
        if self.connection is None:
            raise RecoverableConnectionError("this channel is closed")
        return self.connection

    @property
    def _store(self) -> Any:
        return self._connection().store

    def _caller(self) -> Any:
        return self._connection().caller()

    def _run(self, statement: Any) -> Any:
        return self._connection().run(statement)

    def _use(self, queue: str, method: tuple[int, int]) -> tuple[int, int]:
        queue_id, ready, refusal = self._run(self._store.use_queue(checked_name("queue", queue), self._caller()))
        self._raise(refusal, f"queue {queue!r}", method)
        return queue_id, ready

    def _raise(self, refusal: str | None, what: str, method: tuple[int, int]) -> None:
        if refusal is None:
            return
        if refusal in ("not found", "no exchange"):
            raise NotFound(f"{what} does not exist", method, reply_code=404)
        if refusal == "locked":
            raise ResourceLocked(f"{what} is exclusive to another connection that is alive", method, reply_code=405)
        if refusal == "reserved":
            raise AccessRefused(f'{what}: names that begin with "amq." are reserved', method, reply_code=403)
        raise PreconditionFailed(f"{what}: {refusal}", method, reply_code=406)


def _checked_exchange(name: str, method: tuple[int, int]) -> str:
    if not name:
        raise AccessRefused("the default exchange cannot be declared, deleted or bound", method, reply_code=403)
    return checked_name("exchange", name)


def _wanted_headers(exchange: str, arguments: Mapping[str, Any] | None) -> str:
    """What a binding to a headers exchange compares."""
    match = (arguments or {}).get("x-match", "all")
    if match not in _MATCHES:
        raise PreconditionFailed(
            f"binding to {exchange!r}: x-match is {match!r}, not one of {', '.join(_MATCHES)}", (50, 20), reply_code=406
        )
    wanted = {key: value for key, value in (arguments or {}).items() if key != "x-match"}
    return f'{{"match": "{match}", "headers": {messages.routing_headers(wanted)}}}'


def _raise_cancelled(tag: str) -> NoReturn:
    raise ConsumerCancelled(tag, (60, 30))


def _packed(arguments: Mapping[str, Any] | None) -> str:
    return json.dumps(arguments or {}, sort_keys=True, default=str)


def _definition(
    name: str, durable: bool, exclusive: bool, auto_delete: bool, arguments: Mapping[str, Any]
) -> QueueDefinition:
    def number(key: str, least: int, most: int = 2**63 - 1) -> int | None:
        value = arguments.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise refused(key, f"a whole number from {least} to {most}")
        return value

    def text(key: str) -> str | None:
        value = arguments.get(key)
        if value is not None and not isinstance(value, str):
            raise refused(key, "text")
        return None if value is None else checked_name(key, value)

    def refused(key: str, expected: str) -> PreconditionFailed:
        what = f"queue {name!r}: {key} is {arguments[key]!r}, not {expected}"
        return PreconditionFailed(what, (50, 10), reply_code=406)

    if arguments.get("x-overflow") not in (None, *_OVERFLOWS):
        raise refused("x-overflow", "one of " + ", ".join(_OVERFLOWS))
    if "x-dead-letter-routing-key" in arguments and "x-dead-letter-exchange" not in arguments:
        raise refused("x-dead-letter-routing-key", "allowed without x-dead-letter-exchange")

    return QueueDefinition(
        name=name,
        durable=bool(durable),
        exclusive=bool(exclusive),
        auto_delete=bool(auto_delete),
        max_priority=number("x-max-priority", 0, 255),
        message_ttl=number("x-message-ttl", 0, LONGEST_TTL),
        expires=number("x-expires", 1, LONGEST_TTL),
        max_length=number("x-max-length", 0),
        max_length_bytes=number("x-max-length-bytes", 0),
        overflow=text("x-overflow"),
        dead_letter_exchange=text("x-dead-letter-exchange"),
        dead_letter_routing_key=text("x-dead-letter-routing-key"),
        delivery_limit=number("x-delivery-limit", 0),
        arguments=_packed(arguments),
    )
