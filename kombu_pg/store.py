"""What do we ask of Postgres?

Every run-time statement of the transport. A statement says what it does and how its rows read; who runs it, on which
connection, and when, is not known here. The work itself is in the functions of `migrations/`, where it is explained.
"""

from __future__ import annotations

import binascii
import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kombu_pg.database import Rows, Statement
from kombu_pg.options import Options

__all__ = [
    "Attached",
    "Claim",
    "Claimed",
    "Declared",
    "Outgoing",
    "QueueDefinition",
    "Row",
    "Settlement",
    "Store",
    "Upkeep",
    "read_pushed",
    "refused",
    "store_for",
]


@dataclass(eq=False, slots=True)
class Outgoing:
    """A message on its way in, as the columns of its row. Times: ttl in milliseconds, due as ISO 8601 text.

    Not frozen: one is made per publish. publish_id: a UUID as 32 hexadecimal digits.
    """

    persistent: bool
    exchange: str
    routing_key: str
    priority: int
    ttl: int | None
    due: str | None
    task: str | None
    task_id: str | None
    reply_to: str | None
    properties: bytes
    body: bytes
    publish_id: str
    retry_age: float | None
    mandatory: bool
    headers: str | None = None  # JSON object, for headers exchanges

    @property
    def is_plain(self) -> bool:
        """What most are: a first attempt, into one queue by its name, due at once, without an expiry or a priority."""
        rare = (self.ttl, self.due, self.retry_age, self.headers)
        return not (self.exchange or self.priority or self.mandatory) and rare == (None, None, None, None)


@dataclass(eq=False)
class Row:
    """A message that was claimed, or pushed.

    Not frozen and without slots: one is made per delivery, and each may be weakly referred to.
    """

    id: int
    queue_id: int
    redelivered: bool
    returns: int
    priority: int
    expired: bool
    exchange: str
    routing_key: str
    properties: bytes
    body: bytes
    lease_id: int
    deaths: list[dict[str, Any]] | None
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """What to claim: per queue its id, the idle lock's key, the most to take, whether its lock is held, its mark."""

    consumer_id: int
    token: int
    queues: Sequence[int]
    keys: Sequence[int]
    limits: Sequence[int]
    armed: Sequence[bool]
    marks: Sequence[int]
    limit: int
    max_bytes: int
    suspects: int
    gate: bool
    advance: bool


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a claim took. `armed[i]` is None where queue i is gone; `armed` is None where the consumer itself is.

    `firsts`, `upper`, `xid`, `xmin`: see `feed.Marks`; None unless the claim asked to advance and took something.
    """

    rows: list[Row]
    armed: list[bool | None] | None
    firsts: list[int | None] | None
    upper: int | None
    xid: int | None
    xmin: int | None


@dataclass(slots=True)
class Settlement:
    """What has been decided about claimed messages and not yet been told to the store.

    completed: acked, too; a result that is stored in this schema belongs to it.
    """

    acked: list[int] = field(default_factory=list)
    completed: list[int] = field(default_factory=list)
    requeued: list[int] = field(default_factory=list)
    given_back: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    expired: list[int] = field(default_factory=list)
    recorded: list[int] = field(default_factory=list)
    leases: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.acked or self.completed or self.returns or self.leases)

    @property
    def message_ids(self) -> list[int]:
        return [
            *self.acked, *self.completed, *self.requeued, *self.given_back, *self.rejected, *self.expired,
            *self.recorded,
        ]  # fmt: skip

    @property
    def returns(self) -> bool:
        """Some of it makes messages ready: the same, or copies of them in dead-letter queues."""
        return bool(self.requeued or self.given_back or self.rejected or self.expired or self.recorded)

    def add(self, other: Settlement) -> None:
        for name in self.__slots__:
            getattr(self, name).extend(getattr(other, name))


@dataclass(frozen=True, slots=True)
class QueueDefinition:
    """What `queue.declare` says; times in milliseconds, None = not given."""

    name: str
    durable: bool
    exclusive: bool
    auto_delete: bool
    max_priority: int | None
    message_ttl: int | None
    expires: int | None
    max_length: int | None
    max_length_bytes: int | None
    overflow: str | None
    dead_letter_exchange: str | None
    dead_letter_routing_key: str | None
    delivery_limit: int | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Declared:
    """What queue.declare found; refusal: see migration 0004."""

    queue_id: int | None
    message_count: int
    consumer_count: int
    refusal: str | None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: exclusive queues belong to a connection of a process."""

    consumer_id: int | None
    token: int
    live_tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Attached:
    """consumer_id None = reaped meanwhile. outstanding: consumers not yet back since the server (re)started."""

    consumer_id: int | None
    epoch: str
    outstanding: int
    epoch_age: float


@dataclass(frozen=True, slots=True)
class Upkeep:
    """Live consumers, how many of them are older than this one, whether this one is known, and what is to be done next.

    more: the sweep is not finished. next_reap: seconds until the grace of a lost consumer is over, None if none is.
    """

    consumers: int
    rank: int
    known: bool
    more: bool
    next_reap: float | None


class Store:
    """The statements for one schema."""

    def __init__(self, options: Options) -> None:
        s = options.schema
        self.clock_channel = f"{s}.clock"
        self._options = options
        # (::text tells a driver that wants to know a parameter's type; others let the server find it.)
        self._enqueue_borrowed = (
            f"SELECT {s}.enqueue_borrowed(%s, %s::text, %s::text, %s, %s, %s, "
            "%s::text, %s::text, %s::text, %s, %s, %s, %s)"
        )
        self._publish = f"CALL {s}.publish({_slots(15)}, false)"
        # Constants are cheaper as text than as parameters, for both sides.
        self._publish_plainly = {
            (persistent, push): (
                f"CALL {s}.publish({persistent}, '', %s, 0, NULL, NULL, {_slots(6)}, NULL, false, NULL, {push})"
            )
            for persistent in (True, False)
            for push in (True, False)
        }
        self._claim = f"SELECT * FROM {s}.claim({_slots(12)})"
        self._settle = f"SELECT {s}.settle({_slots(9)})"
        self._settle_and_wake = f"CALL {s}.settle_and_wake({_slots(9)})"
        self._sql = s

    # Publish

    def publish(self, message: Outgoing, *, push: bool = False) -> Statement[None]:
        """Store the message, durably if it is persistent, and wake who is idle. A notice says if it was `refused`.

        `push`: a plain message is an idle consumer's at once, if that is possible, who need not claim it.

        Must be alone in its transaction: it commits.
        """
        m = message
        if not m.is_plain:
            return Statement(
                self._publish,
                (
                    m.persistent, m.exchange, m.routing_key, m.priority, m.ttl, m.due, m.task, m.task_id, m.reply_to,
                    m.properties, m.body, m.publish_id, m.retry_age, m.mandatory, m.headers,
                ),
                _nothing,
            )  # fmt: skip
        return Statement(
            self._publish_plainly[m.persistent, push],
            (m.routing_key, m.task, m.task_id, m.reply_to, m.properties, m.body, m.publish_id),
            _nothing,
        )

    def flush(self) -> Statement[None]:
        """Whatever was committed before is durable, as a persistent message is. Commits, alone."""
        return Statement(f"{_DURABLY}; SELECT pg_logical_emit_message(true, 'kombu_pg', ''::text)", (), _nothing)

    def publish_batch(self, messages: Sequence[Outgoing]) -> Statement[tuple[int, str | None]]:
        """Store all of them in one transaction, or none. -> (how many, or the index of the refused one; refusal).

        Durable if one of them is persistent. Must be alone in its transaction: it commits.
        """
        columns = zip(
            *(
                (m.exchange, m.routing_key, m.priority, m.ttl, m.due, m.task, m.task_id, m.reply_to, m.properties,
                 m.body, m.mandatory, m.headers)
                for m in messages
            ),
            strict=True,
        )  # fmt: skip
        casts = "text text int bigint timestamptz text text text bytea bytea bool jsonb".split()
        slots = ", ".join(f"%s::{cast}[]" for cast in casts)
        return Statement(
            f"CALL {self._sql}.publish_batch(%s, {slots})",
            (any(m.persistent for m in messages), *map(list, columns)),
            lambda rows: (rows[0][0], rows[0][1]),
        )

    def enqueue(self, message: Outgoing) -> Statement[tuple[list[int], str | None, float | None]]:
        """Store the message in the transaction that is open. -> (queue ids, refusal, due time as epoch).

        Whoever commits wakes the queues, or those who wait for the due time.
        """
        return Statement(
            "SELECT e.queue_ids, e.refusal, extract(epoch FROM e.due)::float8 "
            f"FROM {self._sql}.enqueue({_slots(14)}) AS e",
            (
                message.exchange, message.routing_key, message.priority, message.ttl, message.due,
                message.task, message.task_id, message.reply_to, message.properties, message.body,
                None, None, message.mandatory, message.headers,
            ),
            lambda rows: rows[0],
        )  # fmt: skip

    def enqueue_borrowed(
        self, message: Outgoing, queues: list[Any] | None = None, *, unannounced: bool = False
    ) -> Statement[tuple[list[int], str | None, float | None]]:
        """The same in a transaction that is not ours, on whatever driver; `unannounced`: nobody will run `wake`.

        `queues`: what `resolve` has said, for which the refusal 'resolve' asks.
        """
        texts = (
            message.exchange, message.routing_key, message.task, message.task_id, message.reply_to, message.headers,
        )  # fmt: skip
        if queues is None and all(text is None or text.isascii() for text in texts):
            return Statement(
                self._enqueue_borrowed,
                (
                    unannounced, message.exchange, message.routing_key, message.priority, message.ttl, message.due,
                    message.task, message.task_id, message.reply_to, message.properties, message.body,
                    message.mandatory, message.headers,
                ),
                _read_enqueued,
            )  # fmt: skip
        fields = {
            "exchange": message.exchange, "routing_key": message.routing_key, "priority": message.priority,
            "ttl": message.ttl, "due": message.due, "task": message.task, "task_id": message.task_id,
            "reply_to": message.reply_to, "mandatory": message.mandatory, "headers": message.headers,
            "unannounced": unannounced,
        }  # fmt: skip
        if queues is not None:
            fields["queues"] = queues
        return Statement(
            f"SELECT {self._sql}.enqueue_encoded({_slots(3)})",
            (json.dumps(fields).encode(), message.properties, message.body),
            _read_enqueued,
        )

    def resolve(self, message: Outgoing) -> Statement[tuple[list[Any], str | None]]:
        """Which queues get the message, as `enqueue_borrowed` wants them; or the refusal."""
        return Statement(
            f"SELECT r.queues, r.refusal FROM {self._sql}.resolve({_slots(8)}) AS r",
            (
                message.exchange, message.routing_key, message.priority, message.ttl, message.task, len(message.body),
                message.mandatory, message.headers,
            ),
            lambda rows: (rows[0][0], rows[0][1]),
        )  # fmt: skip

    def may_publish(self) -> Statement[bool | None]:
        """May the role of a connection that is not ours publish here? None: the schema is not in its database.

        Raises nothing for either, which would cost its owner the transaction.
        """
        return Statement(
            "SELECT bool_and(has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') "
            "AND (c.relname = 'installation' OR has_table_privilege(c.oid, 'INSERT'))) FROM pg_catalog.pg_class c "
            "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname = %s AND c.relname IN ('installation', 'message', 'ready', 'scheduled')",
            (self._sql,),
            lambda rows: rows[0][0],
        )

    def wake(self, queue_ids: Sequence[int], due: float | None) -> Statement[None]:
        """Tell who is idle about what was just committed, in queues or at a due time. Commits, alone."""
        clock = "" if due is None else f", {self._sql}.wake_clock(to_timestamp(%s))"
        return Statement(
            f"SELECT {self._sql}.wake(%s){clock}", (_array(queue_ids), *([] if due is None else [due])), _nothing
        )

    def installation(self) -> Statement[str]:
        """The id that tells one store from another, whatever URL leads there."""
        return Statement(f"SELECT id::text FROM {self._sql}.installation", (), lambda rows: str(rows[0][0]))

    # Claim and settle

    def settle(self, consumer_id: int, settlement: Settlement) -> Statement[None]:
        """Tell the store what was decided, and wake who is idle. May be sent again where its answer was lost."""
        sql = self._settle_and_wake if settlement.returns else self._settle
        return Statement(sql, self._settle_parameters(consumer_id, settlement), _nothing)

    def claim(self, claim: Claim, settlement: Settlement | None = None) -> Statement[Claimed]:
        """Settle (nothing that returns messages), then lease what the claim asks for, in one transaction."""
        parameters = (
            claim.consumer_id, claim.token, _array(claim.queues), _array(claim.keys), _array(claim.limits), claim.limit,
            claim.max_bytes, claim.suspects, claim.gate, _booleans(claim.armed), _array(claim.marks), claim.advance,
        )  # fmt: skip
        if not settlement:
            return Statement(self._claim, parameters, _read_claim)
        return Statement(
            f"{self._settle};{self._claim}",
            self._settle_parameters(claim.consumer_id, settlement) + parameters,
            _read_claim,
        )

    def _settle_parameters(self, consumer_id: int, settlement: Settlement) -> tuple[Any, ...]:
        return (
            consumer_id, _array((*settlement.acked, *settlement.completed)), _array(settlement.requeued),
            _array(settlement.given_back), _array(settlement.rejected), _array(settlement.expired),
            _array(settlement.recorded), _array(settlement.leases), self._options.delivery_limit,
        )  # fmt: skip

    def without_result(self, message_ids: Iterable[int]) -> Statement[list[int]]:
        """-> those of the messages whose task has no final result that is younger than the message."""
        return Statement(
            f"SELECT m.id FROM {self._sql}.message m WHERE m.id = ANY (%s) AND NOT EXISTS "
            f"(SELECT FROM {self._sql}.result r WHERE r.task_id = m.task_id AND r.date_done >= m.enqueued_at)",
            (_array(message_ids),),
            lambda rows: [row[0] for row in rows],
        )

    def requeue_later(self, consumer_id: int, message_id: int, delay: float) -> Statement[None]:
        """Return a claimed message to its queue, counted, but not before `delay` seconds. Commits, alone."""
        return Statement(
            f"CALL {self._sql}.requeue_later_and_wake({_slots(4)})",
            (consumer_id, message_id, delay, self._options.delivery_limit),
            _nothing,
        )

    def dead_letter(self, consumer_id: int, message_id: int, detail: str, kind: str = "rejected") -> Statement[None]:
        """Put a claimed message to the dead letters, with the consumer's own words. Commits, alone."""
        return Statement(
            f"CALL {self._sql}.dead_letter_and_wake({_slots(4)})", (consumer_id, message_id, kind, detail), _nothing
        )

    def finish(self, message_id: int, *, reject: bool) -> Statement[Iterable[int]]:
        """The message ends with the open transaction: acknowledged, or a dead letter. -> queues to wake.

        Raises AlreadyFinished where it is gone; the transaction can only be rolled back then.
        """
        return self._call("finish", message_id, reject)

    def disarm(self, keys: Sequence[int]) -> Statement[None]:
        """Release the idle locks with these keys, each once, on the session that holds them."""
        return Statement(
            f"SELECT pg_advisory_unlock_shared({self._sql}.lock_key('idle', k)) FROM unnest(%s::bigint[]) AS k",
            (_array(keys),),
            _nothing,
        )

    def prepare_claims(self) -> Statement[int]:
        """Make the session fit to claim on: a fresh look at the data in every statement. -> the id of its process.

        The server notices within seconds that its peer is gone. Without tcp_user_timeout: that also ends a session
        whose peer does not read a large claim for as long, as in a callback.
        """
        return Statement(
            f"{_KEEPALIVES}; SET default_transaction_isolation = 'read committed'; SET synchronous_commit = off; "
            "SELECT pg_backend_pid()",
            (),
            lambda rows: int(rows[0][0]),
        )

    def offer(self, consumer_id: int, token: int, channel: str) -> Statement[None]:
        """Publishers may push messages to this session from now on, each as a notification that `read_pushed` reads."""
        return Statement(
            f'LISTEN "{channel}"; SELECT {self._sql}.offer(%s, %s, %s)', (consumer_id, token, channel), _nothing
        )

    def renew_offer(self) -> Statement[None]:
        return Statement(f"SELECT {self._sql}.renew_offer()", (), _nothing)

    def withdraw_offer(self, consumer_id: int, token: int) -> Statement[list[tuple[int, int]]]:
        """Nothing more is pushed to this session. -> (lease, message) of what was, unsettled; some may yet come."""
        return Statement(f"SELECT * FROM {self._sql}.withdraw_offer(%s, %s)", (consumer_id, token), _pairs)

    def pushed_before(self, seconds: float, consumer_id: int, token: int) -> Statement[list[tuple[int, int]]]:
        """-> (lease, message) of what was pushed to the session so many seconds ago or earlier, and is not settled."""
        return Statement(
            f"SELECT l.id, unnest(l.message_ids) FROM {self._sql}.lease l WHERE l.consumer_id = %s AND l.token = %s "
            "AND l.offer IS NOT NULL AND l.claimed_at < clock_timestamp() - %s * interval '1 s'",
            (consumer_id, token, seconds),
            _pairs,
        )

    def listen(self, channel: str) -> Statement[None]:
        return Statement(f'LISTEN "{channel}"', (), _nothing)

    def unlisten(self, channel: str) -> Statement[None]:
        return Statement(f'UNLISTEN "{channel}"', (), _nothing)

    def consumer_channel(self, backend_pid: int) -> str:
        """Where a session that claims is told of messages."""
        return f"{self._sql}.{backend_pid}"

    # Exchanges, queues, bindings, subscriptions

    def declare_exchange(
        self, name: str, kind: str, *, durable: bool, auto_delete: bool, arguments: str, passive: bool
    ) -> Statement[str | None]:
        return self._call("declare_exchange", name, kind, durable, auto_delete, arguments, passive)

    def delete_exchange(self, name: str, *, if_unused: bool) -> Statement[str | None]:
        return self._call("delete_exchange", name, if_unused)

    def declare_queue(self, queue: QueueDefinition, caller: Caller, *, passive: bool) -> Statement[Declared]:
        return Statement(
            f"SELECT * FROM {self._sql}.declare_queue({_slots(18)})",
            (
                queue.name, passive, queue.durable, queue.exclusive, queue.auto_delete, queue.max_priority,
                queue.message_ttl, queue.expires, queue.max_length, queue.max_length_bytes, queue.overflow,
                queue.dead_letter_exchange, queue.dead_letter_routing_key, queue.delivery_limit, queue.arguments,
                *_caller(caller),
            ),
            lambda rows: Declared(rows[0][0], rows[0][1] or 0, rows[0][2] or 0, rows[0][3]),
        )  # fmt: skip

    def delete_queue(
        self, name: str, caller: Caller, *, if_unused: bool, if_empty: bool
    ) -> Statement[tuple[int, str | None]]:
        return Statement(
            f"SELECT * FROM {self._sql}.delete_queue({_slots(6)})",
            (name, if_unused, if_empty, *_caller(caller)),
            lambda rows: (rows[0][0], rows[0][1]),
        )

    def bind_queue(
        self,
        queue: str,
        exchange: str,
        routing_key: str,
        pattern: str | None,
        headers: str,
        arguments: str,
        caller: Caller,
    ) -> Statement[str | None]:
        return self._call("bind_queue", queue, exchange, routing_key, pattern, headers, arguments, *_caller(caller))

    def bind_exchange(
        self, destination: str, source: str, routing_key: str, pattern: str | None, headers: str, arguments: str
    ) -> Statement[str | None]:
        return self._call("bind_exchange", destination, source, routing_key, pattern, headers, arguments)

    def unbind_exchange(self, destination: str, source: str, routing_key: str, arguments: str) -> Statement[str | None]:
        return self._call("unbind_exchange", destination, source, routing_key, arguments)

    def unbind_queue(
        self, queue: str, exchange: str, routing_key: str, arguments: str, caller: Caller
    ) -> Statement[str | None]:
        return self._call("unbind_queue", queue, exchange, routing_key, arguments, *_caller(caller))

    def bindings(self) -> Statement[list[tuple[str, str, str]]]:
        """(exchange, routing key, queue or exchange) of every binding."""
        return Statement(
            f"SELECT b.exchange, b.routing_key, coalesce(q.name, b.destination) FROM {self._sql}.binding b "
            f"LEFT JOIN {self._sql}.queue q ON q.id = b.queue_id ORDER BY 1, 2, 3",
            (),
            lambda rows: [(row[0], row[1], row[2]) for row in rows],
        )

    def use_queue(self, name: str, caller: Caller) -> Statement[tuple[int | None, int, str | None]]:
        """-> (queue id, messages ready, refusal); counts as use of the queue."""
        return Statement(
            f"SELECT * FROM {self._sql}.use_queue({_slots(4)})",
            (name, *_caller(caller)),
            lambda rows: (rows[0][0], rows[0][1] or 0, rows[0][2]),
        )

    def purge(self, queue_id: int, limit: int) -> Statement[int]:
        """Drop up to `limit` waiting messages. -> how many."""
        return self._call("purge", queue_id, limit)

    def subscribe(self, queue: str, tag: str, caller: Caller) -> Statement[tuple[int | None, str | None]]:
        return Statement(
            f"SELECT * FROM {self._sql}.subscribe({_slots(5)})",
            (queue, tag, *_caller(caller)),
            lambda rows: (rows[0][0], rows[0][1]),
        )

    def unsubscribe(self, consumer_id: int, token: int, tag: str) -> Statement[None]:
        return self._call("unsubscribe", consumer_id, token, tag)

    # Consumers

    def attach(self, consumer_id: int | None, hostname: str, pid: int, *, heartbeat: bool) -> Statement[Attached]:
        o = self._options
        return Statement(
            f"SELECT * FROM {self._sql}.attach({_slots(6)})",
            (consumer_id, hostname, pid, heartbeat, o.reconnect_grace, o.heartbeat_timeout),
            lambda rows: Attached(*rows[0]),
        )

    def prepare_liveness(self) -> Statement[int]:
        """Have the server notice within seconds that this session's peer is gone. -> the id of its process."""
        return Statement(
            f"{_KEEPALIVES}; SET tcp_user_timeout = 10000; SET synchronous_commit = off; "
            "SET default_transaction_isolation = 'read committed'; SELECT pg_backend_pid()",
            (),
            lambda rows: int(rows[0][0]),
        )

    def backend_pid(self) -> Statement[int]:
        return Statement("SELECT pg_backend_pid()", (), lambda rows: int(rows[0][0]))

    def returning_consumers(self) -> Statement[tuple[int, float]]:
        """-> (consumers not yet back since the server started, seconds since the first one was)."""
        return Statement(f"SELECT * FROM {self._sql}.returning_consumers()", (), lambda rows: (rows[0][0], rows[0][1]))

    def reconcile(
        self,
        consumer_id: int,
        last_token: int,
        tokens: Iterable[int],
        held: Iterable[int],
        *,
        reassert: bool = False,
        end: bool = False,
    ) -> Statement[int]:
        """-> messages that were given back. `end`: lost connections lose subscriptions and exclusive queues, too."""
        return Statement(
            f"CALL {self._sql}.reconcile_and_wake({_slots(6)})",
            (consumer_id, last_token, _array(tokens), _array(held), reassert, end),
            lambda rows: int(rows[0][0]),
        )

    def close_connection(self, consumer_id: int, token: int) -> Statement[None]:
        return Statement(f"CALL {self._sql}.close_connection_and_wake(%s, %s)", (consumer_id, token), _nothing)

    def detach(self, consumer_id: int) -> Statement[None]:
        return Statement(f"CALL {self._sql}.detach(%s)", (consumer_id,), _nothing)

    def upkeep(self, consumer_id: int, *, sweep: bool) -> Statement[Upkeep]:
        o = self._options
        return Statement(
            f"CALL {self._sql}.upkeep_and_wake({_slots(4)})",
            (consumer_id, o.restart_grace, o.delivery_limit, sweep),
            lambda rows: Upkeep(*rows[0]),
        )

    def promote(self, limit: int) -> Statement[int]:
        """Make due messages ready. -> how many."""
        return Statement(f"CALL {self._sql}.promote_and_wake(%s)", (limit,), lambda rows: int(rows[0][0]))

    def next_due(self) -> Statement[float | None]:
        """-> seconds until the next eta."""
        return self._call("next_due")

    def _call(self, function: str, *parameters: Any) -> Statement[Any]:
        return Statement(
            f"SELECT {self._sql}.{function}({_slots(len(parameters))})", parameters, lambda rows: rows[0][0]
        )


@functools.lru_cache(maxsize=32)
def store_for(options: Options) -> Store:
    """The statements for these options, made once."""
    return Store(options)


def refused(notice: str) -> str | None:
    """What the server's notice says of a message that `publish` did not take; None if it says something else."""
    level, _, text = notice.strip().partition(":  refused: ")
    return text if level == "INFO" and text else None


#: Before the first statement of a transaction of ours: never at another level than the functions are written for.
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED;"


#: The server gives up a quiet peer that does not answer within seconds.
_KEEPALIVES = "SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3"

#: The transaction that it stands in waits for the flush, as long as the server is set to at least.
_DURABLY = (
    "SELECT set_config('synchronous_commit', 'on', true) "
    "WHERE current_setting('synchronous_commit') NOT IN ('on', 'remote_apply')"
)


def commit(*, durable: bool) -> Statement[None]:
    """End the transaction; where it is durable, once it is flushed."""
    if durable:
        return Statement(f"{_DURABLY}; COMMIT", None, _nothing)
    return Statement("SET LOCAL synchronous_commit = off; COMMIT", None, _nothing)


def rollback() -> Statement[None]:
    return Statement("ROLLBACK", None, _nothing)


def _caller(caller: Caller) -> tuple[Any, ...]:
    return (caller.consumer_id, caller.token, _array(caller.live_tokens))


def _slots(count: int) -> str:
    return ", ".join(["%s"] * count)


def _array(values: Iterable[int]) -> str:
    # As text: the server reads it as bigint[] without a cast, and psycopg2 need not adapt every element.
    return "{" + ",".join(map(str, values)) + "}"


def _booleans(values: Iterable[bool]) -> str:
    return "{" + ",".join("t" if value else "f" for value in values) + "}"


def _nothing(_: Rows) -> None:
    return None


def _pairs(rows: Rows) -> list[tuple[int, int]]:
    return [(row[0], row[1]) for row in rows]


def _read_enqueued(rows: Rows) -> tuple[list[int], str | None, float | None]:
    text = rows[0][0]
    if not text.startswith("x"):
        return [int(queue_id) for queue_id in text.split(",") if queue_id], None, None
    answer = json.loads(bytes.fromhex(text[1:]))
    return answer["queue_ids"], answer["refusal"], answer["due"]


def read_pushed(payload: str) -> Row:
    """A message as `push` has sent it; its routing key, the name of its queue, is not known here."""
    lease_id, message_id, queue_id, priority, split, content = payload.split(" ", 5)
    content_bytes = binascii.a2b_base64(content)
    return Row(
        id=int(message_id), queue_id=int(queue_id), redelivered=False, returns=0, priority=int(priority), expired=False,
        exchange="", routing_key="", properties=content_bytes[: int(split)], body=content_bytes[int(split) :],
        lease_id=int(lease_id), deaths=None,
    )  # fmt: skip


def _read_claim(rows: Rows) -> Claimed:
    summary = rows[-1]
    lease_id = summary[11]
    return Claimed(
        [
            Row(r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], bytes(r[8]), bytes(r[9]), lease_id, r[10], r[17])
            for r in rows[:-1]
        ],
        summary[12], summary[13], summary[14], summary[15], summary[16],
    )  # fmt: skip
