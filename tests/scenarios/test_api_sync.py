"""Integrations that ship on a schedule and on demand: does examples/api_sync do what it says?"""

import contextlib
import itertools
import json
import logging
import re
import warnings
from typing import ClassVar

import kombu
import pytest
import sqlalchemy
from celery import Celery
from scenarios.running import PYTHONPATH, database, run_example
from watching import eventually

import kombu_pg
from examples.api_sync import app as example
from examples.api_sync.app import RUN_POLICY
from examples.api_sync.backends import Backend, Metadata, metadata_of
from examples.api_sync.errors import IngestError, IngestRejected, IngestUnavailable
from examples.api_sync.runner import Runner
from examples.api_sync.runs import API, CHUNK_BYTES, RECEIVE, SCHEDULE, Runs, chunks
from examples.api_sync.web import make_web
from examples.http import post, serving
from examples.running import worker
from kombu_pg import libpq_url

DEAD = "pg://nobody@127.0.0.1:1/nowhere"


class Described(Backend):
    """One that remembers how it was made."""

    made: ClassVar = []

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.made.append(kwargs)

    @classmethod
    def describe(cls):
        return Metadata("described", "app", "2.0")

    def run(self, policy, entities=(), **kwargs):
        self.made.append(kwargs)
        return entities


@pytest.fixture
def broker(scenario_store):
    return scenario_store.broker()


def using(broker):
    return contextlib.closing(Celery("api_sync", broker=broker, set_as_current=False))


@pytest.fixture
def app(broker):
    with using(broker) as app:
        yield app


@pytest.fixture
def engine(broker):
    return sqlalchemy.create_engine(libpq_url(broker), poolclass=sqlalchemy.NullPool)


@pytest.fixture
def runs(engine, app, broker):
    with kombu.Connection(broker) as connection:
        kombu.Queue("celery", channel=connection.default_channel).declare()
    runs = Runs(engine, app)
    runs.install()
    return runs


@pytest.fixture
def recorded(scenario_store):
    """(state, source, error) of every run."""
    return lambda: scenario_store.execute("SELECT state, source, error FROM api_sync_run ORDER BY id")


@pytest.fixture
def shipped(scenario_store):
    """How many chunks are published."""
    return lambda: scenario_store.value("SELECT count(*) FROM kombu_pg.message WHERE task = %s", (RECEIVE,))


def old_backend():
    class Old(Backend):
        def setup(self):
            return Metadata("old", "app", "1.0")

        def run(self, policy, **_):
            return [{"found": policy}]

    return Old


# What a backend says of itself


def test_a_backend_describes_itself_without_an_instance():
    Described.made.clear()

    assert metadata_of(Described) == Metadata("described", "app", "2.0")
    assert Described.made == []


def test_an_old_backend_is_asked_through_a_throwaway_instance():
    with pytest.warns(DeprecationWarning, match="Old has setup"):
        old = old_backend()

    assert metadata_of(old) == Metadata("old", "app", "1.0")


def test_an_old_backend_is_warned_of_when_its_class_is_defined():
    with pytest.warns(DeprecationWarning, match=r"Old has setup\(\), but no describe\(\)"):
        old_backend()


def test_setup_is_marked_as_deprecated_for_type_checkers():
    assert Backend.setup.__deprecated__ == "say it by the classmethod describe()"


def test_an_old_backend_runs_and_is_one_line_in_the_operators_log_however_often_it_does(runs, recorded, caplog):
    with pytest.warns(DeprecationWarning, match="Old has setup"):
        old = old_backend()
    clients = []
    with caplog.at_level(logging.WARNING, "examples.api_sync"):
        runner = Runner({"old": old}, runs, client_for=clients.append)
        for _ in range(2):
            runner.run("old", SCHEDULE)

    assert recorded() == [("COMPLETED", SCHEDULE, None)] * 2
    assert clients == [Metadata("old", "app", "1.0")] * 2
    (record,) = (record for record in caplog.records if record.name.startswith("examples"))
    assert "Old still describes itself by setup()" in record.getMessage()


def test_a_backend_that_describes_itself_is_warned_of_nowhere(runs, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Runner({"described": Described}, runs, client_for=str).run("described", SCHEDULE)
    assert [record for record in caplog.records if record.name.startswith("examples")] == []


# How it is made and run


def test_the_runner_reads_the_metadata_builds_client_and_callback_and_makes_the_backend_once(runs):
    Described.made.clear()
    runner = Runner({"policy": Described}, runs, client_for=lambda metadata: f"client of {metadata.name}")

    runner.run("policy", SCHEDULE, unknown=1)

    made, ran = Described.made
    assert made["client"] == "client of described"
    assert callable(made["ingest_callback"])
    assert ran == {"unknown": 1}


def test_a_backend_takes_keywords_that_it_does_not_know():
    backend = Described(ingest_callback=None, later="added")

    assert list(backend.run("policy", also="later")) == []


# Runs


@pytest.mark.parametrize("source", [SCHEDULE, API])
def test_a_run_is_completed_with_its_source(source, runs, recorded, shipped):
    runs.ingest("policy", source, lambda: [{"a": 1}])

    assert recorded() == [("COMPLETED", source, None)]
    assert shipped() == 1


def test_the_producer_is_called_inside_the_run(runs, recorded):
    seen = []

    def produce():
        seen.append(recorded())
        yield {"a": 1}
        seen.append(recorded())

    runs.ingest("policy", SCHEDULE, produce)

    assert seen == [[("RUNNING", SCHEDULE, None)]] * 2


def test_a_producer_that_crashes_is_a_failed_run_and_ships_nothing(runs, recorded, shipped):
    def produce():
        yield {"a": "x" * (CHUNK_BYTES // 2)}
        yield {"a": "x" * (CHUNK_BYTES // 2)}
        raise ZeroDivisionError("crash")

    with pytest.raises(IngestError, match="crash") as raised:
        runs.ingest("policy", SCHEDULE, produce)

    assert type(raised.value) is IngestError
    assert recorded() == [("FAILED", SCHEDULE, "IngestError: ZeroDivisionError: crash")]
    assert shipped() == 0


def test_a_producer_that_crashes_before_it_gives_anything_is_a_failed_run(runs, recorded):
    with pytest.raises(IngestError):
        runs.ingest("policy", API, lambda: 1 / 0)
    assert [state for state, _, _ in recorded()] == ["FAILED"]


def test_entities_are_shipped_in_chunks_of_at_most_3_mb(runs, scenario_store):
    runs.ingest("policy", SCHEDULE, lambda: ({"n": n, "x": "x" * 1_000_000} for n in range(7)))

    bodies = [bytes(row[0]) for row in scenario_store.execute("SELECT body FROM kombu_pg.message ORDER BY id")]
    sizes = [len(json.dumps(json.loads(body)[0][2])) for body in bodies]
    assert len(sizes) == 3
    assert max(sizes) <= 3 * 1024 * 1024
    assert [entity["n"] for body in bodies for entity in json.loads(body)[0][2]] == list(range(7))


def test_an_entity_that_no_chunk_can_hold_is_rejected():
    with pytest.raises(IngestRejected):
        list(chunks([{"x": "x" * CHUNK_BYTES}]))


def test_completed_and_all_its_chunks_are_one_commit(runs, engine, shipped, recorded):
    before = {}

    @sqlalchemy.event.listens_for(engine, "commit")
    def look(_connection):
        before["shipped"], before["recorded"] = shipped(), recorded()

    runs.ingest("policy", SCHEDULE, lambda: ({"x": "x" * 2_000_000} for _ in range(3)))

    assert before == {"shipped": 0, "recorded": [("RUNNING", SCHEDULE, None)]}
    assert (shipped(), recorded()) == (3, [("COMPLETED", SCHEDULE, None)])


def test_a_chunk_that_the_receiver_refuses_is_a_failed_run_and_rejected(runs, app, recorded, shipped):
    full = kombu.Queue("full", queue_arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    app.conf.task_queues, app.conf.task_default_queue = [full], "full"

    with pytest.raises(IngestRejected, match="full"):
        runs.ingest("policy", SCHEDULE, lambda: ({"x": "x" * 2_000_000} for _ in range(3)))

    assert [state for state, _, _ in recorded()] == ["FAILED"]
    assert shipped() == 0


def test_a_store_that_is_away_is_unavailable(app):
    runs = Runs(sqlalchemy.create_engine("postgresql://nobody@127.0.0.1:1/nowhere"), app)

    with pytest.raises(IngestUnavailable):
        runs.ingest("policy", SCHEDULE, list)


def test_a_broker_that_is_away_is_unavailable(engine, recorded, runs):
    with using(DEAD) as app, pytest.raises(IngestUnavailable) as raised:
        Runs(engine, app).ingest("policy", SCHEDULE, lambda: [{"a": 1}])

    assert isinstance(raised.value.__cause__, kombu_pg.Unavailable)
    assert [state for state, _, _ in recorded()] == ["FAILED"]


def test_a_run_whose_commit_was_done_and_not_answered_is_completed(runs, engine, scenario_store, recorded, shipped):
    commits = itertools.count(1)

    @sqlalchemy.event.listens_for(engine, "commit")
    def lose_the_answer(connection):
        if next(commits) == 2:  # the first one says RUNNING
            connection.connection.driver_connection.commit()
            session = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
            scenario_store.execute("SELECT pg_terminate_backend(%s, 5000)", (session,))

    runs.ingest("policy", SCHEDULE, lambda: [{"a": 1}])

    assert recorded() == [("COMPLETED", SCHEDULE, None)]
    assert shipped() == 1


# The callback


def test_the_callback_ships_by_the_same_path(runs, recorded, shipped):
    runs.callback("policy")(entities=[{"a": 1}])

    assert recorded() == [("COMPLETED", API, None)]
    assert shipped() == 1


def test_the_callback_records_an_error(runs, recorded):
    with pytest.raises(IngestError, match="the service is gone"):
        runs.callback("policy")(error=OSError("the service is gone"))

    assert recorded() == [("FAILED", API, "IngestError: OSError: the service is gone")]


@pytest.mark.parametrize("given", [{}, {"entities": [], "error": OSError()}])
def test_the_callback_takes_exactly_one_of_entities_and_error(given, runs, recorded):
    with pytest.raises(TypeError):
        runs.callback("policy")(**given)
    assert recorded() == []


# The whole


def test_the_schedule_is_a_plain_celery_beat():
    assert example.app.conf.beat_schedule == {
        "countries": {"task": "run_policy", "schedule": 60.0, "args": ("countries", SCHEDULE)}
    }


@pytest.fixture(scope="module")
def working(server_url, worker_id, tmp_path_factory):
    """The database of a worker with beat, whose schedule is a second."""
    with database(server_url, worker_id) as store:
        schedule = str(tmp_path_factory.mktemp("beat") / "schedule")
        environment = {"EXAMPLE_STORE": store.broker(), "PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "ignore"}
        with worker("scenarios.api_sync_app", "-c", "2", "--beat", "--schedule", schedule, **environment):
            eventually(lambda: store.value("SELECT to_regclass('api_sync_run') IS NOT NULL"), 30)
            yield store


def of_policy(store, policy):
    return store.execute("SELECT state, source FROM api_sync_run WHERE policy = %s ORDER BY id", (policy,))


def test_beat_and_a_worker_run_what_is_scheduled(working):
    assert eventually(lambda: ("COMPLETED", SCHEDULE) in of_policy(working, "countries"), 30)


def asked(store, policy):
    """A run was asked for, and its task has ended."""
    with using(store.broker()) as app:
        task = app.send_task(RUN_POLICY, (policy, API)).id
    eventually(lambda: not store.value("SELECT count(*) FROM kombu_pg.message WHERE task_id = %s", (task,)), 30)
    return of_policy(store, policy)


def test_a_transient_error_is_retried(working):
    assert asked(working, "away") == [("FAILED", API), ("COMPLETED", API)]


def test_a_permanent_error_is_not_retried(working):
    assert asked(working, "refused") == [("FAILED", API)]


def test_an_http_request_for_a_policy_that_is_not_there_is_a_404(app):
    with serving(make_web(app)) as url:
        assert post(f"{url}/policies/nowhere/run")[0] == 404


def test_an_http_request_whose_task_cannot_be_published_is_no_202():
    with (
        contextlib.closing(Celery("api_sync", broker=DEAD, set_as_current=False)) as app,
        serving(make_web(app)) as url,
    ):
        assert post(f"{url}/policies/countries/run")[0] == 503


def test_the_example_runs_when_it_is_asked_over_http_and_shows_that_run(runs, scenario_store):
    earlier = runs.ingest("earlier", API, lambda: [{"a": 1}])

    ran = run_example("api_sync", scenario_store)

    first, last = ran.stdout.strip().splitlines()[-2:]
    assert first == "POST /policies/countries/run: 202"
    assert re.fullmatch(r"run \d+ of countries by api: COMPLETED, 1 chunk", last)
    assert int(last.split()[1]) > earlier
    assert scenario_store.value("SELECT count(*) FROM api_sync_run WHERE state <> 'COMPLETED'") == 0
