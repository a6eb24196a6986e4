"""Does a result arrive behind a pooler in transaction mode, by polls or over `listen_url`?"""

from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
from celery import states
from test_pooler import pooled, pooler  # noqa: F401 - fixtures
from test_waiting import TOLD, WITHIN, closing, make, sent, somebody_waits
from watching import eventually


@pytest.fixture
def worker(pooled):  # noqa: F811
    app = make(pooled.broker())
    yield app.backend
    app.close()


def test_behind_a_pooler_a_get_polls(store, pooled, worker):  # noqa: F811
    with closing(make(pooled.broker())) as app, ThreadPoolExecutor(1) as pool:
        result, request = sent(app)
        waiting = pool.submit(result.get, timeout=WITHIN)
        eventually(lambda: app.backend.result_consumer._looked, WITHIN, "it has looked")

        worker.store_result("one", 1, states.STARTED, request=request)
        worker.mark_as_done("one", 42, request=request)

        assert waiting.result(WITHIN) == 42
        assert store.value(TOLD) == 0


def test_with_a_listen_url_a_get_is_woken_behind_a_pooler(store, pooled, worker):  # noqa: F811
    broker = pooled.broker(listen_url=quote(store.url, safe=""))
    with closing(make(broker)) as app, ThreadPoolExecutor(1) as pool:
        result, request = sent(app)
        waiting = pool.submit(result.get, timeout=WITHIN)
        somebody_waits(store)

        worker.mark_as_done("one", 42, request=request)

        assert waiting.result(WITHIN) == 42


def test_behind_a_pooler_the_pauses_between_two_looks_grow_to_a_second(pooled, monkeypatch):  # noqa: F811
    with closing(make(pooled.broker())) as app, ThreadPoolExecutor(1) as pool:
        consumer = app.backend.result_consumer
        pauses = looks(consumer, monkeypatch)
        waiting = pool.submit(sent(app)[0].get, timeout=WITHIN)

        eventually(lambda: 1.0 in pauses, WITHIN, "it waits a second between two looks")
        app.backend.mark_as_done("one", 42)

        assert waiting.result(WITHIN) == 42
        assert list(dict.fromkeys(pauses)) == [0.005 * 2**n for n in range(8)] + [1.0]
        assert len(pauses) < 14


def looks(consumer, monkeypatch):
    """The pause after each look, as they come."""
    pauses = []
    look_at = consumer._look_at

    def look(*args):
        pauses.append(consumer._pause)
        return look_at(*args)

    monkeypatch.setattr(consumer, "_look_at", look)
    return pauses


def test_behind_a_pooler_a_callback_is_called_in_a_long_drain(pooled, worker, monkeypatch):  # noqa: F811
    with closing(make(pooled.broker())) as app, ThreadPoolExecutor(1) as pool:
        called = []
        pauses = looks(app.backend.result_consumer, monkeypatch)
        then, request = sent(app, "then")
        then.then(lambda result: called.append(result.result))
        draining = pool.submit(app.backend.result_consumer.drain_events, timeout=WITHIN)
        eventually(lambda: len(pauses) > 1, WITHIN, "it has looked")

        worker.mark_as_done("then", 42, request=request)

        draining.result(WITHIN)
        assert called == [42]


def test_behind_a_pooler_a_callback_is_called_while_somebody_waits_for_another_task(pooled, worker):  # noqa: F811
    with closing(make(pooled.broker())) as app, ThreadPoolExecutor(1) as pool:
        called = []
        other, its_request = sent(app, "other")
        waiting = pool.submit(other.get, timeout=WITHIN)
        eventually(lambda: app.backend.result_consumer._looked, WITHIN, "it has looked")
        then, request = sent(app, "then")
        then.then(lambda result: called.append(result.result))

        worker.mark_as_done("then", 42, request=request)

        eventually(lambda: called == [42], WITHIN, "the callback is called")
        worker.mark_as_done("other", 1, request=its_request)
        assert waiting.result(WITHIN) == 1


def test_behind_a_pooler_nothing_is_done_while_there_is_nothing_to_wait_for(pooled, monkeypatch):  # noqa: F811
    with closing(make(pooled.broker())) as app:
        consumer = app.backend.result_consumer
        consumer.drain_events(timeout=0)
        slept = []
        sleep = consumer._sleep
        monkeypatch.setattr(consumer, "_sleep", lambda *args: slept.append(1) or sleep(*args))

        consumer.drain_events(timeout=0.3)

        assert len(slept) < 5
