"""What does the worker run? One policy once a minute, and any when somebody asks for it over HTTP."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import sqlalchemy
from celery import Celery, signals

from examples.api_sync.backends import Backend, Entity, Metadata
from examples.api_sync.errors import IngestUnavailable
from examples.api_sync.runner import Runner
from examples.api_sync.runs import RECEIVE, SCHEDULE, Runs
from examples.running import store_url
from kombu_pg import libpq_url

URL = store_url("api_sync")
RUN_POLICY = "run_policy"

app = Celery("api_sync", broker=URL)
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_acks_late=True,
    task_ignore_result=True,
    beat_schedule={"countries": {"task": RUN_POLICY, "schedule": 60.0, "args": ("countries", SCHEDULE)}},
)


class Countries(Backend):
    """Finds what it is asked for."""

    @classmethod
    def describe(cls) -> Metadata:
        return Metadata("countries", "api_sync", "1.0")

    def run(self, policy: str, count: int = 3, **_: Any) -> Iterator[Entity]:
        for number in range(count):
            yield {"country": number}


BACKENDS: dict[str, type[Backend]] = {"countries": Countries}


@cache
def engine() -> sqlalchemy.Engine:
    # Not whatever driver is SQLAlchemy's default: psycopg2 is installed with celery-pg. No pool: the worker forks.
    url = sqlalchemy.make_url(libpq_url(URL)).set(drivername="postgresql+psycopg2")
    return sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)


@cache
def runner() -> Runner:
    runs = Runs(engine(), app)
    runs.install()
    return Runner(BACKENDS, runs, client_for=lambda metadata: f"a client for {metadata.app_name}")


@signals.celeryd_after_setup.connect
def prepare(**_: Any) -> None:
    """One runner for all processes of the worker's pool: an old backend is told of once."""
    runner()


@app.task(name=RUN_POLICY, autoretry_for=(IngestUnavailable,), retry_backoff=True, max_retries=5)
def run_policy(policy: str, source: str) -> None:
    runner().run(policy, source)


@app.task(name=RECEIVE)
def receive_entities(run_id: int, policy: str, entities: list[dict[str, Any]]) -> None:
    """The receiver; a real one would store them."""
