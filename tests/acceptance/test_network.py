import time

import pytest
from acceptance.conftest import broker_url
from acceptance.workers import answers, assert_works, eventually
from conftest import through

pytestmark = [pytest.mark.ownership, pytest.mark.timeout(120)]

LATE = {"task_acks_late": True, "worker_prefetch_multiplier": 4}


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_a_worker_whose_network_was_cut_recovers_by_itself(app, store, start_worker, tcp_proxy, pool):
    worker = start_worker("-P", pool, "-c", "2", broker=broker_url(through(tcp_proxy, store.url)), **LATE)
    sent = [app.send_task("acceptance_app.nap", (1.5,)).id for _ in range(4)]
    eventually(lambda: len(store.started()) == 2, 10)

    tcp_proxy.cut()
    time.sleep(0.5)  # the behaviour under test is that time passes
    tcp_proxy.resume()

    eventually(lambda: store.messages() == 0, 20, "everything is acked")
    assert sorted(store.started()) == sorted(sent)
    assert_works(app, store, worker)


def test_a_worker_cut_off_for_longer_than_its_grace_loses_its_messages_and_comes_back_as_another_consumer(
    app, store, start_worker, tcp_proxy
):
    cut_off = start_worker("-c", "2", broker=broker_url(through(tcp_proxy, store.url)), **LATE)
    app.send_task("acceptance_app.nap", (6,))
    eventually(store.started, 10)
    start_worker("-c", "2", **LATE)

    tcp_proxy.cut()

    eventually(lambda: len(store.started()) == 2, 10, "it runs elsewhere, too")
    tcp_proxy.resume()
    eventually(lambda: store.messages() == 0, 20, "it is acked")
    assert_works(app, store, cut_off)
    assert store.value("SELECT count(*) FROM kombu_pg.consumer c WHERE c.pid = %s", (cut_off.pid,)) == 1
    eventually(lambda: not store.value("SELECT count(*) FROM kombu_pg.lease"), 5, "no lease is left behind")


@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_worker_whose_network_stalls_recovers_by_itself(app, store, start_worker, tcp_proxy, seconds):
    worker = start_worker("-c", "2", broker=broker_url(through(tcp_proxy, store.url)), **LATE)
    assert answers(app, worker)

    tcp_proxy.stall()
    sent = [app.send_task("acceptance_app.nap", (0.1,)).id for _ in range(4)]
    time.sleep(seconds)  # the behaviour under test is that time passes
    tcp_proxy.resume()

    eventually(lambda: set(store.ended()) == set(sent), 40, "everything has run")
    eventually(lambda: store.messages() == 0, 20, "everything is acked")
    assert_works(app, store, worker, within=40)
