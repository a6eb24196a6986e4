"""What do results ask of Postgres?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta, timezone
from operator import attrgetter
from typing import Any

from kombu_pg.database import Rows, Statement
from kombu_pg.options import Options

__all__ = [
    "LATEST",
    "Looked",
    "NewResult",
    "ResultStatus",
    "Results",
    "StoredGroup",
    "StoredResult",
    "bucket",
    "told",
]

#: What a notification begins with that has a result in it, and no other; see `tell_waiting()`.
_RESULT = "\x1e"
_EPOCH = datetime.fromtimestamp(0, timezone.utc)
#: Results that are searched for those that an operator asks for, the latest first.
LATEST = 100_000


@dataclass(frozen=True, slots=True)
class NewResult:
    """A result on its way in, as the parameters of `store_result()`. expires: seconds; None = never."""

    task_id: str
    state: str
    ready: bool
    expires: float | None
    content_type: str
    result: bytes
    meta: bytes | None
    traceback: str | None
    name: str | None
    worker: str | None
    queue: str | None
    retries: int | None
    group_id: str | None
    parent_id: str | None
    reply_to: str | None


# astuple() copies deeply.
_PARAMETERS = attrgetter(*(field.name for field in fields(NewResult)))


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A result as it is stored."""

    task_id: str
    state: str
    date_done: datetime | None
    content_type: str
    result: bytes | None
    meta: bytes | None
    traceback: str | None
    group_id: str | None
    parent_id: str | None


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A group as it was saved."""

    content_type: str
    result: bytes
    date_done: datetime


@dataclass(frozen=True, slots=True)
class ResultStatus:
    """What an operator sees of a result. Seconds; expires_in None: never."""

    id: str
    name: str | None
    state: str
    age: float
    runtime: float | None
    worker: str | None
    queue: str | None
    retries: int | None
    expires_in: float | None
    traceback: str | None


@dataclass(frozen=True, slots=True)
class Looked:
    """What a look found. horizon: None = what is not there yet will be told of; else look again, with it."""

    found: list[StoredResult]
    horizon: str | None


class Results:
    """Statements over results; who runs them, and in which transaction, is not known here."""

    def __init__(self, options: Options) -> None:
        self._sql = options.schema

    def storing(self, result: NewResult) -> tuple[str, tuple[Any, ...]]:
        """The SQL expression that stores the result, and its parameters. It is false after a success, else true."""
        return f"{self._sql}.store_result({', '.join(['%s'] * 15)})", _PARAMETERS(result)

    def store(self, result: NewResult) -> Statement[bool]:
        """Store the result in the transaction that is open."""
        expression, parameters = self.storing(result)
        return Statement(f"SELECT {expression}", parameters, lambda rows: bool(rows[0][0]))

    def store_alone(self, result: NewResult, *, synchronous: bool) -> Statement[bool]:
        """Store the result, as a transaction of its own; `synchronous`: flushed to disk when this returns."""
        expression, parameters = self.storing(result)
        return Statement(
            f"SELECT {self.commits(synchronous=synchronous)}, {expression}", parameters, lambda rows: bool(rows[0][1])
        )

    def commits(self, *, synchronous: bool) -> str:
        """The SQL expression that says how the transaction that it stands in will commit."""
        if not synchronous:
            return "set_config('synchronous_commit', 'off', true)"
        return (
            "CASE WHEN current_setting('synchronous_commit') NOT IN ('on', 'remote_apply') "
            "THEN set_config('synchronous_commit', 'on', true) END"
        )

    def get(self, task_ids: Sequence[str]) -> Statement[list[StoredResult]]:
        return Statement(
            f"SELECT * FROM {self._sql}.get_results(%s::text[])",
            (list(task_ids),),
            lambda rows: [_stored(row) for row in rows],
        )

    def forget(self, task_id: str) -> Statement[None]:
        return Statement(f"DELETE FROM {self._sql}.result WHERE task_id = %s", (task_id,), _nothing)

    def save_group(self, group_id: str, expires: float | None, content_type: str, result: bytes) -> Statement[None]:
        parameters = (group_id, expires, content_type, result)
        return Statement(f"SELECT {self._sql}.save_group(%s, %s, %s, %s)", parameters, _nothing)

    def get_group(self, group_id: str) -> Statement[StoredGroup | None]:
        return Statement(
            f"SELECT g.content_type, g.result, g.stored_at FROM {self._sql}.group_result g "
            "WHERE g.group_id = %s AND (g.expires_at IS NULL OR g.expires_at > clock_timestamp())",
            (group_id,),
            lambda rows: StoredGroup(rows[0][0], bytes(rows[0][1]), rows[0][2]) if rows else None,
        )

    def delete_group(self, group_id: str) -> Statement[None]:
        return Statement(f"DELETE FROM {self._sql}.group_result WHERE group_id = %s", (group_id,), _nothing)

    def latest(
        self, limit: int, *, task_ids: Sequence[str] = (), state: str | None = None, name: str | None = None
    ) -> Statement[list[ResultStatus]]:
        """The results that were stored last: of these tasks, or else those among the `LATEST` of all that fit."""
        given = {"state = %s": state, "name = %s": name, "id = ANY (%s::text[])": list(task_ids) or None}
        conditions = [condition for condition, value in given.items() if value is not None]
        parameters = [value for value in given.values() if value is not None]
        conditions.append("(expires_at IS NULL OR expires_at > clock_timestamp())")
        # Not the view: what fits nothing, and what has expired and is still there, must end the search, too.
        latest = (
            "(SELECT task_id AS id, name, state, date_done - started_at AS runtime, worker, queue, retries, stored_at, "
            f"expires_at, traceback FROM {self._sql}.result ORDER BY stored_at DESC LIMIT {LATEST:d}) AS latest"
        )
        return Statement(
            "SELECT id, name, state, extract(epoch FROM clock_timestamp() - stored_at)::float8, "
            "extract(epoch FROM runtime)::float8, worker, queue, retries, "
            "extract(epoch FROM expires_at - clock_timestamp())::float8, traceback "
            f"FROM {f'{self._sql}.task_result' if task_ids else latest} WHERE {' AND '.join(conditions)} "
            "ORDER BY stored_at DESC LIMIT %s",
            (*parameters, limit),
            lambda rows: [ResultStatus(*row) for row in rows],
        )

    def expire(self, limit: int) -> Statement[int]:
        """Delete up to `limit` results, and as many groups, that have expired. -> how many."""
        return Statement(f"SELECT {self._sql}.expire_results(%s)", (limit,), lambda rows: int(rows[0][0]))

    # Waiting: on a session that keeps its server process

    def listen(self, senders: Sequence[str], buckets: Sequence[int]) -> Statement[Sequence[int]]:
        """Listen for results of what these senders sent, and of tasks in these buckets. -> the keys of their locks.

        Must be committed before the locks are taken.
        """
        return Statement(
            f"SELECT {self._sql}.listen_for_results(%s::text[], %s::integer[])",
            (list(senders), list(buckets)),
            lambda rows: list(rows[0][0]),
        )

    def stop_listening(self, keys: Iterable[int]) -> Statement[None]:
        """Listen no more for the results behind these keys, whose locks are released."""
        return Statement(f"SELECT {self._sql}.stop_listening(%s::bigint[])", (_array(keys),), _nothing)

    def stop_waiting(self, keys: Iterable[int]) -> Statement[None]:
        sql = "SELECT pg_advisory_unlock_shared(k) FROM unnest(%s::bigint[]) AS k"
        return Statement(sql, (_array(keys),), _nothing)

    def last_look(self, task_ids: Sequence[str], keys: Iterable[int]) -> Statement[Looked]:
        """Release the locks with these keys, then read the results, which are expected to be final."""
        sql = f"SELECT *, NULL FROM {self._sql}.get_results(%s::text[], %s)"
        return Statement(sql, (list(task_ids), _array(keys)), _read_look)

    def look(self, task_ids: Sequence[str], horizon: str | None, keys: Iterable[int]) -> Statement[Looked]:
        """Take the locks with these keys, then read the results.

        The look tells whether every transaction is over that may have stored one of them without a notification: those
        that ran when the locks were taken, by this look or by the one that gave the horizon.
        """
        locks = _array(keys)
        if horizon is None and locks == "{}":  # nothing is to be waited for: the same, cheaper
            sql = f"SELECT *, NULL FROM {self._sql}.get_results(%s::text[])"
            return Statement(sql, (list(task_ids),), _read_look)
        return Statement(
            f"SELECT * FROM {self._sql}.look_for_results(%s::text[], %s, %s)",
            (list(task_ids), horizon, locks),
            _read_look,
        )


def told(payload: str) -> StoredResult | None:
    """The result that is in a notification; None where it only names a task, or none."""
    if not payload.startswith(_RESULT):
        return None
    task_id, state, done, content_type, result, meta, group_id, parent_id = json.loads(payload[len(_RESULT) :])
    return StoredResult(
        task_id=task_id,
        state=state,
        date_done=_EPOCH + timedelta(microseconds=done),
        content_type=content_type,
        result=bytes.fromhex(result),
        meta=None if meta is None else bytes.fromhex(meta),
        traceback=None,
        group_id=group_id,
        parent_id=parent_id,
    )


def bucket(task_id: str) -> int:
    """Which of 64 a task's id falls into; the server's `bucket()`."""
    last = task_id[-2:]
    return (ord(last[-1]) + 31 * ord(last[0])) & 63 if last else 0


def _array(values: Iterable[int]) -> str:
    return "{" + ",".join(map(str, values)) + "}"


def _nothing(_: Rows) -> None:
    return None


def _read_look(rows: Rows) -> Looked:
    horizon = rows[-1][9] if rows else None
    return Looked([_stored(row) for row in rows if row[0] is not None], horizon)


def _stored(row: tuple[Any, ...]) -> StoredResult:
    return StoredResult(row[0], row[1], row[2], row[3], _bytes(row[4]), _bytes(row[5]), row[6], row[7], row[8])


def _bytes(value: Any) -> bytes | None:
    return None if value is None else bytes(value)
