"""What can go wrong around a queue?

Each fault says on what it happens (`place`), how it begins and how it ends. `period`: it begins again, so often, until
it ends. `may_duplicate`: at-least-once allows a task to run twice here.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import psycopg2
from acceptance.conftest import broker_url
from chaos.checker import Load, Place, Scene
from chaos.network import OneWayProxy
from chaos.servers import PgServer, free_port, owner, small_disk
from conftest import through
from proxy import TcpProxy
from test_pooler import configure, listens
from watching import eventually

__all__ = ["FAULTS", "Fault", "Site"]

#: Seconds that a consumer is given to come back: short, so that a fault can be longer.
GRACE = {"reconnect_grace": 1, "restart_grace": 10, "delivery_limit": 1000}


@dataclass
class Site:
    """What a fault can build on: a server that it may stop, and a directory; `stack` takes down what it built."""

    server: PgServer
    template: Path
    directory: Path
    stack: contextlib.ExitStack
    name: str

    def database(self, server: PgServer | None = None) -> str:
        """The libpq URI of an empty database; it goes with its server."""
        server = server or self.server
        server.execute(f"CREATE DATABASE {self.name} TEMPLATE template0")
        return server.url.removesuffix("/postgres") + "/" + self.name

    def new_server(self, name: str) -> PgServer:
        server = PgServer(self.directory / name)
        self.stack.callback(server.close)
        return server

    def proxy(self, kind: type[TcpProxy] = TcpProxy) -> TcpProxy:
        return self.stack.enter_context(kind("127.0.0.1", self.server.port))


def everywhere(store: str, broker: str, publishers: int = 2) -> Place:
    """Two workers, and publishers, with the same URL."""
    return Place(store, [broker] * 2, [broker] * publishers)


class Fault:
    """Something that goes wrong."""

    name = ""
    may_duplicate = True
    seconds = 3.0
    full_seconds = 60.0
    period: float | None = None
    full_period: float | None = None
    load = Load()

    def place(self, site: Site) -> Place:
        store = site.database()
        return everywhere(store, broker_url(store, **GRACE))

    def begin(self, scene: Scene) -> None:
        raise NotImplementedError

    def end(self, scene: Scene) -> None:
        """It is over, and whoever looks after the machines has done his part."""


# Processes -----------------------------------------------------------------------------------------------------


class KilledWorker(Fault):
    """A machine is gone, and another takes its place."""

    name = "SIGKILL of a worker with its children"
    seconds, full_seconds, full_period = 0.0, 60.0, 8.0

    def begin(self, scene: Scene) -> None:
        worker = scene.any_worker()
        worker.kill()
        worker.start()

    def end(self, scene: Scene) -> None:
        for worker in scene.workers:
            worker.wait_ready()


class KilledChild(Fault):
    """The kernel's out-of-memory killer."""

    name = "SIGKILL of a child"
    seconds, full_seconds = 2.0, 60.0
    period = full_period = 1.0

    def begin(self, scene: Scene) -> None:
        for child in scene.any_worker().children[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


class KilledParent(KilledWorker):
    """The main process is gone, its children finish what they do."""

    name = "SIGKILL of a worker's main process"

    def begin(self, scene: Scene) -> None:
        worker = scene.any_worker()
        worker.kill_parent()
        worker.start()


class StoppedWorker(Fault):
    """A virtual machine that sleeps. Its session lives, so nobody else gets what it holds."""

    name = "SIGSTOP of a worker for {seconds:g} s"
    may_duplicate = False
    seconds, full_seconds = 4.0, 30.0

    def begin(self, scene: Scene) -> None:
        scene.workers[0].signal_all(signal.SIGSTOP)

    def end(self, scene: Scene) -> None:
        scene.workers[0].signal_all(signal.SIGCONT)


class Crowd(Fault):
    """Everybody publishes at once."""

    name = "100 publishers"
    may_duplicate = False
    seconds, full_seconds = 0.0, 60.0
    load = Load(processes=100, links=1, per_second=1, seconds=0)

    def place(self, site: Site) -> Place:
        store = site.database()
        return everywhere(store, broker_url(store, **GRACE), publishers=1)

    def begin(self, scene: Scene) -> None:
        eventually(lambda: len({number % 100 for number in scene.sent()}) == 100, 60, "all of them publish")


# The server ----------------------------------------------------------------------------------------------------


class TerminatedBackends(Fault):
    """Who is away for longer than the grace works on while others get its messages."""

    name = "pg_terminate_backend of every backend, each second"
    seconds, full_seconds = 3.0, 60.0
    period = full_period = 1.0

    def begin(self, scene: Scene) -> None:
        with contextlib.closing(psycopg2.connect(scene.place.store)) as connection, connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )


class CrashedServer(Fault):
    """Claims and acks of the last moments are forgotten."""

    name = "pg_ctl restart -m immediate"
    seconds, full_seconds, full_period = 0.0, 60.0, 15.0

    def place(self, site: Site) -> Place:
        self._server = site.server
        return super().place(site)

    def begin(self, scene: Scene) -> None:
        self._server.restart("immediate")


class Promotion(Fault):
    """The primary crashes, its synchronous standby takes over."""

    name = "promotion of a synchronous standby"
    seconds, full_seconds = 0.0, 10.0

    def place(self, site: Site) -> Place:
        self._primary = site.new_server("primary").create_from(site.template).start()
        self._standby = site.new_server("standby").create_standby_of(self._primary).start()
        self._primary.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
        self._primary.execute("SELECT pg_reload_conf()")
        synchronous = "SELECT pid FROM pg_stat_replication WHERE sync_state = 'sync'"
        eventually(lambda: self._primary.execute(synchronous), 20, "the standby is synchronous")
        store = site.database(self._primary)
        both = store.replace(str(self._primary.port), f"{self._primary.port},127.0.0.1:{self._standby.port}")
        return everywhere(store, broker_url(both + "?target_session_attrs=read-write", **GRACE))

    def begin(self, scene: Scene) -> None:
        self._primary.stop("immediate")
        self._standby.promote()


class FullDisk(Fault):
    """Nothing fits in any more, until somebody makes room."""

    name = "disk full for {seconds:g} s"
    seconds, full_seconds = 3.0, 20.0
    load = Load(padding=3000)

    def place(self, site: Site) -> Place:
        server = site.new_server("small")
        disk = site.stack.enter_context(small_disk(server.data, 64))
        site.stack.callback(server.close)
        self._filler = disk / "filler"
        server.create("--wal-segsize=1", "-X", str(server.directory / "wal")).start()
        store = site.database(server)
        return everywhere(store, broker_url(store, **GRACE))

    def begin(self, scene: Scene) -> None:
        fill(self._filler)
        sent = len(scene.sent())
        eventually(lambda: refuses(scene.place.store), 30, "the disk is full")
        print(f"{len(scene.sent()) - sent} publishes until the server had used up its last pages")

    def end(self, scene: Scene) -> None:
        self._filler.unlink()


def fill(path: Path) -> None:
    """The file takes all that is left."""
    with path.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while True:
            out.write(bytes(4096))


def refuses(url: str) -> bool:
    """The server cannot make a table larger."""
    try:
        with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
            cursor.execute("CREATE TEMPORARY TABLE filler AS SELECT repeat('x', 1000) FROM generate_series(1, 1000)")
    except psycopg2.Error:
        return True
    return False


# The network ---------------------------------------------------------------------------------------------------


class CutNetwork(Fault):
    """For longer than the grace: who works on is not alone with it."""

    name = "network cut for {seconds:g} s"
    seconds, full_seconds = 2.0, 20.0

    def place(self, site: Site) -> Place:
        store = site.database()
        self._proxy = site.proxy()
        return everywhere(store, broker_url(through(self._proxy, store), **GRACE))

    def begin(self, scene: Scene) -> None:
        self._proxy.cut()

    def end(self, scene: Scene) -> None:
        self._proxy.resume()


class StalledNetwork(CutNetwork):
    """Nothing comes through, nothing is closed; longer than anybody's patience in its full form."""

    name = "network stalled for {seconds:g} s"
    seconds, full_seconds = 3.0, 40.0

    def begin(self, scene: Scene) -> None:
        self._proxy.stall()


class HalvedNetwork(CutNetwork):
    """One worker and one publisher are cut off, the others are not."""

    name = "half of the network cut for {seconds:g} s"
    seconds, full_seconds = 3.0, 20.0

    def place(self, site: Site) -> Place:
        store = site.database()
        self._proxy = site.proxy()
        both = [broker_url(through(self._proxy, store), **GRACE), broker_url(store, **GRACE)]
        return Place(store, both, both)


class OneWayNetwork(Fault):
    """What is said reaches the server, its answers are lost: every publish under way is in doubt."""

    name = "network deaf for {seconds:g} s"
    seconds, full_seconds = 2.0, 20.0

    def place(self, site: Site) -> Place:
        store = site.database()
        self._proxy = site.stack.enter_context(OneWayProxy("127.0.0.1", site.server.port))
        return everywhere(store, broker_url(through(self._proxy, store), **GRACE))

    def begin(self, scene: Scene) -> None:
        self._proxy.go_deaf()

    def end(self, scene: Scene) -> None:
        self._proxy.hear_again()


class RestartedPooler(Fault):
    """Publishers go through PgBouncer; workers publish through it, too, and claim on sessions of their own."""

    name = "SIGKILL of PgBouncer"
    seconds, full_seconds, full_period = 0.0, 60.0, 5.0

    def place(self, site: Site) -> Place:
        store = site.database()
        self._directory = site.directory / "pooler"
        self._directory.mkdir()
        self._port = free_port()
        site.stack.callback(self._stop)
        configure(
            self._directory, self._port, SimpleNamespace(host="127.0.0.1", port=site.server.port), {"user": "postgres"}
        )
        for path in (self._directory, *self._directory.iterdir()):
            shutil.chown(path, owner() or os.getuid())
        self._start()
        pooled = store.replace(str(site.server.port), str(self._port))
        return everywhere(store, broker_url(pooled, listen_url=quote(store, safe=""), **GRACE))

    def _start(self) -> None:
        program = shutil.which("pgbouncer", path=os.environ["PATH"] + ":/usr/sbin")
        assert program, "there is no pgbouncer here: apt-get install pgbouncer"
        self._process = subprocess.Popen(
            [program, self._directory / "pgbouncer.ini"],
            user=owner(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        eventually(lambda: listens(self._port), 20, f"pgbouncer listens: see {self._directory}/log")

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def begin(self, scene: Scene) -> None:
        self._stop()
        (self._directory / "pid").unlink(missing_ok=True)
        self._start()


FAULTS: list[type[Fault]] = [
    KilledWorker, KilledChild, KilledParent, StoppedWorker, TerminatedBackends, CrashedServer, Promotion, CutNetwork,
    StalledNetwork, OneWayNetwork, HalvedNetwork, RestartedPooler, FullDisk, Crowd,
]  # fmt: skip
