"""How does what stands in the store read?

Statements' answers as tables and lines for people, and as values for `--json`. Whatever came from a message is made
visible: a NUL, a lone surrogate or an escape sequence in it must neither fail nor reach the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from celery_pg.screen import Cell, Column, Table, duration, number, shortened, visible
from celery_pg.store.operator import CAP, ConsumerStatus, Horizon, QueueStatus, Server, Waiting
from celery_pg.store.results import ResultStatus
from kombu_pg.message import unpacked

__all__ = [
    "Status",
    "declared",
    "declared_as_json",
    "results",
    "results_as_json",
    "status",
    "status_as_json",
    "waiting",
    "waiting_as_json",
]

#: Seconds after which whoever holds the horizon is worth a warning.
LONG_TRANSACTION = 60.0
#: Characters of arguments, and of one header.
ARGUMENTS = 200
HEADER = 60

_COUNTS = ("ready", "unacked", "scheduled", "dead")
# What the lines of a message say already.
_SHOWN_HEADERS = frozenset({"argsrepr", "eta", "id", "kwargsrepr", "lang", "task"})


@dataclass(frozen=True, slots=True)
class Status:
    """Everything that `status` asked."""

    schema: str
    version: int
    newest: int
    server: Server
    queues: Sequence[QueueStatus]
    consumers: Sequence[ConsumerStatus]
    horizon: Horizon


# Status


def status(seen: Status, *, everything: bool) -> Iterator[Table | Cell | str]:
    """One screen: queues, consumers, and what vacuum and the schema need a person for."""
    shown = [queue for queue in seen.queues if everything or not _comes_and_goes(queue)]
    yield Table("Queues", _QUEUE_COLUMNS, [_queue_row(queue) for queue in shown], "there is none")
    if hidden := len(seen.queues) - len(shown):
        yield Cell(f"and {number(hidden)} for control, events and replies, empty: --all shows them", "dim")
    yield ""
    rows = [_consumer_row(consumer) for consumer in seen.consumers]
    yield Table("Consumers", _CONSUMER_COLUMNS, rows, "there is none: nothing will run")
    yield ""
    yield _schema_line(seen)
    yield _horizon_line(seen.horizon)


def _comes_and_goes(queue: QueueStatus) -> bool:
    busy = queue.ready or queue.unacked or queue.scheduled or queue.dead or queue.paused
    return not busy and bool(queue.exclusive or queue.auto_delete)


_QUEUE_COLUMNS = (
    Column("queue"),
    *(Column(name, right=True) for name in (*_COUNTS, "oldest", "consumers")),
    Column(""),
)


def _queue_row(queue: QueueStatus) -> list[Cell | str]:
    state = Cell("")
    if queue.id is None:
        state = Cell("deleted", "dim")
    elif queue.paused:
        state = Cell("paused", "warn")
    starving = queue.ready and not queue.consumers and queue.id is not None
    return [
        visible(queue.name),
        number(queue.ready, CAP),
        number(queue.unacked) + ("+" if queue.unacked_more else ""),
        number(queue.scheduled, CAP),
        Cell(number(queue.dead, CAP), "bad" if queue.dead else ""),
        duration(queue.oldest_age),
        Cell("" if queue.id is None else number(queue.consumers), "warn" if starving else ""),
        state,
    ]


_CONSUMER_COLUMNS = (
    Column("host"),
    Column("pid", right=True),
    Column("state"),
    Column("holds", right=True),
    Column("for", right=True),
    Column("longest held"),
    Column("queues"),
)


def _consumer_row(consumer: ConsumerStatus) -> list[Cell | str]:
    state = Cell("alive", "good") if consumer.alive else Cell(f"lost {duration(consumer.lost_for)}".rstrip(), "bad")
    return [
        visible(consumer.hostname),
        str(consumer.pid),
        state,
        number(consumer.held) + ("+" if consumer.held_more else ""),
        duration(consumer.held_for),
        ", ".join(dict.fromkeys(shortened(held.task or f"message {held.id}", 40) for held in consumer.longest)),
        ", ".join(visible(name) for name in consumer.queues if not name.endswith(".celery.pidbox")),
    ]


def _schema_line(seen: Status) -> Cell:
    age = "" if seen.version == seen.newest else f" (this release: {seen.newest})"
    server = f'database "{visible(seen.server.database)}", PostgreSQL {seen.server.version.partition(" ")[0]}'
    return Cell(f'Schema "{seen.schema}" at version {seen.version}{age}, {server}')


def _horizon_line(horizon: Horizon) -> Cell:
    unseen = "" if horizon.everything_seen else " (of other roles nothing is seen: GRANT pg_read_all_stats)"
    if horizon.kind is None:
        return Cell(f"Vacuum is held back by nobody{unseen}")
    who = visible(" ".join(filter(None, [horizon.kind, str(horizon.pid or "") or None, horizon.application])))
    details = [part for part in (horizon.role, horizon.state) if part]
    held = f" for {duration(horizon.age)}" if horizon.age is not None else ""
    long = horizon.age is None or horizon.age > LONG_TRANSACTION
    line = f"Vacuum is held back by {who} ({visible(', '.join(details))}){held}, {number(horizon.transactions or 0)}"
    return Cell(f"{line} transactions{unseen}", "warn" if long else "")


def status_as_json(seen: Status) -> dict[str, Any]:
    """Counts are at most CAP; the names of those that may be more are in "capped"."""
    return {
        "schema": {"name": seen.schema, "version": seen.version, "release": seen.newest},
        "server": asdict(seen.server),
        "queues": [_queue_as_json(queue) for queue in seen.queues],
        "consumers": [_consumer_as_json(consumer) for consumer in seen.consumers],
        "horizon": asdict(seen.horizon),
    }


def _queue_as_json(queue: QueueStatus) -> dict[str, Any]:
    counts = {name: getattr(queue, name) for name in _COUNTS}
    capped = [name for name, value in counts.items() if value > CAP or (name == "unacked" and queue.unacked_more)]
    return {
        "name": queue.name,
        **{name: min(value, CAP) for name, value in counts.items()},
        "capped": capped,
        "oldest_age": queue.oldest_age,
        "next_due": queue.next_due,
        "consumers": queue.consumers,
        "paused": queue.paused,
        "deleted": queue.id is None,
    }


def _consumer_as_json(consumer: ConsumerStatus) -> dict[str, Any]:
    return {**asdict(consumer), "queues": list(consumer.queues)}


# Queues


def declared(queues: Sequence[QueueStatus]) -> Table:
    """The queues with what they were declared with."""
    rows = [[visible(queue.name), ", ".join(_flags(queue)), _arguments_line(queue)] for queue in queues]
    return Table("", (Column("queue"), Column("is"), Column("arguments")), rows, "there is no queue")


def _flags(queue: QueueStatus) -> list[str]:
    flags = {"durable": queue.durable, "exclusive": queue.exclusive, "auto-delete": queue.auto_delete}
    return [name for name, is_set in flags.items() if is_set] + (["paused"] if queue.paused else [])


def _arguments(queue: QueueStatus) -> dict[str, Any]:
    arguments: dict[str, Any] = json.loads(queue.arguments or "{}")
    return arguments


def _arguments_line(queue: QueueStatus) -> str:
    return ", ".join(f"{visible(name)}={visible(str(value))}" for name, value in _arguments(queue).items())


def declared_as_json(queue: QueueStatus) -> dict[str, Any]:
    """As it was declared, arguments by their AMQP names."""
    return {
        "name": queue.name,
        "durable": queue.durable,
        "exclusive": queue.exclusive,
        "auto_delete": queue.auto_delete,
        "paused": queue.paused,
        "arguments": _arguments(queue),
    }


# Messages


def waiting(queue: str, messages: Sequence[Waiting]) -> Iterator[Cell | str]:
    """Some lines for each message."""
    if not messages:
        yield Cell(f"nothing waits in queue {visible(queue)!r}", "dim")
    for message in messages:
        content = _content(message)
        yield Cell(f"{message.id}  {shortened(content.task or 'not a task', 80)}", "strong")
        yield f"    {_state(message)}"
        if content.task_id:
            yield f"    id       {shortened(content.task_id, 80)}"
        yield f"    {'args' if content.arguments else 'body'}     {content.arguments or content.body}"
        if headers := ", ".join(_headers(content)):
            yield f"    headers  {headers}"


def _headers(content: _Content) -> Iterator[str]:
    for name, value in content.headers.items():
        usual = value in (None, 0, [], {}, [None, None]) or (name == "root_id" and value == content.task_id)
        if name not in _SHOWN_HEADERS and not usual:
            yield f"{visible(name)}={shortened(str(value), HEADER)}"


@dataclass(frozen=True, slots=True)
class _Content:
    """What could be read of a message; nothing in it moves a cursor, except headers and the task's names."""

    task: str | None
    task_id: str | None
    arguments: str
    body: str
    content_type: str | None
    content_encoding: str | None
    headers: dict[str, Any]


def _content(message: Waiting) -> _Content:
    body = shortened(message.body.decode("utf-8", "backslashreplace"), ARGUMENTS)
    try:
        headers, content_type, content_encoding = unpacked(message.properties)
        given = [str(headers[name]) for name in ("argsrepr", "kwargsrepr") if headers.get(name) not in (None, "{}")]
    except (ValueError, TypeError, KeyError, AttributeError):
        return _Content(message.task, message.task_id, "", body, None, None, {})
    # A name that no column can hold is in the headers still.
    return _Content(
        message.task or _text(headers.get("task")),
        message.task_id or _text(headers.get("id")),
        shortened(" ".join(given), ARGUMENTS),
        body,
        content_type,
        content_encoding,
        headers,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _state(message: Waiting) -> str:
    parts = ["ready" if message.due_in is None else f"due in {duration(message.due_in)}"]
    parts.append(f"published {duration(message.age)} ago")
    if message.returns:
        parts.append(f"returned {number(message.returns)} times" if message.returns > 1 else "returned once")
    if message.priority:
        parts.append(f"priority {message.priority}")
    if message.expires_in is not None:
        parts.append(f"expires in {duration(message.expires_in)}")
    return ", ".join([*parts, f"{number(message.size)} bytes"])


def waiting_as_json(message: Waiting) -> dict[str, Any]:
    """Headers whole, the body as far as it was read."""
    content = _content(message)
    columns = asdict(message)
    del columns["properties"], columns["body"]
    return {
        **columns,
        "task": content.task,
        "task_id": content.task_id,
        "content_type": content.content_type,
        "content_encoding": content.content_encoding,
        "headers": content.headers,
        "body": message.body.decode("utf-8", "backslashreplace"),
    }


# Results

_RESULT_COLUMNS = (
    Column("task id"),
    Column("task"),
    Column("state"),
    Column("stored", right=True),
    Column("ran", right=True),
    Column("retries", right=True),
    Column("worker"),
)
_RESULT_STYLES = {"SUCCESS": "good", "FAILURE": "bad"}


def results(seen: Sequence[ResultStatus], *, tracebacks: bool) -> Iterator[Table | Cell | str]:
    """A line for each result, and its traceback where it was asked for by its id."""
    yield Table("Results", _RESULT_COLUMNS, [_result_row(result) for result in seen], "there is none")
    for result in seen:
        if tracebacks and result.traceback:
            yield ""
            yield from (visible(line) for line in result.traceback.rstrip().splitlines())


def _result_row(result: ResultStatus) -> list[Cell | str]:
    return [
        visible(result.id),
        shortened(result.name or "", HEADER),
        Cell(visible(result.state), _RESULT_STYLES.get(result.state, "")),
        f"{duration(result.age)} ago",
        duration(result.runtime),
        "" if result.retries is None else number(result.retries),
        shortened(result.worker or "", HEADER),
    ]


def results_as_json(seen: Sequence[ResultStatus]) -> list[dict[str, Any]]:
    """All that is known of each."""
    return [asdict(result) for result in seen]
