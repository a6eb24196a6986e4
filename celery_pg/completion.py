"""How do a task's end, its continuations and its acknowledgement become one commit?

Opt-in, for `acks_late` tasks whose broker and result backend are the same store. While such a task's function runs, it
has no transaction of ours, unless it asks for one (`task_transaction`). From the return of the function on, whatever
Celery publishes (callbacks, the rest of the chain) and stores (the result, the chord's part and its body) joins one
transaction, which deletes the message as its last act: where the message is gone, somebody else has finished it, and
everything is rolled back. The acknowledgement that the worker sends later finds nothing to do.

A failure begins a transaction anew, for its result and its errbacks: what the function and its continuations have
stored until then is rolled back. `retry` and `replace` begin one, too, and publish in it. A task whose transaction was
lost with its connection has not failed: it runs again, and that is counted.

What a worker's main process records of a task whose process was lost or out of time goes the same way, while the server
is away again and again; a task that was completed before is left as it is.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TypeVar

from billiard.einfo import ExceptionInfo
from celery import states
from celery.app.trace import TraceInfo, build_tracer, trace_ok_t
from celery.exceptions import ImproperlyConfigured, Reject, TaskPredicate, TimeLimitExceeded

from celery_pg.task_connection import TaskTransaction
from kombu_pg import errors
from kombu_pg.database import Database, database_for
from kombu_pg.message import MESSAGE_ID
from kombu_pg.store import store_for
from kombu_pg.transaction import Transaction, borrowed, same_store, tell, transaction

__all__ = [
    "AtomicCompletion",
    "Completion",
    "complete_atomically",
    "current",
    "is_atomic",
    "make_atomic",
    "require_acks_late",
    "require_one_store",
    "task_transaction",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_running: ContextVar[Completion | None] = ContextVar("celery_pg_completion", default=None)


class _RollBackError(Exception):
    """Leaves a transaction's block without a commit."""


class Completion:
    """The end of one run of a task: everything in it is committed once, together, or not at all.

    Attributes:
        returned: the function has returned: what fails from here on is not the function's failure.
        done: it is committed.
        lost: why what was to take the place of this run, or to follow it, could not be stored: it runs again.
    """

    def __init__(self, database: Database, task: str, task_id: str, message_id: int) -> None:
        self.task_id = task_id
        self.returned = False
        self.done = False
        self.lost: Exception | None = None
        self.user = TaskTransaction(database, f"{task}[{task_id}]")
        self._database = database
        self._message_id = message_id
        self._block: Any = None
        self._opened: Transaction | None = None

    def begin(self) -> None:
        """From here on, what this thread publishes and stores in this store is part of the completion."""
        if self._opened is None:
            self._block = borrowed(self._database, self.user) if self.user.begun else transaction(self._database)
            self._opened = self._block.__enter__()

    def restart(self) -> None:
        """The same, and nothing of what was in it until now."""
        self.roll_back()
        self.begin()

    def commit(self, *, reject: bool = False) -> None:
        """The message is finished, and all of it is stored, durably.

        Raises:
            AlreadyFinished: somebody else has finished the message; nothing is stored.
            Unavailable: the connection was lost; it is not known whether all or nothing is stored.
        """
        self.begin()
        assert self._opened is not None
        opened, block = self._opened, self._block
        finish = store_for(self._database.options).finish(self._message_id, reject=reject)
        if reject:
            opened.wake_after_commit(opened.run(finish))
        else:
            opened.defer(finish)  # whoever is acknowledged wakes nobody
        opened.durable = True
        self._opened = self._block = None
        block.__exit__(None, None, None)
        if not opened.own:
            self.user.commit()
        self.done = True
        if not opened.own:
            tell(self._database, opened.wakes)

    def roll_back(self) -> None:
        """Nothing that is not committed is stored. Never raises for a lost connection: the server does the same."""
        block, self._block, self._opened = self._block, None, None
        if block is not None:
            error = _RollBackError()
            with suppress(_RollBackError):
                block.__exit__(_RollBackError, error, None)
        self.user.close()

    def require_open(self) -> None:
        """Return if what was run in it so far can still be committed.

        Raises:
            TransactionLost: it cannot.
        """
        if self._opened is not None and self._opened.lost:
            raise errors.TransactionLost("the connection was lost inside a transaction: nothing of it is stored")

    @contextmanager
    def storing(self, kind: type[Exception] = Exception) -> Iterator[None]:
        """A block that stores what follows this run; `kind`: of which exceptions it is asked whether it could.

        Raises:
            Reject: it could not, for a connection was lost: the run has not failed, it is to be run again.
        """
        try:
            yield
        except kind as exc:
            if not _is_lost(exc):
                raise
            logger.warning("task %s: what follows it could not be stored, it runs again: %s", self.task_id, exc)
            self.lost = exc
            raise Reject(exc, requeue=True) from exc

    @contextmanager
    def ending(self) -> Iterator[None]:
        """A block that ends in a commit; otherwise everything is rolled back.

        Raises:
            Reject: the message is not ours any more, or the connection was lost: if the message is still there, it is
                to be delivered again. Nothing else may be recorded of the task.
        """
        try:
            yield
        except errors.AlreadyFinished as exc:
            self.roll_back()
            logger.warning("task %s: another worker has finished it, what this one did is rolled back", self.task_id)
            raise Reject(exc, requeue=True) from exc
        except BaseException as exc:
            self.roll_back()
            if _is_lost(exc):
                logger.warning(
                    "task %s: its completion was not confirmed, if it is not stored it runs again: %s",
                    self.task_id,
                    exc,
                )
                raise Reject(exc, requeue=True) from exc
            raise


def _is_lost(exc: Any) -> bool:
    """It was raised because of a lost connection; not only while such an exception was handled."""
    while isinstance(exc, BaseException):
        if isinstance(exc, errors.Unavailable | errors.TransactionLost):
            return True
        exc = exc.reason if isinstance(exc, Reject) else exc.__cause__
    return False


def current(task_id: str) -> Completion | None:
    """The completion of the run that is under way in this thread, if it is of this task."""
    completion = _running.get()
    return completion if completion is not None and completion.task_id == task_id and not completion.done else None


def task_transaction() -> TaskTransaction:
    """The transaction that this run of the task will be completed in.

    ``with task_transaction() as connection:`` gives a SQLAlchemy connection, and
    ``with task_transaction().session() as session:`` an ORM session. Their writes are committed together with the
    task's result and acknowledgement; an exception out of the task's function (Retry, Ignore and Reject, too) rolls
    them back. Do not commit.

    Raises:
        RuntimeError: no task with atomic completion is running here.
    """
    completion = _running.get()
    if completion is None or completion.done:
        raise RuntimeError(
            "task_transaction() is for the function of a task with acks_late=True and atomic_completion=True "
            "(or pg_atomic_completion = True), run by a worker"
        )
    return completion.user


class AtomicCompletion:
    """What a result backend does at the end of such a task; to be inherited before Celery's own."""

    app: Any
    database: Database
    _ensure_retryable: Callable[..., Any]

    def mark_as_done(self, task_id: str, *args: Any, **kwargs: Any) -> None:
        completion = current(task_id)
        if completion is None:
            super().mark_as_done(task_id, *args, **kwargs)  # type: ignore[misc]
            return
        with completion.ending():
            completion.begin()
            super().mark_as_done(task_id, *args, **kwargs)  # type: ignore[misc]
            completion.commit()

    def mark_as_retry(self, task_id: str, *args: Any, **kwargs: Any) -> Any:
        completion = current(task_id)
        if completion is None:
            return super().mark_as_retry(task_id, *args, **kwargs)  # type: ignore[misc]
        with completion.ending():
            completion.begin()
            stored = super().mark_as_retry(task_id, *args, **kwargs)  # type: ignore[misc]
            completion.commit()
            return stored

    def mark_as_failure(
        self, task_id: str, exc: Exception, traceback: Any = None, request: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        def fail() -> None:
            super(AtomicCompletion, self).mark_as_failure(task_id, exc, traceback, request, *args, **kwargs)  # type: ignore[misc]

        completion = current(task_id)
        if completion is not None:
            with completion.ending():
                if completion.returned and _is_lost(exc):
                    raise exc  # its continuations could not be stored: it has not failed, it runs again
                completion.restart()
                fail()
                completion.commit(reject=_is_rejected(self.app.tasks[request.task], exc))
            return
        lost = self.lost_run(exc, request)
        if lost is None:
            fail()
            return

        def fail_in_one() -> None:
            fail()
            lost.commit(reject=_is_rejected(self.app.tasks[request.task], exc))

        self.record(lost, fail_in_one)

    def record(self, lost: Completion, store: Callable[[], T]) -> T:
        """In a worker's main process: `store` what is to be known of a lost run, and commit it.

        It is called again while the server is away, for as long as any result is tried to be stored.

        Raises:
            AlreadyFinished: the run was completed before its process was lost; nothing is stored.
            Unavailable: the server is still away; it is not known whether it is stored.
        """

        def attempt() -> T:
            try:
                lost.restart()
                return store()
            except Exception as exc:
                if _is_lost(exc) and not isinstance(exc, errors.Unavailable):
                    raise errors.Unavailable(str(exc)) from exc
                raise
            finally:
                lost.roll_back()

        recorded: T = self._ensure_retryable(attempt)
        return recorded

    def lost_run(self, exc: Exception, request: Any) -> Completion | None:
        """In a worker's main process, for a task whose process was lost or out of time: how its end is recorded."""
        task = self.app.tasks.get(getattr(request, "task", None))
        message_id = (getattr(request, "properties", None) or {}).get(MESSAGE_ID)
        if task is None or message_id is None or not is_atomic(task):
            return None
        if isinstance(exc, TimeLimitExceeded) and not getattr(task, "acks_on_timeout", _acks_on_failure(task)):
            return None  # recorded, and yet to be run again
        return Completion(self._ensure_retryable(lambda: self.database), task.name, request.id, message_id)


def _is_rejected(task: Any, exc: Exception) -> bool:
    return isinstance(exc, Reject) or not _acks_on_failure(task)


def _acks_on_failure(task: Any) -> bool:
    return bool(getattr(task, "acks_on_failure", task.acks_on_failure_or_timeout))


def is_atomic(task: Any) -> bool:
    """The task says so, or the app does and the task is `acks_late`.

    Raises:
        ImproperlyConfigured: the task says so and is not `acks_late`.
    """
    wanted = getattr(task, "atomic_completion", None)
    if wanted and not task.acks_late:
        raise ImproperlyConfigured(
            f"task {task.name} has atomic_completion, but not acks_late: its message is acknowledged before it runs; "
            "set acks_late=True"
        )
    return bool(task.acks_late and (task.app.conf.get("pg_atomic_completion", False) if wanted is None else wanted))


def require_acks_late(app: Any) -> None:
    """Return if no task of the app asks for what it cannot have.

    Celery calls nobody of ours when a task is registered: so this is asked before the first call whose result is kept.

    Raises:
        ImproperlyConfigured: a task says that it completes atomically, and is not `acks_late`.
    """
    if app.finalized or app.autofinalize:
        _atomic_tasks(app)


def complete_atomically(app: Any, hostname: str) -> None:
    """Every task of the app that wants it completes atomically in this process; called after its tracers were built."""
    for task in _atomic_tasks(app):
        make_atomic(task, functools.partial(build_tracer, task.name, task, app.loader, hostname, app=app))


def require_one_store(app: Any) -> None:
    """Return if every task that wants atomic completion can have it.

    Raises:
        ImproperlyConfigured: a task is not `acks_late`, or its broker and the result backend are not one store.
    """
    tasks = _atomic_tasks(app)
    if not tasks:
        return
    task = max(tasks, key=lambda task: not task.name.startswith("celery."))
    if not isinstance(app.backend, AtomicCompletion):
        raise ImproperlyConfigured(
            f"task {task.name} has atomic completion, but the results are elsewhere ({app.backend.as_uri()}): "
            "set result_backend to the URL of the broker"
        )
    broker = app.connection_for_read().transport
    options = getattr(broker, "options", None)
    if options is None or not same_store(app.backend.database, database_for(options())):
        raise ImproperlyConfigured(
            f"task {task.name} has atomic completion, but broker and result backend are not the same store: "
            "give broker_url and result_backend the same pg:// URL"
        )


def _atomic_tasks(app: Any) -> list[Any]:
    return [task for task in app.tasks.values() if is_atomic(task)]


# The task's own hooks --------------------------------------------------------------------------------------------


def make_atomic(task: Any, new_tracer: Callable[[], Callable[..., Any]]) -> None:
    """The runs of this task, in this process, complete atomically. May be called again."""
    if not hasattr(task.run, "completes"):
        task.run = _completing(task, task.run)
        task.retry = _publishing(task, task.retry, Reject)  # anything else is the function's, or the limit of retries
        task.replace = _publishing(task, task.replace, Exception)
    task.__trace__ = _traced(task, new_tracer())


def _traced(task: Any, tracer: Callable[..., Any]) -> Callable[..., Any]:
    def trace(uuid: str, args: Any, kwargs: Any, request: Any = None) -> Any:
        message_id = ((request or {}).get("properties") or {}).get(MESSAGE_ID)
        if message_id is None:
            return tracer(uuid, args, kwargs, request)
        try:
            return trace_atomically(_begun(task, uuid, message_id), args, kwargs, request)
        except Reject as exc:
            # As the tracer itself answers one that the function has raised: only the prefork pool would catch this one.
            return trace_ok_t(ExceptionInfo(internal=True), TraceInfo(states.REJECTED, exc), 0.0, None)

    def trace_atomically(completion: Completion, args: Any, kwargs: Any, request: Any) -> Any:
        token = _running.set(completion)
        try:
            traced = tracer(completion.task_id, args, kwargs, request)
            _complete_what_stores_nothing(completion, traced[1])
            return traced
        finally:
            _running.reset(token)
            completion.roll_back()

    return trace


def _begun(task: Any, task_id: str, message_id: int) -> Completion:
    """How this run is to end.

    Raises:
        Reject: the process's first look at the result backend found no connection: the task is to run again.
    """
    try:
        return Completion(task.backend.database, task.name, task_id, message_id)
    except errors.Unavailable as exc:
        logger.warning("task %s: its results cannot be reached, it runs again: %s", task_id, exc)
        raise Reject(exc, requeue=True) from exc


def _complete_what_stores_nothing(completion: Completion, info: Any) -> None:
    """Ignore, and Retry of a task without results: the backend never hears of them."""
    if info is not None and info.state in (states.RETRY, states.IGNORED) and not completion.done:
        with completion.ending():
            completion.commit()


def _completing(task: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        completion = _own(task)
        try:
            returned = function(*args, **kwargs)
        except BaseException as exc:
            if completion is not None:
                completion.user.close()
                lost = completion.user.lost or completion.lost is not None
                if lost and isinstance(exc, Exception) and not isinstance(exc, TaskPredicate):
                    logger.warning("task %s: its transaction was lost, it runs again: %s", completion.task_id, exc)
                    raise Reject(exc, requeue=True) from exc
            raise
        if completion is not None:
            completion.returned = True
            with completion.storing():
                if completion.lost is not None:
                    raise completion.lost  # the function has made nothing of it
                completion.begin()
        return returned

    run.completes = True  # type: ignore[attr-defined]
    return run


def _publishing(task: Any, method: Callable[..., Any], fails: type[Exception]) -> Callable[..., Any]:
    """`retry` or `replace`: what it publishes takes the place of this run. `fails`: what it raises if it cannot."""

    @functools.wraps(method)
    def publish(*args: Any, **kwargs: Any) -> Any:
        completion = _own(task)
        if completion is None or not kwargs.get("throw", True):
            return method(*args, **kwargs)
        with completion.storing():
            completion.restart()
        with completion.storing(fails):
            return method(*args, **kwargs)

    return publish


def _own(task: Any) -> Completion | None:
    """The completion under way, unless this is a direct call of the task inside of it, or of another one."""
    request = task.request
    return None if request.called_directly else current(request.id)
