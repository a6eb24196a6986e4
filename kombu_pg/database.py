"""How do we hold a connection?

The only module that imports psycopg2. Every connection is an asynchronous one: a statement is sent, and its answer is
read when the socket says so. So nothing here can block in C: a hub sends and returns, everybody else waits in
`Session.run`, which has a deadline, can be interrupted, and yields where gevent has patched `select`.
"""

from __future__ import annotations

import errno
import os
import re
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import psycopg2
import psycopg2.extensions as pg

from kombu_pg import embedded, errors
from kombu_pg.options import Options, redact

__all__ = ["Database", "Notification", "Session", "Statement"]

T = TypeVar("T")
Rows = Sequence[tuple[Any, ...]]

#: Seconds to wait for a connection where neither the URL nor kombu says how long.
CONNECT_TIMEOUT = 30.0
#: Seconds without an answer after which the server counts as gone. Longer than any statement of ours needs, except
#: those that count or wait for a user's lock, which are given no deadline.
ANSWER_TIMEOUT = 30.0

# What a dead peer must not take hours to show. libpq names, used where the URL does not set them.
_DEFAULTS = {
    "client_encoding": "UTF8",
    "fallback_application_name": "kombu_pg",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "25000",
}


@dataclass(eq=False, slots=True)
class Statement(Generic[T]):
    """One round trip: what is sent, and what its rows mean. (Not frozen: one is made per publish.)"""

    sql: str
    parameters: tuple[Any, ...] | None
    read: Callable[[Rows], T]


@dataclass(frozen=True, slots=True)
class Notification:
    """What a NOTIFY said."""

    channel: str
    payload: str


# Fork ----------------------------------------------------------------------------------------------------------

# A forked child inherits the sockets. If it kept them open, a killed parent would look alive to the server; if it
# closed them through libpq, libpq would say goodbye in the parent's name. So the child puts /dev/null over each.
_open: weakref.WeakSet[Any] = weakref.WeakSet()
# Held while a socket comes or goes (libpq closes it without the GIL), so that a fork finds each of them in _open.
# Reentrant: a signal handler may fork or connect.
_sockets = threading.RLock()
_after_fork: list[Callable[[], None]] = []


def forget_after_fork(callback: Callable[[], None]) -> None:
    """Have `callback` called in every forked child, after the inherited connections were cut off."""
    _after_fork.append(callback)


def _before_fork() -> None:
    _sockets.acquire()


def _in_parent() -> None:
    _sockets.release()


def _in_child() -> None:
    global _sockets
    _sockets = threading.RLock()
    null = os.open(os.devnull, os.O_RDWR)
    for connection in list(_open):
        try:
            os.dup2(null, connection.fileno())
        except (psycopg2.Error, OSError):
            continue  # it has no socket (any more): nothing to cut off
    os.close(null)
    _inherited.extend(_open)
    _open.clear()
    for callback in _after_fork:
        callback()


# Kept for ever in the child: were they collected, libpq would close their file descriptors a second time.
_inherited: list[Any] = []

os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)


# Errors --------------------------------------------------------------------------------------------------------

# By SQLSTATE, longest prefix first. What is not named here is a mistake of ours and passes unchanged.
_UNAVAILABLE = ("08", "25006", "40", "53", "55P03", "57", "58", "XX")
_REJECTED = ("22", "54000")
_MISSING = ("3F000", "42P01", "42883", "42704")
_DENIED = "42501"
_FINISHED = "KP001"


@contextmanager
def mapped_errors() -> Iterator[None]:
    """Raise what the caller can act on in place of the driver's errors.

    Raises:
        Unavailable: the connection is lost, or the server refuses for now (full disk, read-only, too many connections).
        Rejected: the server cannot store a value.
        AlreadyFinished: the message that a transaction was to finish is gone.
        SchemaMissing: a table or function of ours is not there.
        SchemaError: this role may not use what is there.
    """
    try:
        yield
    except psycopg2.Error as exc:
        raise _mapped(exc) from exc


def _mapped(exc: Any) -> Exception:
    code: str | None = exc.pgcode
    text = str(exc).strip() or type(exc).__name__
    if code is None:
        lost = (
            isinstance(exc, psycopg2.OperationalError | psycopg2.InterfaceError) or type(exc) is psycopg2.DatabaseError
        )
        return errors.Unavailable(text) if lost else cast(Exception, exc)
    if code.startswith(_UNAVAILABLE):
        return errors.Unavailable(text)
    if code.startswith(_REJECTED):
        return errors.Rejected(text)
    if code == _FINISHED:
        return errors.AlreadyFinished(text)
    if code in _MISSING:
        return errors.SchemaMissing(f'{text}: is the schema installed? run "celery -A app pg migrate"')
    if code == _DENIED:
        return errors.SchemaError(f"{text}: the owner of the schema must GRANT this role its use")
    return cast(Exception, exc)


# Sessions ------------------------------------------------------------------------------------------------------


class Session:
    """One connection to the server, always in autocommit, one statement at a time.

    Not thread-safe: whoever holds it uses it alone. After an error that lost the connection, and after any statement
    that did not run to its end, it is closed.
    """

    def __init__(
        self, dsn: str, connect_timeout: float | None, *, listens: bool = True, within: float | None = None
    ) -> None:
        """Connect; blocks until connected, at most `connect_timeout` seconds (0 = for ever).

        `listens`: notifications are read; a session that executes no LISTEN is spared the look.
        `within`: seconds after which it is given up, even if the URL's own connect_timeout is longer.

        Raises:
            Unavailable: no server accepts the connection.
            OptionError: libpq does not understand the URL.
        """
        arguments = _connect_arguments(dsn)
        # libpq leaves its own connect_timeout to the caller of an asynchronous connection.
        timeout = float(
            arguments.get("connect_timeout") or (CONNECT_TIMEOUT if connect_timeout is None else connect_timeout)
        )
        if within is not None:
            timeout = min(timeout or within, within)
        self.notifications: deque[Notification] = deque()
        self._statement: Statement[Any] | None = None
        self._listens = listens
        self._poller: tuple[int, select.poll] | None = None
        with mapped_errors():
            with _sockets:
                self._connection = psycopg2.connect(async_=1, **arguments)
                _open.add(self._connection)
            try:
                self._wait(time.monotonic() + timeout if timeout else None, "to connect")
                self._cursor = self._connection.cursor()
            except BaseException:
                self.close()
                raise

    def __repr__(self) -> str:
        return f"<Session {'closed' if self.closed else self.backend_pid}>"

    @property
    def closed(self) -> bool:
        return bool(self._connection.closed)

    @property
    def busy(self) -> bool:
        """A statement is under way."""
        return self._statement is not None

    @property
    def backend_pid(self) -> int:
        """What the server said at login; behind a pooler not the process that runs the statements."""
        return int(self._connection.info.backend_pid)

    def fileno(self) -> int:
        with mapped_errors():
            return int(self._connection.fileno())

    def close(self) -> None:
        """Close the connection; what it had not answered is given up. May be called twice."""
        self._statement = None
        with _sockets:
            _open.discard(self._connection)
            self._connection.close()

    def run(self, statement: Statement[T], timeout: float | None = ANSWER_TIMEOUT) -> T:
        """Return what the statement says; blocks at most `timeout` seconds (None = for ever).

        Raises:
            Unavailable: the connection was lost; whether the statement took effect is not known.
        """
        self.send(statement)
        try:
            try:
                self._wait_answer(timeout)
                return cast(T, self._answer())
            except psycopg2.Error as exc:
                raise _mapped(exc) from exc
        except errors.Unavailable:
            self.close()
            raise
        except BaseException as exc:
            self._end_refused(exc)
            if self.busy:
                self.close()
            raise

    def send(self, statement: Statement[Any]) -> None:
        """Send the statement without waiting for its answer."""
        assert self._statement is None, "one statement at a time"
        self._statement = statement
        try:
            try:
                self._cursor.execute(statement.sql, statement.parameters)
            except psycopg2.Error as exc:
                raise _mapped(exc) from exc
        except errors.Unavailable:
            self.close()
            raise
        except BaseException:
            # Nothing was sent: a parameter that cannot be sent must not cost the connection.
            self._statement = None
            raise

    def receive(self) -> tuple[bool, Any]:
        """Read what has arrived, without blocking: (True, what the statement says) or (False, None).

        Notifications that came along are in `notifications` afterwards.
        """
        try:
            try:
                state = self._connection.poll()
                while state == pg.POLL_WRITE:
                    _wait_for(self.fileno(), False, 0.1)
                    state = self._connection.poll()
                if self._statement is None or state != pg.POLL_OK:
                    self._take_notifications()
                    return False, None
                return True, self._answer()
            except psycopg2.Error as exc:
                raise _mapped(exc) from exc
        except errors.Unavailable:
            self.close()
            raise
        except BaseException as exc:
            self._end_refused(exc)
            raise

    def _end_refused(self, exc: BaseException) -> None:
        # What the server has refused has run to its end: the session is good for the next statement.
        if any(getattr(cause, "pgcode", None) for cause in (exc, exc.__cause__)):
            self._statement = None

    def _answer(self) -> Any:
        statement, self._statement = self._statement, None
        assert statement is not None
        answer = statement.read(self._cursor.fetchall() if self._cursor.description else ())
        if self._listens:
            # A notification that came in behind the rows is in libpq's buffer, where no select() sees it.
            self._connection.poll()
            self._take_notifications()
        return answer

    def _take_notifications(self) -> None:
        pending = self._connection.notifies
        for notify in pending:
            self.notifications.append(Notification(notify.channel, notify.payload))
        pending.clear()

    def take_notices(self) -> list[str]:
        """The server's warnings since the last call."""
        notices = list(self._connection.notices)
        if notices:
            self._connection.notices.clear()
        return notices

    def is_usable(self) -> bool:
        """False if the server has closed an idle session: it is readable then, and reading says so."""
        if self._connection.closed:
            return False
        try:
            # Again, until nothing is left: what the server says on closing comes before the end of the stream.
            while self._is_readable(0):
                self.receive()
        except (errors.Unavailable, OSError) as exc:
            if isinstance(exc, OSError) and exc.errno not in (errno.EBADF, errno.ECONNRESET):
                raise
            return False
        return not self._connection.closed

    def _wait_answer(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        # What nearly every statement is: sent at once, answered in one piece.
        if self._connection.poll() == pg.POLL_READ:
            self._is_readable(None if timeout is None else int(timeout * 1000) + 1)
        self._wait(deadline, "for an answer")

    def _is_readable(self, milliseconds: int | None) -> bool:
        # Kept, to make one costs as much as to ask it; but gevent's belong to the thread that made them.
        thread = threading.get_ident()
        if self._poller is None or self._poller[0] != thread:
            self._poller = thread, select.poll()
            self._poller[1].register(self.fileno(), select.POLLIN)
        return bool(self._poller[1].poll(milliseconds))

    def _wait(self, deadline: float | None, what: str) -> None:
        while True:
            state = self._connection.poll()
            if state == pg.POLL_OK:
                return
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                self.close()
                raise errors.Unavailable(f"timed out while waiting {what}")
            _wait_for(self._connection.fileno(), state == pg.POLL_READ, left)


def still_open(connection: Any) -> bool:
    """Whether the server has not closed an idle connection of `Database.blocking_connection`; no round trip."""
    try:
        # Again, until nothing is left: what the server says on closing comes before the end of the stream.
        while not connection.closed and wait_readable([connection.fileno()], 0):
            connection.poll()
    except psycopg2.Error:
        return False
    return not connection.closed


def _wait_for(fd: int, readable: bool, timeout: float | None) -> bool:
    return bool(wait_readable([fd], timeout) if readable else _poll([fd], select.POLLOUT, timeout))


def wait_readable(fds: Sequence[int], timeout: float | None) -> list[int]:
    """The descriptors that can be read, after at most `timeout` seconds (None = for ever)."""
    return _poll(fds, select.POLLIN, timeout)


def _poll(fds: Sequence[int], events: int, timeout: float | None) -> list[int]:
    poller = select.poll()  # unlike select(), not limited to descriptors below 1024
    for fd in fds:
        poller.register(fd, events)
    # Rounded up: a timer that fires early finds nothing due and spins.
    return [fd for fd, _ in poller.poll(None if timeout is None else max(0, int(timeout * 1000 + 0.999)))]


def _connect_arguments(dsn: str) -> dict[str, Any]:
    try:
        arguments: dict[str, Any] = pg.parse_dsn(dsn)
    except psycopg2.ProgrammingError as exc:
        # libpq quotes what it could not parse, which may be the password: neither its text nor its chain is passed on.
        raise errors.OptionError(
            f"libpq does not understand the URL {redact(dsn)!r}: {_reason(exc)}; percent-encode special characters"
        ) from None
    return {**_DEFAULTS, **arguments}


def _reason(exc: Exception) -> str:
    return re.sub(r'"[^"]*"', '"..."', str(exc).strip().replace("invalid dsn: ", ""))


def driver_version() -> str:
    """psycopg2's version, as its distribution says it."""
    return str(psycopg2.__version__).partition(" ")[0]


# The database --------------------------------------------------------------------------------------------------


class Database:
    """A place to get sessions from: one per set of options and process.

    Sessions are opened on first use and kept for the next one; a process that publishes from one thread has one.

    Attributes:
        installation: the id of the store there, once somebody has asked for it.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.installation: str | None = None
        self._idle: list[Session] = []
        self._lock = threading.Lock()
        self._users = 0

    def connect(self, *, listen: bool = False, within: float | None = None) -> Session:
        """A new session, the caller's to close. `listen`: one that keeps its server process (not behind a pooler).

        `within`: seconds that it may take at most, besides what the options say.
        """
        options = self.options
        if options.embedded:
            dsn = options.dsn_on(embedded.ensure_server(options.embedded))
        else:
            dsn = options.listen_dsn if listen and options.listen_dsn else options.dsn
        return Session(dsn, options.connect_timeout, listens=listen, within=within)

    def blocking_connection(self) -> Any:
        """A new psycopg2 connection as other libraries use them: not in autocommit, blocking; the caller's to close.

        Forks wait while it is made.
        """
        options = self.options
        dsn = options.dsn_on(embedded.ensure_server(options.embedded)) if options.embedded else options.dsn
        arguments = _connect_arguments(dsn)
        arguments.setdefault("connect_timeout", str(int(options.connect_timeout or CONNECT_TIMEOUT)))
        with _sockets:
            connection = psycopg2.connect(**arguments)
            _open.add(connection)
        return connection

    def retain(self) -> None:
        """Keep idle sessions open until the matching `release`."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """The counterpart of `retain`; the last one closes the idle sessions."""
        with self._lock:
            self._users -= 1
            closing = self._idle if self._users <= 0 else []
            self._idle = [] if self._users <= 0 else self._idle
        for session in closing:
            session.close()

    def session(self) -> _Borrowed:
        """Borrow a session for a block; it is returned when the block ends, or dropped if it broke."""
        return _Borrowed(self)

    def run(self, statement: Statement[T], timeout: float | None = ANSWER_TIMEOUT) -> T:
        """Run one statement on a borrowed session."""
        with self.session() as session:
            return session.run(statement, timeout)

    def forget_sessions(self) -> None:
        """In a forked child: the idle sessions, and the lock's state, are the parent's."""
        self._lock = threading.Lock()
        self._idle = []

    def _take(self) -> Session:
        while True:
            with self._lock:
                session = self._idle.pop() if self._idle else None
            if session is None:
                return self.connect()
            if session.is_usable():
                return session
            session.close()

    def _put(self, session: Session) -> None:
        with self._lock:
            if self._users > 0 and not session.closed:
                self._idle.append(session)
                return
        session.close()


class _Borrowed:
    """A session for the length of a block. No generator: every publish borrows one."""

    __slots__ = ("_database", "_session")

    def __init__(self, database: Database) -> None:
        self._database = database

    def __enter__(self) -> Session:
        self._session = self._database._take()
        return self._session

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._session.busy:
            self._session.close()
        self._database._put(self._session)


_databases: dict[Options, Database] = {}
_databases_lock = threading.Lock()


def database_for(options: Options) -> Database:
    """The process's database for these options."""
    with _databases_lock:
        if options not in _databases:
            _databases[options] = Database(options)
        return _databases[options]


def _forget_databases() -> None:
    global _databases_lock
    _databases_lock = threading.Lock()
    for database in _databases.values():
        database.forget_sessions()
    _databases.clear()


forget_after_fork(_forget_databases)
