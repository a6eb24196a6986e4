"""How fast are messages delivered, and how soon?"""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import kombu

from benchmarks.children import Failed, alone, context, together
from benchmarks.form import Form, repeat
from benchmarks.peers import BODY, Kombu, Peer

__all__ = ["consume", "latency"]

PREFETCH = 100
#: Between two messages of the latency row the consumer is idle for so long, in seconds.
GAP = (0.010, 0.030)


def consume(peer: Kombu, queue: str, form: Form) -> dict[str, float | None]:
    fillers = [(_fill, (peer, queue, form.count // 4, form.seconds))] * 4
    filled = sum(together(fillers, within=form.seconds + 30))
    count, seconds = alone(_consume, peer, queue, filled, form.seconds, within=form.seconds * 2 + 30)
    return {"rate": count / seconds}


def _fill(peer: Peer, queue: str, count: int, seconds: float) -> int:
    with peer.publisher(queue) as (send, answered):
        filled = repeat(lambda: send(BODY), Form(1, seconds, count))
        answered()
        return filled


def _consume(peer: Kombu, queue: str, count: int, seconds: float) -> tuple[int, float]:
    """-> (messages acknowledged after the first window, seconds until the channel had answered its close)."""
    seen = 0

    def acknowledge(message: kombu.Message) -> None:
        nonlocal seen
        message.ack()
        seen += 1

    with peer.connect() as connection:
        channel = connection.channel()
        consumer = _consumer(channel, queue, acknowledge, PREFETCH)
        consumer.consume()
        while seen < min(PREFETCH, count // 2):  # a slow peer may have filled less than a window
            connection.drain_events(timeout=5)
        began, warmed_up = time.monotonic(), seen
        while seen < count and time.monotonic() < began + seconds:
            connection.drain_events(timeout=5)
        counted = seen - warmed_up
        # Acks are sent without waiting by every transport that can: a closed channel has settled them.
        channel.close()
        return counted, time.monotonic() - began


def _consumer(channel: Any, queue: str, callback: Callable[[Any], None], prefetch: int) -> kombu.Consumer:
    entity = kombu.Queue(queue, exchange=kombu.Exchange(""), routing_key=queue)
    return kombu.Consumer(channel, [entity], on_message=callback, auto_declare=False, prefetch_count=prefetch)


def latency(peer: Kombu, queue: str, form: Form) -> dict[str, float | None]:
    delivered, ready = context.Semaphore(0), context.Event()
    calls = [
        (_receive, (peer, queue, form, ready, delivered)),
        (_send_to_idle, (peer, queue, form, ready, delivered)),
    ]
    seconds, _ = together(calls, within=form.seconds + 40)
    seconds = sorted(seconds[1:])
    return {
        "p50": statistics.median(seconds) * 1e3,
        "p95": seconds[min(len(seconds) - 1, int(len(seconds) * 0.95))] * 1e3,
    }


def _receive(peer: Kombu, queue: str, form: Form, ready: Any, delivered: Any) -> list[float]:
    taken: list[float] = []
    over = False

    def take(message: kombu.Message) -> None:
        nonlocal over
        now = time.monotonic_ns()
        sent = int(message.body)
        message.ack()
        over = sent == 0
        if not over:
            taken.append((now - sent) / 1e9)
            delivered.release()

    with peer.connect() as connection:
        consumer = _consumer(connection.channel(), queue, take, PREFETCH)
        consumer.consume()
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=0.1)
        ready.set()
        deadline = time.monotonic() + form.seconds + 20
        while not over and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=2)
        return taken


def _send_to_idle(peer: Kombu, queue: str, form: Form, ready: Any, delivered: Any) -> None:
    # A peer that polls is met at any moment between two of its looks, not always just after one.
    gap = (0.0, peer.polls) if peer.polls else GAP
    with peer.publisher(queue) as (send, answered):
        ready.wait(20)
        deadline = time.monotonic() + form.seconds
        for number in itertools.count():
            time.sleep(random.uniform(*gap))
            send(b"%d" % time.monotonic_ns())
            if not delivered.acquire(timeout=10):
                raise Failed("a message was not delivered within 10 s")
            # The first is a warm-up; there is always one to show.
            if number >= 2 and (time.monotonic() > deadline or number >= form.count):
                break
        send(b"0")
        answered()
