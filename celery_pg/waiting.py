"""How does a process learn that its results are there?

One session of a process listens for all of them (to what, `sources` knows), and whoever waits leads: it sleeps on that
session's socket, reads what has arrived and wakes the others. A look costs one statement, for however many results.
Nothing is connected before somebody waits; once nobody does any more, nothing is told for this process's sake. (It goes
on listening, and what reaches it by a shared channel is meant for others: a task's id that it passes over.)

1. Listen, take the locks that say "somebody waits" (see migration 0008), look.
2. While what was under way at that moment is not over (the look is not settled), look again soon.
3. Sleep until a notification names a task; look at that. A safety poll finds what no notification told of.

Where the connection leads to a pooler, and there is no `listen_url`, step 3 is a poll with growing pauses.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from celery import states
from celery.backends.asynchronous import BaseResultConsumer, greenletDrainer
from celery.exceptions import TimeoutError

from celery_pg.sources import Sent, Sources
from celery_pg.store.results import Results, StoredResult, told
from kombu_pg import errors
from kombu_pg.database import ANSWER_TIMEOUT, Session, database_for, wait_readable
from kombu_pg.store import store_for

__all__ = ["ResultConsumer"]

logger = logging.getLogger(__name__)

#: Seconds that one wait lasts at most: then somebody else may lead, and Celery's on_interval is called.
SLICE = 1.0
#: Tasks that one statement looks at.
LOOK_LIMIT = 1000
#: Seconds until an unsettled look is repeated, or until the next poll behind a pooler: first, and at most.
SOON, LATE = 0.005, 1.0
#: With many results to come, seconds between two looks: together they cost less.
GATHER, MANY = 0.005, 8
#: Seconds between two attempts to connect again.
RECONNECT_PAUSE = 0.25
#: Seconds for an attempt to connect, however little time is left: who looks again and again with a timeout of zero must
#: be connected some time.
CONNECT_AT_LEAST = 0.5
UNREACHED = "The operation timed out: there was no connection to the results' database."
#: Seconds at most until the first look at a result that was given a callback (`then`) while somebody waited.
CALLBACKS_INTERVAL = 1.0


class _Waiter:
    """One call that waits: for which tasks, until when at most, and what has become of them."""

    def __init__(self, leaves: Iterable[Any] = (), on_message: Any = None, deadline: float = math.inf) -> None:
        self.leaves = {leaf.id: leaf for leaf in leaves}
        self.task_ids = set(self.leaves)
        self.deadline = deadline
        self.arrived: list[str] = []
        self.failure: Exception | None = None
        self.woken = threading.Event()
        self._on_message = on_message
        self._seen: dict[str, tuple[str, bytes | None]] = {}

    def tell(self, stored: StoredResult, meta: dict[str, Any]) -> None:
        """Call back with a state, once, however often it is looked at."""
        if self._on_message is None or self._seen.get(stored.task_id) == (stored.state, stored.result):
            return
        self._seen[stored.task_id] = stored.state, stored.result
        try:
            self._on_message(meta)
        except Exception as exc:  # noqa: BLE001 - it is raised where the callback came from
            self.failure = exc

    def take(self) -> list[str]:
        arrived, self.arrived = self.arrived, []
        return arrived


class ResultConsumer(BaseResultConsumer):
    """Everything a process waits for. Safe from all threads; callbacks run in the thread that leads."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._results = Results(self.backend.options)
        self._store = store_for(self.backend.options)
        self._poll_interval: float = self.backend.options.poll_interval
        self._bell: tuple[int, int] | None = None
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()  # over the session and what follows; never held while asleep
        self._connecting = threading.Lock()
        self._leader: _Waiter | None = None
        self._waiters: dict[int, _Waiter] = {}
        self._by_task: dict[str, list[_Waiter]] = {}
        self._pending: set[str] = set()  # these have a callback
        self._sent = Sent()
        self._sleepers: dict[int, _Waiter] = {}
        self._session: Session | None = None
        self._connected_before = False
        self._callbacks_at = 0.0
        self._turn: list[str] = []
        if self._bell is not None:
            for end in self._bell:
                os.close(end)
            self._bell = None
        self._forget_session()

    def _forget_session(self) -> None:
        if self._session is not None:
            self._session.close()
        self._session = None
        self._direct = True
        self._sources = Sources(self._results)
        self._horizon: str | None = None
        self._fresh: set[str] = set(self._by_task) | set(self._pending)
        self._unsettled: set[str] = set()
        self._arrived: list[StoredResult] = []
        self._called_back: set[str] = set()  # of those that have a callback: looked at since the locks are held
        self._pause = SOON
        self._looked = 0.0
        self._polled = time.monotonic()

    # What Celery calls

    def start(self, initial_task_id: str, **kwargs: Any) -> None:
        self.consume_from(initial_task_id)

    def stop(self) -> None:
        with self._lock:
            self._forget_session()

    def on_after_fork(self) -> None:
        # The session is the parent's, and the lock may have been held by a thread that is not here.
        self._session = None
        self._reset()

    def consume_from(self, task_id: str) -> None:
        self._pending.add(task_id)

    def cancel_for(self, task_id: str) -> None:
        # Runs wherever the garbage collector does: no lock.
        self._pending.discard(task_id)

    def sent(self, task_id: str) -> None:
        """This thread is about to send the task. Nothing is connected for that."""
        self._sent.note(task_id, self.app.thread_oid)

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait, at most `timeout` seconds, for any result that somebody waits for or that has a callback.

        Raises:
            Unavailable: this process was never connected, and has tried often enough.
        """
        deadline = time.monotonic() + (SLICE if timeout is None else timeout)
        waiter = _Waiter()
        try:
            self._enter(waiter, callbacks=True)
            if self._reached(waiter, deadline):
                self._drain(waiter, max(0.0, deadline - time.monotonic()))
        except errors.Unavailable as exc:
            if not isinstance(self.drainer, greenletDrainer):
                raise
            # With the greenlet that drains, all waiting of the process would end for good.
            self._lost(exc, deadline - time.monotonic())
        finally:
            self._leave(waiter)

    def _wait_for_pending(
        self, result: Any, timeout: float | None = None, on_interval: Any = None, on_message: Any = None, **_: Any
    ) -> Iterator[list[str]]:
        begun = time.monotonic()
        waiter = _Waiter(_leaves(result), on_message, math.inf if timeout is None else begun + timeout)
        self._enter(waiter)
        try:
            slice_ = SLICE if timeout is None else min(timeout, SLICE)
            while not result.on_ready.ready:
                if self._reached(waiter, waiter.deadline):
                    self._drain(waiter, slice_)
                if waiter.failure is not None:
                    raise waiter.failure
                yield waiter.take()
                if on_interval:
                    on_interval()
                waited = time.monotonic() - begun
                if timeout is not None:
                    if waited >= timeout and not result.on_ready.ready:
                        raise TimeoutError("The operation timed out." if self._connected_before else UNREACHED)
                    slice_ = min(timeout - waited, SLICE)
                if waited > SLICE:
                    self._widen(waiter)
            yield waiter.take()
        finally:
            self._leave(waiter)

    # Who waits

    def _enter(self, waiter: _Waiter, *, callbacks: bool = False) -> None:
        with self._lock:
            self._waiters[id(waiter)] = waiter
            for task_id in waiter.task_ids:
                self._by_task.setdefault(task_id, []).append(waiter)
            self._fresh |= waiter.task_ids
            if waiter.task_ids:
                self._pause = SOON
            if callbacks:
                self._callbacks_at = 0.0  # at its first look

    def _leave(self, waiter: _Waiter) -> None:
        with self._lock:
            self._waiters.pop(id(waiter), None)
            for task_id in waiter.task_ids:
                waiters = self._by_task.get(task_id, [])
                if waiter in waiters:
                    waiters.remove(waiter)
                if not waiters:
                    self._by_task.pop(task_id, None)
            if self._waiters:
                self._promote()
            elif not (self._pending and isinstance(self.drainer, greenletDrainer)):
                # (A greenlet that drains for ever keeps the locks for results with a callback.)
                self._disarm()

    def _promote(self) -> None:
        """Have one of those that sleep lead; not one whose caller may be busy with something else."""
        if self._leader is None and self._sleepers:
            next(iter(self._sleepers.values())).woken.set()

    def _wake(self, waiter: _Waiter) -> None:
        waiter.woken.set()
        if waiter is self._leader:
            self._ring()

    def _ring(self) -> None:
        """Wake the leader, who sleeps on the socket."""
        if self._leader is not None and self._bell is not None:
            with contextlib.suppress(BlockingIOError):  # it has been rung often enough
                os.write(self._bell[1], b"!")

    def _widen(self, waiter: _Waiter) -> None:
        """Wait as a stranger, too: another sender may have been named in the message than the one that sent it."""
        with self._lock:
            waited = waiter.task_ids & self._by_task.keys()
            if self._sources.widen(waited):
                self._fresh |= waited

    # One slice of waiting

    def _drain(self, waiter: _Waiter, timeout: float) -> None:
        """Lead, if nobody does, else be woken by who does. Returns when something may have happened."""
        deadline = time.monotonic() + timeout
        waiter.woken.clear()
        if waiter.arrived or waiter.failure:
            return
        if id(waiter) not in self._waiters:
            self._enter(waiter)  # its process was forked meanwhile
        try:
            session = self._connected(waiter, deadline)
            if session is None:
                return
            with self._lock:
                found = self._look(session)
                if self._leader is None:
                    self._leader = waiter
                elif self._unsettled:
                    self._ring()  # its timer is to be set anew
            if self._dispatch(found):
                return
            if self._leader is waiter:
                self._lead(session, waiter, deadline)
            else:
                self._follow(waiter, deadline)
        except (errors.Unavailable, OSError) as exc:
            self._lost(exc, max(0.0, deadline - time.monotonic()))
        finally:
            with self._lock:
                if self._leader is waiter:
                    self._leader = None
                    self._promote()

    def _lead(self, session: Session, waiter: _Waiter, deadline: float) -> None:
        while not waiter.woken.is_set() and session is self._session:
            if not self._sleep(session, deadline):
                return
            with self._lock:
                if session is not self._session:
                    return
                found = self._look(session)
            if self._dispatch(found) and not waiter.task_ids:
                return

    def _follow(self, waiter: _Waiter, deadline: float) -> None:
        with self._lock:
            self._sleepers[id(waiter)] = waiter
            self._promote()
        waiter.woken.wait(max(0.0, deadline - time.monotonic()))
        with self._lock:
            self._sleepers.pop(id(waiter), None)

    def _sleep(self, session: Session, deadline: float) -> bool:
        """Wait until something may be there to look at; False when the time is over."""
        bell = self._bell_rope()
        now = time.monotonic()
        until = min(deadline, self._next_look(), now + SLICE)  # (a callback may have come meanwhile)
        arrived = wait_readable([session.fileno(), bell], max(0.0, until - now))
        if bell in arrived:
            with contextlib.suppress(BlockingIOError):
                os.read(bell, 4096)
        now = time.monotonic()
        if arrived and len(self._by_task) > MANY and now < self._looked + GATHER:
            time.sleep(self._looked + GATHER - now)
        return bool(arrived) or now < deadline

    def _next_look(self) -> float:
        if not self._direct:
            return self._looked + self._pause if self._by_task or self._pending else float("inf")
        poll = self._polled + self._poll_interval if self._poll_interval else float("inf")
        return min(poll, self._looked + self._pause) if self._unsettled else poll

    def _bell_rope(self) -> int:
        with self._lock:
            if self._bell is None:
                self._bell = os.pipe()
                os.set_blocking(self._bell[0], False)
                os.set_blocking(self._bell[1], False)
            return self._bell[0]

    # What the session says; all under the lock

    def _look(self, session: Session) -> list[StoredResult]:
        """Read what is new about the tasks that somebody waits for, as far as it is known which those are."""
        self._hear(session)
        now = time.monotonic()
        self._find_callbacks(now)
        if now >= self._looked + self._pause and (self._unsettled or not self._direct):
            if not self._fresh:  # (what has just come is looked at for the first time)
                self._pause = min(2 * self._pause, LATE)
            self._fresh |= self._unsettled if self._direct else self._polled_for()
        if self._poll_interval and now >= self._polled + self._poll_interval:
            self._polled = now
            self._fresh |= self._polled_for()
        found: list[StoredResult] = []
        while self._fresh:
            found += self._look_at(session, list(itertools.islice(self._fresh, LOOK_LIMIT)))
            self._hear(session)
        arrived, self._arrived = self._arrived, []
        return found + arrived

    def _find_callbacks(self, now: float) -> None:
        """Have those looked at that have got a callback, and of which nobody would be told yet."""
        if now < self._callbacks_at + CALLBACKS_INTERVAL:
            return
        self._callbacks_at = now
        pending = set(self._pending)
        self._called_back &= pending
        if new := pending - self._called_back:
            self._fresh |= new
            self._pause = SOON

    def _polled_for(self) -> set[str]:
        """All that somebody waits for, and of those that have a callback the next ones: they may be many, and stay."""
        if not self._turn:
            self._turn = list(self._pending)
        turn, self._turn = self._turn[:LOOK_LIMIT], self._turn[LOOK_LIMIT:]
        return self._by_task.keys() | self._pending.intersection(turn)

    def _look_at(self, session: Session, task_ids: list[str]) -> list[StoredResult]:
        missing = self._missing(session, task_ids)
        last = bool(self._sources.held) and not missing and self._horizon is None
        last = last and self._by_task.keys() | self._pending <= set(task_ids)
        if last:
            # What nobody waits for any more in a moment: one statement reads it and releases the locks.
            looked = session.run(self._results.last_look(task_ids, self._sources.release()))
        else:
            looked = session.run(self._results.look(task_ids, self._horizon, missing))
        self._looked = time.monotonic()
        self._fresh.difference_update(task_ids)
        if last:
            final = {stored.task_id for stored in looked.found if stored.state in states.READY_STATES}
            self._fresh |= (self._by_task.keys() | self._pending) - final
            self._called_back.clear()
        else:
            self._called_back.update(self._pending.intersection(task_ids))
        if looked.horizon is not None:
            self._unsettled.update(task_ids)
            self._horizon = looked.horizon
        else:
            self._unsettled.difference_update(task_ids)
        return looked.found

    def _missing(self, session: Session, task_ids: list[str]) -> set[int]:
        """The locks that are to be taken for these tasks; their channels are listened to."""
        if not self._direct:
            return set()
        for task_id in task_ids:
            sender = self._sent.sender(task_id)
            if not self._sources.add(task_id, sender):
                waited = self._by_task.keys() | self._pending
                self._fresh |= self._sources.drop((other, self._sent.sender(other)) for other in waited)
                if not self._sources.add(task_id, sender):
                    self._sources.add(task_id, None)
        missing = self._sources.listen(session)
        if missing:
            self._pause = SOON
        return missing

    def _hear(self, session: Session) -> None:
        """Note which results have come, and of which tasks one is to be looked at."""
        _end_statement(session)
        while not session.closed and wait_readable([session.fileno()], 0):
            session.receive()
        if session.closed:
            raise errors.Unavailable("the server has closed the session that waits for results")
        while session.notifications:
            payload = session.notifications.popleft().payload
            stored = told(payload)
            task_id = payload if stored is None else stored.task_id
            if task_id in self._by_task or task_id in self._pending:
                if stored is None:
                    self._fresh.add(task_id)
                else:
                    self._arrived.append(stored)
                    self._fresh.discard(task_id)
                    self._unsettled.discard(task_id)
            elif not task_id:
                self._fresh |= self._by_task.keys() | self._pending

    def _disarm(self) -> None:
        """Have nobody told any more; not waited for."""
        session, held = self._session, self._sources.clear()
        self._unsettled, self._called_back = set(), set()
        self._horizon = None
        self._fresh.clear()
        self._arrived.clear()
        if session is None or not held:
            return
        try:
            _end_statement(session)
            session.send(self._results.stop_waiting(held))
        except (errors.Unavailable, OSError):
            self._forget_session()

    # The session

    def _reached(self, waiter: _Waiter, deadline: float) -> bool:
        """Whether the process has been connected, by now or at the deadline.

        Raises:
            Unavailable: it has been tried often enough. Later the server may be away for as long as it likes.
        """
        return self._connected_before or self._connected(waiter, deadline) is not None

    def _connected(self, waiter: _Waiter, deadline: float) -> Session | None:
        """The session; None if there is none when the time is over."""
        session = self._session
        if session is not None and not session.closed:
            return session
        left = max(0.0, deadline - time.monotonic())
        if not self._connecting.acquire(timeout=min(left, threading.TIMEOUT_MAX)):
            return None
        try:
            if self._session is not None and not self._session.closed:
                return self._session
            if self._connected_before:
                session, direct = self._connect(waiter)
            elif (connected := self._connect_at_first(waiter, deadline)) is not None:
                session, direct = connected
            else:
                return None
            with self._lock:
                self._forget_session()
                self._session, self._direct, self._connected_before = session, direct, True
            return session
        finally:
            self._connecting.release()

    def _connect_at_first(self, waiter: _Waiter, deadline: float) -> tuple[Session, bool] | None:
        try:
            connected: tuple[Session, bool] = self.backend._ensure_retryable(self._connect, waiter, deadline=deadline)
        except errors.Unavailable as exc:
            if time.monotonic() < deadline:
                raise
            logger.warning("no connection for results within the time that they are waited for: %s", exc)
            return None
        return connected

    def _connect(self, waiter: _Waiter) -> tuple[Session, bool]:
        left = waiter.deadline - time.monotonic()
        within = None if math.isinf(left) else max(left, CONNECT_AT_LEAST)
        session = database_for(self.backend.options).connect(listen=True, within=within)
        try:
            _ = self.backend.database  # the schema fits
            direct = session.run(self._store.backend_pid()) == session.backend_pid
            if direct:
                session.run(self._store.prepare_claims())
        except BaseException:
            session.close()
            raise
        return session, direct

    def _lost(self, exc: Exception, left: float) -> None:
        logger.warning("lost the connection that waits for results, connecting again: %s", exc)
        with self._lock:
            if self._session is not None and self._session.closed:
                self._forget_session()
            self._ring()
        time.sleep(max(0.0, min(left, RECONNECT_PAUSE)))

    # What was found

    def _dispatch(self, found: list[StoredResult]) -> bool:
        """Hand over what was found; whether any of it was final, and wanted."""
        delivered = False
        for stored in found:
            with self._lock:
                waiters = list(self._by_task.get(stored.task_id, ()))
            if waiters or stored.task_id in self._pending:
                delivered |= self._deliver(stored, waiters)
        return delivered

    def _deliver(self, stored: StoredResult, waiters: list[_Waiter]) -> bool:
        try:
            meta = self.backend.meta_from_stored(stored)
        except Exception as exc:
            # It is raised where somebody waits for this one.
            self._pending.discard(stored.task_id)
            if not waiters:
                logger.exception("no callback of task %s is called: its result cannot be read", stored.task_id)
            self._end(stored.task_id, exc)
            return True
        for waiter in waiters:
            waiter.tell(stored, meta)
            if waiter.failure is not None:
                self._wake(waiter)
        if stored.state not in states.READY_STATES:
            return False
        self._resolve(meta, [waiter.leaves[stored.task_id] for waiter in waiters])
        self._end(stored.task_id)
        return True

    def _end(self, task_id: str, failure: Exception | None = None) -> None:
        """Nobody waits for this task any more, also nobody who came while it was being resolved."""
        with self._lock:
            self._unsettled.discard(task_id)
            for waiter in self._by_task.pop(task_id, []):
                waiter.failure = waiter.failure or failure
                waiter.arrived.append(task_id)
                self._wake(waiter)

    def _resolve(self, meta: dict[str, Any], leaves: list[Any]) -> None:
        known = [waiting.get(meta["task_id"]) for waiting in self._pending_results]
        # Celery 5.6 knows one object per task, later ones know many.
        called_back = [list(one.values()) if hasattr(one, "values") else [one] for one in known if one is not None]
        for result in {id(result): result for result in itertools.chain(leaves, *called_back)}.values():
            try:
                result._maybe_set_cache(meta)
            except Exception:
                logger.exception("a callback of the result of task %s failed", meta["task_id"])


def _leaves(result: Any) -> Iterator[Any]:
    """The results of all tasks in it that are not known to be ready."""
    if hasattr(result, "results"):
        for node in result.results or ():
            yield from _leaves(node)
    elif not getattr(result, "_cache", None):
        yield result


def _end_statement(session: Session) -> None:
    deadline = time.monotonic() + ANSWER_TIMEOUT
    while session.busy:
        if not wait_readable([session.fileno()], max(0.0, deadline - time.monotonic())):
            session.close()
            raise errors.Unavailable("timed out while waiting for an answer")
        session.receive()
