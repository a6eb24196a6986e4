"""One interface, three ways to run: does examples/task_backend do what it says?"""

import asyncio
import contextlib
import logging
import time

import pytest
import sqlalchemy
from scenarios.running import TOP, run_example
from watching import process

from examples import task_backend
from examples.task_backend import AsyncFireAndTrackBackend, PostgresBrokerTaskBackend, SyncTaskBackend
from kombu_pg import libpq_url

BACKENDS = {
    "sync": lambda url, **given: SyncTaskBackend(),
    "async": lambda url, **given: AsyncFireAndTrackBackend(**given),
    "postgres": lambda url, **given: PostgresBrokerTaskBackend(url, **given),
}
every_backend = pytest.mark.parametrize("kind", BACKENDS)
tracking = pytest.mark.parametrize("kind", ["async", "postgres"])


@pytest.fixture
def url(scenario_store):
    return scenario_store.broker(reconnect_grace=0.5)


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
        await self.may_end.wait()
        if task.get("bad"):
            raise ValueError("bad task")
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
def test_shutdown_is_bounded(kind, url, caplog):
    async def scenario():
        async with running(kind, url, shutdown_timeout_seconds=0.2) as (backend, recorder):
            recorder.may_end.clear()
            await backend.submit({"number": 1})
            await until(lambda: recorder.began)
            await asyncio.wait_for(backend.shutdown(), 20)
        return recorder.ended

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
