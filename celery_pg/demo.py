"""What does it look like when a worker dies?

A private PostgreSQL, real workers, a few orders. The first worker is killed while it packs; the second one does what
the first one left. On a terminal with rich the state is drawn live, elsewhere every event is a line.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

from celery import chain, group
from kombu import Consumer

from celery_pg import demo_tasks as shop
from celery_pg.screen import Cell, Column, Screen, Table, rich_table
from celery_pg.store.operator import Inspection
from kombu_pg import embedded, errors
from kombu_pg.database import Session, database_for
from kombu_pg.options import Options

__all__ = ["run"]

#: Seconds until the demo is given up.
DEADLINE = 90.0
#: Seconds until a review is asked for.
COUNTDOWN = 8.0
#: Steps that must be under way when the worker is killed.
VICTIMS = 2
#: Seconds between two looks at the store.
LOOK = 0.25
#: Lines of the log that are drawn where there is room, and of everything else.
LOG_LINES, OTHER_LINES = 7, 22


def run(screen: Screen) -> int:
    """Play the demo, at most DEADLINE seconds. -> the exit code; nothing is left of server, workers and files."""
    _forget_settings()
    directory = Path(tempfile.mkdtemp(prefix="celery-pg-demo-"))
    try:
        with _ending_like_ctrl_c():
            return _Demo(screen, directory).play()
    except KeyboardInterrupt:
        screen.show("stopped")
        return 130
    finally:
        _remove(directory)


def _forget_settings() -> None:
    # CELERY_BROKER_URL would win over the app's own broker: the orders would go to somebody's production.
    for name in [name for name in os.environ if name.startswith("CELERY_")]:
        del os.environ[name]


@contextlib.contextmanager
def _ending_like_ctrl_c() -> Iterator[None]:
    """A polite kill must not leave workers behind, either."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remove(directory: Path) -> None:
    embedded.leave(str(directory))
    running = directory / "data" / "postmaster.pid"
    deadline = time.monotonic() + 10
    while running.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    shutil.rmtree(directory, ignore_errors=True)


@dataclass(slots=True)
class _Step:
    """One task of an order: how it was called, and what is known of it."""

    order: int
    name: str
    how: str
    state: str = "waiting"
    worker: str = ""
    attempts: int = 0

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed")

    def cell(self) -> Cell:
        again = ", again" if self.attempts > 1 else ""
        return {
            "waiting": Cell("waits" + (" for its time" if self.how == "eta" else ""), "dim"),
            "running": Cell(f"running on {self.worker}{again}", "strong"),
            "lost": Cell(f"lost with {self.worker}", "bad"),
            "failed": Cell("card declined", "warn"),
            "done": Cell(f"done by {self.worker}{again}", "good"),
        }[self.state]


def _steps() -> list[_Step]:
    return [
        _Step(1001, "reserve stock", "chain"),
        _Step(1001, "charge card", "chain"),
        *(_Step(1001, f"pack {article}", "group") for article in ("mug", "book", "lamp")),
        _Step(1002, "charge card", "task"),
        _Step(1002, "cancel order", "link_error"),
        _Step(1003, "charge card", "task"),
        _Step(1003, "send receipt", "link"),
        _Step(1003, "ask for review", "eta"),
    ]


def _send_orders() -> None:
    packing = group(shop.pack.si(1001, article) for article in ("mug", "book", "lamp"))
    chain(shop.reserve.si(1001), shop.charge.si(1001), packing).apply_async()
    shop.charge.apply_async((1002,), {"declined": True}, link=shop.receipt.si(1002), link_error=shop.cancel.si(1002))
    shop.charge.apply_async((1003,), link=shop.receipt.si(1003))
    shop.ask_for_review.apply_async((1003,), countdown=COUNTDOWN)


class _Worker:
    """A `celery worker` in a process group of its own."""

    def __init__(self, name: str, broker: str, directory: Path) -> None:
        self.name = name
        self.fate = ""
        self.log = directory / f"{name.replace(' ', '-')}.log"
        command = [sys.executable, "-m", "celery", "-A", shop.__name__, "worker", "-c", "2", "--without-mingle"]
        environment = {**os.environ, shop.BROKER: broker, shop.WORKER: name, "TMPDIR": str(directory)}
        environment["PYTHONWARNINGS"] = "ignore"
        with self.log.open("wb") as out:
            self._running = subprocess.Popen(  # noqa: S603
                [*command, "-l", "WARNING", "-n", f"{name.replace(' ', '')}@demo"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=directory,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._running.pid

    @property
    def ended(self) -> bool:
        return self._running.poll() is not None

    def kill(self) -> None:
        """The main process and its children are gone when this returns, without a word to anybody."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._running.wait(10)

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        self._running.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._running.wait(10)


@dataclass(slots=True)
class _Counts:
    """What stands in the store, and which processes hold how much."""

    ready: int = 0
    unacked: int = 0
    scheduled: int = 0
    held: dict[int, tuple[bool, int]] = field(default_factory=dict)

    @property
    def left(self) -> int:
        return self.ready + self.unacked + self.scheduled


class _Demo:
    def __init__(self, screen: Screen, directory: Path) -> None:
        self._screen = screen
        self._directory = directory
        self._begun = time.monotonic()
        self._steps = _steps()
        self._workers: list[_Worker] = []
        self._counts = _Counts()
        self._log: list[tuple[float, Cell]] = []
        self._live: Any = None
        self._url = f"pg+embedded://{quote(str(directory))}"

    # The story

    def play(self) -> int:
        with self._drawn():
            try:
                problem = self._tell()
            except (errors.PGError, subprocess.SubprocessError) as exc:
                problem = str(exc)
            finally:
                for worker in self._workers:
                    worker.kill()
        if problem:
            self._explain(problem)
            return 1
        self._sum_up()
        return 0

    def _tell(self) -> str | None:
        """-> what went wrong."""
        self._say("starting a PostgreSQL of our own ...")
        shop.app.conf.broker_url = self._url
        options = Options.parse(self._url)
        with shop.app.connection_for_read() as connection, contextlib.closing(self._connect(options)) as session:
            self._say("... and a Celery worker with two processes")
            self._start("worker 1")
            reports = Consumer(connection, [shop.REPORTS], on_message=self._hear)
            celery = shop.app.amqp.queues["celery"]
            celery(connection.default_channel).declare()
            with reports:
                _send_orders()
                self._say("sent three orders")
                return self._watch(connection, session, Inspection(options))

    def _connect(self, options: Options) -> Session:
        return database_for(options).connect()

    def _watch(self, connection: Any, session: Session, inspection: Inspection) -> str | None:
        look_at = 0.0
        while time.monotonic() < self._begun + DEADLINE:
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=0.1)
            if time.monotonic() >= look_at:
                self._counts = _look(session, inspection)
                look_at = time.monotonic() + LOOK
            if self._live is not None:
                self._live.update(self._picture())
            if self._workers[-1].ended:
                return f"{self._workers[-1].name} has ended by itself"
            if len(self._workers) == 1 and len(self._packing()) >= VICTIMS:
                self._strike()
            if all(step.over for step in self._steps) and self._counts.left == 0:
                self._workers[-1].fate = "stopped"
                self._workers[-1].stop()
                return None
        return f"not everything was done within {DEADLINE:.0f} s"

    def _packing(self) -> list[_Step]:
        return [step for step in self._steps if step.state == "running" and step.how == "group"]

    def _strike(self) -> None:
        victim = self._workers[-1]
        victim.kill()
        victim.fate = "killed"
        lost = [step for step in self._steps if step.state == "running"]
        for step in lost:
            step.state = "lost"
        self._say(f"kill -9 {victim.pid}: {victim.name} is gone in the middle of {len(lost)} steps", "bad")
        self._start("worker 2")
        self._say("started worker 2; the dead one has 3 s to come back")

    def _start(self, name: str) -> None:
        self._workers.append(_Worker(name, self._url, self._directory))

    def _hear(self, message: Any) -> None:
        message.ack()
        said = message.payload
        step = next(s for s in self._steps if (s.order, s.name) == (said["order"], said["step"]))
        if said["worker"] != self._workers[-1].name and step.state == "lost" and said["state"] == "running":
            return  # it was sent before the kill
        step.state, step.worker = said["state"], said["worker"]
        step.attempts += step.state != "done"
        self._say(f"order {step.order}  {step.name:<15} {step.how:<11} {step.cell().text}", step.cell().style)

    def _say(self, text: str, style: str = "") -> None:
        seconds = time.monotonic() - self._begun
        self._log.append((seconds, Cell(text, style)))
        if self._live is None:
            self._screen.show(Cell(f"{seconds:5.1f} s  {text}", style))
        else:
            self._live.update(self._picture())

    # How it looks

    @contextlib.contextmanager
    def _drawn(self) -> Iterator[None]:
        if self._screen.console is None:
            yield
            return
        from rich.live import Live  # there is a console, so there is rich

        with Live(self._picture(), console=self._screen.console, refresh_per_second=8) as self._live:
            yield
            self._live.update(self._picture())

    def _picture(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        room = min(LOG_LINES, max(1, self._screen.console.height - OTHER_LINES))
        lines = [
            Text(f"{seconds:5.1f} s  {cell.text}", style="dim", no_wrap=True, overflow="ellipsis")
            for seconds, cell in self._log[-room:]
        ]
        return Group("", rich_table(self._table()), "", rich_table(self._processes()), "", *lines)

    def _table(self) -> Table:
        columns = (Column("order", right=True), Column("step"), Column("called as"), Column("state"))
        rows: list[list[Cell | str]] = [[str(step.order), step.name, step.how, step.cell()] for step in self._steps]
        return Table("Orders", columns, rows)

    def _processes(self) -> Table:
        c = self._counts
        title = f"In PostgreSQL: {c.ready} ready, {c.unacked} held by workers, {c.scheduled} waiting for their time"
        columns = (Column("worker"), Column("pid", right=True), Column("holds", right=True), Column("state"))
        return Table(title, columns, [self._process(worker) for worker in self._workers], "no worker yet")

    def _process(self, worker: _Worker) -> list[Cell | str]:
        known = worker.pid in self._counts.held
        holds = str(self._counts.held[worker.pid][1]) if known else ""
        if worker.fate == "killed":
            state = Cell("killed, not missed yet" if known else "killed, its messages were returned", "bad")
        else:
            state = Cell(worker.fate or ("alive" if known else "starting"), "good" if known else "dim")
        return [worker.name, str(worker.pid), holds, state]

    def _explain(self, problem: str) -> None:
        self._screen.show(Cell(f"the demo failed: {problem}", "bad"))
        for worker in self._workers:
            text = worker.log.read_text(errors="replace")[-2000:].strip()
            if text:
                self._screen.show(f"what {worker.name} logged:\n{text}")

    def _sum_up(self) -> None:
        twice = [step for step in self._steps if step.attempts > 1]
        seconds = time.monotonic() - self._begun
        total, left = len(self._steps), self._counts.left
        self._screen.show("")
        self._screen.show(
            Cell(f"{total} of {total} steps are over after {seconds:.0f} s, {left} messages are left.", "good")
        )
        self._screen.show(Cell(f"{len(twice)} steps that died with their worker ran again, none was lost.", "good"))


def _look(session: Session, inspection: Inspection) -> _Counts:
    queue = next((q for q in session.run(inspection.queues()) if q.name == "celery"), None)
    held = {c.pid: (c.alive, c.held) for c in session.run(inspection.consumers())}
    if queue is None:
        return _Counts(held=held)
    return _Counts(queue.ready, queue.unacked, queue.scheduled, held)
