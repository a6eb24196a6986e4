"""How does Celery keep its results in PostgreSQL?"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

from celery import states
from celery._state import task_join_will_block
from celery.backends import base
from celery.backends.asynchronous import AsyncBackendMixin
from celery.backends.base import Backend
from celery.result import AsyncResult, result_from_tuple
from celery.utils.serialization import UnpickleableExceptionWrapper
from kombu.serialization import loads
from kombu.serialization import registry as serializers
from kombu.utils.encoding import ensure_bytes

from celery_pg.chords import NativeChords
from celery_pg.completion import AtomicCompletion, require_acks_late
from celery_pg.retrying import Retrying
from celery_pg.store.results import NewResult, Results, StoredResult
from celery_pg.waiting import ResultConsumer
from kombu_pg import errors, schema, transaction
from kombu_pg.database import Database, Statement, T, database_for, forget_after_fork
from kombu_pg.options import Options, redact
from kombu_pg.transaction import same_store
from kombu_pg.transport import Transport
from kombu_pg.url import has_secret_query

__all__ = ["PGBackend"]

logger = logging.getLogger(__name__)

# Celery 5.6 does not compress.
_decompressed: Callable[[bytes], bytes] = getattr(base, "decompress_payload", bytes)

#: Attempts to store or read while the server is not there, if `result_backend_max_retries` does not say otherwise: with
#: Celery's pauses between them they last for about half a minute.
MAX_RETRIES = 15
#: Expired results that are deleted in one transaction, and the seconds between two looks of a process that does it.
EXPIRE_BATCH, EXPIRE_PERIOD = 1000, 10.0

_backends: weakref.WeakSet[PGBackend] = weakref.WeakSet()


class PGBackend(AtomicCompletion, NativeChords, Retrying, AsyncBackendMixin, Backend):
    """`result_backend = "pg://user@host/database"`. One object serves all threads of a process."""

    supports_native_join = True
    supports_autoexpire = True
    supports_result_compression = True
    supports_failure_expires = True
    persistent = True

    def __init__(self, app: Any, url: str | None = None, **kwargs: Any) -> None:
        super().__init__(app, url=url, expires_type=float, **kwargs)
        conf = app.conf
        self.thread_safe = True
        failure_expires = conf.get("result_failure_expires")
        self.failure_expires = (
            self.expires if failure_expires is None else self.prepare_expires(failure_expires, type=float)
        )
        # The server may be away for a while. Both settings always have a value.
        self.always_retry: bool = _setting(conf, "result_backend_always_retry", True)
        self.max_retries: float = _setting(conf, "result_backend_max_retries", MAX_RETRIES)
        self.options = Options.parse(
            url or "",
            connect_timeout=conf.broker_connection_timeout or None,  # as the transport: one pool for both
        )
        if has_secret_query(url or ""):
            logger.warning(
                "result_backend has a password in its query, which `celery report` shows: put it in front of the @, "
                "or into libpq's password file"
            )
        self.results = Results(self.options)
        self._database: Database | None = None
        self._opening = threading.Lock()
        self._expire_at = 0.0
        self._checked = self._knows_tasks = False
        self.result_consumer = ResultConsumer(self, app, self.accept, self._pending_results, self._pending_messages)
        _backends.add(self)

    def __reduce__(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return super().__reduce__(args, {**(kwargs or {}), "url": self.url, "expires": self.expires})

    def as_uri(self, include_password: bool = False) -> str:
        url = self.url or ""
        # Celery cuts pg+embedded:// and postgresql+psycopg2:// at the "+".
        cut = {"embedded": "pg+", "psycopg2": "postgresql+"}.get(url.partition(":")[0], "")
        url = f"{cut}{url}"
        return url if include_password else redact(url)

    # The store

    @property
    def database(self) -> Database:  # type: ignore[override]
        """Where results are; blocks for the first connection of the process, which checks the schema.

        Raises:
            Unavailable: the server cannot be reached, or refuses for now.
            SchemaError: somebody must act.
        """
        if self._database is None:
            with self._opening:
                self._open()
        assert self._database is not None
        return self._database

    def _open(self) -> None:
        if self._database is not None:
            return  # by another thread
        database = database_for(self.options)
        database.retain()
        try:
            if not self._checked:
                with database.session() as session:
                    schema.check(session, self.options)
                self._checked = True
        except BaseException:
            database.release()
            raise
        self._database = database

    @property
    def _synchronous(self) -> bool:  # type: ignore[override]
        return self.options.result_synchronous_commit

    def _run(self, statement: Statement[T]) -> T:
        """Run the statement in the transaction that this thread has open in the store, or else alone."""
        opened = transaction.current(self.database)
        return self.database.run(statement) if opened is None else opened.run(statement)

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        return isinstance(exc, errors.Unavailable)

    def after_fork(self) -> None:
        """In a forked child: what the parent waits for and has read is not ours."""
        self._database = None
        self._opening = threading.Lock()
        for mapping in self._pending_results:
            mapping.clear()
        self._pending_messages.clear()
        self._pending_messages.total = 0
        self._cache.clear()
        self.result_consumer._after_fork()

    # Results

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **_: Any
    ) -> None:
        new = self._new_result(task_id, result, state, traceback, request)
        opened = transaction.current(self.database)
        if opened is None:
            self.database.run(self.results.store_alone(new, synchronous=self._synchronous))
        else:
            opened.defer(self.results.store(new))
            opened.durable |= self._synchronous

    def _stored(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None
    ) -> tuple[str, tuple[Any, ...]]:
        """The SQL expression that stores the (encoded) result wherever it is evaluated, and its parameters."""
        return self.results.storing(self._new_result(task_id, result, state, traceback, request))

    def _new_result(self, task_id: str, result: Any, state: str, traceback: Any, request: Any) -> NewResult:
        meta = self._get_result_meta(result, state, traceback, request)
        further = {key: value for key, value in meta.items() if key not in _OWN_COLUMNS and value}
        delivery = getattr(request, "delivery_info", None) or {}
        columns = {
            "state": state,
            "traceback": None if traceback is None else str(traceback),
            "name": getattr(request, "task", None),
            "worker": getattr(request, "hostname", None),
            "queue": delivery.get("routing_key"),
            "group_id": meta.get("group_id"),
            "parent_id": meta.get("parent_id"),
            "reply_to": getattr(request, "reply_to", None),
        }
        for column, value in columns.items():
            columns[column] = _storable(value)
            if column in _EXACT and columns[column] != value:
                further[_EXACT[column]] = value
        retries = getattr(request, "retries", None)
        return NewResult(
            task_id=task_id,
            ready=state in self.READY_STATES,
            expires=(self.failure_expires if state == states.FAILURE else self.expires) or None,
            content_type=self.content_type,
            result=ensure_bytes(self.encode(result)),
            meta=ensure_bytes(self.encode(further)) if further else None,
            retries=retries if type(retries) is int and abs(retries) <= _MOST_RETRIES else None,
            **columns,
        )

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        found = self._run(self.results.get([task_id]))
        return self.meta_from_stored(found[0]) if found else {"status": states.PENDING, "result": None}

    def meta_from_stored(self, stored: StoredResult) -> dict[str, Any]:
        """What Celery calls a task's meta; decodes only what `result_accept_content` allows.

        Raises:
            ContentDisallowed: it does not allow this one.
        """
        meta: dict[str, Any] = {
            "status": stored.state,
            "result": self._decoded(stored.result, stored.content_type),
            "traceback": stored.traceback,
            "children": [],
            "date_done": stored.date_done and stored.date_done.astimezone(self.app.timezone).isoformat(),
            "task_id": stored.task_id,
        }
        if stored.group_id is not None:
            meta["group_id"] = stored.group_id
        if stored.parent_id is not None:
            meta["parent_id"] = stored.parent_id
        meta.update(self._decoded(stored.meta, stored.content_type) or {})
        return dict(self.meta_from_decoded(meta))

    def _decoded(self, payload: bytes | None, content_type: str) -> Any:
        if payload is None:
            return None
        name = serializers.type_to_name.get(content_type)
        encoding = serializers._encoders[name][1] if name in serializers._encoders else "utf-8"
        return loads(_decompressed(payload), content_type=content_type, content_encoding=encoding, accept=self.accept)

    def exception_to_python(self, exc: Any) -> Any:
        if isinstance(exc, UnpickleableExceptionWrapper):
            exc = {"exc_module": exc.exc_module, "exc_type": exc.exc_cls_name, "exc_message": exc.exc_args}
        if isinstance(exc, BaseException):
            return exc
        rebuilt = super().exception_to_python(exc)
        known = _exception_class(exc) if isinstance(exc, dict) else None
        if known is None or isinstance(rebuilt, known):
            return rebuilt
        # Its constructor takes something else than its args: type and args are what matters to an except clause.
        arguments = exc.get("exc_message", "")
        try:
            return _resembling(known, tuple(arguments) if isinstance(arguments, list | tuple) else (arguments,))
        except Exception as failure:  # noqa: BLE001 - whatever the class does when it is derived from
            logger.debug("%s cannot be made again: %s", known.__name__, failure)
            return rebuilt

    def task_result_exists(self, task_id: str) -> bool:
        return bool(self._ensure_retryable(self._run, self.results.get([task_id])))

    def _forget(self, task_id: str) -> None:
        self._run(self.results.forget(task_id))

    # Groups

    def _save_group(self, group_id: str, result: Any) -> Any:
        payload = ensure_bytes(self.encode({"result": result.as_tuple()}))
        self._run(self.results.save_group(group_id, self.expires or None, self.content_type, payload))
        return result

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        group = self._run(self.results.get_group(group_id))
        if group is None:
            return None
        saved = self._decoded(group.result, group.content_type)
        return {
            "task_id": group_id,
            "result": result_from_tuple(saved["result"], self.app),
            "date_done": group.date_done.astimezone(self.app.timezone).isoformat(),
        }

    def _delete_group(self, group_id: str) -> None:
        self._run(self.results.delete_group(group_id))

    # Waiting

    def on_task_call(self, producer: Any, task_id: str) -> dict[str, Any]:
        if not self._knows_tasks:
            require_acks_late(self.app)
            self._knows_tasks = True
        # Nothing is connected for this: an app that never asks for a result never listens.
        if not task_join_will_block():
            self.result_consumer.sent(task_id)
        return {}

    def iter_native(self, result: Any, no_ack: bool = True, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        self._ensure_not_eager()
        groups = [node for node in result.results or () if not hasattr(node, "_cache")]
        nodes = {node.id: node for node in result.results or () if hasattr(node, "_cache")}
        for arrived in self._arrivals(result, **kwargs):
            for task_id in arrived:
                if task_id in nodes and nodes[task_id]._cache:
                    yield task_id, nodes.pop(task_id)._cache
        for task_id, node in nodes.items():
            if node._cache:
                yield task_id, node._cache
        # Last, when all their tasks are there: whoever asks them does it without a timeout.
        for group in groups:
            yield group.id, group.children

    def _arrivals(self, result: Any, **kwargs: Any) -> Iterator[list[str]]:
        ready = [node.id for node in result.results or () if getattr(node, "_cache", None)]
        yield ready
        if len(ready) < len(result.results or ()):
            yield from self._wait_for_pending(result, **kwargs)

    def get_many(
        self,
        task_ids: Iterable[str],
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_message: Any = None,
        on_interval: Any = None,
        max_iterations: int | None = None,
        READY_STATES: Iterable[str] = states.READY_STATES,  # noqa: N803 - Celery's name
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (task id, meta) of each task as it becomes ready; one statement for all of them."""
        wanted = list(dict.fromkeys(task_ids))
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        for stored in self._ensure_retryable(self._run, self.results.get(wanted), deadline=deadline):
            meta = self.meta_from_stored(stored)
            if on_message is not None:
                on_message(meta)
            if meta["status"] in READY_STATES:
                wanted.remove(stored.task_id)
                yield stored.task_id, meta
        if not wanted or max_iterations == 1:
            return
        pending = self.app.ResultSet([AsyncResult(task_id, backend=self, app=self.app) for task_id in wanted])
        yield from self.iter_native(pending, timeout=timeout, on_interval=on_interval, on_message=on_message)

    # Expiry

    def cleanup(self) -> None:
        """Delete what has expired, in transactions of bounded size."""
        while self._ensure_retryable(self._expire):
            pass
        super().cleanup()

    def process_cleanup(self) -> None:
        # After each task. Where messages are in the same store, their consumers do this.
        if time.monotonic() >= self._expire_at:
            self._expire_at = time.monotonic() + EXPIRE_PERIOD
            try:
                self._expire_at = 0.0 if self._expires_itself and self._expire() else self._expire_at
            except errors.PGError as exc:
                logger.warning("expired results are not deleted yet: %s", exc)

    def _expire(self) -> bool:
        """Whether there was more than is deleted at a time."""
        results = self.database.run(self.results.expire(EXPIRE_BATCH))
        return max(results, self.database.run(self._chords.sweep(EXPIRE_BATCH))) >= EXPIRE_BATCH

    @cached_property
    def _expires_itself(self) -> bool:
        """No consumer does it: what they sweep is their own store, which is not this one."""
        broker = self.app.connection_for_read().transport
        return not (isinstance(broker, Transport) and same_store(self.database, database_for(broker.options())))


#: What the column can hold; a message may say anything.
_MOST_RETRIES = 2**31 - 1
#: What has a column of its own, or none at all (the result).
_OWN_COLUMNS = frozenset({"status", "result", "traceback", "date_done", "group_id", "parent_id"})
#: Column -> key of the meta, where text that the column cannot hold must come back as it was.
_EXACT = {"state": "status", "traceback": "traceback", "group_id": "group_id", "parent_id": "parent_id"}


def _setting(conf: Any, name: str, default: Any) -> Any:
    """What the user has set, not Celery's own default."""
    return default if not conf.value_set_for(name) or conf[name] is None else conf[name]


def _storable(value: object) -> str | None:
    """The text as a column can hold it: without NUL and lone surrogates."""
    if value is None:
        return None
    text = str(value)
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-8", "replace").decode()
    return text


def _resembling(known: type[BaseException], arguments: tuple[Any, ...]) -> BaseException:
    """An exception of this type with these args, but without what else its constructor gives it.

    So its own way to say what it is may not work: it says its name and its args.
    """
    namespace = {
        "__module__": known.__module__,
        "__qualname__": known.__qualname__,
        "__doc__": known.__doc__,
        "__str__": BaseException.__repr__,
        "__repr__": BaseException.__repr__,
        "__reduce__": lambda self: (_resembling, (known, self.args)),
    }
    kind = type(known.__name__, (known,), namespace)
    again: BaseException = kind.__new__(kind, *arguments)
    again.args = arguments
    return again


def _exception_class(stored: Any) -> type[BaseException] | None:
    found: Any = sys.modules.get(str(stored.get("exc_module")))
    for name in str(stored.get("exc_type")).split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def _forget_the_parents() -> None:
    for backend in list(_backends):
        backend.after_fork()


forget_after_fork(_forget_the_parents)
