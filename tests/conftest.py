import contextlib
import itertools
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace

import psycopg2
import pytest
from brokers import amqp, broker, pg, rabbitmq  # noqa: F401 - fixtures
from proxy import TcpProxy
from watching import Store

from kombu_pg.embedded import ensure_server, leave
from kombu_pg.errors import PGError
from kombu_pg.url import Url, redact

ADVICE = (
    "set CELERY_PG_TEST_URL=postgresql://user:password@host/postgres (a role that may create databases), "
    'or pip install "celery-pg[embedded]"'
)
SERVER = pytest.StashKey[str]()
DIRECTORY = pytest.StashKey[str]()
_numbers = itertools.count(1)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Find the server and talk to it once: one failure here, not one in each test.

    xdist's workers inherit the URL by their environment, so there is one server however many they are.
    """
    # A shell lets its background jobs ignore SIGINT, and what they start inherits that: nothing could be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = session.config
    try:
        if not os.environ.get("CELERY_PG_TEST_URL"):
            config.stash[DIRECTORY] = tempfile.mkdtemp(prefix="celery-pg-test-")
            os.environ["CELERY_PG_TEST_URL"] = ensure_server(config.stash[DIRECTORY])
        url = os.environ["CELERY_PG_TEST_URL"]
        with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('server_version')")
            config.stash[SERVER] = f"PostgreSQL {cursor.fetchone()[0]} at {redact(url)}"
    except (PGError, psycopg2.Error) as exc:
        pytest.exit(f"no PostgreSQL to test against: {exc}\n{ADVICE}", returncode=3)


def pytest_report_header(config: pytest.Config) -> str:
    return f"server: {config.stash[SERVER]}"


def pytest_unconfigure(config: pytest.Config) -> None:
    directory = config.stash.get(DIRECTORY, None)
    if directory is not None:
        leave(directory)
        del os.environ["CELERY_PG_TEST_URL"]
        deadline = time.monotonic() + 30
        while os.path.exists(os.path.join(directory, "data", "postmaster.pid")) and time.monotonic() < deadline:
            time.sleep(0.02)
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def own_database(server_url: str, kind: str, worker_id: str) -> Iterator[str]:
    """The libpq URI of an empty database of its own; it is gone when the block ends, whoever is connected."""
    name = f"celery_pg_{kind}_{os.getpid()}_{worker_id}_{next(_numbers)}"
    execute(server_url, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
    try:
        yield str(replace(Url.cut(server_url), path=f"/{name}"))
    finally:
        execute(server_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def server_url() -> str:
    """A libpq URI of the server's maintenance database."""
    return os.environ["CELERY_PG_TEST_URL"]


@pytest.fixture(scope="session")
def database_url(server_url: str, worker_id: str) -> Iterator[str]:
    """A libpq URI of an empty database that belongs to this test process alone."""
    with own_database(server_url, "test", worker_id) as url:
        yield url


@pytest.fixture(scope="session")
def schema_url(database_url: str) -> str:
    return database_url


@pytest.fixture(scope="session")
def _store_url(server_url: str, worker_id: str) -> Iterator[str]:
    with own_database(server_url, "store", worker_id) as url:
        yield url


@pytest.fixture
def empty(_store_url: str) -> Iterator[Store]:
    """A store whose schema is not installed yet; afterwards nothing of it is left, no session either."""
    store = Store(_store_url)
    yield store
    store.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    store.execute("DROP SCHEMA IF EXISTS kombu_pg CASCADE; DROP SCHEMA IF EXISTS other CASCADE")


@pytest.fixture
def store(empty: Store) -> Store:
    """A store with nothing in it."""
    empty.install()
    return empty


@pytest.fixture
def tcp_proxy(server_url: str) -> Iterator[TcpProxy]:
    """A proxy in front of the server; `through(proxy, url)` leads any URL of that server through it."""
    with TcpProxy(*address(server_url)) as proxy:
        yield proxy


def through(proxy: TcpProxy, url: str) -> str:
    """Return the URL with the proxy's host and port instead of its own."""
    parts = Url.cut(url)
    query = tuple(raw for key, _value, raw in parts.pairs() if key not in ("host", "hostaddr", "port"))
    return str(replace(parts, hosts=f"{proxy.host}:{proxy.port}", query=query))


def address(url: str) -> tuple[str, int]:
    """Return the first host, or directory of its socket, and the port behind a libpq URI."""
    with contextlib.closing(psycopg2.connect(url)) as connection:
        return connection.info.host, connection.info.port


def execute(url: str, statement: str) -> None:
    """Run one statement outside any transaction."""
    with contextlib.closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
