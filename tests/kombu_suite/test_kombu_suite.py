"""kombu's own integration classes, unmodified: `tox -e kombu-suite`."""

import contextlib
import socket

import kombu
import pytest
from conftest import address, through
from proxy import TcpProxy
from t.integration.common import (
    BaseEventLoop,
    BaseExchangeTypes,
    BaseFailover,
    BaseMessage,
    BasePriority,
    BaseTimeToLive,
    BasicFunctionality,
)

import kombu_pg  # noqa: F401


@pytest.fixture(scope="session")
def tcp_url(server_url, database_url):
    """The database over TCP: kombu's failover tests compare ports, and the embedded server has a unix socket only."""
    with TcpProxy(*address(server_url)) as proxy:
        yield "pg://" + through(proxy, database_url).partition("://")[2]


@pytest.fixture(scope="session")
def dead_port():
    """A port that nobody listens on, and nobody else can take."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@pytest.fixture
def connection(tcp_url):
    with contextlib.closing(kombu.Connection(tcp_url)) as connection:
        yield connection


@pytest.fixture
def invalid_connection(dead_port):
    with contextlib.closing(kombu.Connection(f"pg://127.0.0.1:{dead_port}/nowhere")) as connection:
        yield connection


@pytest.fixture
def failover_connection(tcp_url, dead_port):
    """kombu leaves the first URL to a transport that parses URLs, so nobody but the caller knows its port."""
    urls = f"pg://postgres@127.0.0.1:{dead_port}/nowhere;{tcp_url}"
    with contextlib.closing(kombu.Connection(urls, port=dead_port)) as connection:
        yield connection


class TestBasicFunctionality(BasicFunctionality):
    pass


class TestExchangeTypes(BaseExchangeTypes):
    pass


class TestTimeToLive(BaseTimeToLive):
    pass


class TestPriority(BasePriority):
    pass


class TestMessage(BaseMessage):
    pass


class TestEventLoop(BaseEventLoop):
    pass


class TestFailover(BaseFailover):
    pass
