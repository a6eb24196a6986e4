"""How fast can one publish, and what does it cost?

A row's function is called in the process that measures nothing, with a queue that is declared and empty; it starts the
children that measure. It returns one number for each of the row's figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.children import Failed, alone, context, together
from benchmarks.form import WARM_UP, Form, repeat
from benchmarks.peers import BODY, Peer, Send

__all__ = ["cpu", "expect", "publish", "publish16", "transaction", "transaction16"]

PUBLISHERS = 16
#: Seconds for what was sent and not answered to be in its queue.
ARRIVED = 10.0


def publish(peer: Peer, queue: str, form: Form) -> dict[str, float | None]:
    count, began, ended = alone(_publish, peer, queue, form, within=form.seconds + 30)
    expect(peer, queue, count + WARM_UP)
    return {"rate": count / (ended - began)}


def publish16(peer: Peer, queue: str, form: Form) -> dict[str, float | None]:
    start = context.Barrier(PUBLISHERS)
    calls = [(_publish, (peer, queue, form, start))] * PUBLISHERS
    spans = together(calls, within=form.seconds + 60)
    count = sum(count for count, _, _ in spans)
    expect(peer, queue, count + WARM_UP * PUBLISHERS)
    return {"rate": count / (max(ended for _, _, ended in spans) - min(began for _, began, _ in spans))}


def transaction(peer: Peer, queue: str, form: Form) -> dict[str, float | None]:
    count, began, ended = alone(_buy, peer, queue, form, within=form.seconds + 30)
    expect(peer, queue, count + WARM_UP)
    return {"rate": count / (ended - began)}


def transaction16(peer: Peer, queue: str, form: Form) -> dict[str, float | None]:
    start = context.Barrier(PUBLISHERS)
    calls = [(_buy, (peer, queue, form, start))] * PUBLISHERS
    spans = together(calls, within=form.seconds + 60)
    count = sum(count for count, _, _ in spans)
    expect(peer, queue, count + WARM_UP * PUBLISHERS)
    return {"rate": count / (max(ended for _, _, ended in spans) - min(began for _, began, _ in spans))}


def cpu(peer: Peer, queue: str, form: Form) -> dict[str, float | None]:
    return dict(alone(_cpu, peer.named(f"{queue}_cpu"), queue, form, within=form.seconds + 30))


def _buy(peer: Peer, queue: str, form: Form, start: Any = None) -> tuple[int, float, float]:
    """-> (transactions, first moment, last moment)."""
    with peer.buyer(queue) as sending:
        return _send(sending, form, start)


def _publish(peer: Peer, queue: str, form: Form, start: Any = None) -> tuple[int, float, float]:
    """-> (messages, first moment, last moment)."""
    with peer.publisher(queue) as sending:
        return _send(sending, form, start)


def _send(sending: tuple[Send, Callable[[], object]], form: Form, start: Any) -> tuple[int, float, float]:
    send, answered = sending
    _warm_up(send, answered)
    if start is not None:
        start.wait(30)
    began = time.monotonic()
    count = repeat(lambda: send(BODY), form)
    answered()
    return count, began, time.monotonic()


def _cpu(peer: Peer, queue: str, form: Form) -> dict[str, float | None]:
    name = f"{queue}_cpu"
    with peer.publisher(queue) as (send, answered):
        _warm_up(send, answered)
        backends = peer.backends(name)
        served, spent = _server_time(backends), time.process_time()
        count = repeat(lambda: send(BODY), form)
        answered()
        spent = time.process_time() - spent
        if served is not None:
            served = (_server_time(backends) or served) - served
        return {"server": None if served is None else served / count * 1e6, "client": spent / count * 1e6}


def _server_time(backends: list[int] | None) -> float | None:
    """Seconds that these processes have been on a CPU; None where the kernel does not tell."""
    if not backends:
        return None
    try:
        return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in backends) / 1e9
    except OSError:
        return None


def _warm_up(send: Callable[[bytes], object], answered: Callable[[], object]) -> None:
    for _ in range(WARM_UP):
        send(BODY)
    answered()


def expect(peer: Peer, queue: str, count: int) -> None:
    """What was counted is in the queue: a peer that drops messages has no rate.

    What nobody confirmed may come a moment later: RabbitMQ counts its queue before it has taken in what waits for it.
    """
    deadline = time.monotonic() + ARRIVED
    while (depth := alone(peer.depth, queue)) < count and time.monotonic() < deadline:
        time.sleep(0.2)
    if depth != count:
        raise Failed(f"{count:,} messages were published, but {depth:,} are in the queue")
