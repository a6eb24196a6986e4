"""What do revokes ask of Postgres?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kombu_pg.database import Rows, Statement
from kombu_pg.options import Options

__all__ = ["RevokeStore", "RevokedStamp", "WaitingTask"]


@dataclass(frozen=True, slots=True)
class RevokedStamp:
    """Tasks whose stamp `header` is `stamp` (as JSON) are revoked: messages up to the id `upper`, and `recent` ones."""

    header: str
    stamp: str
    upper: int
    recent: bool


@dataclass(frozen=True, slots=True)
class WaitingTask:
    """A task that nobody has claimed; due_at None: it is ready."""

    id: int
    due_at: datetime | None
    priority: int
    task: str
    task_id: str | None
    exchange: str
    routing_key: str
    returns: int
    properties: bytes
    body: bytes | None  # None: too large to be listed


class RevokeStore:
    """The statements for one schema."""

    def __init__(self, options: Options) -> None:
        self._sql = options.schema

    def revoke(self, task_ids: Sequence[str]) -> Statement[None]:
        return Statement(f"SELECT {self._sql}.revoke(%s::text[])", (list(task_ids),), _nothing)

    def revoke_stamps(self, stamps: Sequence[tuple[str, str]]) -> Statement[None]:
        """Pairs of a header and the value that is stamped there, as JSON."""
        return Statement(
            f"SELECT {self._sql}.revoke_stamps(%s::text[], %s::text[])",
            ([header for header, _ in stamps], [stamp for _, stamp in stamps]),
            _nothing,
        )

    def stamps(self) -> Statement[list[RevokedStamp]]:
        return Statement(
            "SELECT header, stamp, upper, revoked_at > clock_timestamp() - interval '3 hours' "
            f"FROM {self._sql}.revoked_stamp",
            (),
            lambda rows: [RevokedStamp(*row) for row in rows],
        )

    def waiting(
        self, queues: Sequence[str], limit: int, body_limit: int, *, ready: bool
    ) -> Statement[list[WaitingTask]]:
        """What is scheduled in these queues, the next due first, and (`ready`) what would be claimed next."""
        return Statement(
            f"SELECT * FROM {self._sql}.waiting_tasks(%s, %s, %s, %s)",
            (list(queues), ready, limit, body_limit),
            _read_waiting,
        )


def _read_waiting(rows: Rows) -> list[WaitingTask]:
    return [WaitingTask(*_waiting(row)) for row in rows]


def _waiting(row: Sequence[Any]) -> tuple[Any, ...]:
    return (*row[:8], bytes(row[8]), None if row[9] is None else bytes(row[9]))


def _nothing(_: Rows) -> None:
    return None
