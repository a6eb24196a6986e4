"""How does a kombu message become a row and back?

What the store decides on (task, ids, eta, expiry, priority) becomes typed columns; everything else is two byte strings:
the body as it came, and headers with properties as one JSON text in which bytes, dates and decimals are tagged. SQL
never parses it: a NUL or a lone surrogate, which PostgreSQL's own json cannot hold, is just an escape in it.
"""

from __future__ import annotations

import base64
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timezone
from datetime import time as time_of_day
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from amqp.basic_message import Message as BasicMessage
from amqp.exceptions import PreconditionFailed
from kombu import message as kombu_message

from kombu_pg import errors
from kombu_pg.store import Outgoing, Row

if TYPE_CHECKING:
    from kombu_pg.channel import Channel

__all__ = ["Draft", "Message", "Raw", "decode", "encode", "unpacked"]

#: The property under which a message carries the id of its publish from one attempt to the next.
PUBLISH_ID = "pg_publish_id"
#: Properties of a delivered message that say which row it is and how often it came back.
MESSAGE_ID = "pg_message_id"
RETURNS = "pg_returns"
#: In the delivery info of a task that was revoked while it waited: it is not to be run.
REVOKED = "pg_revoked"
_FIRST_ATTEMPT = "pg_first_attempt"
#: What is sent of the properties: as with py-amqp, whatever else a caller passes on is not.
_PROPERTIES = frozenset(name for name, _ in BasicMessage.PROPERTIES)

_TRANSIENT = 1
_LONGEST_NAME = 255
#: Milliseconds, 300 years: more would be past the end of PostgreSQL's calendar some day.
LONGEST_TTL = 10**13
#: AMQP's priority is one byte; beyond it the nearest counts.
HIGHEST_PRIORITY = 255
_TAG = "\0type"
_TAG_IN_TEXT = '"\\u0000type"'
_TABLE = "table"


@dataclass(eq=False, slots=True)
class Draft:
    """What `prepare_message` made and `basic_publish` sends. (Not frozen: one is made per publish.)"""

    body: str | bytes
    priority: int | None
    content_type: str | None
    content_encoding: str | None
    headers: dict[str, Any]
    properties: dict[str, Any]


@dataclass(eq=False)
class Raw:
    """A row on its way to a consumer's callback."""

    row: Row
    body: str | bytes
    content_type: str | None
    content_encoding: str | None
    headers: dict[str, Any]
    properties: dict[str, Any]
    delivery_info: dict[str, Any]
    delivery_tag: int


class Message(kombu_message.Message):
    """A delivered message. Weakly referred to by the consumer: as long as it is alive, it stays leased."""

    @property
    def returns(self) -> int:
        """How often it came back to its queue, counted; 0 on its first delivery."""
        return int(self.properties[RETURNS])

    def requeue(self, delay: float | None = None) -> None:
        """Put the message back into its queue, counted; with `delay`, not before that many seconds.

        Raises:
            MessageStateError: it was settled before.
        """
        if delay is None:
            super().requeue()
        else:
            self._settle_at_once("REQUEUED", lambda: self.channel.requeue_later(self.delivery_tag, delay))

    def expect_result(self) -> None:
        """From now on an ack says that the task's result is stored in the schema that the message is from.

        If the server crashes in between, and has forgotten the result, the task runs again.
        """
        self.channel.expect_result(self.delivery_tag)

    def dead_letter(self, reason: str, kind: str = "rejected") -> None:
        """Put the message to the dead letters, with this reason; `kind` is one word for it.

        It takes the way of its queue's x-dead-letter-exchange, or is kept in the table `dead_letter`, task or not.

        Raises:
            MessageStateError: it was settled before.
        """
        self._settle_at_once("REJECTED", lambda: self.channel.dead_letter(self.delivery_tag, reason, kind))

    _state: str

    def _settle_at_once(self, state: str, settle: Callable[[], None]) -> None:
        if self.acknowledged:
            raise self.MessageStateError(f"the message was settled before, with state {self._state}")
        settle()
        self._state = state

    def __init__(self, raw: Raw, channel: Channel) -> None:
        super().__init__(
            body=raw.body,
            channel=channel,
            delivery_tag=raw.delivery_tag,
            content_type=raw.content_type,
            content_encoding=raw.content_encoding,
            delivery_info=raw.delivery_info,
            properties=raw.properties,
            headers=raw.headers,
        )
        if raw.delivery_info["consumer_tag"] not in channel.no_ack_consumers:
            channel.connection_of_messages.consumer.hold(raw.row.id, self, raw.row.returns)


# Out -----------------------------------------------------------------------------------------------------------


def encode(draft: Draft, exchange: str, routing_key: str, *, mandatory: bool, max_size: int) -> Outgoing:
    """Return the draft as a row.

    A second call with the same properties is a retry of the same publish and says so.

    Raises:
        Rejected: the body is too large, a header cannot be encoded, or a name is not one that AMQP allows.
        PreconditionFailed: the expiration is not a number of milliseconds.
    """
    body = draft.body.encode("utf-8", "surrogatepass") if isinstance(draft.body, str) else bytes(draft.body or b"")
    if len(body) > max_size:
        raise errors.Rejected(
            f"message body of {len(body):,} bytes is larger than max_message_size, {max_size:,} bytes: "
            "store it elsewhere and send a reference, or raise the limit"
        )
    properties, headers = draft.properties, draft.headers
    first_attempt = properties.get(_FIRST_ATTEMPT)
    if not isinstance(first_attempt, float):
        first_attempt = None
        properties[PUBLISH_ID] = os.urandom(16).hex()
        properties[_FIRST_ATTEMPT] = time.monotonic()
    task = _text(headers.get("task"))
    return Outgoing(
        persistent=properties.get("delivery_mode") != _TRANSIENT,
        exchange=checked_name("exchange", exchange),
        routing_key=checked_name("routing key", routing_key),
        priority=min(max(int(draft.priority), 0), HIGHEST_PRIORITY) if isinstance(draft.priority, int) else 0,
        ttl=_milliseconds(properties.get("expiration")),
        due=_instant(headers.get("eta")) if task is not None else None,
        task=task,
        task_id=_text(headers.get("id")) if task is not None else None,
        reply_to=_text(properties.get("reply_to")),
        properties=_pack(draft),
        body=body,
        publish_id=properties[PUBLISH_ID],
        retry_age=None if first_attempt is None else time.monotonic() - first_attempt,
        mandatory=mandatory,
    )


def routing_headers(headers: Mapping[str, Any] | None) -> str:
    """The headers as a headers exchange compares them: a JSON object that PostgreSQL's jsonb can hold."""
    return json.dumps({key: _comparable(value) for key, value in (headers or {}).items() if _text(key) is not None})


def _comparable(value: Any) -> Any:
    """The value itself, or an object that equals nothing but the same of an equal value."""
    if value is None or isinstance(value, int) or _text(value) is not None:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return {"repr": ascii(value)}


def checked_name(what: str, name: str) -> str:
    """Return the name of an entity as AMQP allows it: at most 255 bytes of UTF-8, without NUL.

    Raises:
        Rejected: it is something else.
    """
    if len(name) <= _LONGEST_NAME and name.isascii() and "\0" not in name:
        return name
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise errors.Rejected(f"{what} {name!r} has a lone surrogate: names are UTF-8") from None
    if size > _LONGEST_NAME:
        raise errors.Rejected(
            f"{what} {name[:40]!r}... has {size} bytes, more than the {_LONGEST_NAME} that AMQP allows"
        )
    if "\0" in name:
        raise errors.Rejected(f"{what} {name!r} has a NUL: PostgreSQL cannot store it")
    return name


def _text(value: object) -> str | None:
    # A column holds what can be looked for; what a column cannot hold (NUL, surrogates) is still in the headers.
    if not isinstance(value, str) or "\0" in value:
        return None
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value


def _milliseconds(value: object) -> int | None:
    if value is None:
        return None
    try:
        milliseconds = int(value) if isinstance(value, str | int | float) else -1
    except (ValueError, OverflowError):
        milliseconds = -1
    if not 0 <= milliseconds <= LONGEST_TTL:
        raise PreconditionFailed(f"expiration is {value!r}, not a number of milliseconds", (60, 40), reply_code=406)
    return milliseconds


def _instant(value: object) -> str | None:
    """An eta header as the server reads it; None where it is not one (the worker says what is wrong with it)."""
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).isoformat()
    except ValueError:
        return None


def _pack(draft: Draft) -> bytes:
    packed: dict[str, Any] = {
        "h": draft.headers,
        "p": {key: value for key, value in draft.properties.items() if key in _PROPERTIES and value is not None},
    }
    if draft.content_type is not None:
        packed["t"] = draft.content_type
    if draft.content_encoding is not None:
        packed["e"] = draft.content_encoding
    if isinstance(draft.body, str):
        packed["s"] = 1
    if draft.priority is not None:
        packed["p"]["priority"] = draft.priority
    try:
        text = _dumps(packed)
        return (_dumps(_escaped(packed)) if _TAG_IN_TEXT in text else text).encode("ascii")
    except (TypeError, ValueError, RecursionError) as exc:
        raise errors.Rejected(f"a header or property cannot be encoded: {exc}") from exc


def _escaped(value: Any) -> Any:
    """The value with every table that has our tag's name for a key written as a list of pairs."""
    if isinstance(value, dict):
        table = {key: _escaped(item) for key, item in value.items()}
        return {_TAG: _TABLE, "v": list(table.items())} if _TAG in table else table
    return [_escaped(item) for item in value] if isinstance(value, list | tuple) else value


def _tagged(value: object) -> dict[str, str]:
    for name, (kind, write, _) in _TAGGED.items():
        if isinstance(value, kind):
            return {_TAG: name, "v": write(value)}
    raise TypeError(f"{type(value).__name__} is neither JSON nor bytes, date, time, Decimal or UUID")


_TAGGED: dict[str, tuple[type | tuple[type, ...], Callable[[Any], str], Callable[[str], Any]]] = {
    "bytes": ((bytes, bytearray, memoryview), lambda v: base64.b64encode(v).decode(), base64.b64decode),
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "date": (date, date.isoformat, date.fromisoformat),
    "time": (time_of_day, time_of_day.isoformat, time_of_day.fromisoformat),
    "decimal": (Decimal, str, Decimal),
    "uuid": (uuid.UUID, str, uuid.UUID),
}
_dumps = json.JSONEncoder(default=_tagged, separators=(",", ":"), check_circular=True).encode


# In ------------------------------------------------------------------------------------------------------------


def decode(row: Row, consumer_tag: str, delivery_tag: int) -> Raw:
    """Return the row as a callback gets it."""
    packed = _unpack(row.properties)
    properties = packed["p"]
    properties[MESSAGE_ID] = row.id
    properties[RETURNS] = row.returns
    info = {
        "exchange": row.exchange,
        "routing_key": row.routing_key,
        "redelivered": row.redelivered,
        "consumer_tag": consumer_tag,
        "delivery_tag": delivery_tag,
        "priority": properties.get("priority"),
    }
    if row.revoked:
        info[REVOKED] = True
    if row.deaths:
        packed["h"].update(_death_headers(row.deaths, properties.pop("expiration", None)))
    return Raw(
        row=row,
        body=row.body.decode("utf-8", "surrogatepass") if packed.get("s") else row.body,
        content_type=packed.get("t"),
        content_encoding=packed.get("e"),
        headers=packed["h"],
        properties=properties,
        delivery_info=info,
        delivery_tag=delivery_tag,
    )


def _death_headers(deaths: list[dict[str, Any]], expiration: str | None) -> dict[str, Any]:
    for death in deaths:
        # As py-amqp reads it: UTC, and without saying so.
        death["time"] = datetime.fromtimestamp(death["time"], timezone.utc).replace(tzinfo=None)
        if death.pop("first"):
            first = death
    if expiration is not None:
        first["original-expiration"] = expiration
    return {
        "x-death": deaths,
        "x-first-death-queue": first["queue"],
        "x-first-death-reason": first["reason"],
        "x-first-death-exchange": first["exchange"],
    }


def unpacked(properties: bytes) -> tuple[dict[str, Any], str | None, str | None]:
    """-> headers, content type and content encoding of a stored message."""
    packed = _unpack(properties)
    return packed["h"], packed.get("t"), packed.get("e")


def _unpack(data: bytes) -> dict[str, Any]:
    text = data.decode()
    # The hook costs a call per object; hardly any message needs it.
    unpacked, _ = (_tagged_decoder if _TAG_IN_TEXT in text else _decoder).raw_decode(text)
    return unpacked  # type: ignore[no-any-return]


def _untagged(value: dict[str, Any]) -> Any:
    if _TAG not in value:
        return value
    if value[_TAG] == _TABLE:
        return dict(value["v"])
    return _TAGGED[value[_TAG]][2](value["v"])


# Not json.loads: it looks for the encoding first, and for white space behind.
_decoder, _tagged_decoder = json.JSONDecoder(), json.JSONDecoder(object_hook=_untagged)
