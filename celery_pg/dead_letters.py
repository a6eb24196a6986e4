"""Who hears of a message that cannot be delivered?

Its task's result, its `link_error` and its chord. SQL, or a worker that cannot run a message, moves it to the table
`dead_letter`; a worker of that queue then records the failure, calls the errbacks and returns the chord's part. Where
the result backend is in the same store, all that is one transaction with the note that it was heard.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from celery import states
from celery.app.task import Context
from celery.exceptions import CeleryError, InvalidTaskError, NotRegistered, Reject, TaskRevokedError
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.message import Message
from kombu.serialization import prepare_accept_content

from celery_pg.runnable import malformed
from celery_pg.store.dead_letters import DeadLetter, DeadLetterStore
from kombu_pg import errors
from kombu_pg.database import Database
from kombu_pg.message import MESSAGE_ID, decode
from kombu_pg.store import Row
from kombu_pg.transaction import transaction

__all__ = ["DeadLettered", "Heard", "Listener", "hear"]

logger = logging.getLogger(__name__)

#: Attempts to tell of it before it is given up; the last one is without the errbacks.
ATTEMPTS = 3
#: Seconds after which a look pauses: the worker has other things to do.
LONGEST_LOOK = 0.25

_EXPIRED = "expired"
_JSON = "application/json"


class DeadLettered(CeleryError):
    """The message of a task was not delivered, or too often, and is now a dead letter."""


@dataclass(frozen=True)
class Heard:
    """What was told, and of what. problem: whom it could not be told, and why."""

    letter: DeadLetter
    request: Context
    exception: Exception
    state: str
    problem: str | None


def hear(app: Any, letter: DeadLetter, *, call_errbacks: bool = True) -> Heard:
    """The failure of the letter's task is recorded, its errbacks are called, its chord has the part.

    In the transaction that is open, as far as broker and result backend are in its store.
    """
    request, problem = _request(app, letter)
    exception = _exception(letter)
    state = states.REVOKED if letter.reason == _EXPIRED else states.FAILURE
    if not request.id:
        return Heard(letter, request, exception, state, "nobody can be told: it names no task id")
    task = app.tasks.get(request.task)
    backend = app.backend if task is None else task.backend
    backend.mark_as_failure(
        request.id,
        exception,
        request=request,
        store_result=_is_stored(app, task, request),
        call_errbacks=call_errbacks,
        state=state,
    )
    if problem and request.group:
        # Whose part it is, is known; which body waits for it, only to the other parts.
        backend.on_chord_part_return(request, state, exception)
    return Heard(letter, request, exception, state, problem)


def _is_stored(app: Any, task: Any, request: Context) -> bool:
    ignored = request.ignore_result
    if ignored is None:
        ignored = app.conf.task_ignore_result if task is None else task.ignore_result
    anyway = app.conf.task_store_errors_even_if_ignored if task is None else task.store_errors_even_if_ignored
    return bool(not ignored or anyway)


def _exception(letter: DeadLetter) -> Any:
    reason, detail = letter.reason, letter.detail or ""
    if reason == _EXPIRED:
        return TaskRevokedError("expired")
    if reason == "unknown_task":
        return NotRegistered(letter.task)
    if reason == "content_type":
        return ContentDisallowed(detail)
    if reason == "undecodable":
        return DecodeError(detail)
    if reason in ("malformed", "invalid_header"):
        return InvalidTaskError(detail)
    if reason == "rejected":
        return Reject(detail or f"rejected by a consumer of queue {letter.queue!r}", requeue=False)
    if reason == "delivery_limit":
        return DeadLettered(
            f"returned to queue {letter.queue!r} {letter.returns} times, more than its delivery limit allows "
            f"(workers that died with it, or rejected it): now dead letter {letter.id}"
        )
    if reason == "maxlen":
        return DeadLettered(f"queue {letter.queue!r} was full (x-max-length): now dead letter {letter.id}")
    return DeadLettered(f"{reason}: {detail}: now dead letter {letter.id}")


def _request(app: Any, letter: DeadLetter) -> tuple[Context, str | None]:
    """What the task would have had as its request, and what is not known of it."""
    row = Row(letter.id, 0, True, letter.returns, 0, False, letter.exchange, letter.routing_key, letter.properties,
              letter.body, 0, None)  # fmt: skip
    raw = decode(row, "", 0)
    headers = dict(raw.headers)
    embed, problem = _embedded(app, raw, headers)
    headers.update(
        # Without the message's id: there is nothing left that the end of the task could finish.
        properties={name: value for name, value in raw.properties.items() if name != MESSAGE_ID},
        reply_to=raw.properties.get("reply_to"),
        correlation_id=raw.properties.get("correlation_id"),
        delivery_info={**raw.delivery_info, "is_eager": False},
    )
    context = Context({**_NOTHING_EMBEDDED, **headers, **embed})
    for name in ("id", "task", "group"):
        if not isinstance(getattr(context, name, None), str):
            setattr(context, name, None)
    return context, problem


_NOTHING_EMBEDDED: dict[str, Any] = {
    "callbacks": None,
    "errbacks": None,
    "chain": None,
    "chord": None,
    "args": (),
    "kwargs": {},
}


def _embedded(app: Any, raw: Any, headers: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    unknown = "its link_error and its chord are not known: "
    message = Message(
        body=raw.body, content_type=raw.content_type, content_encoding=raw.content_encoding, headers=raw.headers,
        accept=prepare_accept_content(app.conf.accept_content),
    )  # fmt: skip
    try:
        if message.errors:
            message._reraise_error()
        payload = message.decode()
    except Exception as exc:  # noqa: BLE001 - any decoder's
        payload = _plain(app, raw.body)
        if malformed(payload) is not None:
            return {}, f"{unknown}the body cannot be read ({exc})"
    if isinstance(payload, dict):
        return _first_protocol(payload, headers), None
    problem = malformed(payload)
    if problem is None:
        args, kwargs, embed = payload
        return {**(embed or {}), "args": args, "kwargs": kwargs}, None
    if isinstance(payload, list) and len(payload) == 3 and isinstance(payload[2], dict):
        embed = {key: value for key, value in payload[2].items() if key not in problem.split()[:1]}
        return embed, None
    return {}, unknown + problem


def _plain(app: Any, body: Any) -> Any:
    """The body as plain JSON, None if it is none: a value that cannot be decoded stays as it was encoded.

    So it is known who is to be called where a header is wrong, or an argument has a type that is not known here.
    """
    if _JSON not in prepare_accept_content(app.conf.accept_content):
        return None  # what it says must not be believed
    try:
        return json.loads(body)
    except (TypeError, ValueError, RecursionError):
        return None


def _first_protocol(payload: dict[str, Any], headers: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": headers.get("id", payload.get("id")),
        "task": headers.get("task", payload.get("task")),
        "group": headers.get("group", payload.get("taskset")),
        "args": payload.get("args") or (),
        "kwargs": payload.get("kwargs") or {},
        "errbacks": payload.get("errbacks"),
        "chord": payload.get("chord"),
    }


class Listener:
    """Hears, for one worker, of the dead letters of its queues; each is heard by one worker.

    What cannot be told is tried again, the last time without the errbacks; after ATTEMPTS the row says that, and why.
    """

    def __init__(self, app: Any, database: Database) -> None:
        self._app = app
        self._database = database
        self._store = DeadLetterStore(database.options)
        self._failed: dict[int, list[str]] = {}

    def look(self, queues: Iterable[str], on_heard: Callable[[Heard], None]) -> bool:
        """Hear of what is there; blocks for that, but not much longer than LONGEST_LOOK. -> there is more.

        Raises:
            Unavailable: the store or the result backend is not there; what was not heard will be.
        """
        until = time.monotonic() + LONGEST_LOOK
        for queue in self._database.run(self._store.unheard(list(queues))):
            after = 0
            while (letter_id := self._hear_next(queue, after, on_heard)) is not None:
                after = letter_id
                if time.monotonic() > until:
                    return True
        return False

    def forget(self) -> None:
        """Drop what was heard of longer ago than the retention."""
        self._database.run(self._store.forget())

    def _hear_next(self, queue: str, after: int, on_heard: Callable[[Heard], None]) -> int | None:
        letter = heard = None
        try:
            with transaction(self._database) as opened:
                letter = opened.run(self._store.next_unheard(queue, after))
                if letter is None:
                    return None
                heard = self._tell(letter)
                opened.run(self._store.heard(letter.id, _storable(heard.problem)))
                opened.durable = True
        except Exception as exc:
            if letter is None or _is_transient(exc):
                raise
            self._note(letter, exc)
            return letter.id
        self._failed.pop(letter.id, None)
        _log(letter, repr(heard.exception))
        on_heard(heard)
        return letter.id

    def _tell(self, letter: DeadLetter) -> Heard:
        failed = self._failed.get(letter.id, [])
        last = len(failed) >= ATTEMPTS - 1
        heard = hear(self._app, letter, call_errbacks=not last)
        return replace(heard, problem=f"link_error could not be called: {failed[0]}") if last else heard

    def _note(self, letter: DeadLetter, exc: Exception) -> None:
        """An attempt to tell of it has failed; after the last one it counts as heard."""
        failed = self._failed.setdefault(letter.id, [])
        failed.append(repr(exc))
        logger.warning("dead letter %s: attempt %s to tell of it failed", letter.id, len(failed), exc_info=True)
        if len(failed) >= ATTEMPTS:
            self._database.run(self._store.heard(letter.id, _storable(f"nobody could be told: {failed[-1]}")))
            del self._failed[letter.id]
            _log(letter, "nobody could be told")


def _log(letter: DeadLetter, what: str) -> None:
    logger.error(
        "task %s[%s] of queue %s is dead letter %s (%s): %s",
        letter.task, letter.task_id, letter.queue, letter.id, letter.reason, what,
    )  # fmt: skip


def _storable(text: str | None) -> str | None:
    """What a decoder says about a text may cite it."""
    return None if text is None else text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _is_transient(exc: BaseException | None) -> bool:
    while exc is not None:
        if isinstance(exc, errors.Unavailable | errors.TransactionLost | OSError):
            return True
        exc = exc.__cause__ or exc.__context__
    return False
