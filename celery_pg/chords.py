"""When does the body of a chord run, and with what?

A part is counted in the transaction that stores its task's result. The one that completes the chord also publishes the
body there, or fails it: one commit, so one body. (Where the broker is not in the same store, the body is published just
before that commit: at least once.) Nothing ever polls; no `celery.chord_unlock` is sent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from celery import states
from celery.app.task import Context
from celery.backends.base import Backend
from celery.canvas import Signature, _chain, group, maybe_signature
from celery.canvas import _chord as chord
from celery.exceptions import ChordError
from celery.result import GroupResult, result_from_tuple
from celery.utils.functional import _regen, maybe_list
from kombu.utils.encoding import ensure_bytes

from celery_pg.store.chords import ChordStore, Expression, Part, Returned
from kombu_pg import errors
from kombu_pg.database import Database, Statement
from kombu_pg.transaction import current, transaction

__all__ = ["NativeChords"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: The results that `mark_as_*` has handed over and that wait for their parts, by task id; None outside of it.
_held_back: ContextVar[dict[str, Expression] | None] = ContextVar("celery_pg_held_back", default=None)


#: What canvas gives to each copy of a signature.
_OWN_OPTIONS = frozenset({"task_id", "root_id", "parent_id", "reply_to"})


class _BodyRefused(Exception):
    """The body could not be published, and what was published of it is rolled back."""


class NativeChords(Backend):
    """The chords of a result backend. Mixed in front of it, see `PGBackend`."""

    database: Database
    _run: Callable[[Statement[T]], T]
    _stored: Callable[..., Expression]
    _synchronous: bool

    # What the worker and canvas call

    def mark_as_done(self, *args: Any, **kwargs: Any) -> Any:
        with self._results_with_parts():
            return super().mark_as_done(*args, **kwargs)

    def mark_as_failure(self, *args: Any, **kwargs: Any) -> Any:
        with self._results_with_parts():
            return super().mark_as_failure(*args, **kwargs)

    def mark_as_revoked(self, *args: Any, **kwargs: Any) -> Any:
        with self._results_with_parts():
            return super().mark_as_revoked(*args, **kwargs)

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        """Of a part of a chord that has ended: nothing yet, `on_chord_part_return` follows and stores both."""
        held_back = _held_back.get()
        if held_back is None or request is None or not request.chord or state not in states.READY_STATES:
            return super().store_result(task_id, result, state, traceback=traceback, request=request, **kwargs)
        encoded = self.encode_result(result, state)
        held_back[task_id] = self._stored(task_id, encoded, state, traceback, request)
        return encoded

    def on_chord_part_return(
        self, request: Any, state: str, result: Any, told: Sequence[dict[str, Any]] = (), **_: Any
    ) -> None:
        """Count the part; if it completes the chord, publish or fail the body, in the same transaction.

        told: the errbacks that know of its failure already.
        """
        held_back = _held_back.get() or {}
        if not request.id or not request.group:
            return
        encoded = ensure_bytes(self.encode([self.encode_result(result, state), *told]))
        part = Part(request.group, request.id, request.group_index, state, encoded)
        stored = held_back.pop(request.id, None)
        self._ensure_retryable(self._count, part, stored, request.chord)

    def apply_chord(self, header_result_args: Any, body: Any, **_: Any) -> None:
        group_id, results = header_result_args[0], header_result_args[1]
        self._bodies[group_id] = body
        # A frozen chord may be applied again, under the same id; its first part may come before its size is said.
        self._ensure_retryable(self._run, self._chords.restart(group_id))
        # A header from a generator is walked by whoever publishes it, not before.
        if not isinstance(results, _regen) and any(isinstance(result, GroupResult) for result in results):
            structure = self.encode(self.app.GroupResult(group_id, results).as_tuple())
            self._ensure_retryable(self._run, self._chords.shape(group_id, ensure_bytes(structure)))

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Called before the last task of the header is published; parts may have come before this."""
        self._ensure_retryable(self._size, group_id, chord_size)

    def add_to_chord(self, chord_id: str, result: Any) -> None:
        self._ensure_retryable(self._run, self._chords.grow(chord_id))

    # Counting

    @cached_property
    def _chords(self) -> ChordStore:
        expires = self.app.conf.get("result_chord_expires")
        time_to_live = self.expires if expires is None else self.prepare_expires(expires, type=int)
        return ChordStore(self.database.options, time_to_live or None)

    @cached_property
    def _bodies(self) -> WeakValueDictionary[str, Signature]:
        """The bodies of the chords that are being published, while canvas holds them."""
        return WeakValueDictionary()

    @contextmanager
    def _results_with_parts(self) -> Iterator[None]:
        token = _held_back.set({})
        try:
            yield
            for expression in (_held_back.get() or {}).values():  # of parts that had returned before
                self._ensure_retryable(self._run, self._chords.store(expression))
        finally:
            _held_back.reset(token)

    def _count(self, part: Part, stored: Expression | None, body: Any) -> None:
        if current(self.database) is None and self.database.run(self._chords.count(part, stored, complete=False)):
            if self._synchronous:
                self.database.run(self._chords.flush())
            return
        self._complete(part.chord_id, self._chords.count(part, stored, complete=True), body)

    def _size(self, chord_id: str, size: int) -> None:
        if self._run(self._chords.size(chord_id, size, complete=False)):
            return
        body = self._bodies.get(chord_id)
        if body is None:
            logger.warning("all parts of chord %s came before its size, and its body is not known here", chord_id)
        self._complete(chord_id, self._chords.size(chord_id, size, complete=True), body)

    # Completing

    def _complete(self, chord_id: str, statement: Statement[Any], body: Any) -> None:
        try:
            self._finish(chord_id, statement, body, self._publish)
        except _BodyRefused as refused:
            self._finish(chord_id, statement, body, _raising(ChordError(f"Callback error: {refused.__cause__!r}")))

    def _finish(
        self, chord_id: str, statement: Statement[Any], body: Any, publish: Callable[[Any, Returned], None]
    ) -> None:
        own = current(self.database) is None
        with transaction(self.database) as opened:
            opened.durable |= self._synchronous
            opened.defer(statement)
            returned = opened.run(self._chords.finish(chord_id)) if body is not None else None
            if returned is None:
                return
            body = maybe_signature(body, app=self.app)
            try:
                publish(body, returned)
            except (errors.Unavailable, errors.TransactionLost):
                raise
            except ChordError as exc:
                self._fail(body, returned, exc)
            except Exception as exc:
                if own:
                    # The transaction may be of no use any more: the body fails in another one.
                    raise _BodyRefused from exc
                error = ChordError(f"Callback error: {exc!r}")
                _catching(error, lambda error: self._fail(body, returned, error))

    def _publish(self, body: Any, returned: Returned) -> None:
        results = self._results(returned)
        # Celery 5.7: each message of a callback is retried on its own.
        retry_publish = getattr(self.app.amqp, "_retry_publish", None)
        if retry_publish is None:
            body.delay(results)
        else:
            retry_publish(body.delay, results)

    def _fail(self, body: Any, returned: Returned, error: ChordError) -> None:
        """The body has failed, its errbacks are called, and whoever waits for its result hears of it."""
        logger.error("the body %s of a chord has failed: %s", body.options.get("task_id"), error)
        errbacks = maybe_list(body.options.get("link_error")) or []
        told = self._told(returned)
        # Celery links the errbacks of a chord to the chords that are nested in its header, too: once is enough.
        untold = [errback for errback in errbacks if _comparable(errback) not in told]
        body["options"] = {**body.options, "link_error": untold}  # its own, where this is tried again
        self.chord_error_from_stack(body, error)
        for part in _parts_of(body):
            # Celery leaves the chord that this one is nested in waiting.
            self.on_chord_part_return(part, states.FAILURE, error, told=[_comparable(errback) for errback in errbacks])

    def _told(self, returned: Returned) -> list[dict[str, Any]]:
        failed = (result for _, state, result in returned.parts if state in states.PROPAGATE_STATES)
        return [errback for result in failed for errback in self.decode(result)[1:]]

    # Results

    def _results(self, returned: Returned) -> list[Any]:
        """What the body is called with.

        Raises:
            ChordError: a part has failed, or what it returned cannot be read.
        """
        try:
            values = [(task_id, self._value(task_id, state, result)) for task_id, state, result in returned.parts]
            if returned.structure is None:
                return [value for _, value in values]
            shape = result_from_tuple(self.decode(returned.structure), app=self.app)
            return list(self._shaped(shape, dict(values)))
        except (ChordError, errors.Unavailable, errors.TransactionLost):
            raise
        except Exception as exc:
            raise ChordError(f"Join error: {exc!r}") from exc

    def _value(self, task_id: str, state: str, result: bytes) -> Any:
        value = self.decode(result)[0]
        if state in states.EXCEPTION_STATES:
            value = self.exception_to_python(value)
        if state in states.PROPAGATE_STATES:
            raise ChordError(f"Dependency {task_id} raised {value!r}") from value
        return value

    def _shaped(self, shape: Any, values: dict[str, Any]) -> Any:
        if isinstance(shape, GroupResult):
            return [self._shaped(result, values) for result in shape.results]
        if shape.id in values:
            return values[shape.id]
        meta = self.get_task_meta(shape.id, cache=False)
        if meta["status"] not in states.READY_STATES:
            raise ChordError(f"Join error: task {shape.id} of the header is {meta['status']}")
        if meta["status"] in states.PROPAGATE_STATES:
            raise ChordError(f"Dependency {shape.id} raised {meta['result']!r}") from meta["result"]
        return meta["result"]


def _parts_of(body: Any) -> Iterator[Context]:
    """The requests, as it were, of those tasks of a body that are parts of the chord around it."""
    if isinstance(body, group):
        for task in body.tasks:
            yield from _parts_of(maybe_signature(task, app=body.app))
    elif isinstance(body, _chain) and body.tasks:
        yield from _parts_of(maybe_signature(body.tasks[-1], app=body.app))
    elif isinstance(body, chord) and body.body is not None:
        yield from _parts_of(maybe_signature(body.body, app=body.app))
    if body.options.get("chord"):
        request = Context(body, **body.options)
        request.id, request.group = body.options.get("task_id"), body.options.get("group_id")
        yield request


def _comparable(errback: Any) -> dict[str, Any]:
    """What makes it the same errback as another one, wherever it is linked."""
    options = {key: value for key, value in errback["options"].items() if key not in _OWN_OPTIONS}
    return {
        "task": errback["task"],
        "args": list(errback["args"]),
        "kwargs": dict(errback["kwargs"]),
        "options": options,
    }


def _raising(error: ChordError) -> Callable[[Any, Returned], None]:
    def publish(_body: Any, _returned: Returned) -> None:
        raise error

    return publish


def _catching(error: ChordError, then: Callable[[ChordError], None]) -> None:
    try:
        raise error
    except ChordError as exc:
        then(exc)
