"""Do results of real workers arrive, whatever happens to worker, server and connection meanwhile?"""

import pytest
from celery import Celery, chain, group, states

WITHIN = 60
RESULTS = {"task_ignore_result": False, "imports": ["results_app"]}


@pytest.fixture
def app(broker):
    app = Celery("acceptance", broker=broker, backend=broker, set_as_current=False)
    yield app
    app.backend.result_consumer.stop()
    with app.pool.acquire(block=True) as connection:
        connection._close()
    app.close()


def task(app, name):
    return app.signature(f"results_app.{name}")


@pytest.mark.parametrize(("pool", "concurrency"), [("prefork", 2), ("threads", 4), ("gevent", 10), ("solo", 1)])
def test_every_kind_of_result_comes_from_every_pool(app, broker, start_worker, pool, concurrency):
    start_worker("-P", pool, "-c", str(concurrency), result_backend=broker, task_track_started=True, **RESULTS)
    told = []

    assert task(app, "add").delay(1, 2).get(timeout=WITHIN) == 3
    numbers = group(task(app, "add").clone((n, n)) for n in range(50)).apply_async()
    assert numbers.get(timeout=WITHIN) == [2 * n for n in range(50)]
    assert chain(task(app, "add").clone((1, 1)), task(app, "add").clone((5,)), app=app)().get(timeout=WITHIN) == 7
    assert task(app, "again").delay().get(timeout=WITHIN) == 1
    with pytest.raises(KeyError) as raised:
        task(app, "fail").delay(7).get(timeout=WITHIN)
    assert raised.value.args == ("no such thing", 7)
    stepping = task(app, "steps").delay(3)
    assert stepping.get(timeout=WITHIN, on_message=lambda meta: told.append(meta["status"])) > 0
    assert told[-1] == states.SUCCESS
    parent = task(app, "parent").delay()
    assert [child.id for child in (parent.get(timeout=WITHIN) and parent.children)] == parent.result


def test_sql_says_who_ran_what_and_how_long(app, broker, store, start_worker):
    worker = start_worker("-c", "1", result_backend=broker, task_track_started=True, **RESULTS)
    sent = task(app, "again").delay()
    assert sent.get(timeout=WITHIN) == 1

    row = store.execute(
        "SELECT name, state, worker, queue, retries, runtime >= '0' FROM kombu_pg.task_result WHERE id = %s", (sent.id,)
    )

    assert row == [("results_app.again", "SUCCESS", worker.name, "celery", 1, True)]


def test_link_error_finds_the_real_exception_when_it_runs(app, broker, start_worker):
    start_worker("-c", "2", result_backend=broker, **RESULTS)
    failing = [(name, n) for name in ("fail", "refuse") for n in range(20)]
    for name, n in failing:
        errback = task(app, "heard").set(task_id=f"{name}-{n}")
        task(app, name).clone((n,)).apply_async(link_error=errback)

    for name, n in failing:
        expected = ["KeyError", "no such thing", str(n)] if name == "fail" else ["Refused", f"{n}: refused"]
        assert app.AsyncResult(f"{name}-{n}").get(timeout=WITHIN) == ["FAILURE", *expected, True]


def test_an_ignored_result_is_not_stored_unless_it_is_an_error_that_is_asked_for(app, broker, store, start_worker):
    start_worker("-c", "1", result_backend=broker, **RESULTS)
    unheard, failing = task(app, "unheard").delay(), task(app, "heard_if_it_fails").delay()

    with pytest.raises(ValueError, match="no"):
        app.AsyncResult(failing.id).get(timeout=WITHIN)

    assert store.execute("SELECT task_id FROM kombu_pg.result") == [(failing.id,)]
    assert unheard.id != failing.id


def test_a_get_in_a_task_of_a_prefork_child_is_answered(app, broker, start_worker):
    start_worker("-c", "2", result_backend=broker, **RESULTS)

    assert task(app, "joining").delay(5).get(timeout=WITHIN) == [2 * n for n in range(5)]
