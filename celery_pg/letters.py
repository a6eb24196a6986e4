"""What does an operator see of dead letters?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from celery_pg.screen import Cell, Column, Table, duration, number, shortened, visible
from celery_pg.store.dead_letters import PREVIEW, DeadLetter, Listed
from kombu_pg.message import unpacked

__all__ = ["letter", "letter_as_json", "letters", "listed_as_json"]

_COLUMNS = (
    Column("id", right=True),
    Column("queue"),
    Column("reason"),
    Column("task"),
    Column("task id"),
    Column("dead for", right=True),
    Column("returns", right=True),
    Column("heard"),
    Column("detail"),
)

#: Values of headers that say nothing.
_USUAL: tuple[Any, ...] = (None, [], {}, [None, None])


def letters(found: Sequence[Listed], *, more: bool) -> Iterator[Table | Cell]:
    """A line for each; `more`: there are others."""
    yield Table("", _COLUMNS, [_line(one) for one in found], "there is no dead letter")
    if more:
        yield Cell(f"... and more after {found[-1].id} (--after, -n)", "dim")


def _line(one: Listed) -> list[Cell | str]:
    return [
        str(one.id),
        visible(one.queue),
        one.reason,
        shortened(one.task or "not a task", 60),
        shortened(one.task_id or "", 40),
        duration(one.age),
        number(one.returns),
        "yes" if one.heard else Cell("no", "warn"),
        shortened(one.detail or "", 100),
    ]


def listed_as_json(one: Listed) -> dict[str, Any]:
    """A line of the list."""
    return asdict(one)


def letter(one: DeadLetter) -> Iterator[Cell | str]:
    """Some lines about one, its body as far as PREVIEW goes."""
    yield Cell(f"{one.id}  {shortened(one.task or 'not a task', 80)}", "strong")
    headers, content_type, _ = unpacked(one.properties)
    said = {
        "queue": one.queue,
        "reason": one.reason,
        "detail": one.detail,
        "dead at": str(one.dead_at),
        "heard at": str(one.heard_at) if one.heard_at else "nobody has heard of it yet",
        "returns": str(one.returns),
        "task id": one.task_id,
        "sent to": f"exchange {one.exchange!r}, routing key {one.routing_key!r}",
        "type": content_type,
        **{f"header {name}": str(value) for name, value in headers.items() if value not in _USUAL},
        "body": _body(one),
    }
    for name, value in said.items():
        if value:
            yield f"    {visible(name):<16} {shortened(value, 1000)}"


def _body(one: DeadLetter) -> str:
    return one.body[:PREVIEW].decode("utf-8", "backslashreplace")


def letter_as_json(one: DeadLetter) -> dict[str, Any]:
    """Headers whole, the body as far as PREVIEW goes."""
    headers, content_type, content_encoding = unpacked(one.properties)
    columns = asdict(one)
    del columns["properties"]
    return {
        **columns,
        "size": len(one.body),
        "body": _body(one),
        "content_type": content_type,
        "content_encoding": content_encoding,
        "headers": headers,
    }
