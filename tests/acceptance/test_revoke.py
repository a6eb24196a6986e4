import pytest
from acceptance.hearing import lab as laboratory
from acceptance.workers import eventually
from celery.exceptions import TaskRevokedError

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def lab(server_url, worker_id, tmp_path):
    with laboratory(server_url, worker_id, tmp_path) as lab:
        yield lab


def make_due(lab, task_id):
    """Its eta has come, days later; the row's revoke is as old as that."""
    lab.store.execute("UPDATE kombu_pg.revoked SET revoked_at = revoked_at - interval '3 days'")
    lab.store.execute(
        "UPDATE kombu_pg.scheduled SET due_at = clock_timestamp() WHERE message_id ="
        " (SELECT id FROM kombu_pg.message WHERE task_id = %s)",
        (task_id,),
    )


def assert_revoked(lab, result):
    state, found = lab.end(result)
    assert (state, type(found)) == ("REVOKED", TaskRevokedError)
    lab.settle(result.id)
    assert lab.runs(result.id, "end") == 0


def test_a_task_that_was_revoked_before_any_worker_ran_is_not_run_and_its_chord_ends(lab):
    result, body = lab.send_in_chord("note")
    lab.app.control.revoke(result.id)

    lab.start()

    assert_revoked(lab, result)
    assert lab.end(body)[0] == "FAILURE"
    assert lab.runs(result.id, "revoked") == 1  # the signal


def test_a_task_that_waits_for_days_is_not_run_though_every_worker_was_restarted(lab):
    worker = lab.start()
    result, body = lab.send_in_chord("note", countdown=3 * 86400)
    result.revoke()
    lab.settle_down(worker)

    lab.start()
    make_due(lab, result.id)

    assert_revoked(lab, result)
    assert lab.end(body)[0] == "FAILURE"


def test_a_retry_that_waits_is_not_run_after_a_revoke(lab):
    worker = lab.start()
    result = lab.send("retry", 86400)
    eventually(lambda: result.state == "RETRY", 30)
    eventually(lambda: lab.store.value("SELECT count(*) FROM kombu_pg.scheduled") == 1, 30)
    result.revoke()
    lab.settle_down(worker)

    lab.start()
    make_due(lab, result.id)

    eventually(lambda: lab.is_gone(result.id), 30)
    assert lab.end(result)[0] == "REVOKED"
    assert lab.runs(result.id) == 1


def test_tasks_are_revoked_by_what_is_stamped_on_them(lab):
    results = [
        lab.sig("note").apply_async(customer=customer, stamped_headers=["customer"]) for customer in ("acme", "other")
    ]
    lab.app.control.revoke_by_stamped_headers({"customer": ["acme"]})
    lab.store.execute("UPDATE kombu_pg.revoked_stamp SET revoked_at = revoked_at - interval '3 days'")

    lab.start()

    assert_revoked(lab, results[0])
    assert lab.end(results[1])[0] == "SUCCESS"


def test_a_revoke_with_terminate_ends_what_runs_and_what_waits(lab):
    lab.start()
    running, waiting = lab.send("nap", 60), lab.send("nap", 60)
    eventually(lambda: lab.runs(running.id), 30)

    lab.app.control.revoke([running.id, waiting.id], terminate=True)

    for result in (running, waiting):
        eventually(lambda result=result: lab.end(result)[0] == "REVOKED", 30)
    lab.settle(running.id, waiting.id)
    assert [lab.heard(running.id), lab.heard(waiting.id)] == [0, 0], "as on RabbitMQ"
    assert lab.runs(waiting.id) == 0


def test_a_task_sent_days_later_under_a_revoked_id_runs(lab):
    lab.app.control.revoke("again")
    lab.store.execute("UPDATE kombu_pg.revoked SET revoked_at = revoked_at - interval '4 hours'")
    lab.start()

    result = lab.send("note", task_id="again")

    assert lab.end(result)[0] == "SUCCESS"


def test_what_is_told_to_one_worker_alone_is_not_written_down(lab):
    lab.app.control.revoke("x", destination=["somebody@else"])

    assert lab.store.value("SELECT count(*) FROM kombu_pg.revoked") == 0


def test_inspect_lists_what_waits_in_the_database(lab):
    lab.start()
    later = [lab.send("note", 1, "two", countdown=3600 * (n + 1)).id for n in range(3)]
    large = lab.send("note", "x" * 20_000, countdown=7 * 3600).id
    lab.pause("celery")
    ready = lab.send("note").id

    inspect = lab.app.control.inspect(timeout=10, limit=1)
    (scheduled,) = inspect.scheduled().values()
    (queried,) = inspect.query_task([later[0], ready, "nobody"]).values()

    assert [entry["request"]["id"] for entry in scheduled] == [*later, large]
    assert scheduled[0]["request"]["args"] == [1, "two"]
    shown = scheduled[-1]["request"]["args"]
    assert shown.startswith("('xxx")
    assert len(shown) < 2_000, "as the sender has written it down"
    assert {task_id: state for task_id, (state, _) in queried.items()} == {later[0]: "scheduled", ready: "ready"}
