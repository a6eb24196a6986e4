"""What does an operator ask of Postgres?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kombu_pg.database import Rows, Statement
from kombu_pg.options import Options

__all__ = ["ConsumerStatus", "Held", "Horizon", "Inspection", "QueueStatus", "Server", "Waiting"]

#: Counts stop here: one more means "more".
CAP = 10_000
#: Of each consumer, so many of the messages that it has held longest.
LONGEST_HELD = 3
#: Bytes of a body that a look at it returns.
PREVIEW = 1_000


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Counts end at CAP + 1. id None: the queue is gone, its dead letters are not. Seconds; None = no such message."""

    id: int | None
    name: str
    ready: int
    unacked: int
    unacked_more: bool
    scheduled: int
    dead: int
    oldest_age: float | None
    next_due: float | None
    consumers: int
    paused: bool
    durable: bool | None
    exclusive: bool | None
    auto_delete: bool | None
    arguments: str | None


@dataclass(frozen=True, slots=True)
class Held:
    """A message that a consumer has claimed and not settled."""

    id: int
    task: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class ConsumerStatus:
    """A consuming process. lost_for: since when nobody has seen its lock (or heartbeat); None = seen since."""

    id: int
    hostname: str
    pid: int
    alive: bool
    heartbeat: bool
    attached_for: float
    lost_for: float | None
    queues: Sequence[str]
    held: int
    held_more: bool
    held_for: float | None
    longest: Sequence[Held]


@dataclass(frozen=True, slots=True)
class Horizon:
    """Who holds the oldest transaction or snapshot, if anybody does; vacuum removes nothing that is younger."""

    kind: str | None
    pid: int | None
    application: str | None
    role: str | None
    state: str | None
    age: float | None
    transactions: int | None
    everything_seen: bool


@dataclass(frozen=True, slots=True)
class Waiting:
    """A message nobody has claimed. Seconds; due_in None: it may be claimed now. body: its first PREVIEW bytes."""

    id: int
    returns: int
    priority: int
    age: float
    due_in: float | None
    expires_in: float | None
    task: str | None
    task_id: str | None
    reply_to: str | None
    exchange: str
    routing_key: str
    properties: bytes
    size: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Server:
    """Where we are."""

    version: str
    database: str


class Inspection:
    """What an operator asks. Nothing here claims a message or counts to the end."""

    def __init__(self, options: Options) -> None:
        self._sql = options.schema

    def server(self) -> Statement[Server]:
        return Statement(
            "SELECT current_setting('server_version'), current_database()", (), lambda rows: Server(*rows[0])
        )

    def queue_ids(self) -> Statement[dict[str, int]]:
        return Statement(f"SELECT name, id FROM {self._sql}.queue", (), lambda rows: {row[0]: row[1] for row in rows})

    def queues(self) -> Statement[Sequence[QueueStatus]]:
        return Statement(
            f"SELECT * FROM {self._sql}.inspect_queues(%s)",
            (CAP,),
            lambda rows: [QueueStatus(*row) for row in rows],
        )

    def consumers(self) -> Statement[Sequence[ConsumerStatus]]:
        return Statement(
            f"SELECT * FROM {self._sql}.inspect_consumers(%s, %s)",
            (CAP, LONGEST_HELD),
            _read_consumers,
        )

    def horizon(self) -> Statement[Horizon]:
        return Statement(f"SELECT * FROM {self._sql}.inspect_horizon()", (), lambda rows: Horizon(*rows[0]))

    def waiting(self, queue_id: int, limit: int) -> Statement[list[Waiting]]:
        """The messages that would be claimed next, then the scheduled ones."""
        return Statement(
            f"SELECT * FROM {self._sql}.inspect_messages(%s, %s, %s)", (queue_id, limit, PREVIEW), _read_waiting
        )

    def pause(self, queue_id: int, *, paused: bool) -> Statement[bool]:
        """Have nobody claim from the queue, or everybody again, who is told. -> whether that was not so before.

        Must be alone in its transaction: it commits.
        """
        return Statement(f"CALL {self._sql}.pause_and_wake(%s, %s)", (queue_id, paused), lambda rows: bool(rows[0][0]))


def _read_consumers(rows: Rows) -> list[ConsumerStatus]:
    return [
        ConsumerStatus(*(*row[:11], [Held(*held) for held in zip(row[11], row[12], row[13], strict=True)]))
        for row in rows
    ]


def _read_waiting(rows: Rows) -> list[Waiting]:
    return [Waiting(*(*row[:11], bytes(row[11]), row[12], bytes(row[13]))) for row in rows]
