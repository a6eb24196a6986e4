import contextlib
import socket

import psycopg2
import pytest
from conftest import through


def answer(connection):
    with connection.cursor() as cursor:
        cursor.execute("SELECT 42")
        return cursor.fetchone()[0]


@pytest.fixture
def proxied(tcp_proxy, server_url):
    connection = psycopg2.connect(through(tcp_proxy, server_url))
    with contextlib.closing(connection):
        yield connection


def test_a_proxy_forwards_in_both_directions(proxied):
    assert answer(proxied) == 42

    with proxied.cursor() as cursor:
        cursor.execute("SELECT %s", ["x" * 3_000_000])
        assert len(cursor.fetchone()[0]) == 3_000_000


def test_a_cut_resets_connections_and_refuses_new_ones_until_resumed(proxied, tcp_proxy, server_url):
    tcp_proxy.cut()

    with pytest.raises(psycopg2.OperationalError):
        answer(proxied)
    with pytest.raises(psycopg2.OperationalError, match="refused"):
        psycopg2.connect(through(tcp_proxy, server_url))
    assert tcp_proxy.connections == 0

    tcp_proxy.resume()
    with contextlib.closing(psycopg2.connect(through(tcp_proxy, server_url))) as connection:
        assert answer(connection) == 42


def test_a_cut_is_a_reset_not_an_orderly_end(tcp_proxy):
    with socket.create_connection((tcp_proxy.host, tcp_proxy.port)) as client:
        client.settimeout(10)
        client.send(b"\0\0\0\x08\x04\xd2\x16\x2f")  # SSLRequest: the answer proves that the proxy has accepted
        client.recv(1)

        tcp_proxy.cut()

        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_drop_resets_connections_and_welcomes_new_ones(proxied, tcp_proxy, server_url):
    tcp_proxy.drop()

    with pytest.raises(psycopg2.OperationalError):
        answer(proxied)
    with contextlib.closing(psycopg2.connect(through(tcp_proxy, server_url))) as connection:
        assert answer(connection) == 42


def test_a_stalled_proxy_holds_back_what_it_forwards_after_resume(tcp_proxy):
    with socket.create_connection((tcp_proxy.host, tcp_proxy.port)) as client:
        client.settimeout(0.2)
        tcp_proxy.stall()
        client.send(b"\0\0\0\x08\x04\xd2\x16\x2f")

        with pytest.raises(TimeoutError):
            client.recv(1)
        tcp_proxy.resume()

        client.settimeout(10)
        assert client.recv(1) in (b"N", b"S")
