"""What of Celery's worker do we wrap?

Only this module touches its internals (Celery 5.6 and 5.7). `install` is called when a Celery worker connects to our
broker (entry-point group `kombu_pg.workers`), so that `celery worker`, `app.worker_main()` and embedded workers all
have it; a worker on another broker is left as it is.

* A message that the worker cannot run becomes a dead letter, where Celery would drop it or die of it.
* The dead letters of the worker's queues are heard (`celery_pg.dead_letters`).
* A task that was revoked while nobody ran is not run (`celery_pg.revoke`).
* A task with atomic completion completes atomically (`celery_pg.completion`).
* `inspect scheduled` and `query_task` also know what waits in the database.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import celery
from celery import signals, states
from celery.exceptions import InvalidTaskError, Reject, TaskPredicate, TimeLimitExceeded
from celery.utils.nodenames import gethostname
from celery.worker import control
from celery.worker import state as worker_state
from celery.worker.consumer.consumer import Consumer
from celery.worker.consumer.tasks import Tasks
from celery.worker.request import Request
from celery.worker.worker import WorkController
from kombu.exceptions import ContentDisallowed
from kombu.utils.functional import maybe_list

from celery_pg.backend import PGBackend
from celery_pg.completion import AtomicCompletion, complete_atomically, is_atomic, require_one_store
from celery_pg.dead_letters import Heard, Listener
from celery_pg.inspection import info, waiting
from celery_pg.revoke import Stamps
from celery_pg.runnable import BEFORE_5_7, problem_of, require_runnable
from kombu_pg import errors
from kombu_pg.database import Database
from kombu_pg.message import MESSAGE_ID, REVOKED, Message
from kombu_pg.transaction import same_store
from kombu_pg.transport import Transport

__all__ = ["install"]

logger = logging.getLogger(__name__)

#: Seconds between two looks for dead letters that SQL has moved there, and until the next when there was more.
LOOK_PERIOD = 2.0
LOOK_AGAIN = 0.05
#: Seconds between two sweeps of what is past its retention.
SWEEP_PERIOD = 60.0

#: What Celery's code raises when it works with a message that is not what it should be.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_WRAPPED = "__wrapped_by_celery_pg__"
_SEAM = "celery_pg_seam"
_ENDS_ELSEWHERE = "celery_pg_ends_elsewhere"
#: Attributes of a request: what is to become of its message, behind a block; what its acknowledgement commits first.
_SETTLING = "celery_pg_settling"
_COMMITS = "celery_pg_commits"


def install() -> None:
    """Celery's worker classes are wrapped; a second call does nothing."""
    _wrap(Consumer, "create_task_handler", _create_task_handler)
    _wrap(Consumer, "on_unknown_message", _on_unknown_message)
    _wrap(Consumer, "on_unknown_task", _on_unknown_task)
    _wrap(Consumer, "on_invalid_task", _on_invalid_task)
    _wrap(Consumer, "on_decode_error", _on_decode_error)
    _wrap(WorkController, "_process_task", _process_task)
    _wrap(Request, "on_failure", _on_failure)
    _wrap(Request, "on_timeout", _on_timeout)
    _wrap(Request, "acknowledge", _acknowledge)
    _wrap(Request, "reject", _reject)
    if not BEFORE_5_7:
        _wrap(Request, "_retry_worker_lost", _retry_worker_lost)
    _wrap(Consumer, "update_strategies", _update_strategies)
    signals.worker_process_init.connect(_begin_pool_process, dispatch_uid=__name__)
    _wrap(Tasks, "start", _start_tasks)
    _wrap(Tasks, "stop", _stop_tasks)
    for name, command in _COMMANDS.items():
        _wrap_command(name, command)


def _wrap(owner: type, name: str, replacement: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if hasattr(original, _WRAPPED):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(original, self, *args, **kwargs)

    setattr(wrapped, _WRAPPED, True)
    setattr(owner, name, wrapped)


def _wrap_command(name: str, replacement: Callable[..., Any]) -> None:
    original = control.Panel.data[name]
    if hasattr(original, _WRAPPED):
        return

    @functools.wraps(original)
    def wrapped(state: Any, *args: Any, **kwargs: Any) -> Any:
        answer = original(state, *args, **kwargs)
        seam = _seam(state.consumer)
        return answer if seam is None else replacement(seam, answer, *args, **kwargs)

    setattr(wrapped, _WRAPPED, True)
    control.Panel.data[name] = wrapped


# Messages that cannot be run ---------------------------------------------------------------------------------------


def _create_task_handler(original: Any, consumer: Any, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    handle = original(consumer, *args, **kwargs)

    def on_task_received(message: Any) -> Any:
        seam = _seam(consumer)
        if seam is None or not isinstance(message, Message):
            return handle(message)
        problem = problem_of(message)
        if problem is not None:
            return seam.bury(message, "malformed", problem)
        revoked = seam.mark_revoked(message)
        try:
            return handle(message)
        except _MALFORMED as exc:
            if message.acknowledged or seam.is_lost(exc):
                raise
            for request in [r for r in worker_state.reserved_requests if r.message is message]:
                seam.let_go(request)
            return seam.bury_malformed(message, exc)
        finally:
            if revoked is not None and message.acknowledged:
                worker_state.revoked.discard(revoked)

    return on_task_received


def _process_task(original: Any, controller: Any, request: Any) -> Any:
    """Called when the pool has a place, or by a timer: there Celery would die of what is wrong with a message."""
    message, seam = request.message, _seam(controller.consumer)
    if seam is None or not isinstance(message, Message):
        return original(controller, request)
    try:
        require_runnable(request)
        original(controller, request)
    except (InvalidTaskError, *_MALFORMED) as exc:
        if message.acknowledged or seam.is_lost(exc):
            raise
        # Not at once: the place goes to the next one that waits, which may be as bad, and so on.
        seam.consumer.call_soon(seam.give_up, request, exc)
    return None


def _on_unknown_message(original: Any, consumer: Any, body: Any, message: Any) -> None:
    _refuse(original, consumer, message, "malformed", "neither of Celery's protocols", body, message)


def _on_unknown_task(original: Any, consumer: Any, body: Any, message: Any, exc: Exception) -> None:
    text = f"the worker has no task {exc.args[0] if exc.args else exc}"
    _refuse(original, consumer, message, "unknown_task", text, body, message, exc)


def _on_invalid_task(original: Any, consumer: Any, body: Any, message: Any, exc: Exception) -> None:
    if isinstance(exc, ContentDisallowed):
        kind = "content_type"
    else:
        kind = "invalid_header" if str(exc).startswith(("invalid ETA", "invalid expires")) else "malformed"
    _refuse(original, consumer, message, kind, str(exc), body, message, exc)


def _on_decode_error(original: Any, consumer: Any, message: Any, exc: Exception) -> None:
    kind = "content_type" if isinstance(exc, ContentDisallowed) else "undecodable"
    _refuse(original, consumer, message, kind, f"{type(exc).__name__}: {exc}", message, exc)


def _refuse(original: Any, consumer: Any, message: Any, kind: str, text: str, *args: Any) -> None:
    """Celery logs, stores and signals what it would; but the message is not dropped, it is a dead letter."""
    seam = _seam(consumer)
    if seam is None or not isinstance(message, Message) or message.acknowledged or _is_no_ack(message):
        original(consumer, *args)
        return
    unsettled = _Unsettled(message)
    original(consumer, *(unsettled if arg is message else arg for arg in args))
    seam.bury(message, kind, text)


def _on_failure(
    original: Any, request: Any, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
) -> Any:
    """Called, with a hard time limit, beside `on_timeout`: of two that record the failure, one is enough."""
    if isinstance(request.message, Message):
        given = exc_info.exception
        exc = getattr(given, "exc", given)
        if isinstance(given, TaskPredicate) or isinstance(exc, TaskPredicate):
            # Retried, replaced, ignored: what comes of it is another message, flushed, and no final result.
            setattr(request, _ENDS_ELSEWHERE, True)
        if isinstance(exc, TimeLimitExceeded) and not return_ok and not BEFORE_5_7:
            return None
    with _settled_last(request):
        if isinstance(request.message, Message) and BEFORE_5_7:
            _record_rejected(request, exc_info)
        return original(request, exc_info, send_failed_event=send_failed_event, return_ok=return_ok)


def _record_rejected(request: Any, exc_info: Any) -> None:
    """As Celery 5.7: a task that rejects its message for good has failed."""
    exc = getattr(exc_info.exception, "exc", exc_info.exception)
    if isinstance(exc, Reject) and not exc.requeue:
        stored = request.store_errors
        request.task.backend.mark_as_failure(request.id, exc, request=request._context, store_result=stored)


def _on_timeout(original: Any, request: Any, soft: bool, timeout: float) -> None:
    if soft or not BEFORE_5_7 or not isinstance(request.message, Message):
        with _settled_last(request):
            original(request, soft, timeout)
    else:
        logger.error("Hard time limit (%ss) exceeded for %s[%s]", timeout, request.name, request.id)


@contextlib.contextmanager
def _settled_last(request: Any) -> Iterator[None]:
    """The message of a task with atomic completion is settled behind the block, which records the task's end.

    Celery settles it first. Where the end cannot be recorded, the task runs again.
    """
    message = request.message
    if not isinstance(message, Message) or MESSAGE_ID not in message.properties or not is_atomic(request.task):
        yield
        return
    settling: list[Callable[[], Any]] = []
    setattr(request, _SETTLING, settling)
    try:
        yield
    except errors.AlreadyFinished:
        logger.info("task %s was completed before its process was lost: it has not failed", request.id)
        settling[:] = [request.acknowledge]
    except Exception as exc:
        if settling or isinstance(exc, errors.Unavailable):
            logger.warning("task %s: its failure could not be recorded, it runs again: %s", request.id, exc)
            settling[:] = [functools.partial(request.reject, requeue=True)]
        raise
    finally:
        delattr(request, _SETTLING)
        for settle in settling:
            settle()


def _retry_worker_lost(original: Any, request: Any, exc: Exception, exc_info: Any) -> bool:
    """The retry of a task with atomic completion takes the place of its message in one commit."""
    backend = request.task.backend
    ours = isinstance(request.message, Message) and isinstance(backend, AtomicCompletion)
    lost = backend.lost_run(exc, request._context) if ours else None
    if lost is None:
        return bool(original(request, exc, exc_info))

    def retry() -> bool:
        retried = bool(original(request, exc, exc_info))
        if not retried:
            lost.require_open()  # Celery has only logged why
        return retried

    setattr(request, _COMMITS, lost)
    try:
        return bool(backend.record(lost, retry))
    finally:
        delattr(request, _COMMITS)


def _reject(original: Any, request: Any, requeue: bool = False) -> None:
    settling = getattr(request, _SETTLING, None)
    if settling is None:
        original(request, requeue=requeue)
    else:
        settling.append(functools.partial(request.reject, requeue=requeue))


def _acknowledge(original: Any, request: Any) -> None:
    """A late ack counts only with the result, if a crash of the server comes between them."""
    commits = getattr(request, _COMMITS, None)
    if commits is not None:
        commits.commit()
    settling = getattr(request, _SETTLING, None)
    if settling is not None:
        settling.append(request.acknowledge)
        return
    message = request.message
    if request.task.acks_late and isinstance(message, Message) and _has_result(request):
        try:
            if _is_in(message.channel.connection_of_messages.database, request.task.backend):
                message.expect_result()
        except errors.PGError as exc:
            logger.warning("it is not known whether results are in the broker's store: %s", exc)
    original(request)


def _has_result(request: Any) -> bool:
    """The task has ended with something that is stored: a result, or the count of a chord's part."""
    if getattr(request, _ENDS_ELSEWHERE, False):
        return False
    if request.ignore_result or request.task.ignore_result:
        return request.group is not None and request.chord is not None
    return True


@functools.lru_cache(maxsize=8)
def _is_in(database: Database, backend: Any) -> bool:
    """The results are in the same store as the messages."""
    if not isinstance(backend, PGBackend):
        return False
    return backend.options == database.options or same_store(backend.database, database)


def _is_no_ack(message: Any) -> bool:
    return message.delivery_info.get("consumer_tag") in message.channel.no_ack_consumers


class _Unsettled:
    """A message that somebody believes to have settled."""

    def __init__(self, message: Message) -> None:
        self._message = message

    def __getattr__(self, name: str) -> Any:
        return getattr(self._message, name)

    def reject_log_error(self, *_: Any, **__: Any) -> None: ...

    ack = reject = ack_log_error = reject_log_error


# Tracers -----------------------------------------------------------------------------------------------------------


def _update_strategies(original: Any, consumer: Any) -> None:
    require_one_store(consumer.app)
    original(consumer)  # builds the tracers anew
    complete_atomically(consumer.app, consumer.hostname)


def _begin_pool_process(sender: str | None, **_: Any) -> None:
    complete_atomically(celery.current_app._get_current_object(), sender or gethostname())


# The consumer's life -----------------------------------------------------------------------------------------------


def _start_tasks(original: Any, step: Any, consumer: Any) -> None:
    seam = _begin(consumer)
    if seam is not None:
        seam.stamps.load(seam.database)
        if getattr(consumer.on_task_request, "__name__", "") == "_process_task":
            # Bound before there was a connection, and so before it was wrapped.
            consumer.on_task_request = consumer.controller._process_task
    original(step, consumer)
    if seam is not None:
        seam.start()


def _stop_tasks(original: Any, step: Any, consumer: Any) -> None:
    seam = _seam(consumer)
    if seam is not None:
        seam.stop()
    original(step, consumer)


def _begin(consumer: Any) -> _Seam | None:
    """The consumer's seam, a new one for its new connection; None on another broker."""
    former = getattr(consumer, _SEAM, None)
    if former is not None:
        former.stop()
    ours = isinstance(consumer.connection.transport, Transport)
    seam = _Seam(consumer, consumer.connection.connection.database) if ours else None
    setattr(consumer, _SEAM, seam)
    return seam


def _seam(consumer: Any) -> _Seam | None:
    seam: _Seam | None = getattr(consumer, _SEAM, None)
    return seam


class _Seam:
    """What one consumer has of us, for as long as it is connected."""

    def __init__(self, consumer: Any, database: Database) -> None:
        self.consumer = consumer
        self.database = database
        self.stamps = Stamps()
        self._listener = Listener(consumer.app, database)
        self._timer: Any = None
        self._sweep_at = 0.0

    def start(self) -> None:
        # From here on Celery rejects a task only when it has recorded its failure; what it has not goes through `bury`.
        self.consumer.task_consumer.channel.records_rejected = True
        self._timer = self.consumer.timer.call_repeatedly(LOOK_PERIOD, self._look_now_and_then)
        self.look()

    def stop(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    @property
    def queues(self) -> list[str]:
        consumer = self.consumer.task_consumer
        return [] if consumer is None else [queue.name for queue in consumer.queues]

    def bury(self, message: Message, kind: str, text: str) -> None:
        """The message is a dead letter and was heard of, unless its queue sends it another way."""
        message.dead_letter(text, kind)
        self.look()

    def bury_malformed(self, message: Message, exc: Exception) -> None:
        logger.error("message %s cannot be worked with", message.properties.get(MESSAGE_ID), exc_info=exc)
        name = "" if isinstance(exc, InvalidTaskError) else f"{type(exc).__name__}: "
        self.bury(message, "malformed", f"{name}{exc}")

    def give_up(self, request: Any, exc: Exception) -> None:
        """What was to go to the pool is a dead letter instead."""
        if self is _seam(self.consumer) and not request.message.acknowledged:
            self.let_go(request)
            self.bury_malformed(request.message, exc)

    def let_go(self, request: Any) -> None:
        """Celery knows the request no more, and its place in the pool is free."""
        reserved = request in worker_state.reserved_requests
        worker_state.task_ready(request)
        if reserved and self.consumer.controller.semaphore is not None:
            self.consumer.controller._quick_release()

    def is_lost(self, exc: Exception) -> bool:
        """It was the connection that failed."""
        return isinstance(exc, self.consumer.connection_errors)

    def mark_revoked(self, message: Message) -> str | None:
        """Let Celery know that this task was revoked. -> its id, if that was news."""
        headers, properties = message.headers, message.properties
        if not message.delivery_info.get(REVOKED) and not self.stamps.revoke(headers, properties.get(MESSAGE_ID, 0)):
            return None
        task_id = headers.get("id")
        if not isinstance(task_id, str) or task_id in worker_state.revoked:
            return None
        worker_state.revoked.add(task_id)
        return task_id

    def _look_now_and_then(self) -> None:
        if self._timer is not None:
            self.look()
            if time.monotonic() >= self._sweep_at:
                self._sweep_at = time.monotonic() + SWEEP_PERIOD
                self._try(self._listener.forget)
                self._try(lambda: self.stamps.load(self.database))

    def look(self) -> None:
        """Hear of what there is. Never raises: what could not be heard will be."""
        if self._try(lambda: self._listener.look(self.queues, self._announce)):
            self.consumer.timer.call_after(LOOK_AGAIN, self.look)

    def _try(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except (errors.Unavailable, OSError) as exc:
            logger.warning("dead letters wait to be heard: %s", exc)
        except Exception:
            logger.exception("dead letters wait to be heard")
        return None

    def _announce(self, heard: Heard) -> None:
        """Tell events and signals what Celery would have told them."""
        expired = heard.state == states.REVOKED
        request, task = heard.request, self.consumer.app.tasks.get(heard.request.task)
        if heard.letter.reason != "unknown_task" and self.consumer.event_dispatcher and request.id:
            if expired:
                fields: dict[str, Any] = {"terminated": False, "signum": None, "expired": True}
            else:
                fields = {"exception": repr(heard.exception)}
            self.consumer.event_dispatcher.send(f"task-{'revoked' if expired else 'failed'}", uuid=request.id, **fields)
        if task is None:
            return
        if expired:
            signals.task_revoked.send(sender=task, request=request, terminated=False, signum=None, expired=True)
        else:
            signals.task_failure.send(
                sender=task, task_id=request.id, exception=heard.exception, args=request.args, kwargs=request.kwargs,
                traceback=None, einfo=None,
            )  # fmt: skip


# What waits in the database ----------------------------------------------------------------------------------------


def _scheduled(seam: _Seam, answer: Any, *_: Any, **__: Any) -> Any:
    listed = list(answer)
    for task in waiting(seam.database, seam.queues, ready=False):
        if task.due_at is not None:
            listed.append({"eta": task.due_at.isoformat(), "priority": 6, "request": info(seam.consumer, task)})
    return listed


def _query_task(seam: _Seam, answer: Any, ids: Any, **_: Any) -> Any:
    wanted = set(maybe_list(ids)) - set(answer)
    if not wanted:
        return answer
    found = {
        task.task_id: ("scheduled" if task.due_at is not None else "ready", info(seam.consumer, task))
        for task in waiting(seam.database, seam.queues, ready=True)
        if task.task_id in wanted
    }
    return {**answer, **found}


def _revoke_by_stamped_headers(seam: _Seam, answer: Any, *_: Any, **__: Any) -> Any:
    seam.stamps.load(seam.database)
    return answer


_COMMANDS: Mapping[str, Callable[..., Any]] = {
    "scheduled": _scheduled,
    "query_task": _query_task,
    "revoke_by_stamped_headers": _revoke_by_stamped_headers,
}
