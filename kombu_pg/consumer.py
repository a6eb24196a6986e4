"""Who holds which messages, and is he alive?

A consuming process registers once per database, however many kombu connections it has. A thread of its own keeps the
registration: it holds the advisory lock that says "alive" on a connection of its own, takes both again by itself when
they are lost, and does the housekeeping of the store in turn with the other consumers (returns what dead consumers
held, makes due messages ready). The hub may block for as long as a task runs; this thread does not.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import socket
import threading
import time
import weakref
from contextlib import suppress

from kombu_pg import errors
from kombu_pg.database import Database, Session, forget_after_fork, wait_readable
from kombu_pg.options import Options
from kombu_pg.store import Caller, Settlement, Store

__all__ = ["Consumer", "consumer_for"]

logger = logging.getLogger(__name__)

#: Seconds between two rounds of housekeeping, over all consumers together.
UPKEEP_PERIOD = 0.25
#: A consumer takes part at least this often, however many there are.
LONGEST_PERIOD = 5.0
#: Seconds between two sweeps (expiry, orphans) by the oldest consumer.
SWEEP_PERIOD = 5.0
#: The oldest consumers wake for a due message, one after the other, until one has made it ready.
CLOCK_KEEPERS = 10
CLOCK_STEP = 0.02
#: Messages that are made ready in one transaction.
PROMOTION_BATCH = 500
#: From this many returns on, a message is claimed only while no other such message is held.
SUSPECT_RETURNS = 3
#: Seconds after a lost connection in which its leases are looked through every RECONCILE_PERIOD, then less often.
RECONCILE_CLOSELY = 3.0
RECONCILE_PERIOD = 0.5
#: Seconds after which its subscriptions and exclusive queues end: by then the application consumes over another one.
ENDING = 30.0
#: Seconds that a process waits for its thread to leave.
LEAVE_TIMEOUT = 10.0
#: Seconds after which it leaves by itself when all its connections were lost: most of them come back at once.
LINGER = 10.0


class Consumer:
    """The process, as the store knows it.

    Attributes:
        id: changes when the process was away for longer than the grace and has been reaped (`generation` then grows).
        settled: everybody who was there before a restart of the server is back: messages may be claimed.
        epoch: another one after each restart or crash of the server, once this process has noticed.
    """

    def __init__(self, database: Database, store: Store) -> None:
        self._database = database
        self._store = store
        self._options: Options = database.options
        self._lifecycle = threading.Lock()  # held over attach and detach; the thread never takes it
        self._lock = threading.Lock()  # held for moments, over what the thread shares
        self._last_token = 0
        self._live_tokens: set[int] = set()
        self._held: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
        self._suspects: set[int] = set()
        self._late: dict[str | None, Settlement] = {}  # by the epoch in which the messages were claimed
        self._thread: threading.Thread | None = None
        self._attached = threading.Event()
        self._failure: Exception | None = None
        self._stopping = False
        self._reader = self._writer = -1
        self._lost_at: float | None = None  # when a connection was last lost; None = since the thread began, none was
        self._users: set[int] = set()
        self.id: int | None = None
        self.generation = 0
        self.heartbeat = False
        self.settled = False
        self.epoch: str | None = None

    # For connections

    def attach(self, token: int) -> int:
        """Register this process unless it is registered; blocks until it is. Returns its id.

        The registration lasts until every connection that asked for it has called `detach`.

        Raises:
            Unavailable: the server could not be reached, or it does not accept the registration.
        """
        with self._lifecycle:
            self._users.add(token)
            if self._stopping and not self._ended(LEAVE_TIMEOUT):
                raise errors.Unavailable("this process's former registration has not ended yet: the server is silent")
            if self._thread is None:
                self._attached.clear()
                self._failure = None
                self._stopping = False
                self._lost_at = None
                self._reader, self._writer = os.pipe()
                os.set_blocking(self._reader, False)
                self._thread = threading.Thread(target=self._live, name="kombu_pg-liveness", daemon=True)
                self._thread.start()
            while not self._attached.wait(0.05):
                if self._failure is not None:
                    failure, self._failure = self._failure, None
                    self._join()
                    raise failure
        assert self.id is not None
        return self.id

    def is_attached(self, token: int) -> bool:
        return token in self._users

    def detach(self, token: int) -> None:
        """The connection needs the registration no more.

        With the last one the process leaves in order, and this blocks until the server knows, at most LEAVE_TIMEOUT. It
        stays while it works on what a lost connection had claimed: leaving would give that to somebody else.
        """
        with self._lifecycle:
            self._live_tokens.discard(token)
            self._users.discard(token)
            if self._thread is not None and not self._users and not self._held:
                self._join()

    def _join(self) -> None:
        self._stopping = True
        self._nudge()
        if not self._ended(LEAVE_TIMEOUT):
            logger.warning("consumer %s could not say that it leaves: the server is silent", self.id)

    def _ended(self, within: float) -> bool:
        if self._thread is None:
            return True
        self._thread.join(within)
        if self._thread.is_alive():
            return False  # until it is over, all this is its own
        self._thread = None
        self._attached.clear()
        os.close(self._reader)
        os.close(self._writer)
        self._reader = self._writer = -1
        self.id = None
        self.settled = False
        return True

    def open_token(self) -> int:
        """A number for a connection of this process; its claims and exclusive queues carry it."""
        with self._lock:
            self._last_token += 1
            self._live_tokens.add(self._last_token)
            return self._last_token

    def drop_token(self, token: int) -> None:
        """The connection is gone, without a word to the server: the thread gives back what nobody works on."""
        with self._lock:
            self._live_tokens.discard(token)
            self._users.discard(token)
            self._lost_at = time.monotonic()
        self._nudge()

    def caller(self, token: int) -> Caller:
        return Caller(self.id, token, tuple(self._live_tokens))

    def hold(self, message_id: int, holder: object, returns: int) -> None:
        """`holder` is what works with the message: as long as it is alive, the message is not given back."""
        self._held[message_id] = holder
        if returns >= SUSPECT_RETURNS:
            self._suspects.add(message_id)

    def let_go(self, message_id: int) -> None:
        """The message is settled."""
        self._held.pop(message_id, None)
        self._suspects.discard(message_id)

    @property
    def suspects_allowed(self) -> int:
        # What was lost with its connection is nobody's any more, without having been settled.
        return 0 if any(message_id in self._held for message_id in tuple(self._suspects)) else 1

    def settle_late(self, settlement: Settlement, epoch: str | None) -> None:
        """Have the thread settle messages whose own connection, made in this epoch, is gone."""
        with self._lock:
            self._late.setdefault(epoch, Settlement()).add(settlement)
        self._nudge()

    def forget(self) -> None:
        """In a forked child: the thread, the registration and the pipe are the parent's."""
        self._lifecycle = threading.Lock()
        self._lock = threading.Lock()
        self._thread = None
        self._reader = self._writer = -1
        self._users.clear()

    # The thread

    def _nudge(self) -> None:
        if self._writer >= 0:
            with suppress(BlockingIOError, OSError):
                os.write(self._writer, b".")

    def _take_nudges(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._reader, 4096)

    def _live(self) -> None:
        pause = 0.1
        while not self._is_over():
            session = None
            try:
                session = self._connect()
                pause = 0.1
                self._serve(session)
            except errors.Unavailable as exc:
                if not self._attached.is_set():
                    self._failure = exc
                    return
                self.settled = False  # the server may have restarted: not a claim before everybody is back
                level = logging.WARNING if session is not None else logging.INFO  # a server that is away is said once
                logger.log(level, "no session keeps consumer %s alive, taking one again: %s", self.id, exc)
            except Exception as exc:
                if not self._attached.is_set():
                    self._failure = exc
                    return
                logger.exception("the liveness thread of consumer %s failed, it starts again", self.id)
            finally:
                if session is not None:
                    session.close()
            if wait_readable([self._reader], 0.0 if self._is_over() else pause * random.uniform(0.5, 1.5)):
                self._take_nudges()
            pause = min(pause * 2, 1.0)

    def _is_over(self) -> bool:
        """The thread is to end: it was told to, or every connection was lost, not closed, and nothing is left to do."""
        if self._stopping:
            return True
        lost_at = self._lost_at
        if self._users or self._held or self._late or lost_at is None or time.monotonic() < lost_at + LINGER:
            return False
        # Not while somebody attaches, who would wait for us.
        if not self._lifecycle.acquire(blocking=False):
            return False
        try:
            self._stopping = not self._users
        finally:
            self._lifecycle.release()
        return self._stopping

    def _connect(self) -> Session:
        session = self._database.connect(listen=True)
        try:
            self.heartbeat = self._tells_by_heartbeat(session)
            if not self.heartbeat:
                session.run(self._store.prepare_liveness())
            self._register(session)
        except BaseException:
            session.close()
            raise
        return session

    def _tells_by_heartbeat(self, session: Session) -> bool:
        if self._options.liveness != "auto":
            return self._options.liveness == "heartbeat"
        # A pooler invents the process id that it names at login.
        return session.run(self._store.backend_pid()) != session.backend_pid

    def _register(self, session: Session) -> None:
        known = self.id
        attached = session.run(
            self._store.attach(known, socket.gethostname(), os.getpid(), heartbeat=self.heartbeat), timeout=60
        )
        if attached.consumer_id is None:
            logger.warning("consumer %s was away for too long, its messages were returned; registering again", known)
            self.id = None
            self.generation += 1
            self._register(session)
            return
        self.id = attached.consumer_id
        self.epoch = attached.epoch
        if known is not None:
            self._agree(session, closely=True, reassert=True)
        self.settled = attached.outstanding == 0 or attached.epoch_age >= self._options.reconnect_grace
        self._attached.set()
        logger.info("consumer %s is registered%s", self.id, " (by heartbeats)" if self.heartbeat else "")

    def _agree(self, session: Session, *, closely: bool, reassert: bool = False, end: bool = False) -> None:
        """Give back what was leased over lost connections and is no longer referred to.

        `end`: their subscriptions and exclusive queues, too, are over.
        """
        # What an application has dropped may hang in a reference cycle, an exception's traceback for instance.
        if closely:
            gc.collect()
        with self._lock:
            last, tokens = self._last_token, tuple(self._live_tokens)
            late = [message_id for settlement in self._late.values() for message_id in settlement.message_ids]
            held = (*self._held.keys(), *late)
        assert self.id is not None
        given_back = session.run(self._store.reconcile(self.id, last, tokens, held, reassert=reassert, end=end))
        if given_back:
            logger.info("consumer %s gave back %s messages that nobody here works on", self.id, given_back)

    def _serve(self, session: Session) -> None:
        rounds = _Rounds()
        listening = False
        while not self._is_over():
            self._flush_late(session)
            if rounds.reconcile_due(self._lost_at):
                self._agree(session, closely=rounds.reconciles_closely, end=rounds.lost_for_good)
            if not self.settled:
                self._wait_for_the_others(session)
            if rounds.upkeep_due():
                listening = self._keep_up(session, rounds, listening)
            if rounds.promotion_due():
                while session.run(self._store.promote(PROMOTION_BATCH)) == PROMOTION_BATCH:
                    pass
                rounds.plan_promotion(session.run(self._store.next_due()))
            self._doze(session, rounds)
        self._leave(session)

    def _flush_late(self, session: Session) -> None:
        assert self.id is not None
        with self._lock:
            late, self._late = self._late, {}
        while late:
            epoch, settlement = late.popitem()
            try:
                if epoch != self.epoch:
                    self._doubt(session, settlement)
                session.run(self._store.settle(self.id, settlement))
            except errors.Unavailable:
                late.setdefault(epoch, Settlement()).add(settlement)
                with self._lock:
                    for claimed_in, unsettled in late.items():
                        self._late.setdefault(claimed_in, Settlement()).add(unsettled)
                raise

    def _doubt(self, session: Session, settlement: Settlement) -> None:
        """Give back what the server has forgotten to be complete.

        It had answered, but not flushed, the results of what had ended just before it crashed.
        """
        if settlement.completed:
            forgotten = session.run(self._store.without_result(settlement.completed))
            settlement.completed = [kept for kept in settlement.completed if kept not in forgotten]
            settlement.given_back += forgotten
            if forgotten:
                logger.warning("%s tasks run again: the server has forgotten their results", len(forgotten))

    def _wait_for_the_others(self, session: Session) -> None:
        outstanding, epoch_age = session.run(self._store.returning_consumers())
        self.settled = outstanding == 0 or epoch_age >= self._options.reconnect_grace

    def _keep_up(self, session: Session, rounds: _Rounds, listening: bool) -> bool:
        assert self.id is not None
        upkeep = session.run(self._store.upkeep(self.id, sweep=rounds.sweep_due()))
        if not upkeep.known:
            raise errors.Unavailable("this consumer has been reaped")
        rounds.plan_upkeep(upkeep.consumers, upkeep.rank)
        if upkeep.more:
            rounds.sweep_again()
        if upkeep.rank <= CLOCK_KEEPERS:
            rounds.plan_reap(upkeep.next_reap)
        rounds.plan_reconcile()
        if self.heartbeat:
            rounds.upkeep_at = min(rounds.upkeep_at, time.monotonic() + self._options.heartbeat_interval)
        keeper = upkeep.rank <= CLOCK_KEEPERS and not self.heartbeat
        if keeper != listening:
            session.run(
                self._store.listen(self._store.clock_channel)
                if keeper
                else self._store.unlisten(self._store.clock_channel)
            )
        if keeper or self.heartbeat:
            rounds.plan_promotion(session.run(self._store.next_due()))
        return keeper

    def _doze(self, session: Session, rounds: _Rounds) -> None:
        # What came along with an answer is read already: nothing would show it to a select().
        pause = 0.0 if session.notifications else rounds.until_next() if self.settled else 0.1
        readable = wait_readable([session.fileno(), self._reader], pause)
        if self._reader in readable:
            self._take_nudges()
        if session.fileno() in readable:
            session.receive()
        if session.notifications:
            session.notifications.clear()
            rounds.plan_promotion(session.run(self._store.next_due()))

    def _leave(self, session: Session) -> None:
        self._flush_late(session)
        assert self.id is not None
        session.run(self._store.detach(self.id))
        logger.info("consumer %s has left", self.id)
        self.id = None


class _Rounds:
    """When is what due? Times are of time.monotonic()."""

    def __init__(self) -> None:
        self.upkeep_at = 0.0
        self._began_at = time.monotonic()
        self._sweep_at = 0.0
        self._reconcile_at: float | None = None
        self._lost_at: float | None = None
        self._promote_at: float | None = None
        self._rank = 0

    def upkeep_due(self) -> bool:
        return time.monotonic() >= self.upkeep_at

    def sweep_due(self) -> bool:
        if time.monotonic() < self._sweep_at:
            return False
        # The oldest consumer sweeps; the others, ever less often, in case it does not.
        self._sweep_at = time.monotonic() + SWEEP_PERIOD * (1 + self._rank)
        return True

    def plan_reap(self, next_reap: float | None) -> None:
        if next_reap is not None and next_reap > 0:  # one that is overdue waits for the end of the restart's grace
            self.upkeep_at = min(self.upkeep_at, time.monotonic() + next_reap + 0.01)

    def sweep_again(self) -> None:
        self.upkeep_at = self._sweep_at = 0.0

    @property
    def reconciles_closely(self) -> bool:
        return self._lost_at is not None and time.monotonic() < self._lost_at + RECONCILE_CLOSELY

    @property
    def lost_for_good(self) -> bool:
        """What was lost is long lost; and the server, if it was away, has been back for as long."""
        return self._lost_at is not None and time.monotonic() > max(self._lost_at, self._began_at) + ENDING

    def reconcile_due(self, lost_at: float | None) -> bool:
        """At once when a connection was lost, and then again and again.

        The application may let go of messages only later, and a claim that was on its way may still be executed.
        """
        now = time.monotonic()
        if lost_at != self._lost_at:
            self._lost_at, self._reconcile_at = lost_at, now
        if self._reconcile_at is None or now < self._reconcile_at:
            return False
        self._reconcile_at = now + RECONCILE_PERIOD if self.reconciles_closely else None
        return True

    def plan_reconcile(self) -> None:
        """With every round of upkeep, if a connection was ever lost."""
        if self._lost_at is not None and self._reconcile_at is None:
            self._reconcile_at = time.monotonic()

    def promotion_due(self) -> bool:
        return self._promote_at is not None and time.monotonic() >= self._promote_at

    def plan_upkeep(self, consumers: int, rank: int) -> None:
        # The more consumers, the less often each: together they make one round per UPKEEP_PERIOD.
        period = min(consumers * UPKEEP_PERIOD, LONGEST_PERIOD)
        self.upkeep_at = time.monotonic() + period * random.uniform(0.75, 1.25)
        self._rank = rank

    def plan_promotion(self, next_due: float | None) -> None:
        if next_due is None:
            self._promote_at = None
        else:
            self._promote_at = time.monotonic() + max(0.0, next_due) + self._rank * CLOCK_STEP

    def until_next(self) -> float:
        times = (self.upkeep_at, self._promote_at, self._reconcile_at)
        return max(0.0, min(moment for moment in times if moment is not None) - time.monotonic())


# One per database and process: what identifies a process to the store cannot belong to one of its connections.
_consumers: dict[Database, Consumer] = {}
_consumers_lock = threading.Lock()


def consumer_for(database: Database, store: Store) -> Consumer:
    """The process's consumer of this database, not yet attached if it is new."""
    with _consumers_lock:
        if database not in _consumers:
            _consumers[database] = Consumer(database, store)
        return _consumers[database]


def _forget_consumers() -> None:
    global _consumers_lock
    _consumers_lock = threading.Lock()
    for consumer in _consumers.values():
        consumer.forget()
    _consumers.clear()


forget_after_fork(_forget_consumers)
