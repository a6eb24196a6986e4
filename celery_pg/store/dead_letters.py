"""What do dead letters ask of Postgres?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kombu_pg.database import Rows, Statement
from kombu_pg.options import Options

__all__ = ["Chosen", "DeadLetter", "DeadLetterStore", "Listed"]

#: Dead letters that are dropped in one round, when their retention is over.
FORGET_BATCH = 1_000
#: Bytes of a body that a look at it returns.
PREVIEW = 1_000

_COLUMNS = (
    "id, queue, reason, detail, returns, task, task_id, reply_to, exchange, routing_key, properties, body, "
    "dead_at, heard_at"
)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A row of dead_letter. heard_at None: its task's result, link_error and chord have not heard of it."""

    id: int
    queue: str
    reason: str
    detail: str | None
    returns: int
    task: str | None
    task_id: str | None
    reply_to: str | None
    exchange: str
    routing_key: str
    properties: bytes
    body: bytes
    dead_at: datetime
    heard_at: datetime | None


@dataclass(frozen=True, slots=True)
class Listed:
    """A line of the list. Seconds."""

    id: int
    queue: str
    reason: str
    detail: str | None
    task: str | None
    task_id: str | None
    age: float
    heard: bool
    returns: int
    size: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which dead letters; None = whatever it is."""

    ids: Sequence[int] | None = None
    queue: str | None = None
    reason: str | None = None
    task: str | None = None
    task_id: str | None = None


class DeadLetterStore:
    """The statements for one schema."""

    def __init__(self, options: Options) -> None:
        self._sql = options.schema
        self._retention = options.dead_letter_retention

    def unheard(self, queues: Sequence[str]) -> Statement[list[str]]:
        """-> those of the queues that have dead letters nobody has heard of."""
        return Statement(
            f"SELECT {self._sql}.unheard_queues(%s::text[])", (list(queues),), lambda rows: list(rows[0][0])
        )

    def next_unheard(self, queue: str, after: int) -> Statement[DeadLetter | None]:
        """Lock the first one of the queue, above this id, that nobody has heard of, for the open transaction."""
        return Statement(
            f"SELECT {_COLUMNS} FROM {self._sql}.next_unheard(%s, %s)",
            (queue, after),
            lambda rows: _read(rows[0]) if rows else None,
        )

    def heard(self, letter_id: int, detail: str | None = None) -> Statement[None]:
        """It was heard of; `detail` is added to what is said about it."""
        return Statement(f"SELECT {self._sql}.heard(%s, %s)", (letter_id, detail), _nothing)

    def forget(self) -> Statement[int]:
        """Drop what was heard of before the retention began, and revokes that nothing is left of. -> dead letters."""
        return Statement(
            f"SELECT {self._sql}.forget_dead_letters(%s, %s), {self._sql}.forget_revokes(%s)",
            (self._retention, FORGET_BATCH, FORGET_BATCH),
            lambda rows: int(rows[0][0]),
        )

    # For operators

    def newest(self) -> Statement[int]:
        """-> the last message id that was drawn: no dead letter has a greater one yet."""
        return Statement(f"SELECT last_value FROM {self._sql}.message_id_seq", (), lambda rows: int(rows[0][0]))

    def find(self, chosen: Chosen, after: int, limit: int) -> Statement[list[int]]:
        """-> the next ids above `after`, in ascending order."""
        return Statement(
            f"SELECT {self._sql}.find_dead_letters(%s::bigint[], %s, %s, %s, %s, %s, %s)",
            (
                None if chosen.ids is None else list(chosen.ids), chosen.queue, chosen.reason, chosen.task,
                chosen.task_id, after, limit,
            ),
            lambda rows: list(rows[0][0]),
        )  # fmt: skip

    def listed(self, ids: Sequence[int]) -> Statement[list[Listed]]:
        return Statement(
            "SELECT id, queue, reason, detail, task, task_id, extract(epoch FROM clock_timestamp() - dead_at)::float8, "
            f"heard_at IS NOT NULL, returns, octet_length(body) FROM {self._sql}.dead_letter "
            "WHERE id = ANY (%s::bigint[]) ORDER BY id",
            (list(ids),),
            lambda rows: [Listed(*row) for row in rows],
        )

    def get(self, letter_id: int) -> Statement[DeadLetter | None]:
        return Statement(
            f"SELECT {_COLUMNS} FROM {self._sql}.dead_letter WHERE id = %s",
            (letter_id,),
            lambda rows: _read(rows[0]) if rows else None,
        )

    def redrive(self, ids: Sequence[int], queue: str | None) -> Statement[int]:
        """Put them into the queue (None: each into the one it died in) and wake who is idle. -> how many.

        Those whose queue is gone stay. Must be alone in its transaction: it commits.
        """
        return Statement(
            f"CALL {self._sql}.redrive_and_wake(%s::bigint[], %s)", (list(ids), queue), lambda rows: int(rows[0][0])
        )

    def delete(self, ids: Sequence[int]) -> Statement[int]:
        """-> how many."""
        return Statement(
            f"WITH gone AS (DELETE FROM {self._sql}.dead_letter WHERE id = ANY (%s::bigint[]) RETURNING id) "
            "SELECT count(*) FROM gone",
            (list(ids),),
            lambda rows: int(rows[0][0]),
        )


def _read(row: Sequence[Any]) -> DeadLetter:
    return DeadLetter(*(*row[:10], bytes(row[10]), bytes(row[11]), *row[12:]))


def _nothing(_: Rows) -> None:
    return None
