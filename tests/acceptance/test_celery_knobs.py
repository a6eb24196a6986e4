"""Do Celery's own settings do on this broker what they do on RabbitMQ?"""

import pytest
from acceptance.hearing import lab as laboratory
from acceptance.workers import eventually

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def lab(server_url, worker_id, tmp_path):
    with laboratory(server_url, worker_id, tmp_path) as lab:
        yield lab


def test_a_message_is_acked_when_its_task_begins_and_with_acks_late_when_it_has_ended(lab):
    lab.start("-Q", "celery")
    lab.start("-Q", "bench", task_acks_late=True)
    early, late = lab.send("nap", 3), lab.send("nap", 3, queue="bench")
    eventually(lambda: lab.runs(early.id) and lab.runs(late.id), 30)

    eventually(lambda: lab.is_gone(early.id), 30)
    acked_before_its_end = (
        "SELECT NOT EXISTS (SELECT FROM effect WHERE phase = 'end' AND task_id = %s)"
        " AND NOT EXISTS (SELECT FROM kombu_pg.message WHERE task_id = %s)"
    )
    assert not lab.store.value(acked_before_its_end, (late.id, late.id))

    assert [lab.end(early)[0], lab.end(late)[0]] == ["SUCCESS", "SUCCESS"]
    eventually(lambda: lab.is_gone(late.id), 30)


def test_a_failed_task_is_acked_or_where_acks_on_failure_is_off_a_dead_letter(lab):
    lab.start("-Q", "celery", task_acks_late=True)
    lab.start("-Q", "bench", task_acks_late=True, task_acks_on_failure_or_timeout=False)

    acked, kept = lab.send("fail"), lab.send("fail", queue="bench")

    assert [lab.end(acked)[0], lab.end(kept)[0]] == ["FAILURE", "FAILURE"]
    assert lab.letter(kept.id) == "rejected"
    lab.settle(acked.id, kept.id)
    assert lab.letters(acked.id) == []
    for result in (acked, kept):
        eventually(lambda result=result: lab.heard(result.id), 30)
    lab.settle()
    assert [lab.heard(acked.id), lab.heard(kept.id)] == [1, 1]


def test_a_task_whose_process_was_lost_has_failed_or_is_run_again_up_to_the_delivery_limit(lab):
    lab.start("-Q", "celery", task_acks_late=True)
    lab.start("-Q", "limited", task_acks_late=True, task_reject_on_worker_lost=True)

    lost, again = lab.send("die"), lab.send("die", queue="limited")

    state, error = lab.end(lost)
    assert (state, type(error).__name__) == ("FAILURE", "WorkerLostError")
    state, error = lab.end(again)
    assert (state, type(error).__name__) == ("FAILURE", "DeadLettered")
    assert lab.letter(again.id) == "delivery_limit"
    assert [lab.runs(lost.id), lab.runs(again.id)] == [1, 3]
    for result in (lost, again):
        eventually(lambda result=result: lab.heard(result.id), 30)
    lab.settle()
    assert [lab.heard(lost.id), lab.heard(again.id)] == [1, 1]


def test_time_limits_end_a_task(lab):
    lab.start("-c", "2")

    hard = lab.send("nap", 60, time_limit=1)
    soft = lab.send("nap", 60, soft_time_limit=1)

    assert [type(lab.end(result)[1]).__name__ for result in (hard, soft)] == [
        "TimeLimitExceeded",
        "SoftTimeLimitExceeded",
    ]
    for result in (hard, soft):
        eventually(lambda result=result: lab.heard(result.id) == 1, 30)
    lab.settle(hard.id, soft.id)


def test_a_task_out_of_time_runs_again_where_acks_on_timeout_is_off(lab):
    lab.start(task_acks_late=True, task_acks_on_failure_or_timeout=False)

    result = lab.send("nap_once", 60, time_limit=1)

    eventually(lambda: lab.runs(result.id) == 2, 30, "it runs again")
    lab.settle(result.id)
    assert lab.letters(result.id) == []


def test_a_task_may_requeue_ignore_or_retry(lab):
    lab.start(task_acks_late=True)

    requeued, ignored, retried = lab.send("reject", True), lab.send("ignore"), lab.send("retry")

    assert lab.end(requeued) == ("SUCCESS", "the second time")
    assert lab.end(retried) == ("SUCCESS", 1)
    lab.settle(requeued.id, ignored.id, retried.id)
    assert [lab.runs(result.id) for result in (requeued, ignored, retried)] == [2, 1, 2]
    assert ignored.state == "PENDING"
    assert [lab.heard(result.id) for result in (requeued, ignored, retried)] == [0, 0, 0]


def test_children_are_replaced_after_so_many_tasks_or_so_much_memory(lab):
    lab.start("-Q", "celery", "--max-tasks-per-child", "2")
    lab.start("-Q", "bench", "--max-memory-per-child", "150000")

    counted = [lab.send("note") for _ in range(6)]
    grown = [lab.send("grow", 150, queue="bench") for _ in range(3)]

    for result in counted + grown:
        assert lab.end(result)[0] == "SUCCESS"
    assert processes(lab, counted) == 3
    assert processes(lab, grown) == 3
    lab.settle(*(result.id for result in counted + grown))


def processes(lab, results):
    return lab.store.value(
        "SELECT count(DISTINCT pid) FROM effect WHERE phase = 'end' AND task_id = ANY (%s)",
        ([result.id for result in results],),
    )


def test_a_long_task_is_cancelled_with_its_connection_where_that_is_wanted(lab):
    lab.start(task_acks_late=True, worker_cancel_long_running_tasks_on_connection_loss=True)
    result = lab.send("nap_once", 600)
    eventually(lambda: lab.runs(result.id), 30)

    lab.store.terminate(lab.store.sessions())

    assert lab.end(result)[0] == "SUCCESS"
    assert lab.runs(result.id) == 2


def test_a_task_that_has_succeeded_is_not_run_again_where_that_is_wanted(lab):
    lab.start(task_acks_late=True, worker_deduplicate_successful_tasks=True)
    result = lab.send("note", queue="bench")
    lab.tamper("bench", lambda fields: None)
    assert lab.end(result)[0] == "SUCCESS"

    # As if its ack had been lost.
    lab.app.send_task("heard_app.note", task_id=result.id, queue="bench")
    lab.redeliver("bench")

    lab.settle(result.id)
    assert lab.runs(result.id, "end") == 1


def test_the_pool_grows_and_shrinks_with_the_queue(lab, monkeypatch):
    monkeypatch.setenv("AUTOSCALE_KEEPALIVE", "1")
    worker = lab.start("--autoscale", "4,1")
    results = [lab.send("nap", 2) for _ in range(8)]

    eventually(lambda: len(worker.children) >= 3, 30, "it has grown")
    for result in results:
        assert lab.end(result)[0] == "SUCCESS"
    eventually(lambda: len(worker.children) == 1, 30, "it has shrunk")
    lab.settle()


def test_a_worker_begins_and_ends_to_consume_a_queue_when_told(lab):
    lab.start("-Q", "celery")
    control = lab.app.control
    control.add_consumer("bench", reply=True, timeout=10, limit=1)
    assert lab.end(lab.send("note", queue="bench"))[0] == "SUCCESS"

    control.cancel_consumer("bench", reply=True, timeout=10, limit=1)
    waiting = lab.send("note", queue="bench")
    lab.settle()
    assert not waiting.ready()

    control.add_consumer("bench", reply=True, timeout=10, limit=1)
    assert lab.end(waiting)[0] == "SUCCESS"


def test_a_rate_limit_holds(lab):
    lab.start()
    lab.app.control.rate_limit("heard_app.note", "1/s", reply=True, timeout=10, limit=1)

    results = [lab.send("note") for _ in range(4)]

    for result in results:
        assert lab.end(result)[0] == "SUCCESS"
    spread = "SELECT extract(epoch FROM max(at) - min(at)) FROM effect WHERE phase = 'end' AND task_id = ANY (%s)"
    assert lab.store.value(spread, ([result.id for result in results],)) > 2
