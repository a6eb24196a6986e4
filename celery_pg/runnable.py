"""Can a worker run this message?

Celery trusts what a message says: of a body or a header that is not what it should be its worker dies, or drops the
message without a word.
"""

from __future__ import annotations

import math
from typing import Any

import celery
from celery.exceptions import InvalidTaskError
from celery.utils.time import maybe_iso8601, maybe_make_aware, timezone

from kombu_pg.message import Message

__all__ = ["BEFORE_5_7", "malformed", "problem_of", "require_runnable"]

BEFORE_5_7 = celery.VERSION < (5, 7)
_CALLED = ("callbacks", "errbacks", "chain")


def problem_of(message: Message) -> str | None:
    """What is wrong with a message of which Celery's worker would die, or that it would drop; None if nothing is."""
    headers = message.headers
    first = not isinstance(headers, dict) or "task" not in headers
    if not first and not _names(headers):
        return "the headers name no task, or no id"
    if BEFORE_5_7 and not first and _is_out_of_range(headers.get("eta")):
        return f"eta {headers['eta']} is out of range"
    try:
        payload = message.payload
    except Exception:  # noqa: BLE001 - any decoder's
        return None  # what cannot be decoded has callbacks of its own
    if first:
        return _malformed_first(headers or {}, payload)
    return None if isinstance(payload, dict) and "args" in payload else malformed(payload)


def _malformed_first(headers: Any, payload: Any) -> str | None:
    """Of Celery's first protocol, where all is in the body. None, too, for what is nothing of Celery's."""
    if not isinstance(payload, dict) or "task" not in payload:
        return None
    if not _names(payload):
        return "the body names no task, or no id"
    eta = headers.get("eta", payload.get("eta"))
    # Celery would reject it, which is the end of a message whose headers name no task.
    return f"eta {eta} is out of range" if _is_out_of_range(eta) else None


def _names(fields: dict[str, Any]) -> bool:
    return isinstance(fields["task"], str) and isinstance(fields.get("id"), str)


def _is_out_of_range(eta: Any) -> bool:
    """A time that Celery can read, and then rejects the message; Celery 5.6 runs it all the same."""
    try:
        moment = maybe_iso8601(eta) if eta else None
    except (AttributeError, TypeError, ValueError):
        return False  # no time at all: that is told by the request
    try:
        if moment is not None:
            timezone.to_system(maybe_make_aware(moment)).timestamp()
    except (OverflowError, ValueError):
        return True
    return False


def require_runnable(request: Any) -> None:
    """The pool can keep to the limits, and the worker can count the task under its name.

    Raises:
        InvalidTaskError: Celery would die of it, or never acknowledge the message.
    """
    name, limits = request.name, request.time_limits
    if not isinstance(name, str):
        raise InvalidTaskError(f"shadow is {name!r:.60}, not a name")
    if not (isinstance(limits, list | tuple) and len(limits) == 2 and all(map(_is_limit, limits))):
        raise InvalidTaskError(f"timelimit is {limits!r:.60}, not [hard, soft]")


def _is_limit(value: Any) -> bool:
    if not isinstance(value, int | float):
        return value is None
    try:
        return not math.isnan(value)
    except OverflowError:  # no float is as great
        return False


def malformed(payload: Any) -> str | None:
    """What is wrong with a decoded body of Celery's second protocol, None if nothing is."""
    if not isinstance(payload, list | tuple) or len(payload) != 3:
        return f"the body is {_shown(payload)}, not [args, kwargs, embed]"
    args, kwargs, embed = payload
    if not isinstance(args, list | tuple | None):
        return f"args are {_shown(args)}, not a list"
    if not isinstance(kwargs, dict | None):
        return f"kwargs are {_shown(kwargs)}, not a dict"
    if embed is None:
        return None
    if not isinstance(embed, dict):
        return f"what is embedded is {_shown(embed)}, not a dict"
    for name in _CALLED:
        if not isinstance(embed.get(name), list | tuple | None):
            return f"{name} are {_shown(embed[name])}, not a list"
    if not isinstance(embed.get("chord"), dict | None):
        return f"chord is {_shown(embed['chord'])}, not a dict"
    return None


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"
