"""How long does a caller wait for results?"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from celery import chord, group

from benchmarks import tasks
from benchmarks.children import Failed, alone
from benchmarks.form import Form, repeat
from benchmarks.peers import Kombu
from benchmarks.working import running

__all__ = ["CHORD", "GROUP", "chord200", "get", "group500"]

GROUP, CHORD = 500, 200
#: Seconds for one answer, that of a worker which has just been started among them.
ANSWER = 40.0


def get(peer: Kombu, queue: str, form: Form) -> dict[str, float | None]:
    seconds = _waited(peer, queue, form, _one, processes=1)
    p95 = sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * 0.95))]
    return {"speed": 1 / statistics.median(seconds), "p95": p95 * 1e3}


def group500(peer: Kombu, queue: str, form: Form) -> dict[str, float | None]:
    return {"rate": GROUP / statistics.median(_waited(peer, queue, form, _group, processes=2))}


def chord200(peer: Kombu, queue: str, form: Form) -> dict[str, float | None]:
    return {"rate": CHORD / statistics.median(_waited(peer, queue, form, _chord, processes=2))}


def _waited(peer: Kombu, queue: str, form: Form, call: Callable[[], None], *, processes: int) -> list[float]:
    """-> seconds of each call, of a worker with so many processes; the first of them is not among these."""
    settings = peer.with_results(queue)
    with (
        tempfile.TemporaryDirectory(prefix="bench-worker-") as directory,
        running(settings, queue, directory, processes),
    ):
        return list(alone(_repeated, settings, call, form, within=form.seconds + 2 * ANSWER))


def _repeated(settings: dict[str, Any], call: Callable[[], None], form: Form) -> list[float]:
    tasks.configure(settings)
    for _ in range(WARMING[call]):
        call()
    taken = []

    def timed() -> None:
        began = time.monotonic()
        call()
        taken.append(time.monotonic() - began)

    repeat(timed, form)
    return taken


def _one() -> None:
    _same(tasks.echo.delay(1).get(timeout=ANSWER), 1)


def _group() -> None:
    sent = group(tasks.echo.s(number) for number in range(GROUP))
    _same(sent.apply_async().get(timeout=ANSWER), list(range(GROUP)))


def _chord() -> None:
    sent = chord([tasks.echo.s(number) for number in range(CHORD)], tasks.total.s())
    _same(sent.apply_async().get(timeout=ANSWER), sum(range(CHORD)))


def _same(answer: object, expected: object) -> None:
    if answer != expected:
        raise Failed(f"the answer was {answer!r}, not {expected!r}")


#: How often each is called before the clock starts.
WARMING = {_one: 20, _group: 1, _chord: 1}
