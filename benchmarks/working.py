"""How fast does a real worker run tasks?"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kombu
from celery import chord, group

from benchmarks import tasks
from benchmarks.children import Failed, alone
from benchmarks.form import WARM_UP, Form, repeat
from benchmarks.peers import Kombu, Ours
from benchmarks.publishing import expect

__all__ = ["SEGMENT", "apply_async", "atomic", "atomic_write", "parts", "running", "worker", "worker_results"]

ROOT = Path(__file__).parent.parent
#: A mark in the worker's queue after so many tasks, and before the first so many that warm it up.
SEGMENT = 250
#: The workers that share a chord: processes of one `celery worker`.
MANY = 16
#: Seconds for a worker to start and to run a first segment, and to stop.
STARTED, STOP = 60.0, 15.0

Settings = dict[str, Any]


def apply_async(peer: Kombu, queue: str, form: Form) -> dict[str, float | None]:
    count, seconds = alone(_apply_async, peer, queue, form, within=form.seconds + 30)
    expect(peer, queue, count + WARM_UP)
    return {"rate": count / seconds}


def _apply_async(peer: Kombu, queue: str, form: Form) -> tuple[int, float]:
    tasks.configure(peer.celery(queue))
    for _ in range(WARM_UP):
        tasks.nothing.apply_async()
    began = time.monotonic()
    count = repeat(tasks.nothing.apply_async, form)
    if not peer.confirms:
        with tasks.app.pool.acquire() as connection:
            # The producers' pool shares this connection: its answer comes after everything that was sent.
            kombu.Queue(queue)(connection.default_channel).queue_declare(passive=True)
    return count, time.monotonic() - began


def worker(peer: Kombu, queue: str, form: Form) -> dict[str, float | None]:
    return {"rate": _tasks_done(peer, peer.celery(queue), queue, form)}


def worker_results(peer: Kombu, queue: str, form: Form) -> dict[str, float | None]:
    return {"rate": _tasks_done(peer, peer.with_results(queue), queue, form)}


def atomic(peer: Kombu, queue: str, form: Form) -> dict[str, float | None]:
    return {"rate": _tasks_done(peer, _late(peer, queue), queue, form)}


def atomic_write(peer: Ours, queue: str, form: Form) -> dict[str, float | None]:
    settings = {**_late(peer, queue), "bench_dsn": peer.dsn}
    return {"rate": _tasks_done(peer, settings, queue, form, tasks.buy)}


def _late(peer: Kombu, queue: str) -> Settings:
    return {**peer.with_results(queue), "task_acks_late": True, "pg_atomic_completion": not peer.plain}


def parts(peer: Kombu, queue: str, form: Form) -> dict[str, float | None]:
    settings = peer.with_results(queue)
    with tempfile.TemporaryDirectory(prefix="bench-worker-") as directory:
        alone(_send_parts, peer, settings, form, directory, within=form.seconds * 2 + 60)
        first, last = Path(directory) / "first", Path(directory) / "last"
        with running(settings, queue, directory, MANY) as process:
            _wait_for(last, process, form.seconds * 2 + 60)
        if not last.exists():
            raise Failed(f"{form.count:,} parts were not done within {form.seconds * 2 + 60:g} s")
        return {"rate": form.count / (int(last.read_text()) - int(first.read_text())) * 1e9}


def _send_parts(peer: Kombu, settings: Settings, form: Form, directory: str) -> None:
    """Send tasks that warm the worker up, a mark, and the parts: the chord's body is the second mark."""
    tasks.configure(settings)
    for _ in range(SEGMENT):
        tasks.nothing.apply_async()
    tasks.mark.apply_async((f"{directory}/first",))
    header = [tasks.echo.s(number) for number in range(form.count)]
    if peer.plain:
        group(header).apply_async()
        tasks.mark.apply_async((f"{directory}/last",))
    else:
        chord(header, tasks.mark_parts.s(form.count, f"{directory}/last")).apply_async()


def _tasks_done(peer: Kombu, settings: Settings, queue: str, form: Form, task: Any = tasks.nothing) -> float:
    """-> tasks in a second, of a worker with two processes that finds its queue full."""
    with tempfile.TemporaryDirectory(prefix="bench-worker-") as directory:
        marks, replies = alone(_send_tasks, settings, form, directory, task.name, within=form.seconds * 2 + 30)
        try:
            with running(settings, queue, directory, 2) as process:
                _wait_for(Path(directory) / "0", process, STARTED)
                _wait_for(Path(directory) / str(marks - 1), process, form.seconds + 20)
        finally:
            alone(peer.forget, replies)
        marked = (Path(directory) / str(mark) for mark in range(marks))
        moments = [int(path.read_text()) for path in itertools.takewhile(Path.exists, marked)]
    if len(moments) < 2:
        raise Failed(f"fewer than {SEGMENT} tasks ran within {STARTED + form.seconds + 20:g} s")
    return (len(moments) - 1) * (SEGMENT + 1) / (moments[-1] - moments[0]) * 1e9


def _send_tasks(settings: Settings, form: Form, directory: str, task: str) -> tuple[int, str]:
    """Send tasks of this name, with a mark after each segment of them. -> (marks, who is sent the results)."""
    tasks.configure(settings)
    deadline = time.monotonic() + form.seconds
    marks = 0
    while marks < 2 or (marks * SEGMENT < form.count + SEGMENT and time.monotonic() < deadline):
        for _ in range(SEGMENT):
            tasks.app.tasks[task].apply_async()
        tasks.mark.apply_async((f"{directory}/{marks}",))
        marks += 1
    return marks, tasks.app.thread_oid


@contextlib.contextmanager
def running(settings: Settings, queue: str, directory: str, processes: int) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a worker that has been started; it and its children are gone afterwards."""
    command = f"-m celery -A benchmarks.tasks worker -P prefork -c {processes} -l WARNING --without-mingle"
    with (Path(directory) / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command.split(), "-n", f"{queue}@bench"],
            env={**os.environ, tasks.SETTINGS: json.dumps(settings), "PYTHONWARNINGS": "ignore"},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The worker and its children are gone when this returns, gently if they can."""
    process.terminate()
    try:
        process.wait(STOP)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(path: Path, process: subprocess.Popen[bytes], within: float) -> None:
    """Return when the file is there or the time is over: what was marked until then counts."""
    deadline = time.monotonic() + within
    while not path.exists() and time.monotonic() < deadline:
        if process.poll() is not None:
            raise Failed("the worker ended: " + (path.parent / "log").read_text(errors="replace")[-2000:])
        time.sleep(0.05)
