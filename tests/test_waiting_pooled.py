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
