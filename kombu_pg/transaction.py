"""In whose transaction does a statement run?

One seam for whatever must commit together: a result with the chord body it sets free, the end of a task with its
acknowledgement, a publish with the user's own writes. While a transaction is open, everything that publishes or stores
in its store from the same thread (greenlet, asyncio task) runs in it. Whose connection it is decides who commits:
`transaction` takes a session of ours and commits it; `borrowed` leaves the connection to its owner.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from kombu_pg import errors, store
from kombu_pg.database import Database, Session, Statement, T
from kombu_pg.store import Outgoing, store_for

__all__ = ["Transaction", "Wakes", "borrowed", "current", "of_application", "same_store", "tell", "transaction"]


logger = logging.getLogger(__name__)


class Connection(Protocol):
    """What a transaction runs its statements on. takes_several: also several in one message."""

    takes_several: bool

    def run(self, statement: Statement[T]) -> T: ...


class Wakes:
    """Whom to tell after a commit: consumers of queues, or those that wait for a due time (epoch).

    `told` False: nobody can, after the commit; the next round of housekeeping does.
    """

    def __init__(self, *, told: bool = True) -> None:
        self.told = told
        self._queues: set[int] = set()
        self._due: float | None = None

    def note(self, queue_ids: Iterable[int], due: float | None) -> None:
        if due is None:
            self._queues.update(queue_ids)
        elif self._due is None or due < self._due:
            self._due = due

    def forget(self) -> None:
        """Nobody is to be told: it was rolled back."""
        self._queues, self._due = set(), None

    def take(self, database: Database, *, clock: bool = True) -> Statement[None] | None:
        """What tells them; None if nobody is to be told. They are not told twice.

        `clock`: also of due times, for which it looks at what else is due.
        """
        queues, due = sorted(self._queues), self._due if clock else None
        self.forget()
        return store_for(database.options).wake(queues, due) if queues or due is not None else None


def tell(database: Database, wakes: Wakes, session: Session | None = None) -> None:
    """Consumers know of what was committed. Never raises: it is committed, and they look by themselves."""
    statement = wakes.take(database)
    if statement is not None:
        try:
            (session or database).run(statement)
        except Exception as exc:  # noqa: BLE001 - it would look like a failed commit
            logger.warning("committed, but idle consumers were not told, they will poll: %s", exc)


class Transaction:
    """A transaction that is open, or will be with its first statement.

    Attributes:
        durable: the commit must wait for the flush (a persistent message is in it).
        own: this library commits it; otherwise its owner does.
        asked: the application has asked for it: what it publishes meanwhile must not leave before the commit.
        deferred: statements that run in front of the next one.
        wakes: whom to tell after the commit.
        lost: its connection was lost; nothing of it is stored, or can be.
    """

    def __init__(self, database: Database, connection: Connection, *, own: bool, wakes: Wakes | None = None) -> None:
        self.database = database
        self.durable = False
        self.own = own
        self.asked = False
        self._connection = connection
        self.deferred: list[Statement[Any]] = []
        self.lost = False
        self.wakes = Wakes() if wakes is None else wakes
        self._store = store_for(database.options)
        self._resolves = False
        self._owner = _who()

    def run(self, statement: Statement[T]) -> T:
        """Run the statement in this transaction.

        Raises:
            TransactionLost: the connection was lost; nothing of the transaction is stored. (On a borrowed connection
                its own driver's error.)
        """
        try:
            return self._connection.run(self.with_deferred(statement))
        except errors.TransactionLost:
            self.lost = True
            raise

    def defer(self, statement: Statement[Any]) -> None:
        """Have the statement run in front of the next one or of the commit, and raise there: a round trip less."""
        if self._connection.takes_several:
            self.deferred.append(statement)
        else:
            self.run(statement)  # not every driver takes two at once

    def run_deferred(self) -> None:
        """Run what was deferred, now."""
        if self.deferred:
            self.run(self.deferred.pop())

    def with_deferred(self, statement: Statement[T]) -> Statement[T]:
        """The statement, behind those that were deferred; none is any more."""
        parts: list[Statement[Any]] = [*self.deferred, statement]
        self.deferred = []
        if len(parts) == 1:
            return statement
        parameters = [parameter for part in parts for parameter in part.parameters or ()]
        return Statement(";".join(part.sql for part in parts), tuple(parameters), statement.read)

    def enqueue(self, message: Outgoing) -> tuple[list[int], str | None]:
        """Store the message in this transaction. -> (queue ids, refusal); a refusal leaves the transaction usable."""
        self.durable |= message.persistent
        if self.own:
            queue_ids, refusal, due = self.run(self._store.enqueue(message))
        else:
            queue_ids, refusal, due = self._enqueue_borrowed(message)
        self.wake_after_commit(queue_ids, due)
        return queue_ids, refusal

    def _enqueue_borrowed(self, message: Outgoing) -> tuple[list[int], str | None, float | None]:
        unannounced = not self.wakes.told
        if not self._resolves:
            answer = self.run(self._store.enqueue_borrowed(message, unannounced=unannounced))
            if answer[1] != "resolve":
                return answer
            self._resolves = True
        # Each time: a queue may be deleted and declared anew while the transaction is open.
        queues, refusal = self.database.run(self._store.resolve(message), timeout=None)
        if not queues:
            return [], refusal, None
        return self.run(self._store.enqueue_borrowed(message, queues, unannounced=unannounced))

    def wake_after_commit(self, queue_ids: Iterable[int], due: float | None = None) -> None:
        """Note whom to tell after the commit: consumers of the queues, or those that wait for a due time (epoch)."""
        self.wakes.note(queue_ids, due)

    def is_mine(self) -> bool:
        """This thread, greenlet or asyncio task opened it: a thread or task that inherited it must not use it."""
        return self._owner == _who()


_open: ContextVar[tuple[Transaction, ...]] = ContextVar("kombu_pg_transactions", default=())


def current(database: Database) -> Transaction | None:
    """The innermost open transaction of this thread in the same store."""
    for opened in reversed(_open.get()):
        if opened.is_mine() and same_store(opened.database, database):
            return opened
    return None


def of_application() -> Transaction | None:
    """The innermost open transaction of this thread that the application has asked for, in whatever store."""
    return next((opened for opened in reversed(_open.get()) if opened.asked and opened.is_mine()), None)


@contextmanager
def transaction(database: Database) -> Iterator[Transaction]:
    """A block whose statements commit together when it ends; blocks for the commit.

    Inside an open transaction of the same store it joins that, and commits nothing. An exception rolls everything back.

    Raises:
        Unavailable: the connection was lost. Whether a commit that was under way took effect is not known.
    """
    joined = current(database)
    if joined is not None:
        yield joined
        return
    try:
        with database.session() as session:
            own = _Own(session)
            opened = Transaction(database, own, own=True)
            try:
                with _entered(opened):
                    yield opened
                if own.begun or opened.deferred:
                    own.commit(opened.with_deferred(store.commit(durable=opened.durable)), durable=opened.durable)
            except BaseException:
                own.roll_back()
                raise
            tell(database, opened.wakes, session)
    except errors.TransactionLost as exc:
        raise errors.Unavailable(str(exc)) from exc


@contextmanager
def borrowed(
    database: Database, connection: Connection, wakes: Wakes | None = None, *, asked: bool = False
) -> Iterator[Transaction]:
    """A block whose statements run on somebody else's connection, in the transaction that is open there.

    Nothing is committed; whoever commits then calls `tell`. `wakes`: where it is noted whom to tell, if several blocks
    tell together, or nobody can.
    """
    opened = Transaction(database, connection, own=False, wakes=wakes)
    opened.asked = asked
    with _entered(opened):
        yield opened
    opened.run_deferred()


def same_store(one: Database, other: Database) -> bool:
    """The two reach the same tables, by whatever URL. What they say of themselves is remembered while it agrees."""
    if one is other or one.options == other.options or _agree(one, other):
        return True
    # One of them may remember a store that was dropped and installed again.
    one.installation = other.installation = None
    return _agree(one, other)


def _agree(one: Database, other: Database) -> bool:
    for database in (one, other):
        if database.installation is None:
            database.installation = database.run(store_for(database.options).installation())
    return one.installation == other.installation


@contextmanager
def _entered(opened: Transaction) -> Iterator[None]:
    token = _open.set((*_open.get(), opened))
    try:
        yield
    finally:
        _open.reset(token)


def _who() -> tuple[int, int, int]:
    """Which thread, greenlet (under gevent they are the threads) or asyncio task of which process this is."""
    task = None if asyncio._get_running_loop() is None else asyncio.current_task()
    return os.getpid(), threading.get_ident(), id(task)


class _Own:
    """A session of ours, in a transaction from its first statement on."""

    takes_several = True

    def __init__(self, session: Session) -> None:
        self._session = session
        self.begun = False
        self._failed = False

    def run(self, statement: Statement[T]) -> T:
        if self._session.closed:
            raise errors.TransactionLost("the connection was lost inside a transaction: nothing of it is stored")
        try:
            return self._run(statement)
        except errors.Unavailable as exc:
            raise errors.TransactionLost(f"nothing of the transaction is stored: {exc}") from exc

    def _run(self, statement: Statement[T]) -> T:
        # BEGIN goes in front of the first statement: it is no round trip of its own.
        begin = "" if self.begun else store.BEGIN
        self.begun = True
        try:
            return self._session.run(Statement(begin + statement.sql, statement.parameters, statement.read))
        except BaseException:
            self._failed = True
            raise

    def commit(self, statement: Statement[None], *, durable: bool) -> None:
        if self._failed or self._session.closed:
            # The server would answer COMMIT with a rollback, and without an error.
            raise errors.TransactionLost("a statement of the transaction failed: nothing of it is stored")
        self._session.take_notices()
        self._run(statement)
        for notice in self._session.take_notices():
            if durable and "synchron" in notice:
                raise errors.Unavailable(f"committed on the primary, but perhaps on no standby: {notice.strip()}")

    def roll_back(self) -> None:
        if self.begun and not self._session.closed:
            try:
                self._session.run(store.rollback())
            except errors.Unavailable as exc:
                logger.debug("the server rolls back what it has lost: %s", exc)
