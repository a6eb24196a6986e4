"""Which broker and which result backend does Celery's own suite run on, and what is left out?

TEST_BROKER and TEST_BACKEND are the suite's own variables. Each is a URL, or "pg": a database that is made for this run
and dropped after it. REDIS_HOST and REDIS_PORT say where the Redis is by which the suite's tasks and tests talk.
"""

import configparser
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg2
import pytest
from celery.result import _set_task_join_will_block

from kombu_pg.embedded import ensure_server, leave
from kombu_pg.url import Url

#: Celery's own runs set the level: tests read what the worker logs.
DEFAULTS = {"TEST_BROKER": "pg", "TEST_BACKEND": "pg", "WORKER_LOGLEVEL": "INFO"}
DATABASE = pytest.StashKey[Any]()


class AskedForRedis(str):
    """A URL that answers "yes" to the one question with which the suite's tests find out whether to run."""

    def startswith(self, prefix: Any, *bounds: Any) -> bool:
        asked = prefix if isinstance(prefix, tuple) else (prefix,)
        return "redis" in asked or super().startswith(prefix, *bounds)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """The variables are set before the suite's conftest reads them."""
    wanted = {name: os.environ.get(name) or default for name, default in DEFAULTS.items()}
    if "pg" in wanted.values():
        database = private_database()
        url = "pg://" + next(database).partition("://")[2]
        early_config.stash[DATABASE] = database
        wanted = {name: url if value == "pg" else value for name, value in wanted.items()}
    os.environ.update(wanted)


def pytest_unconfigure(config: pytest.Config) -> None:
    next(config.stash.get(DATABASE, iter(())), None)


def pytest_plugin_registered(plugin: Any) -> None:
    if isinstance(plugin, ModuleType) and plugin.__name__ == "t.integration.conftest":
        plugin.TEST_BACKEND = AskedForRedis(plugin.TEST_BACKEND)


def pytest_report_header() -> list[str]:
    return [f"{name}: {os.environ[name].partition('://')[0]}" for name in ("TEST_BROKER", "TEST_BACKEND")]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A worker that an earlier test made in this process does not forbid this one to wait for results."""
    _set_task_join_will_block(False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only the tests that tests.ini calls quick, about 3 minutes")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if matches(collection_path.name, "always") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if is_wanted(name(item), quick=config.getoption("quick"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def is_wanted(test: str, *, quick: bool) -> bool:
    in_redis = os.environ["TEST_BACKEND"].startswith("redis")
    if matches(test, "always") or (matches(test, "unless the results are in Redis") and not in_redis):
        return False
    return not quick or (matches(test, "quick") and not matches(test, "slow"))


def name(item: pytest.Item) -> str:
    """`test_file.py::test_class::test_name`, without what the test is parametrised with."""
    return item.nodeid.partition("[")[0].rpartition("/")[2]


def matches(test: str, section: str) -> bool:
    return any(fnmatchcase(test, pattern) for pattern in listed(section))


@functools.cache
def listed(section: str) -> tuple[str, ...]:
    tests = configparser.RawConfigParser(delimiters=("=",), allow_no_value=True)
    tests.optionxform = str
    tests.read(Path(__file__).with_name("tests.ini"))
    return tuple(tests.options(section))


def private_database() -> Iterator[str]:
    """Yield the libpq URI of an empty database. Resumed, drops it."""
    server = os.environ.get("CELERY_PG_TEST_URL")
    directory = None if server else tempfile.mkdtemp(prefix="celery-suite-")
    url = server or ensure_server(str(directory))
    database = f"celery_suite_{os.getpid()}"
    execute(url, f"CREATE DATABASE {database} TEMPLATE template0 ENCODING 'UTF8'")
    yield str(replace(Url.cut(url), path=f"/{database}"))
    execute(url, f"DROP DATABASE {database} WITH (FORCE)")
    if directory is not None:
        leave(directory)
        shutil.rmtree(directory, ignore_errors=True)


def execute(url: str, statement: str) -> None:
    with contextlib.closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
