"""One interface, three ways to run: does examples/task_backend do what it says?"""

import asyncio
import contextlib
import datetime
import logging
import threading
import time
import uuid

import kombu
import pytest
import sqlalchemy
from kombu.exceptions import EncodeError
from scenarios.running import TOP, run_example
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from watching import process

from examples import task_backend
from examples.task_backend import AsyncFireAndTrackBackend, PostgresBrokerTaskBackend, SyncTaskBackend
from examples.task_backend.postgres import QUEUE
from kombu_pg import libpq_url

OURS = "datname = current_database() AND application_name = 'kombu_pg'"
BACKENDS = {
    "sync": lambda url, **given: SyncTaskBackend(),
    "async": lambda url, **given: AsyncFireAndTrackBackend(**given),
    "postgres": lambda url, **given: PostgresBrokerTaskBackend(url, **given),
}
every_backend = pytest.mark.parametrize("kind", BACKENDS)
tracking = pytest.mark.parametrize("kind", ["async", "postgres"])


@pytest.fixture
def url(request):
    """Of a database, where the backend needs one."""
    if "kind" in request.fixturenames and request.getfixturevalue("kind") != "postgres":
        return None
    return request.getfixturevalue("scenario_store").broker(reconnect_grace=0.5)


@pytest.fixture
def postgres(url):
    return PostgresBrokerTaskBackend(url)


class Recorder:
    """An executor that remembers, and waits where it is told to."""

    def __init__(self):
        self.began = []
        self.ended = []
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def __call__(self, task):
        self.began.append(task)
        while not self.may_end.is_set():
            try:
                await self.may_end.wait()
            except asyncio.CancelledError:
                if not task.get("stubborn"):
                    raise
        if task.get("bad"):
            raise ValueError("bad task")
        if task.get("cancels"):
            raise asyncio.CancelledError
        self.ended.append(task)


@contextlib.asynccontextmanager
async def running(kind, url, **given):
    backend, recorder = BACKENDS[kind](url, **given), Recorder()
    backend.set_executor(recorder)
    await backend.initialize()
    try:
        yield backend, recorder
    finally:
        recorder.may_end.set()
        await backend.shutdown()


async def until(condition, within=30.0):
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def stored(store):
    return store.value("SELECT count(*) FROM kombu_pg.message")


@every_backend
def test_what_is_submitted_runs_once(kind, url):
    async def scenario():
        async with running(kind, url) as (backend, recorder):
            for number in range(3):
                await backend.submit({"number": number})
            await until(lambda: len(recorder.ended) == 3)
        return recorder.ended

    ended = asyncio.run(scenario())
    assert sorted(task["number"] for task in ended) == [0, 1, 2]


@every_backend
def test_the_executor_gets_what_was_submitted(kind, url):
    task = {"id": uuid.uuid4(), "at": datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.timezone.utc), "bytes": b"\0"}

    async def scenario():
        async with running(kind, url) as (backend, recorder):
            await backend.submit(task)
            await until(lambda: recorder.ended)
        return recorder.ended

    assert asyncio.run(scenario()) == [task]


def test_what_cannot_be_stored_raises_at_the_submitter(postgres, scenario_store):
    async def scenario():
        await postgres.initialize()
        await postgres.submit({"it": object()})

    with pytest.raises(EncodeError):
        asyncio.run(scenario())


@every_backend
def test_an_executors_error_is_logged_and_not_the_submitters(kind, url, caplog):
    async def scenario():
        async with running(kind, url) as (backend, recorder):
            await backend.submit({"bad": True})
            await backend.submit({"bad": False})
            await until(lambda: recorder.ended == [{"bad": False}])

    asyncio.run(scenario())
    assert any("task failed: {'bad': True}" in record.getMessage() for record in caplog.records)


@every_backend
def test_a_submit_before_initialize_warns(kind, url, caplog):
    async def scenario():
        backend = BACKENDS[kind](url)
        await backend.submit({"early": True})
        await backend.shutdown()

    asyncio.run(scenario())
    assert any("before initialize()" in record.getMessage() for record in caplog.records)


@every_backend
def test_shutdown_waits_for_what_runs(kind, url):
    async def scenario():
        async with running(kind, url) as (backend, recorder):
            await backend.submit({"number": 1})
            await until(lambda: recorder.began)
        return recorder.ended

    assert asyncio.run(scenario()) == [{"number": 1}]


@tracking
def test_what_runs_is_counted(kind, url):
    async def scenario():
        async with running(kind, url) as (backend, recorder):
            recorder.may_end.clear()
            await backend.submit({"number": 1})
            await until(lambda: recorder.began and backend.inflight_count == 1)
            recorder.may_end.set()
            await until(lambda: backend.inflight_count == 0)

    asyncio.run(scenario())


@tracking
@pytest.mark.parametrize("task", [{"number": 1}, {"stubborn": True}], ids=str)
def test_shutdown_is_bounded(kind, task, url, caplog):
    async def scenario():
        async with running(kind, url, shutdown_timeout_seconds=0.2) as (backend, recorder):
            recorder.may_end.clear()
            await backend.submit(task)
            await until(lambda: recorder.began)
            await asyncio.wait_for(backend.shutdown(), 20)
            return [*recorder.ended]

    assert asyncio.run(scenario()) == []
    assert any("still running after" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_without_an_executor_a_task_is_dropped_with_a_warning(kind, url, caplog):
    async def scenario():
        backend = BACKENDS[kind](url)
        await backend.initialize()
        await backend.submit({"number": 1})
        await backend.shutdown()

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert any("task dropped" in record.getMessage() for record in caplog.records)


def test_without_an_executor_postgres_keeps_the_task_queued(postgres, scenario_store):
    async def scenario():
        await postgres.initialize()
        await postgres.submit({"number": 1})
        await postgres.shutdown()

    asyncio.run(scenario())
    assert stored(scenario_store) == 1


def test_what_postgres_kept_runs_once_there_is_an_executor(postgres):
    async def scenario():
        recorder = Recorder()
        await postgres.initialize()
        await postgres.submit({"number": 1})
        postgres.set_executor(recorder)
        await until(lambda: recorder.ended)
        await postgres.shutdown()
        return recorder.ended

    assert asyncio.run(scenario()) == [{"number": 1}]


def workers():
    return [thread for thread in threading.enumerate() if thread.name.endswith("(_work)")]


def test_a_backend_has_one_worker_however_often_it_is_initialized_and_given_an_executor(postgres):
    async def scenario():
        for _ in range(2):
            postgres.set_executor(Recorder())
            await postgres.initialize()
        seen.append(len(workers()))
        await postgres.shutdown()
        seen.append(len(workers()))

    seen = []
    asyncio.run(scenario())
    assert seen == [1, 0]


def test_a_server_that_is_away_stops_neither_initialize_nor_shutdown(caplog):
    async def scenario():
        async with running("postgres", "pg://nobody@127.0.0.1:1/nowhere") as (backend, _):
            await until(lambda: "connecting again" in caplog.text)
            await backend.shutdown()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_message_that_cannot_be_read_is_a_dead_letter_and_the_next_one_runs(url, scenario_store):
    async def scenario():
        async with running("postgres", url) as (backend, recorder):
            with kombu.Connection(url) as connection:
                producer = kombu.Producer(connection.channel())
                producer.publish("{", routing_key="task_backend", content_type="application/json", declare=[QUEUE])
                producer.publish(b"", routing_key="task_backend", content_type="application/x-python-serialize")
            await backend.submit({"number": 1})
            await until(lambda: recorder.ended)

    asyncio.run(scenario())
    reasons = [reason for (reason,) in scenario_store.execute("SELECT detail FROM kombu_pg.dead_letter ORDER BY id")]
    assert [reason.partition("(")[0] for reason in reasons] == [
        "it cannot be read: DecodeError",
        "it cannot be read: ContentDisallowed",
    ]


def test_a_task_that_is_cancelled_comes_back_until_it_has_come_back_too_often_and_others_run(url, scenario_store):
    async def scenario():
        async with running("postgres", url) as (backend, recorder):
            await backend.submit({"cancels": True})
            await backend.submit({"number": 1})
            await until(lambda: scenario_store.value("SELECT count(*) FROM kombu_pg.dead_letter"))
        return recorder

    recorder = asyncio.run(scenario())
    assert recorder.ended == [{"number": 1}]
    assert recorder.began.count({"cancels": True}) == 20


def test_what_runs_when_the_connection_is_lost_is_not_run_again(url, scenario_store, caplog):
    async def scenario():
        async with running("postgres", url) as (backend, recorder):
            recorder.may_end.clear()
            await backend.submit({"number": 1})
            await until(lambda: recorder.began)
            scenario_store.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE " + OURS)
            await backend.submit({"number": 2})
            await until(lambda: {"number": 2} in recorder.began)
            recorder.may_end.set()
            await until(lambda: stored(scenario_store) == 0)
        return recorder.began

    assert asyncio.run(scenario()) == [{"number": 1}, {"number": 2}]
    assert "connection lost" in caplog.text


def test_what_was_running_at_the_end_of_the_bound_goes_back(url, scenario_store):
    async def scenario():
        async with running("postgres", url, shutdown_timeout_seconds=0.1) as (backend, recorder):
            recorder.may_end.clear()
            await backend.submit({"number": 1})
            await until(lambda: recorder.began)
            await backend.shutdown()

    asyncio.run(scenario())
    assert scenario_store.execute(
        "SELECT count(*), sum(returns) FROM kombu_pg.message JOIN kombu_pg.ready ON id = message_id"
    ) == [(1, 0)]


@pytest.mark.parametrize("commits", [True, False])
def test_a_task_is_submitted_with_the_callers_transaction(commits, postgres, scenario_store):
    engine = sqlalchemy.create_engine(libpq_url(scenario_store.broker()), poolclass=sqlalchemy.NullPool)

    async def scenario():
        await postgres.initialize()
        with engine.connect() as connection:
            connection.exec_driver_sql("CREATE TEMPORARY TABLE own (id int)")
            await postgres.submit({"number": 1}, connection)
            assert scenario_store.value("SELECT to_regclass('kombu_pg.message') IS NULL") or stored(scenario_store) == 0
            connection.commit() if commits else connection.rollback()
        await postgres.shutdown()

    asyncio.run(scenario())
    assert stored(scenario_store) == (1 if commits else 0)


@pytest.mark.parametrize("commits", [True, False])
def test_a_task_is_submitted_with_the_transaction_of_an_async_session(commits, postgres, scenario_store):
    async def scenario():
        engine = create_async_engine(scenario_store.url.replace("postgresql:", "postgresql+asyncpg:"))
        await postgres.initialize()
        async with AsyncSession(engine) as session:
            await postgres.submit({"number": 1}, session)
            before = stored(scenario_store)
            await (session.commit() if commits else session.rollback())
        await engine.dispose()
        await postgres.shutdown()
        return before

    assert asyncio.run(scenario()) == 0
    assert stored(scenario_store) == (1 if commits else 0)


def test_the_task_of_a_process_that_crashed_runs_in_another_one(url, postgres):
    program = (
        f"sys.path.append({str(TOP)!r}); import asyncio; from examples.task_backend import *\n"
        "async def hang(task): print('began', flush=True); await asyncio.sleep(3600)\n"
        "async def main():\n"
        f"    backend = PostgresBrokerTaskBackend({url!r}); backend.set_executor(hang)\n"
        "    await backend.initialize(); await asyncio.sleep(3600)\n"
        "asyncio.run(main())"
    )

    async def submit():
        await postgres.initialize()
        await postgres.submit({"number": 1})
        await postgres.shutdown()

    async def recover():
        async with running("postgres", url) as (_, recorder):
            await until(lambda: recorder.ended)
        return recorder.ended

    asyncio.run(submit())
    with process(program) as crashing:
        assert crashing.stdout.readline() == "began\n"
    assert asyncio.run(recover()) == [{"number": 1}]


def test_the_default_backend_is_the_inline_one_until_another_is_set():
    before = task_backend.get_default_task_backend()
    assert isinstance(before, SyncTaskBackend)

    another = AsyncFireAndTrackBackend()
    task_backend.set_default_task_backend(another)
    try:
        assert task_backend.get_default_task_backend() is another
    finally:
        task_backend.set_default_task_backend(before)


def test_the_example_runs_in_three_ways(scenario_store):
    ran = run_example("task_backend", scenario_store)

    assert [line for line in ran.stdout.splitlines() if ":" in line] == [
        "SyncTaskBackend: 5 tasks ran here",
        "AsyncFireAndTrackBackend: 5 tasks ran here",
        "PostgresBrokerTaskBackend: 5 tasks ran in another process",
    ]
    assert stored(scenario_store) == 0
