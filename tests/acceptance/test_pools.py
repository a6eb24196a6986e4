import time

import pytest
from acceptance.workers import answers, eventually
from celery import chain

COMMANDS = {
    "ping": {},
    "active": {},
    "stats": {},
    "rate_limit": {"task_name": "acceptance_app.nap", "rate_limit": 100},
}
POOLS = [("prefork", 2), ("threads", 8), ("gevent", 20), ("solo", 1)]


@pytest.mark.parametrize(("pool", "concurrency"), POOLS)
def test_a_pool_runs_links_chains_and_retries_and_answers_inspect(app, store, start_worker, pool, concurrency):
    worker = start_worker("-P", pool, "-c", str(concurrency), task_acks_late=True)
    passed_on = app.signature("acceptance_app.passed_on")

    for n in range(30):
        app.send_task("acceptance_app.passed_on", (n,), link=passed_on)
    for n in range(40):
        chain(passed_on.clone((n,)), passed_on, passed_on, app=app).apply_async()
    for _ in range(20):
        app.send_task("acceptance_app.retried")

    # With gevent, a worker is ready before its mailbox is: Celery opens that in a greenlet of its own.
    eventually(lambda: answers(app, worker), 10, f"{worker.name} answers")
    eventually(lambda: len(store.ended()) == 200, 30, f"200 tasks have run, not {len(store.ended())}")
    eventually(lambda: store.messages() == 0, 5, "all are acked")
    assert len(set(store.ended())) == 200
    with app.connection_for_write() as connection:
        inspect = app.control.inspect(limit=1, timeout=5, connection=connection)
        assert inspect.stats()[worker.name]["pool"]["implementation"].startswith(f"celery.concurrency.{pool[:6]}")
        assert inspect.active() == {worker.name: []}


def test_inspect_and_control_answer_within_two_hundred_milliseconds(app, store, start_worker):
    worker = start_worker("-c", "2")
    answers(app, worker)
    app.send_task("acceptance_app.nap", (5,))
    eventually(store.started, 10)
    with app.connection_for_write() as connection:
        took = {
            command: min(seconds_to_answer(app, worker, connection, command, arguments) for _ in range(3))
            for command, arguments in COMMANDS.items()
        }

    print("answered after", {command: f"{seconds * 1000:.0f} ms" for command, seconds in took.items()})
    assert max(took.values()) < 0.2


def seconds_to_answer(app, worker, connection, command, arguments):
    begun = time.monotonic()
    assert app.control.broadcast(
        command, arguments=arguments, destination=[worker.name], reply=True, timeout=5, limit=1, connection=connection
    )
    return time.monotonic() - begun
