"""How does a task write in the commit that completes it?"""

import logging

import pytest
from watching import eventually

import celery_pg
from celery_pg import task_connection
from celery_pg.task_connection import TaskTransaction
from kombu_pg.database import database_for
from kombu_pg.options import Options


@pytest.fixture
def database(store):
    database = database_for(Options.parse(store.broker()))
    database.retain()
    yield database
    database.release()


def open_transactions(store):
    return store.value(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"
    )


def test_outside_of_a_task_there_is_no_transaction_and_the_error_says_for_whom_there_is():
    with pytest.raises(RuntimeError, match="acks_late=True and atomic_completion=True"):
        celery_pg.task_transaction()


def test_no_transaction_is_open_before_the_first_statement(store, database):
    transaction = TaskTransaction(database, "t[1]")

    with transaction as connection:
        assert open_transactions(store) == 0
        connection.exec_driver_sql("SELECT 1")
        assert open_transactions(store) == 1
    transaction.close()
    assert open_transactions(store) == 0


def test_a_transaction_that_stays_open_is_warned_of(database, caplog, monkeypatch):
    monkeypatch.setattr(task_connection, "LONG", 0.05)
    monkeypatch.setattr(task_connection, "_watch", task_connection._Watch())
    transaction = TaskTransaction(database, "slow[1]")

    with caplog.at_level(logging.WARNING), transaction as connection:
        connection.exec_driver_sql("SELECT 1")
        eventually(lambda: caplog.records)
    transaction.close()

    assert "the transaction of task slow[1] has been open for 0.05 s" in caplog.records[0].getMessage()


def test_a_connection_that_the_server_has_closed_meanwhile_is_not_given_to_the_next_task(store, database):
    def write():
        transaction = TaskTransaction(database, "t[1]")
        with transaction as connection:
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        transaction.close()
        return pid

    pid = write()
    assert write() == pid
    store.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))

    assert write() != pid


def test_a_commit_of_ones_own_is_refused_and_stores_nothing(store, database):
    store.execute("CREATE TABLE own (id int)")
    transaction = TaskTransaction(database, "t[1]")

    with transaction as connection:
        connection.exec_driver_sql("INSERT INTO own VALUES (1)")
        with pytest.raises(RuntimeError, match="leave that to it"):
            connection.commit()
    transaction.close()

    assert store.value("SELECT count(*) FROM own") == 0
    store.execute("DROP TABLE own")


def test_a_session_is_flushed_and_committed_with_the_task(store, database):
    store.execute("CREATE TABLE own (id int)")
    transaction = TaskTransaction(database, "t[1]")

    with transaction.session() as session:
        session.connection().exec_driver_sql("INSERT INTO own VALUES (1)")
    assert store.value("SELECT count(*) FROM own") == 0
    transaction.commit()

    assert store.value("SELECT count(*) FROM own") == 1
    store.execute("DROP TABLE own")
