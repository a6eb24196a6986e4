import signal
import time

import pytest
from acceptance.conftest import broker_url
from acceptance.workers import assert_works, eventually

pytestmark = [pytest.mark.ownership, pytest.mark.timeout(120)]

LATE = {"task_acks_late": True}
WIDE = {"task_acks_late": True, "worker_prefetch_multiplier": 8}


def test_a_killed_workers_messages_run_elsewhere_within_five_seconds_and_none_is_lost(app, store, broker, start_worker):
    broker = broker_url(store.url, reconnect_grace=3)
    first = start_worker("-c", "2", broker=broker, **WIDE)
    second = start_worker("-P", "threads", "-c", "8", broker=broker, **LATE, worker_prefetch_multiplier=1)
    sent = {app.send_task("acceptance_app.nap", (0.05,)).id for _ in range(300)}
    eventually(lambda: len(store.ended()) > 60, 20, "both are at work")

    held = {row[0] for row in store.execute(
        "SELECT m.task_id FROM kombu_pg.consumer c JOIN kombu_pg.lease l ON l.consumer_id = c.id"
        " JOIN kombu_pg.message m ON m.id = ANY (l.message_ids) WHERE c.pid = %s", (first.pid,)
    )}  # fmt: skip
    first.kill()
    killed_at = time.monotonic()

    eventually(lambda: held <= set(store.ended()), 5, "what it held has run elsewhere")
    print(f"{len(held)} messages ran elsewhere after {time.monotonic() - killed_at:.2f} s")
    eventually(lambda: sent <= set(store.ended()), 30, "everything has run")
    eventually(lambda: store.messages() == 0, 5, "everything is acked")
    assert second.alive


def test_after_every_backend_was_terminated_what_runs_runs_once_and_what_was_reserved_runs_elsewhere(
    app, store, start_worker
):
    broker = broker_url(store.url, reconnect_grace=3)
    first = start_worker("-c", "2", broker=broker, **WIDE)
    sent = [app.send_task("acceptance_app.nap", (7,)).id for _ in range(16)]
    eventually(lambda: len(store.started()) == 2 and store.unacked() == 16, 10, "2 run, 14 are reserved")
    running = store.started()
    sessions = store.sessions()
    start_worker("-c", "16", broker=broker, **WIDE)

    lost_at = time.monotonic()
    store.terminate(sessions)

    eventually(lambda: len(store.started()) == 16, 5, "the other 14 are begun")
    print(f"14 messages ran elsewhere after {time.monotonic() - lost_at:.2f} s")
    eventually(lambda: store.messages() == 0, 30, "everything is acked")
    assert sorted(store.started()) == sorted(sent)
    assert len(set(running)) == 2
    assert_works(app, store, first)


def test_when_the_parent_is_killed_its_lock_is_free_within_a_second_though_a_child_runs_on(app, store, start_worker):
    worker = start_worker("-c", "2", **LATE)
    app.send_task("acceptance_app.nap", (60,))
    eventually(lambda: store.started(), 10)
    consumer, children = consumer_of(store, worker), worker.children
    assert lock_is_held(store, consumer)

    worker.signal(signal.SIGKILL)
    killed_at = time.monotonic()

    eventually(lambda: not lock_is_held(store, consumer), 1, "the lock is free")
    print(f"free after {(time.monotonic() - killed_at) * 1000:.0f} ms; {len(children)} children")


def consumer_of(store, worker):
    return store.value("SELECT id FROM kombu_pg.consumer WHERE pid = %s", (worker.pid,))


def lock_is_held(store, consumer):
    return not store.value("SELECT pg_try_advisory_lock_shared(kombu_pg.lock_key('alive', %s))", (consumer,))


@pytest.mark.parametrize("seconds", [10, pytest.param(30, marks=pytest.mark.slow)])
def test_a_stopped_worker_keeps_what_it_runs_and_what_it_reserved(app, store, start_worker, seconds):
    first = start_worker("-c", "2", **WIDE)
    sent = [app.send_task("acceptance_app.nap", (1,)).id for _ in range(6)]
    eventually(lambda: len(store.started()) == 2 and store.unacked() == 6, 10)
    start_worker("-c", "2", **WIDE)

    first.signal_all(signal.SIGSTOP)
    other = app.send_task("acceptance_app.note").id
    time.sleep(seconds)  # the behaviour under test is that time passes
    first.signal_all(signal.SIGCONT)

    eventually(lambda: store.messages() == 0, 20, "everything is acked")
    assert sorted(store.started()) == sorted(sent)
    assert other in store.ended()


def test_neighbours_of_a_poison_message_all_run_and_the_poison_ends_as_a_dead_letter(app, store, start_worker):
    broker = broker_url(store.url, reconnect_grace=0.5, delivery_limit=5)
    start_worker("-c", "1", "-Q", "other", broker=broker)  # somebody must be there to take over
    app.amqp.queues.add("celery").bind(app.connection_for_write().default_channel).declare()
    poison = app.send_task("acceptance_app.poison").id
    good = {app.send_task("acceptance_app.note").id for _ in range(15)}

    worker = start_worker("-c", "1", broker=broker, ready=False, task_acks_late=True, worker_prefetch_multiplier=16)

    def over():
        if not worker.alive:
            worker.kill()
            worker.start()
        return store.value("SELECT count(*) FROM kombu_pg.dead_letter") and good <= set(store.ended())

    eventually(over, 90, "the poison is buried and the good have run")
    assert store.execute("SELECT task_id, reason FROM kombu_pg.dead_letter") == [(poison, "delivery_limit")]
    assert store.started().count(poison) == 6


@pytest.mark.parametrize(
    ("name", "number"), [("warm", signal.SIGTERM), ("soft", signal.SIGQUIT), ("cold", signal.SIGQUIT)]
)
def test_a_shutdown_gives_back_what_was_prefetched_before_the_process_ends(app, store, start_worker, name, number):
    settings = {**WIDE, "worker_soft_shutdown_timeout": 2.0 if name == "soft" else 0.0}
    worker = start_worker("-c", "2", **settings)
    for _ in range(16):
        app.send_task("acceptance_app.nap", (1 if name != "cold" else 30,))
    eventually(lambda: len(store.started()) == 2 and store.unacked() == 16, 10)

    worker.signal(number)
    worker.wait(15)

    left = store.returns()
    assert store.ready() == len(left) == {"warm": 14, "soft": 14, "cold": 16}[name]
    assert not store.execute("SELECT FROM kombu_pg.consumer UNION ALL SELECT FROM kombu_pg.lease")
    assert left.count(0) >= 14
    if name == "warm":
        assert set(left) == {0}


def test_early_acks_reach_the_server_within_fifty_milliseconds_of_the_start(app, store, start_worker):
    start_worker("-c", "1", task_acks_late=False, worker_prefetch_multiplier=1)
    app.send_task("acceptance_app.note")
    eventually(lambda: store.ended(), 10, "the worker is warm")
    gaps = []
    for _ in range(3):
        sent = app.send_task("acceptance_app.nap", (0.4,)).id
        while sent not in store.started():
            pass
        begun = time.monotonic()
        while store.value("SELECT count(*) FROM kombu_pg.message WHERE task_id = %s", (sent,)):
            assert sent not in store.ended()
        gaps.append(time.monotonic() - begun)
        eventually(lambda sent=sent: sent in store.ended(), 5)

    print("acked after", [f"{gap * 1000:.0f} ms" for gap in gaps])
    assert min(gaps) < 0.05


def test_children_that_come_and_go_do_all_tasks_and_leave_no_session_behind(app, store, start_worker):
    worker = start_worker("--autoscale", "4,1", worker_max_tasks_per_child=1, **WIDE)
    sent = {app.send_task("acceptance_app.publishing").id for _ in range(40)}

    eventually(lambda: len(store.ended()) == 80, 60, "all tasks, and what they published, are done")
    eventually(lambda: store.messages() == 0, 5)

    assert sent <= set(store.ended())
    assert len(set(store.ended())) == 80
    limit = 3 + len(worker.children)
    eventually(lambda: len(store.sessions()) <= limit, 5, f"at most {limit} sessions")
