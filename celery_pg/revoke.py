"""How does a revoke outlive the workers?

Whoever revokes publishes a control message, which reaches the workers that run now. Before it leaves, what it revokes
is written down here; a claim that comes upon such a task says so (`kombu_pg.message.REVOKED`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kombu.serialization import loads
from kombu.utils.functional import maybe_list

from celery_pg.store.revoke import RevokedStamp, RevokeStore
from kombu_pg.database import Database, Statement
from kombu_pg.message import Draft
from kombu_pg.transaction import transaction

__all__ = ["Stamps", "as_stamp", "record"]

_BY_ID = ("revoke", "terminate")
_BY_STAMP = "revoke_by_stamped_headers"


def record(database: Database, message: Draft) -> None:
    """What this control message revokes stays revoked. One to chosen workers (destination, pattern) is theirs alone.

    Raises:
        Unavailable: it is not known whether it was written down; the message was not sent.
    """
    statement = _statement(RevokeStore(database.options), _command(message))
    if statement is not None:
        with transaction(database) as opened:
            opened.run(statement)
            opened.durable = True


def _command(message: Draft) -> Mapping[str, Any]:
    # Our own process has just encoded it: it may be read whatever its serializer is.
    command = loads(message.body, message.content_type, message.content_encoding, force=True)
    return command if isinstance(command, Mapping) else {}


def _statement(store: RevokeStore, command: Mapping[str, Any]) -> Statement[None] | None:
    method, arguments = command.get("method"), command.get("arguments") or {}
    if command.get("destination") or command.get("pattern"):
        return None
    if method in _BY_ID:
        ids = [i for i in maybe_list(arguments.get("task_id")) or [] if isinstance(i, str) and "\0" not in i]
        return store.revoke(ids) if ids else None
    if method == _BY_STAMP:
        stamps = [(header, as_stamp(value)) for header, value in _stamps(arguments.get("headers"))]
        return store.revoke_stamps(stamps) if stamps else None
    return None


def _stamps(headers: Any) -> list[tuple[str, Any]]:
    if not isinstance(headers, Mapping):
        headers = dict(text.split("=", 1) for text in headers or [])
    return [(header, value) for header, values in headers.items() for value in maybe_list(values)]


def as_stamp(value: Any) -> str:
    """The value as two processes write it alike."""
    return json.dumps(value, sort_keys=True, default=str)


class Stamps:
    """What is revoked by stamped headers, as it was when it was last loaded."""

    def __init__(self) -> None:
        self._revoked: dict[tuple[str, str], RevokedStamp] = {}

    def load(self, database: Database) -> None:
        found = database.run(RevokeStore(database.options).stamps())
        self._revoked = {(stamp.header, stamp.stamp): stamp for stamp in found}

    def revoke(self, headers: Mapping[str, Any], message_id: int) -> bool:
        """A task with these headers is revoked."""
        if not self._revoked:
            return False
        stamps = headers.get("stamps")
        if not isinstance(stamps, Mapping):
            return False
        named = [name for name in maybe_list(headers.get("stamped_headers")) or [] if isinstance(name, str)]
        return any(
            (found := self._revoked.get((name, as_stamp(value)))) is not None
            and (found.recent or message_id <= found.upper)
            for name in named
            for value in maybe_list(stamps.get(name)) or []
        )
