"""What does a task message say about the call that it comes from?

Read here, never written: a message that passes the gate is what Celery made of the call, byte for byte.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from celery.app import amqp as celery_amqp

from celery_pg.gate_choice import Call

__all__ = ["call_of", "continues"]


def call_of(name: str, message: Any, options: Mapping[str, Any]) -> Call:
    """Return the call behind a message that is about to be sent, in the words of `apply_async`."""
    says = _says(message)
    args, kwargs, later = _parts(message)
    queue = options.get("queue")
    described = {key: value for key, value in options.items() if value is not None}
    described |= {key: says[key] for key in ("eta", "expires", "parent_id", "root_id") if says.get(key) is not None}
    described |= {"task_id": says["id"]}
    if queue is not None:
        described["queue"] = queue if isinstance(queue, str) else queue.name
    return Call(name, _unit(name, says, args, later), args, kwargs, described)


def continues(message: Any, request: Any) -> bool:
    """Whether the message goes on with this request (None: with one that no task of this thread is working on).

    A link, a link_error, the next step of a chain, a chord's body, a retry and a `replace()` do; a call that the
    task's own code makes does not, although Celery gives it the same root_id and parent_id.
    """
    says = _says(message)
    marked = _is_marked()
    if marked:
        return True
    if request is None:
        return says.get("parent_id") is not None  # Celery gives it by itself only to what a running task sends
    return (
        says["id"] == request.id  # a retry, or replaced by one task
        or (says.get("replaced_task_nesting") or 0) > (request.replaced_task_nesting or 0)
        or (request.group is not None and says.get("group") == request.group)  # add_to_chord()
        or says.get("parent_id") not in (None, request.id)  # link_error of a chord's body
        or _is_errback(says, _parts(message)[0], request)
        or (marked is None and _is_planned(says, request))
    )


def _says(message: Any) -> Mapping[str, Any]:
    """The headers; in protocol 1 the body says all that."""
    says: Mapping[str, Any] = message.headers if "id" in message.headers else message.body
    return says


def _parts(message: Any) -> tuple[Any, Any, Mapping[str, Any]]:
    """Arguments, keyword arguments, and what is to happen afterwards."""
    if isinstance(message.body, Mapping):
        return message.body["args"], message.body["kwargs"], message.body
    args, kwargs, later = message.body
    return args, kwargs, later


def _is_marked() -> bool | None:
    """Celery 5.7 marks, for as long as it lasts, that it sends what follows a task; Celery 5.6 does not: None."""
    mark = getattr(celery_amqp, "_callback_publish_retry", None)
    return None if mark is None else bool(mark.get())


def _is_planned(says: Mapping[str, Any], request: Any) -> bool:
    """Whether a task of that name is to follow the request: the next best, where nothing is marked."""
    follows = [*(request.callbacks or ()), *(request.chain or ())[-1:], request.chord]
    return says.get("task") in set(_names(follows))


def _names(signatures: Iterable[Any]) -> Iterator[str]:
    for signature in filter(None, signatures):
        inner = signature.get("kwargs") or {}
        header = inner.get("header") or ()
        yield signature["task"]
        yield from _names(inner.get("tasks") or ())
        yield from _names([header] if isinstance(header, Mapping) else header)


def _is_errback(says: Mapping[str, Any], args: Any, request: Any) -> bool:
    """An errback that is sent as a task gets the id of what failed before its own arguments."""
    names = {errback.get("task") for errback in request.errbacks or ()}
    return says.get("task") in names and says.get("parent_id") == request.id and tuple(args[:1]) == (request.id,)


def _unit(name: str, says: Mapping[str, Any], args: Any, later: Mapping[str, Any]) -> str:
    """What the messages of one chord, or of one group, have in common; else the task's id."""
    chord = later.get("chord") or _options(later.get("chain")).get("chord")
    if name == "celery.chord_unlock":  # the poll for a chord, where the result backend cannot count
        chord = args[1]
    unit = says.get("group") or says["id"]
    while chord:
        options = chord.get("options") or {}
        unit = options.get("task_id") or unit
        chord = options.get("chord")
    return str(unit)


def _options(chain: Any) -> Mapping[str, Any]:
    """Those of the chain's last step, which stands first."""
    return (chain[0].get("options") or {}) if chain else {}
