"""Was anything lost, or done twice, and how long did it take until all was well again?"""

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg2
from acceptance.workers import START, Worker
from chaos.chaos_app import BROKER, EFFECTS
from watching import eventually

__all__ = ["ChaosWorker", "Figures", "Ledger", "Load", "Place", "Scene", "scene"]

TESTS = Path(__file__).parent.parent
LEDGER = """
CREATE TABLE effect (
    number bigint, link integer, pid integer, redelivered boolean, at timestamptz DEFAULT clock_timestamp()
);
CREATE INDEX ON effect (number, link)
"""


@dataclass(frozen=True)
class Load:
    """What is published meanwhile, by each program; a task takes so many seconds."""

    processes: int = 1
    links: int = 2
    per_second: float = 12
    seconds: float = 0.03
    padding: int = 0


@dataclass(frozen=True)
class Place:
    """Where all this happens: the store as a libpq URI, and which broker URL each worker and each publisher has."""

    store: str
    workers: Sequence[str]
    publishers: Sequence[str]


@dataclass(frozen=True)
class Figures:
    """What became of it. Tasks count with their links."""

    fault: str
    tasks: int
    lost: int
    duplicated: int
    recovered_after: float

    def __str__(self) -> str:
        return f"| {self.fault} | {self.tasks} | {self.lost} | {self.duplicated} | {self.recovered_after:.1f} |"


class Ledger:
    """Which task has run how often: in a database that no fault touches."""

    def __init__(self, url: str, links: int) -> None:
        self.url = url
        self._links = links
        self._connection = psycopg2.connect(url, application_name="ledger")
        self._connection.autocommit = True
        self._query(LEDGER)

    def close(self) -> None:
        self._connection.close()

    def _query(self, statement: str) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def finished(self) -> set[int]:
        """The numbers whose task and links have all run."""
        rows = self._query(f"SELECT number FROM effect GROUP BY number HAVING count(DISTINCT link) = {self._links + 1}")
        return {row[0] for row in rows}

    def runs(self) -> int:
        return int(self._query("SELECT count(*) FROM effect")[0][0])

    def missing(self, sent: set[int]) -> list[tuple[int, int]]:
        """(number, link) of what should have run and has not."""
        run = set(self._query("SELECT DISTINCT number, link FROM effect"))
        return sorted((number, link) for number in sent for link in range(self._links + 1) if (number, link) not in run)

    def repeated(self) -> list[tuple[int, int, int]]:
        """(number, link, runs) of what has run more than once."""
        return self._query("SELECT number, link, count(*) FROM effect GROUP BY 1, 2 HAVING count(*) > 1 ORDER BY 1, 2")


class ChaosWorker(Worker):
    """A worker of the numbered tasks, or of another app."""

    def __init__(self, name: str, broker: str, effects: str, log: Path, app: str = "chaos.chaos_app") -> None:
        self.name = f"{name}@chaos"
        self.log = log
        self._orphans: list[int] = []
        self._command = [
            sys.executable, "-m", "celery", "-A", app, "worker", "-n", self.name, "-l", "INFO",
            "-c", "2", "--without-mingle", "--without-gossip",
        ]  # fmt: skip
        self._environment = environment(broker, effects)
        self.start()

    def kill_parent(self) -> None:
        """The main process is gone when this returns; what its children do is their own business."""
        self._orphans.append(self.pid)
        self.process.kill()
        self.process.wait(10)

    def kill(self) -> None:
        for group in [*self._orphans, self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, 9)
        self._orphans.clear()
        self.process.wait(10)


class Publishers:
    """A publishing program, and which numbers it could publish."""

    def __init__(self, nth: int, of: int, broker: str, effects: str, load: Load, directory: Path) -> None:
        self._out = directory / f"published-{nth}"
        arguments = [nth, of, load.processes, load.links, load.per_second, load.seconds, load.padding]
        with self._out.open("ab") as out, (directory / f"publisher-{nth}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "chaos.publisher", *map(str, arguments)],
                env=environment(broker, effects), stdin=subprocess.PIPE, stdout=out, stderr=log, start_new_session=True,
            )  # fmt: skip

    def lines(self) -> list[str]:
        text = self._out.read_text()
        return text[: text.rfind("\n") + 1].splitlines()

    def sent(self) -> set[int]:
        """The numbers whose publish has returned."""
        return {int(line) for line in self.lines() if not line.startswith("failed")}

    def failures(self) -> list[str]:
        return [line for line in self.lines() if line.startswith("failed")]

    def stop(self) -> None:
        """End after the publish under way."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait(10)


def environment(broker: str, effects: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    ours = {BROKER: broker, EFFECTS: effects, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **ours}


@dataclass
class Scene:
    """Workers and publishers at work on one place."""

    place: Place
    ledger: Ledger
    directory: Path
    workers: list[ChaosWorker] = field(default_factory=list)
    publishers: list[Publishers] = field(default_factory=list)

    def sent(self) -> set[int]:
        return set().union(*(publishers.sent() for publishers in self.publishers))

    def failures(self) -> list[str]:
        return [line for publishers in self.publishers for line in publishers.failures()]

    def any_worker(self) -> ChaosWorker:
        return random.choice(self.workers)

    def start(self, load: Load) -> None:
        """All of them are at work when this returns."""
        for nth, broker in enumerate(self.place.workers):
            log = self.directory / f"worker-{nth}.log"
            self.workers.append(ChaosWorker(f"w{nth}", broker, self.ledger.url, log))
        of = len(self.place.publishers)
        for nth, broker in enumerate(self.place.publishers):
            self.publishers.append(Publishers(nth, of, broker, self.ledger.url, load, self.directory))
        for worker in self.workers:
            worker.wait_ready()
        eventually(self.ledger.finished, START, "the first task and its links have run")

    def wait_for(self, numbers: set[int], within: float) -> None:
        """Every task with one of these numbers, and all its links, have run; or they are lost."""
        with contextlib.suppress(AssertionError):
            eventually(lambda: numbers <= self.ledger.finished(), within)

    def stop_publishers(self) -> None:
        for publishers in self.publishers:
            publishers.stop()
        for publishers in self.publishers:
            publishers.process.wait(60)

    def kill(self) -> None:
        for each in (*self.publishers, *self.workers):
            each.kill()
        self.ledger.close()


@contextlib.contextmanager
def scene(place: Place, ledger_url: str, directory: Path, load: Load) -> Iterator[Scene]:
    """A scene where all is well; afterwards no process of it is left."""
    made = Scene(place, Ledger(ledger_url, load.links), directory)
    try:
        made.start(load)
        yield made
    finally:
        made.kill()
