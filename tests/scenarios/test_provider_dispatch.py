"""The provider is chosen per tenant, and the old path stays: does examples/provider_dispatch do what it says?"""

import logging
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from scenarios.running import TOP, run_example

from examples.provider_dispatch.app import GRAPHS, Crm, app
from examples.provider_dispatch.dispatch import Dispatcher
from examples.provider_dispatch.providers import Registry, SyncContext, SyncResult

SERVICES = {"http": "a client"}


class Provider:
    """One that remembers what was asked of it."""

    def __init__(self) -> None:
        self.calls = []

    def initialize(self, services):
        self.calls.append(("initialize", services))

    def sync_cycle(self, context):
        self.calls.append(("sync_cycle", context))
        return SyncResult(engine="known", synced=3, failures=2)


@pytest.fixture
def events():
    return []


@pytest.fixture
def provider():
    return Provider()


@pytest.fixture
def dispatcher(provider, events):
    registry = Registry()
    registry.register("known", lambda: provider)
    compositions = {"a": "known", "b": "unknown", "c": "unknown", "d": "another", "e": ""}
    return Dispatcher(registry, compositions.__getitem__, SERVICES, lambda **fields: events.append(fields))


def levels(caplog):
    return [record.levelname for record in caplog.records if "is not on this worker" in record.getMessage()]


def test_the_task_runs_for_every_graph_once_a_minute():
    (entry,) = app.conf.beat_schedule.values()

    assert (entry["task"], entry["schedule"]) == ("sync_every_graph", 60.0)


def test_a_registered_provider_is_initialized_and_then_runs_one_cycle(dispatcher, provider):
    context = SyncContext("a", {"full": True})

    assert dispatcher.run(context).engine == "known"
    assert provider.calls == [("initialize", SERVICES), ("sync_cycle", context)]


def test_a_provider_that_is_not_on_this_worker_leaves_the_graph_to_the_legacy_engine(dispatcher):
    assert dispatcher.run(SyncContext("b")).engine == "legacy"


def test_the_legacy_engine_is_imported_only_where_it_runs():
    program = (
        "import sys; from examples.provider_dispatch.app import *; from examples.provider_dispatch.providers import *\n"
        "dispatcher._emit = lambda **fields: None\n"
        "dispatcher.run(SyncContext('graph-1')); print('examples.provider_dispatch.legacy' in sys.modules)\n"
        "dispatcher.run(SyncContext('graph-3')); print('examples.provider_dispatch.legacy' in sys.modules)"
    )
    assert python("-c", program, PROVIDERS="crm").stdout.split() == ["False", "True"]


@pytest.mark.parametrize("graph", [None, "", "e"])
def test_without_a_graph_or_a_composition_the_legacy_engine_runs_without_a_warning(dispatcher, graph, caplog):
    with caplog.at_level(logging.DEBUG):
        assert dispatcher.run(SyncContext(graph)).engine == "legacy"

    assert levels(caplog) == []


def test_a_missing_provider_is_a_warning_once_for_each_graph_and_provider_and_debug_after(dispatcher, caplog):
    with caplog.at_level(logging.DEBUG):
        for graph in ("b", "b", "c", "d", "c"):
            dispatcher.run(SyncContext(graph))

    assert levels(caplog) == ["WARNING", "DEBUG", "WARNING", "WARNING", "DEBUG"]


def test_an_error_of_the_state_raises(dispatcher, events):
    with pytest.raises(KeyError):
        dispatcher.run(SyncContext("nobody knows it"))
    assert events == []


def test_an_error_of_the_registry_raises(events):
    def broken():
        raise ConnectionError("the registry is away")

    registry = Registry()
    registry.register("known", broken)
    with pytest.raises(ConnectionError):
        Dispatcher(registry, lambda _: "known", SERVICES, lambda **_: None).run(SyncContext("a"))


def test_failures_are_in_the_log_line_and_in_the_event_and_none_on_the_legacy_path(dispatcher, events, caplog):
    with caplog.at_level(logging.INFO):
        dispatcher.run(SyncContext("a"))
        dispatcher.run(SyncContext("e"))

    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["graph a: known, 2 failures", "graph e: legacy, 0 failures"]
    assert [event["failures"] for event in events] == [2, 0]


@pytest.mark.parametrize("optimized", [(), ("-O",)], ids=["python", "python -O"])
def test_without_a_services_container_a_provider_raises(optimized):
    program = (
        "from examples.provider_dispatch.app import *\n"
        "from examples.provider_dispatch.providers import SyncContext\n"
        "try: Dispatcher(registry, GRAPHS.__getitem__, None, print).run(SyncContext('graph-1'))\n"
        "except RuntimeError as error: print(type(error).__name__)"
    )
    assert python(*optimized, "-c", program, PROVIDERS="crm").stdout.split() == ["RuntimeError"]


def test_the_apps_own_provider_says_how_many_failed():
    assert Crm().sync_cycle(SyncContext("graph-1", {"failures": 3})).failures == 3


def test_old_and_new_workers_on_one_queue_drain_it_and_nothing_is_lost_or_run_twice(scenario_store):
    ran = run_example("provider_dispatch", scenario_store)

    *lines, last = ran.stdout.splitlines()
    synced = [re.fullmatch(r"(\S+) by (\S+), task (\S+) on (\S+)@example", line).groups() for line in lines]
    rounds = int(last.removesuffix(f" rounds over {len(GRAPHS)} graphs"))
    assert Counter(graph for graph, *_ in synced) == dict.fromkeys(GRAPHS, rounds)
    assert set(Counter(task for _, _, task, _ in synced).values()) == {1}
    assert {(engine, worker) for _, engine, _, worker in synced} == {
        ("legacy", "old"),
        ("legacy", "new"),
        ("crm", "new"),
    }
    assert [worker for *_, worker in (synced[0], synced[-1])] == ["old", "new"]
    assert scenario_store.value("SELECT count(*) FROM kombu_pg.message WHERE task IS NOT NULL") == 0


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TOP,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
