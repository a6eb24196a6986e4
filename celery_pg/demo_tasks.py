"""What do the demo's workers run?

An ordinary Celery app. Every step of an order says what it does by a message to the queue REPORTS, which is durable
before the step goes on.
"""

from __future__ import annotations

import os
import time

from celery import Celery
from kombu import Queue

__all__ = [
    "BROKER",
    "REPORTS",
    "WORKER",
    "CardDeclinedError",
    "app",
    "ask_for_review",
    "cancel",
    "charge",
    "pack",
    "receipt",
    "reserve",
]

#: The environment variables that say which broker, and what this worker is called.
BROKER, WORKER = "CELERY_PG_DEMO_BROKER", "CELERY_PG_DEMO_WORKER"
REPORTS = Queue("demo.reports")

app = Celery("celery_pg.demo", broker=os.environ.get(BROKER), set_as_current=False)
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
)


class CardDeclinedError(Exception):
    """What goes wrong in the demo on purpose."""


def _report(order: int, step: str, state: str) -> None:
    with app.producer_pool.acquire(block=True) as producer:
        producer.publish(
            {"order": order, "step": step, "state": state, "worker": os.environ.get(WORKER, "")},
            routing_key=REPORTS.name,
            declare=[REPORTS],
            retry=True,
        )


def _work(order: int, step: str, seconds: float) -> None:
    _report(order, step, "running")
    time.sleep(seconds)
    _report(order, step, "done")


@app.task(shared=False)
def reserve(order: int) -> None:
    """Set the goods aside."""
    _work(order, "reserve stock", 0.4)


@app.task(shared=False, throws=(CardDeclinedError,))
def charge(order: int, *, declined: bool = False) -> None:
    """Take the money, if there is any."""
    if declined:
        _report(order, "charge card", "failed")
        raise CardDeclinedError(order)
    _work(order, "charge card", 0.4)


@app.task(shared=False)
def pack(order: int, article: str) -> None:
    """Take long enough to be killed."""
    _work(order, f"pack {article}", 1.5)


@app.task(shared=False)
def receipt(order: int) -> None:
    """What a successful charge leads to."""
    _work(order, "send receipt", 0.2)


@app.task(shared=False)
def cancel(order: int) -> None:
    """What a failed charge leads to."""
    _work(order, "cancel order", 0.2)


@app.task(shared=False)
def ask_for_review(order: int) -> None:
    """What is done later."""
    _work(order, "ask for review", 0.2)
