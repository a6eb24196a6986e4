"""Can a team move from one broker to the other under load, and go back?"""

import collections
import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import celery
import kombu
import pytest
from acceptance.conftest import broker_url
from acceptance.workers import eventually
from celery import Celery, chain, chord, group
from kombu import pools
from kombu.exceptions import OperationalError

pytestmark = pytest.mark.timeout(300)


@dataclass
class Move:
    """Two brokers, one result backend, and a flag."""

    brokers: dict
    default: str
    backend: str
    choose: object
    name: str = "gate"

    def settings(self, **more):
        """Of a worker, and of the client."""
        return {
            "broker_write_url": "pg-gate://",
            "broker_transport_options": {"confirm_publish": True},
            "result_backend": self.backend,
            "task_default_queue": self.name,
            "control_exchange": f"{self.name}.control",
            "event_exchange": f"{self.name}.events",
            "imports": ["gate_app"],
            "pg_gate": {"brokers": self.brokers, "default": self.default, "choose": self.choose},
            **more,
        }

    def client(self):
        app = Celery("acceptance", set_as_current=False)
        app.conf.update(self.settings(broker_url=self.brokers[self.default]))
        return app


@pytest.fixture
def client():
    with contextlib.ExitStack() as stack:
        stack.callback(hang_up)
        yield lambda move: stack.enter_context(contextlib.closing(move.client()))


def hang_up():
    """Close every pooled connection in order; the pools' own way is to drop them, as if they were lost."""
    for pool in pools.connections.values():
        with contextlib.suppress(OSError, OperationalError), pool.acquire(block=True) as connection:
            connection._close()
    pools.reset()


class RabbitMQ:
    """A node of the test's own: it may be stopped, and everything on it is the test's."""

    def __init__(self, server, directory):
        self._directory = directory
        self._port, distribution = free_port(), free_port()
        self._node = f"gate-{self._port}@localhost"
        (directory / "env").touch()
        self._environment = {
            **os.environ,
            "HOME": str(directory),
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self._port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CONF_ENV_FILE": str(directory / "env"),  # not the machine's
            "RABBITMQ_CONFIG_FILE": str(directory / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_PID_FILE": str(directory / "pid"),
        }
        self._control = server.with_name("rabbitmqctl")
        with (directory / "output").open("wb") as output:
            self._server = subprocess.Popen(server, env=self._environment, stdout=output, stderr=output)

    def wait_ready(self):
        """The URL of it."""
        eventually(lambda: self._server.poll() is not None or self._listens(), 60, "RabbitMQ listens")
        assert self._server.poll() is None, (self._directory / "output").read_text()
        return f"amqp://guest:guest@127.0.0.1:{self._port}//"

    def _listens(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port)):
            return True

    def control(self, *command):
        return subprocess.run(
            [self._control, "-q", "-n", self._node, *command],
            env=self._environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ).stdout  # fmt: skip

    def left(self):
        """The queues with messages, ready or unacked."""
        lines = self.control("list_queues", "--no-table-headers", "name", "messages_ready", "messages_unacknowledged")
        return [line for line in lines.splitlines() if line.split("\t")[1:] != ["0", "0"]]

    def end(self):
        self._server.terminate()
        self._server.wait(60)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def own_rabbitmq(tmp_path):
    # Not Debian's wrapper around it, which changes the user.
    server = shutil.which("rabbitmq-server", path=os.pathsep.join(["/usr/lib/rabbitmq/bin", os.environ["PATH"]]))
    if server is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no rabbitmq-server: install RabbitMQ")
    node = RabbitMQ(Path(server), tmp_path)
    yield node
    node.end()


def stories(app):
    """Calls for ever: how many effects the n-th has, and what makes it. Each of its tasks is told n."""
    for number in itertools.count():
        task = partial(app.signature, kwargs={"story": number})
        step = task("gate_app.step")
        yield (
            (2, partial(task("gate_app.step").apply_async, link=step)),
            (3, chain(step, step, step, app=app).apply_async),
            (3, chord([step, step], step, app=app).apply_async),
            (1, task("gate_app.tries_again").apply_async),
            (2, partial(task("gate_app.fails").apply_async, link_error=step)),
            (2, task("gate_app.calls").apply_async),
            (2, task("gate_app.replaced", ("gate_app.step",)).apply_async),
        )[number % 7]


class Load:
    """Calls at about fifty tasks a second, and what came of them."""

    RATE = 50

    def __init__(self, app, store):
        self._stories = stories(app)
        self._store = store
        self._turn = threading.Lock()
        self._enough = threading.Event()
        self.told = 0
        self.expected = 0

    @contextlib.contextmanager
    def running(self):
        """In a thread of its own, until the block ends."""
        with ThreadPoolExecutor(1) as thread:
            self._running = thread.submit(self._run)
            try:
                yield
            finally:
                self._enough.set()
            self._running.result()

    def _run(self):
        begun = time.monotonic()
        while not self._enough.wait(max(0.0, begun + self.expected / self.RATE - time.monotonic())):
            with self._turn:
                count, call = next(self._stories)
                call()
                self.told += 1
                self.expected += count

    @contextlib.contextmanager
    def between_calls(self):
        """Nothing is called within the block, and the tasks of what was called are on their way. -> the next story."""
        with self._turn:
            yield self.told

    def go_on(self, seconds):
        """So much more has been called."""
        enough = self.expected + seconds * self.RATE
        eventually(lambda: self.expected >= enough or self._running.done(), 10 * seconds, "the load goes on")

    def settle(self):
        """Everything that was called has run, once. -> (id, task, story, pid of the worker) of each task."""

        def effects():
            return self._store.execute("SELECT task_id, task, phase, parent FROM effect ORDER BY id")

        eventually(lambda: len(effects()) >= self.expected, 60, f"{self.expected} effects")
        found = effects()
        twice = [each for each, n in collections.Counter(row[:2] for row in found).items() if n > 1]
        assert (len(found), twice) == (self.expected, [])
        return found


@pytest.mark.parametrize("seconds", [1.5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_team_moves_step_by_step_under_load_stops_rabbitmq_starts_it_and_goes_back(
    store, start_worker, client, own_rabbitmq, tmp_path, seconds
):
    flag = tmp_path / "percent"
    flag.write_text("0")
    postgres = broker_url(store.url)
    moving = Move({"postgres": postgres}, "rabbitmq", backend=postgres, choose="gate_app:broker_for")
    moving.brokers["rabbitmq"] = own_rabbitmq.wait_ready()
    workers = {
        name: start_worker("-c", "2", broker=url, name=name, ready=False, **moving.settings(gate_flag=str(flag)))
        for name, url in moving.brokers.items()
    }
    app = client(moving)
    load = Load(app, store)
    for worker in workers.values():
        worker.wait_ready()

    def turn_to(percent):
        # The workers' own calls ask a function that reads the flag.
        flag.write_text(str(percent))
        app.conf.pg_gate["choose"] = {"percent": {"postgres": percent}}

    turn_to(0)
    began = []
    with load.running():
        for percent in (0, 10, 50, 100):
            with load.between_calls() as story:
                turn_to(percent)
            began.append(story)
            load.go_on(seconds)
        eventually(lambda: not own_rabbitmq.left(), 30, "nothing is ready or unacked on RabbitMQ")

        own_rabbitmq.control("stop_app")
        load.go_on(seconds)
        with load.between_calls():
            turn_to(0)
            with pytest.raises(OperationalError):
                app.send_task("gate_app.step", retry=False)
            turn_to(100)
        assert workers["rabbitmq"].alive

        own_rabbitmq.control("start_app")
        eventually(lambda: answering(app) == {worker.name for worker in workers.values()}, 30, "both sides answer")
        with load.between_calls() as story:
            turn_to(0)
        began.append(story)
        load.go_on(seconds)

    load.settle()
    for worker in workers.values():
        worker.signal(signal.SIGTERM)
    assert [worker.wait(30) for worker in workers.values()] == [0, 0]
    assert (store.messages(), own_rabbitmq.left()) == (0, [])
    off, tenth, half, moved, back = sides(load.settle(), {worker.pid: name for name, worker in workers.items()}, began)
    assert set(off) == set(back) == {"rabbitmq"}
    assert set(moved) == {"postgres"}
    assert tenth.count("postgres") / len(tenth) < half.count("postgres") / len(half) < 1
    assert "Connection to broker lost" in workers["rabbitmq"].output()
    assert "Connection to broker lost" not in workers["postgres"].output()
    hang_up()


def sides(effects, pids, began):
    """Where the stories of each phase ran. One and all of its tasks ran on one side, but for calls of their own."""
    ran = collections.defaultdict(set)
    for _id, task, story, pid in effects:
        if task != "gate_app.plain":
            ran[int(story)].add(pids[pid])
    assert [story for story, where in ran.items() if len(where) > 1] == []
    where = [min(ran[story]) for story in sorted(ran)]
    return [where[first:last] for first, last in itertools.pairwise([*began, len(where)])]


def answering(app):
    return {name for reply in app.control.ping(timeout=1) or () for name in reply}


@pytest.fixture
def halves(store):
    """Two schemas of one database: the client sends everything to "new", where a worker is; the default is "old"."""
    halves = Move(
        brokers={"old": broker_url(store.url, schema="other"), "new": broker_url(store.url)},
        default="old",
        backend=broker_url(store.url),
        choose={"percent": {"new": 100}},
    )
    with kombu.Connection(halves.brokers["old"]) as connection:
        kombu.Queue(halves.name, channel=connection.default_channel).declare()
    return halves


def chooses_nothing(halves):
    """Settings of a worker that sends each new call to the default broker."""
    return halves.settings(pg_gate={"brokers": halves.brokers, "default": halves.default})


def left(store):
    """The tasks that wait in the broker that has no worker."""
    return sorted(row[0] for row in store.execute("SELECT task FROM other.message WHERE task IS NOT NULL"))


@pytest.mark.parametrize(("pool", "concurrency"), [("prefork", 2), ("threads", 4), ("gevent", 4), ("solo", 1)])
def test_what_follows_a_call_stays_with_it_and_a_call_of_its_own_asks_the_chooser(
    store, start_worker, client, halves, pool, concurrency
):
    start_worker("-P", pool, "-c", str(concurrency), broker=halves.brokers["new"], **chooses_nothing(halves))
    app = client(halves)
    step = app.signature("gate_app.step")
    fails = app.signature("gate_app.fails")
    load = Load(app, store)

    for count, call in itertools.islice(stories(app), 14):
        call()
        load.expected += count
    load.expected -= 2  # two calls of their own
    app.send_task("gate_app.step", link=group([step, step], app=app))
    chain(step, group([step, step], app=app), step, app=app).apply_async()
    app.send_task("gate_app.replaced", (chain(step, step, app=app),), link=step)
    app.send_task("gate_app.replaced", (group([step, step], app=app),), link=step)
    chord([fails, step], step.clone().on_error(step), app=app).apply_async()
    chord([app.signature("gate_app.adds"), step], step, app=app).apply_async()
    load.expected += 3 + 4 + 4 + 4 + 3 + 4
    load.expected += celery.VERSION[:2] < (5, 7)  # it links the callback of a task that a chain replaces twice

    load.settle()
    assert left(store) == ["gate_app.plain"] * 2
    eventually(lambda: store.messages() == 0, 30, "all are acked")


def test_the_errback_of_a_task_that_its_worker_had_to_kill_stays_with_it(store, start_worker, client, halves):
    start_worker("-c", "1", broker=halves.brokers["new"], **chooses_nothing(halves))
    app = client(halves)
    load = Load(app, store)

    app.send_task("gate_app.endless", time_limit=1, link_error=app.signature("gate_app.step"))

    load.expected = 2
    assert [row[1] for row in load.settle()] == ["gate_app.endless", "gate_app.step"]
    assert left(store) == []


def test_a_command_reaches_the_workers_of_every_broker(start_worker, client, halves):
    workers = [
        start_worker("-c", "1", broker=url, name=name, **halves.settings()).name for name, url in halves.brokers.items()
    ]
    app = client(halves)

    eventually(lambda: answering(app) == set(workers), 30, "both sides answer")

    for worker in workers:
        eventually(lambda name=worker: [*(app.control.inspect([name], timeout=1).ping() or ())] == [name], 30)
    assert len(app.control.ping(timeout=10, limit=1)) == 1
    eventually(lambda: len(app.control.revoke("some-id", reply=True, timeout=1)) == 2, 30, "both have heard of it")


def test_a_command_for_every_broker_raises_when_one_cannot_be_reached_and_reaches_the_others(
    start_worker, client, halves
):
    worker = start_worker("-c", "1", broker=halves.brokers["new"], **halves.settings())
    halves.brokers = {**halves.brokers, "old": "amqp://guest:guest@127.0.0.1:9//"}
    app = client(halves)
    app.conf.broker_connection_timeout = 0.5

    with pytest.raises(ConnectionRefusedError):
        app.control.shutdown()

    assert worker.wait(30) == 0


def test_a_worker_starts_while_a_broker_that_it_does_not_read_from_cannot_be_reached(start_worker, client, halves):
    halves.brokers = {**halves.brokers, "old": "amqp://guest:guest@127.0.0.1:9//"}
    worker = start_worker("-c", "1", broker=halves.brokers["new"], **halves.settings())

    client(halves).send_task("gate_app.step").get(timeout=30)
    assert "Connection refused" not in worker.output()
