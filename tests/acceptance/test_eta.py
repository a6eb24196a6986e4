from datetime import datetime, timedelta, timezone

import psutil
import pytest
from acceptance.workers import eventually


def in_seconds(seconds):
    return datetime.now(timezone.utc) + timedelta(seconds=seconds)


@pytest.mark.timeout(120)
def test_nothing_with_an_eta_runs_early_and_nothing_more_than_a_hundred_milliseconds_late(app, store, start_worker):
    start_worker("-c", "2")
    app.send_task("acceptance_app.note")
    eventually(store.ended, 10)

    rounds = [(lateness(app, store), latency(app, store)) for _ in range(2)]

    print([f"late by {late * 1000:.0f} ms, {base * 1000:.0f} ms without an eta" for late, base in rounds])
    # The machine may be busy with something else: what counts is what the eta adds.
    assert min(late - base for late, base in rounds) <= 0.1


def lateness(app, store):
    """The median of seven tasks with an eta; none may be early by the server's clock."""
    store.execute("DELETE FROM effect")
    for seconds in (0.05, 0.3, 0.31, 1.0, 1.2, 1.7, 2.5):
        app.send_task("acceptance_app.due", eta=in_seconds(seconds))
    eventually(lambda: len(store.ended()) == 7, 20)
    late = [row[0] for row in store.execute("SELECT late FROM effect ORDER BY late")]
    assert late[0] >= 0
    return late[3]


def latency(app, store):
    """The median of seven tasks without one, each sent when the one before has run."""
    store.execute("DELETE FROM effect")
    for count in range(1, 8):
        app.send_task("acceptance_app.due", (in_seconds(0).isoformat(),))
        eventually(lambda count=count: len(store.ended()) == count, 20)
    return store.execute("SELECT late FROM effect ORDER BY late")[3][0]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_far_etas_take_no_memory_in_the_worker(app, store, start_worker, count):
    worker = start_worker("-c", "1")
    for _ in range(200):
        app.send_task("acceptance_app.note")
    eventually(lambda: len(store.ended()) == 200, 20, "the worker is warm")
    before = psutil.Process(worker.pid).memory_info().rss

    with app.pool.acquire() as connection, app.amqp.Producer(connection) as producer:
        for _ in range(count):
            app.send_task("acceptance_app.due", ("x" * 500,), eta=in_seconds(86400), producer=producer)
    app.send_task("acceptance_app.due", eta=in_seconds(0.2))
    eventually(lambda: len(store.ended()) == 201, 10, "an earlier one is not held up")

    grown = psutil.Process(worker.pid).memory_info().rss - before
    print(f"grown by {grown / 1024:.0f} kB")
    assert grown < 2 * 1024 * 1024
    assert store.value("SELECT count(*) FROM kombu_pg.scheduled") == count
