import subprocess
import sys

import pytest
from acceptance.conftest import broker_url
from acceptance.workers import eventually, worker_environment


@pytest.fixture
def dump(store, broker, tmp_path):
    """What `celery events --dump` prints, once it listens."""
    printed = tmp_path / "events"
    with printed.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-b", broker, "events", "--dump"],
            env=worker_environment(broker, store.url, {}), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
    listening = (
        "SELECT count(*) FROM kombu_pg.subscription s JOIN kombu_pg.queue q ON q.id = s.queue_id"
        " WHERE q.name LIKE 'celeryev.%'"
    )
    try:
        eventually(lambda: store.value("SELECT to_regclass('kombu_pg.subscription') IS NOT NULL"), 30)
        eventually(lambda: store.value(listening), 30, "it listens")
        yield printed.read_text
    finally:
        process.terminate()
        process.wait(30)


def test_celery_events_shows_what_a_worker_does(app, dump, start_worker):
    worker = start_worker("-c", "1", "-E")

    task = app.send_task("acceptance_app.nap", (0,))

    for event in ("started: active=0", "task received", "task started", "task succeeded"):
        eventually(lambda event=event: event in dump(), 20, f"{event} is shown")
    assert worker.name in dump()
    assert task.id in dump()


def test_workers_mingle_and_gossip_where_the_option_says_so(store, start_worker):
    url = broker_url(store.url, gossip="true")
    first = start_worker("-c", "1", "-l", "DEBUG", broker=url)
    second = start_worker("-c", "1", "-l", "DEBUG", broker=url)

    assert "mingle: sync with 1 nodes" in second.output()
    eventually(lambda: f"{second.name} joined the party" in first.output(), 20)
    second.signal(15)
    eventually(lambda: f"{second.name} left" in first.output(), 20)
