"""Do real workers run what was published in somebody's transaction, and nothing of what was rolled back?"""

import contextlib

import psycopg2
import pytest
from acceptance.workers import eventually
from celery import chord

from celery_pg import publish_in

PATIENCE = 30.0


@pytest.fixture
def connection(store):
    with contextlib.closing(psycopg2.connect(store.url)) as connection:
        yield connection


def test_a_chord_of_a_transaction_runs_after_its_commit_and_one_that_was_rolled_back_never_does(
    store, broker, app, start_worker, connection
):
    app.conf.update(result_backend=broker, task_ignore_result=False)
    start_worker("-P", "solo", result_backend=broker)

    def parts():
        return (app.signature("acceptance_app.passed_on", (n,)) for n in range(3))

    body = app.signature("acceptance_app.note")
    with publish_in(connection, app):
        chord(parts(), body).delay()
    connection.rollback()
    with publish_in(connection, app):
        kept = chord(parts(), body).delay()
    assert store.messages() == 0
    connection.commit()

    eventually(lambda: kept.id in store.ended(), PATIENCE, "the body runs")
    assert len(store.ended()) == 4
    assert store.messages() == 0


def test_a_worker_runs_what_sql_has_published_with_its_callbacks(store, start_worker):
    start_worker("-P", "solo")

    publish = "SELECT kombu_pg.publish_task('acceptance_app.passed_on', %s, %s, %s)"
    store.execute(publish, ['["done"]', "{}", '{"link": "acceptance_app.note"}'])
    # It takes no such argument, and fails.
    store.execute(publish, ["[]", '{"x": 1}', '{"link_error": "acceptance_app.note"}'])

    ended = "SELECT task, count(*) FROM effect WHERE phase = 'end' GROUP BY task ORDER BY task"
    wanted = [("acceptance_app.note", 2), ("acceptance_app.passed_on", 1)]
    eventually(lambda: store.execute(ended) == wanted, PATIENCE, "the task, its callback, and the other one's errback")
