import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from acceptance.workers import Store, Worker, sender
from celery import Celery
from conftest import own_database

from kombu_pg.url import Url


@pytest.fixture
def store(server_url: str, worker_id: str) -> Iterator[Store]:
    """A database of the test's own: workers that were killed leave nothing to the next one."""
    with own_database(server_url, "acceptance", worker_id) as url:
        yield Store(url)


@pytest.fixture
def broker(store: Store) -> str:
    return broker_url(store.url)


def broker_url(url: str, **options: Any) -> str:
    """The broker URL for a libpq URI, with a short grace unless the test says otherwise."""
    given = {"reconnect_grace": 1, **options}
    query = tuple(f"{key}={value}" for key, value in given.items())
    parts = Url.cut(url)
    return str(replace(parts, start="pg://", query=parts.query + query))


@pytest.fixture
def app(broker: str) -> Iterator[Celery]:
    with sender(broker) as app:
        yield app


StartWorker = Callable[..., Worker]


@pytest.fixture
def start_worker(store: Store, broker: str, tmp_path: Path) -> Iterator[StartWorker]:
    """`start_worker(*options, broker=, name=, ready=True, **settings)`; whatever it started is killed afterwards."""
    url = broker
    started: list[Worker] = []

    def start(*options: str, broker: str = url, name: str = "", ready: bool = True, **settings: Any) -> Worker:
        name = name or f"w{len(started) + 1}"
        worker = Worker(name, broker, store.url, tmp_path / f"{name}.log", options, settings)
        started.append(worker)
        return worker.wait_ready() if ready else worker

    yield start
    for worker in started:
        with contextlib.suppress(ProcessLookupError):
            worker.kill()
