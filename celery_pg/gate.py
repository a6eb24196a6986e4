"""Which broker gets this call, while a team moves from one to another?

Put in by `install(app)`, or without code by `broker_write_url = "pg-gate://"`, and told by `app.conf.pg_gate`; the
page docs/migrate.md says how it is used. It stands at three places of an app, and adds nothing to any message:

* `app.amqp.send_task_message`, through which Celery sends every task. A new call asks the chooser, and is sent with
  a producer of the broker that was chosen. Where that is the broker to which Celery would have sent it anyway, the
  message takes Celery's own producer: "off" is Celery's own code on Celery's own connection.
* `app.amqp.Connection`. `pg-gate://` leads to the default broker, and in a worker to the broker from which that
  worker reads, so that its events and replies do not depend on a broker that it has nothing to do with.
* `app.control.mailbox`. A command goes to the workers of every broker, an answer back where the question came from.

How what follows a call stays on its broker: a worker that reads from a broker sends whatever continues its current
request there, and asks the chooser for everything else. Both are sent in the same thread with the same `root_id`
and `parent_id`; `gate_calls.continues` tells them apart by what else Celery says. In the process that serves the pool
(which gives up killed and expired tasks), what continues a task is what names a parent without one that runs.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import cached_property
from types import FrameType
from typing import Any, NoReturn

from celery import Celery
from kombu import Connection, Exchange, pools
from kombu.exceptions import LimitExceeded, OperationalError
from kombu.transport import base

from celery_pg.connections import UnusableConnection
from celery_pg.gate_calls import call_of, continues
from celery_pg.gate_choice import GATE, SETTING, Choice, Plan, is_gate
from kombu_pg.database import Database, database_for
from kombu_pg.errors import OptionError, SchemaMissing
from kombu_pg.transaction import of_application, same_store
from kombu_pg.transport import Transport as PGTransport

__all__ = ["Gate", "Transport", "install"]

#: Exchange of Celery's native delayed delivery, and how many words it puts before a routing key.
_DELAYED = "celery_delayed_27"
_DELAYED_WORDS = 28
#: What a worker that starts asks its neighbours: those of its own broker, it has nothing to do with another one.
_MINGLE = "hello"


def install(app: Celery) -> None:
    """Every task that this app sends passes the gate from now on. Reads no setting yet; safe to call again."""
    if app.configured:
        app.conf.broker_write_url = f"{GATE}://"
    else:
        app.on_after_configure.connect(_lead_to_the_gate, weak=False)
    _gate_of(app)


def _lead_to_the_gate(sender: Celery, **_signal: Any) -> None:
    sender.conf.broker_write_url = f"{GATE}://"


def _gate_of(app: Celery) -> "Gate":
    found = getattr(app.amqp, "pg_gate", None)
    return found if isinstance(found, Gate) else Gate(app)


class Gate:
    """What stands before the brokers of one app."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._given: Any = None
        self._choice: Choice | None = None
        self._usual: Any = None
        self._pools: dict[str, Any] = {}
        self._databases: dict[str, Database | None] = {}
        self._commands = False
        amqp = app.amqp
        self._connect, self._sender = amqp.Connection, vars(amqp).get("send_task_message")
        amqp.pg_gate, amqp.Connection, amqp.send_task_message = self, self.connection, self.send

    @property
    def plan(self) -> Plan:
        """The setting as it is now."""
        return self._asked().plan

    @property
    def home(self) -> Any:
        """Where everything goes that nobody chooses: the default broker, in a worker its own."""
        plan = self.plan
        return self._own if self._app.use_fast_trace_task else plan.brokers[plan.default]

    @property
    def _own(self) -> Any:
        """The broker from which a worker with these settings reads."""
        url = self._app.conf.broker_read_url
        if is_gate(url):
            raise OptionError(
                f"a worker reads from one broker, not from {url}: set broker_read_url (or CELERY_BROKER_READ_URL) to "
                f"the URL of one of {SETTING}'s brokers, and broker_write_url to {GATE}://"
            )
        return url

    def connection(self, url: Any = None, *args: Any, **kwargs: Any) -> Connection:
        """Stands for `app.amqp.Connection`."""
        self.take_commands()
        return self._connect(self.home if is_gate(url) else url, *args, **kwargs)

    def send(self, producer: Any, name: str, message: Any, **options: Any) -> Any:
        """Stands for `app.amqp.send_task_message`: choose, and send.

        A caller that brought a connection to somewhere else has chosen already.

        Raises:
            OperationalError: the broker that was chosen cannot be reached; no other is tried.
            UnusableConnection: inside `publish_in`, a broker was chosen that is not the one of the transaction.
        """
        _ = producer.connection.transport  # from pg-gate:// on it has the broker's own errors, which Celery retries
        if not self._is_home(producer.connection):
            return self._send(producer, name, message, **options)
        pool = self._pool(self._broker(name, message, options))
        if pool is self._app.producer_pool:
            return self._send(producer, name, message, **options)
        with self._acquired(pool) as other, other.connection._reraise_as_library_errors():
            return self._send(other, name, message, **_not_delayed(options, self._app.amqp.queues, other))

    @cached_property
    def _send(self) -> Any:
        return self._sender or self._app.amqp._create_task_sender()

    def _broker(self, name: str, message: Any, options: Mapping[str, Any]) -> Any:
        """The URL of the broker for this message."""
        if self._continues(message):
            return self._own
        choice = self._asked()
        chosen = choice.broker(call_of(name, message, options))
        url = choice.plan.brokers[chosen]
        self._refuse_outside(name, chosen, url)
        return url

    def _refuse_outside(self, name: str, chosen: str, url: str) -> None:
        """What is called inside `publish_in` must not leave before its commit."""
        block = of_application()
        if block is not None and not _is_in(self._database(url), block.database):
            raise UnusableConnection(
                f"task {name} is called inside publish_in, but its broker is {chosen!r}: it would leave before the "
                f"commit; choose the broker of the transaction for it in {SETTING}, or call it after the commit"
            )

    @property
    def databases(self) -> list[Database]:
        """Those behind its brokers, as far as they are PostgreSQL."""
        return [found for found in map(self._database, self.plan.brokers.values()) if found is not None]

    def _database(self, url: str) -> Database | None:
        if url not in self._databases:
            transport = self._app.connection_for_write(url).transport
            self._databases[url] = database_for(transport.options()) if isinstance(transport, PGTransport) else None
        return self._databases[url]

    def _continues(self, message: Any) -> bool:
        """Whether a worker sends it to go on with what it has received; what runs eagerly was received from nowhere."""
        task = self._app.current_worker_task
        if task is None or task.app is not self._app:
            return bool(self._app.use_fast_trace_task) and continues(message, None)
        return not task.request.is_eager and continues(message, task.request)

    def _asked(self) -> Choice:
        given = self._app.conf.get(SETTING)
        if self._choice is None or given != self._given:
            self._choice, self._given = Choice(Plan.parse(given)), _snapshot(given)
        return self._choice

    def _is_home(self, connection: Any) -> bool:
        """Whether it leads where Celery itself would send."""
        if getattr(connection, "_pool", self) in (self._app.pool, self._app.producer_pool.connections):
            return True
        return bool(_place(connection) == _place(self._app.pool.connection))

    def _pool(self, url: Any) -> Any:
        """Producers of that broker, kept as Celery keeps its own; Celery's own where they lead there already."""
        usual = self._app.producer_pool
        if usual is not self._usual:  # it is another one after a fork
            self._usual, self._pools = usual, {}
        if (key := repr(url)) not in self._pools:
            connection = self._app.connection_for_write(url)
            same = _place(connection) == _place(usual.connections.connection)
            self._pools[key] = usual if same else pools.producers[connection]
            self._pools[key].limit = self._app.pool.limit
        return self._pools[key]

    @contextmanager
    def _acquired(self, pool: Any) -> Iterator[Any]:
        timeout = self._app.conf.get("broker_pool_acquire_timeout")
        try:
            producer = pool.acquire(block=True, timeout=timeout)
        except LimitExceeded as exc:
            raise OperationalError(
                f"no producer for the chosen broker within {timeout} s: all {pool.limit} are in use, "
                "raise broker_pool_limit or broker_pool_acquire_timeout"
            ) from exc
        with producer:
            yield producer

    def take_commands(self) -> None:
        """Commands that this app sends reach the workers of every broker from now on."""
        if not self._commands:
            self._commands = True
            mailbox = self._app.control.mailbox
            mailbox.__class__ = type("Mailbox", (_Mailbox, type(mailbox)), {"gate": self})

    def others(self, connection: Any) -> list[Any]:
        """URLs of the brokers to which this connection, which leads home, does not lead; none if it leads elsewhere."""
        if not self._is_home(connection):
            return []
        return [url for url in self.plan.brokers.values() if self._pool(url) is not self._app.producer_pool]

    @contextmanager
    def reached(self, url: Any) -> Iterator[tuple[Any, Any]]:
        """A connection to that broker, established, and its producers."""
        producers = self._pool(url)
        with producers.connections.acquire(block=True) as connection:
            connection.ensure_connection(max_retries=1, timeout=self._app.conf.broker_connection_timeout)
            yield connection, producers


class _Mailbox:
    """Asks the workers of every broker, one broker after the other."""

    gate: Gate
    connection: Any
    producer_pool: Any

    def _broadcast(
        self, command: str, arguments: Any = None, destination: Any = None, reply: bool = False, timeout: float = 1,
        limit: int | None = None, callback: Any = None, channel: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        """The answers of all. Waits up to `timeout` at each broker, until `limit` (or all of `destination`) answered.

        A broker that cannot be reached does not keep the others from being asked, and raises afterwards.
        """
        question = {"timeout": timeout, "callback": callback, "channel": channel, **options}
        here: Any = super()
        alone = channel is not None or command == _MINGLE
        others = [] if alone else self.gate.others(self.connection)
        if not others:
            return here._broadcast(command, arguments, destination, reply, limit=limit, **question)
        left = limit or len(destination or ()) or None
        answers: list[Any] = []
        failure: Exception | None = None
        places: list[AbstractContextManager[Any]] = [nullcontext(here), *map(self._at, others)]
        for place in places:
            try:
                with place as mailbox:
                    wanted = reply and left != 0
                    more = mailbox._broadcast(command, arguments, destination, wanted, limit=left, **question) or []
            except (OSError, OperationalError, *self.connection.recoverable_connection_errors) as exc:
                failure = failure or exc
                continue
            answers += more
            left = left and max(0, left - len(more))
        if failure is not None:
            raise failure
        return answers if reply else None

    @contextmanager
    def _at(self, url: Any) -> Iterator[Any]:
        with self.gate.reached(url) as (connection, producers):
            there = copy(self)
            vars(there).pop("reply_queue", None)  # its name is made of the mailbox's identity
            there.connection, there.producer_pool = connection, producers
            yield there


class _Knock:
    """Puts the gate before the app that makes a connection from pg-gate://; then says that the class parses its URL.

    kombu asks the class for it in `Connection.__init__`, and that is the one moment before an app's first message at
    which anything of ours is asked. It is not told by whom, so the stack is: this once, for each app.
    """

    def __get__(self, _transport: Any, _owner: Any) -> bool:
        frame: FrameType | None = sys._getframe(1)
        connection = frame.f_locals.get("self") if frame is not None else None
        if isinstance(connection, Connection) and is_gate(connection._initial_params["hostname"]):
            while frame is not None and not isinstance(frame.f_locals.get("self"), Celery):
                frame = frame.f_back
            if frame is not None:
                gate = _gate_of(frame.f_locals["self"])
                gate.take_commands()
                home = gate.home
                connection._initial_params["hostname"] = home if isinstance(home, str) else ";".join(home)
        return True


class Transport(base.Transport):
    """What kombu finds behind pg-gate://: to an app, the transport of the broker to which its gate leads."""

    can_parse_url = _Knock()

    def __new__(cls, client: Any) -> Any:
        """Make it a connection to where the gate has led it, and return that one's transport."""
        if is_gate(client.hostname):
            return super().__new__(cls)
        options = ("ssl", "connect_timeout", "transport_options", "login_method", "heartbeat")
        given = {name: getattr(client, name) for name in options}
        Connection.__init__(client, client.hostname, failover_strategy=client._failover_strategy, **given)
        return client.create_transport()

    def establish_connection(self) -> NoReturn:
        """There is none without an app.

        Raises:
            OptionError: always.
        """
        raise OptionError(f"{GATE}:// leads nowhere without a Celery app: set broker_write_url of an app to it")

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        """It holds no secret."""
        return uri


def _is_in(database: Database | None, other: Database) -> bool:
    try:
        return database is not None and same_store(database, other)
    except SchemaMissing:  # nothing has ever been sent there
        return False


def _place(connection: Any) -> Any:
    """Where a connection leads; the same however often it was cloned, and after a failover."""
    _ = connection.transport  # it may rewrite what it was given
    if connection.alt:
        return tuple(map(str, connection.alt))
    says = connection.info()
    host = "127.0.0.1" if says["hostname"] == "localhost" else says["hostname"]  # as pyamqp does when it connects
    return says["transport"], host, says["port"], says["virtual_host"]


def _not_delayed(options: dict[str, Any], queues: Mapping[str, Any], producer: Any) -> dict[str, Any]:
    """The options with the task's own queue, where Celery meant RabbitMQ to delay it and the broker is another one."""
    exchange = options.get("exchange")
    name = exchange.name if isinstance(exchange, Exchange) else exchange
    if name != _DELAYED or producer.connection.transport.driver_type == "amqp":
        return options
    key = options["routing_key"].split(".", _DELAYED_WORDS)[-1]
    queue = next((queue for queue in queues.values() if queue.routing_key == key), None)
    rest = {key: value for key, value in options.items() if key not in ("exchange", "exchange_type", "routing_key")}
    return options if queue is None else {**rest, "queue": queue}


def _snapshot(given: Any) -> Any:
    """A copy that does not change with the setting."""
    return {key: _snapshot(value) for key, value in given.items()} if isinstance(given, Mapping) else given
