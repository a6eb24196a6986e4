"""Can a team move from one broker to the other under load, and go back?"""

import collections
import contextlib
import itertools
import signal
import time
import uuid
from dataclasses import dataclass, field

import celery
import kombu
import pytest
from acceptance.conftest import broker_url
from acceptance.workers import eventually
from celery import Celery, chain, chord, group
from kombu import pools
from kombu.exceptions import OperationalError
from proxy import TcpProxy

pytestmark = pytest.mark.timeout(300)


@dataclass
class Move:
    """Two brokers, one result backend, and a flag."""

    brokers: dict
    default: str
    backend: str
    choose: object
    name: str = field(default_factory=lambda: f"gate.{uuid.uuid4().hex[:12]}")

    def settings(self, **more):
        """Of a worker, and of the client. Names on the shared RabbitMQ are the test's own."""
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

    def clear_rabbitmq(self, url):
        """Takes away what was declared. Returns how many messages were waiting."""
        with kombu.Connection(url) as connection, connection.channel() as channel:
            waiting = channel.queue_declare(self.name, passive=True).message_count
            channel.queue_delete(self.name)
            for exchange in (self.name, f"{self.name}.control.pidbox", f"reply.{self.name}.control.pidbox"):
                channel.exchange_delete(exchange)
            channel.exchange_delete(f"{self.name}.events")
            return waiting


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


def stories(app):
    """What to call, for ever, and how many effects each has."""
    step, errback = app.signature("gate_app.step"), app.signature("gate_app.step")
    return itertools.cycle(
        [
            (2, lambda: app.send_task("gate_app.step", link=step)),
            (3, lambda: chain(step, step, step, app=app).apply_async()),
            (3, lambda: chord([step, step], step, app=app).apply_async()),
            (1, lambda: app.send_task("gate_app.tries_again")),
            (2, lambda: app.send_task("gate_app.fails", link_error=errback)),
            (2, lambda: app.send_task("gate_app.calls")),
            (2, lambda: app.send_task("gate_app.replaced", ("gate_app.step",))),
        ]
    )


class Load:
    """Calls at about fifty tasks a second, and what came of them."""

    RATE = 50

    def __init__(self, app, store):
        self._stories = stories(app)
        self._store = store
        self.expected = 0

    def run(self, seconds):
        begun, tasks = time.monotonic(), 0
        while time.monotonic() - begun < seconds:
            count, call = next(self._stories)
            call()
            tasks += count
            time.sleep(max(0.0, begun + tasks / self.RATE - time.monotonic()))
        self.expected += tasks

    def effects(self):
        """(task id, task, root id, pid of the worker) of each."""
        return self._store.execute("SELECT task_id, task, phase, parent FROM effect ORDER BY id")

    def settle(self):
        """Everything that was called has run, once. Returns the effects since the last time."""
        eventually(lambda: len(self.effects()) >= self.expected, 60, f"{self.expected} effects")
        found = self.effects()
        twice = [each for each, n in collections.Counter(row[:2] for row in found).items() if n > 1]
        assert (len(found), twice) == (self.expected, [])
        return found


@pytest.mark.parametrize("seconds", [2.5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_team_moves_step_by_step_under_load_loses_rabbitmq_and_goes_back(
    store, start_worker, client, rabbitmq, tmp_path, seconds
):
    flag = tmp_path / "percent"
    flag.write_text("0")
    broker = kombu.Connection(rabbitmq)
    with TcpProxy(broker.hostname, broker.port or 5672) as network:
        credentials = f"{broker.userid or 'guest'}:{broker.password or 'guest'}"
        moving = Move(
            brokers={
                "rabbitmq": f"amqp://{credentials}@{network.host}:{network.port}/{broker.virtual_host}",
                "postgres": broker_url(store.url),
            },
            default="rabbitmq",
            backend=broker_url(store.url),
            choose="gate_app:broker_for",
        )
        workers = {
            name: start_worker("-c", "2", broker=url, name=name, **moving.settings(gate_flag=str(flag)))
            for name, url in moving.brokers.items()
        }
        app = client(moving)
        app.conf.pg_gate["choose"] = chooser(flag)
        load = Load(app, store)
        eventually(lambda: answering(app) == {worker.name for worker in workers.values()}, 30, "both sides answer")
        pids = {worker.pid: name for name, worker in workers.items()}

        def sides(found):
            return collections.Counter(pids[row[3]] for row in found)

        load.run(seconds)
        off = load.settle()
        assert set(sides(off)) == {"rabbitmq"}

        for percent in (10, 50):
            flag.write_text(str(percent))
            load.run(seconds)
        both = load.settle()[len(off) :]
        assert set(sides(both)) == {"rabbitmq", "postgres"}
        assert follows(both, pids)

        flag.write_text("100")
        load.run(seconds)
        moved = load.settle()
        assert set(sides(moved[len(off) + len(both) :])) == {"postgres"}

        network.cut()
        before = load.expected
        load.run(seconds)
        assert set(sides(load.settle()[before:])) == {"postgres"}
        flag.write_text("0")
        with pytest.raises(OperationalError):
            app.send_task("gate_app.step", retry=False)
        assert workers["rabbitmq"].alive

        network.resume()
        before = load.expected
        load.run(seconds)
        assert set(sides(load.settle()[before:])) == {"rabbitmq"}

        for worker in workers.values():
            worker.signal(signal.SIGTERM)
        assert [worker.wait(30) for worker in workers.values()] == [0, 0]
        assert store.messages() == 0
        hang_up()
    assert moving.clear_rabbitmq(rabbitmq) == 0
    assert "Connection to broker lost" in workers["rabbitmq"].output()
    assert "Connection to broker lost" not in workers["postgres"].output()


def chooser(flag):
    """As in the worker's module, which only a worker can import."""
    import zlib

    return lambda _task, _args, _kwargs, options: (
        "postgres" if zlib.crc32(options["task_id"].encode()) % 100 < int(flag.read_text()) else None
    )


def answering(app):
    return {name for reply in app.control.ping(timeout=1) or () for name in reply}


def follows(found, pids):
    """Whether everything with one root ran on one side, but for calls of their own."""
    sides = collections.defaultdict(set)
    for _id, task, root, pid in found:
        if task != "gate_app.plain":
            sides[root].add(pids[pid])
    return all(len(found) == 1 for found in sides.values())


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
