"""How does a task write in the commit that completes it, and what is recorded of one that cannot?"""

import contextlib
import logging

import pytest
from acceptance.workers import hang_up
from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery import Celery, signals
from celery.exceptions import ImproperlyConfigured
from celery.worker.request import Request
from conftest import through
from kombu.exceptions import OperationalError
from watching import eventually

import celery_pg
from celery_pg import task_connection, worker
from celery_pg.completion import complete_atomically
from celery_pg.runnable import BEFORE_5_7
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


def test_a_task_that_is_not_acks_late_is_refused_when_it_is_called(store):
    with Celery("web", broker=store.broker(), backend=store.broker(), set_as_current=False) as app:
        early = app.task(name="early", atomic_completion=True, shared=False)(working)

        with pytest.raises(ImproperlyConfigured, match="task early has atomic_completion, but not acks_late"):
            early.delay()

    assert store.value("SELECT count(*) FROM kombu_pg.message") == 0


# A task's end, when the way to the server is lost ----------------------------------------------------------------


class Shop:
    """An app whose connections lead through a proxy, and what a worker's pool and main process do for a task of it."""

    def __init__(self, store, proxy):
        self.store = store
        self.proxy = proxy
        url = through(proxy, store.broker(sslmode="disable", gssencmode="disable"))
        self.app = Celery("shop", broker=url, backend=url, set_as_current=False)
        self.app.conf.update(task_acks_late=True, pg_atomic_completion=True, task_publish_retry=False)
        self.app.task(name="callback", shared=False)(self.follow)
        self.callback = self.app.signature("callback")
        self._given = []

    @staticmethod
    def follow(_what):
        """What a link or an errback runs, as a task: it takes one argument."""

    def task(self, function, **options):
        task = self.app.task(name=function.__name__, shared=False, **options)(function)
        complete_atomically(self.app, "shop@test")
        return task

    def given(self, task, **options):
        """The request of a task that was sent, and given to a worker."""
        task.apply_async(**options)
        connection = self.app.connection_for_read(self.store.broker())
        self._given.append(connection)
        channel = connection.default_channel
        message = channel.message_to_python(eventually(lambda: channel.basic_get("celery")))
        settle = {"on_ack": message.ack_log_error, "on_reject": message.reject_log_error}
        return Request(message, app=self.app, task=task, hostname="shop@test", **settle)

    def run(self, request):
        """The end of its run, as the pool is told."""
        request._context  # noqa: B018 - puts the embedded parts into the request
        told, info, _, _ = request.task.__trace__(request.id, request.args, request.kwargs, request._request_dict)
        assert info is None or getattr(told.exception, "exc", told.exception) is info.retval
        return info

    def lose(self, request):
        """The worker's main process hears that the process was lost that ran it."""
        try:
            raise WorkerLostError("killed")
        except WorkerLostError:
            request.on_failure(ExceptionInfo())

    def settle(self):
        """What the worker has noted of its messages is known to the server."""
        while self._given:
            self._given.pop().close()

    def tasks(self):
        return sorted(row[0] for row in self.store.execute("SELECT task FROM kombu_pg.message WHERE task IS NOT NULL"))

    def state(self, request):
        found = self.store.execute("SELECT state FROM kombu_pg.result WHERE task_id = %s", (request.id,))
        return found[0][0] if found else None


@pytest.fixture
def shop(store, tcp_proxy):
    worker.install()
    shop = Shop(store, tcp_proxy)
    yield shop
    tcp_proxy.resume()
    shop.settle()
    hang_up(shop.app)
    shop.app.close()


def runs_again(info):
    return info is not None and info.state == "REJECTED" and info.retval.requeue


@contextlib.contextmanager
def before_the_next_publish(act):
    def once(**_):
        signals.before_task_publish.disconnect(once)
        act()

    signals.before_task_publish.connect(once)
    try:
        yield
    finally:
        signals.before_task_publish.disconnect(once)


def retrying(self):
    raise self.retry(countdown=0)


def replacing(self):
    raise self.replace(self.app.signature("callback", (1,)))


@pytest.mark.parametrize("function", [retrying, replacing])
def test_a_retry_that_could_not_be_published_for_a_lost_connection_runs_again(function, shop):
    request = shop.given(shop.task(function, bind=True))

    with before_the_next_publish(shop.proxy.drop):
        info = shop.run(request)

    assert runs_again(info)
    assert shop.tasks() == [function.__name__]
    assert shop.state(request) is None


@pytest.mark.parametrize("function", [retrying, replacing])
def test_a_retry_that_found_no_connection_runs_again(function, shop):
    def unlucky(self):
        shop.proxy.refuse(1)
        function(self)

    request = shop.given(shop.task(unlucky, bind=True))

    assert runs_again(shop.run(request))
    assert shop.proxy.refusals == 0
    assert shop.state(request) is None


def test_a_retry_whose_function_makes_nothing_of_the_loss_runs_again(shop):
    def swallowing(self):
        shop.proxy.refuse(1)
        with contextlib.suppress(Exception):
            self.retry()

    request = shop.given(shop.task(swallowing, bind=True))

    assert runs_again(shop.run(request))
    assert shop.state(request) is None


def test_a_call_of_ones_own_that_could_not_be_published_fails_a_task_as_ever(shop):
    def calling(self):
        shop.proxy.refuse(1)
        try:
            shop.callback.delay(1)
        except OperationalError as exc:
            raise self.retry(exc=exc, max_retries=0) from None

    request = shop.given(shop.task(calling, bind=True))

    assert shop.run(request).state == "FAILURE"
    assert shop.state(request) == "FAILURE"


def test_a_task_that_has_returned_and_finds_no_connection_runs_again(shop):
    def returning():
        shop.proxy.refuse(1)

    request = shop.given(shop.task(returning))

    assert runs_again(shop.run(request))
    assert shop.proxy.refusals == 0
    assert shop.state(request) is None


def test_the_first_task_of_a_process_that_finds_no_connection_runs_again(shop):
    request = shop.given(shop.task(working))
    shop.proxy.refuse(1)

    info = shop.run(request)

    assert runs_again(info)
    assert shop.proxy.refusals == 0
    assert shop.state(request) is None


def test_a_task_whose_transaction_finds_no_connection_runs_again(shop):
    def opening():
        shop.proxy.refuse(1)
        with celery_pg.task_transaction() as connection:
            connection.exec_driver_sql("SELECT 1")

    request = shop.given(shop.task(opening))

    assert runs_again(shop.run(request))
    assert shop.proxy.refusals == 0
    assert shop.state(request) is None


def test_a_completion_whose_wake_fails_is_a_completion(shop, caplog):
    successes = []

    def writing():
        with celery_pg.task_transaction() as connection:
            connection.exec_driver_sql("SELECT 1")

    request = shop.given(shop.task(writing), link=shop.callback)
    signals.task_success.connect(lambda **_: successes.append(1), weak=False, dispatch_uid="wake")
    shop.store.execute("ALTER FUNCTION kombu_pg.wake(bigint[]) RENAME TO awake")
    info = shop.run(request)
    shop.store.execute("ALTER FUNCTION kombu_pg.awake(bigint[]) RENAME TO wake")
    signals.task_success.disconnect(dispatch_uid="wake")

    assert info is None
    assert successes == [1]
    assert "not told" in caplog.text
    assert (shop.tasks(), shop.state(request)) == (["callback"], "SUCCESS")


# What the worker's main process records of a task whose process was lost ---------------------------------------------


def working():
    return 42


def test_a_lost_task_has_failed_although_the_server_was_away_for_a_moment(shop):
    request = shop.given(shop.task(working), link_error=shop.callback)

    shop.proxy.refuse(6)  # Celery 5.7 tries four times to find a result
    shop.lose(request)

    shop.settle()
    assert shop.proxy.refusals == 0
    assert (shop.tasks(), shop.state(request)) == (["callback"], "FAILURE")


def test_a_lost_task_that_cannot_be_recorded_runs_again(shop):
    shop.app.conf.result_backend_max_retries = 1
    request = shop.given(shop.task(working), link_error=shop.callback)

    shop.proxy.cut()
    with pytest.raises(Exception, match="refused"):
        shop.lose(request)

    shop.settle()
    assert shop.state(request) is None
    assert shop.store.execute("SELECT task, returns FROM kombu_pg.message JOIN kombu_pg.ready ON id = message_id") == [
        ("working", 1)
    ]


def test_a_task_that_was_completed_before_its_process_was_lost_has_not_failed(shop, caplog):
    caplog.set_level(logging.INFO)
    failures = []
    request = shop.given(shop.task(working, ignore_result=True), link=shop.callback, link_error=shop.callback)
    assert shop.run(request) is None

    signals.task_failure.connect(lambda **_: failures.append(1), weak=False, dispatch_uid="lost")
    shop.lose(request)
    signals.task_failure.disconnect(dispatch_uid="lost")

    shop.settle()
    assert failures == []
    assert "was completed before its process was lost" in caplog.text
    assert (shop.tasks(), shop.state(request)) == (["callback"], None)


since_5_7 = pytest.mark.skipif(BEFORE_5_7, reason="retry_on_worker_lost came with Celery 5.7")


@since_5_7
def test_a_lost_task_is_retried_in_the_place_of_its_message(shop):
    request = shop.given(shop.task(working, retry_on_worker_lost=True, default_retry_delay=0))

    shop.proxy.refuse(1)
    shop.lose(request)

    shop.settle()
    assert (shop.tasks(), shop.state(request)) == (["working"], "RETRY")
    assert shop.store.value("SELECT count(*) FROM kombu_pg.lease") == 0


@since_5_7
def test_a_retry_of_a_lost_task_survives_a_connection_that_is_lost_in_it(shop):
    request = shop.given(shop.task(working, retry_on_worker_lost=True, default_retry_delay=0))

    with before_the_next_publish(shop.proxy.drop):
        shop.lose(request)

    shop.settle()
    assert (shop.tasks(), shop.state(request)) == (["working"], "RETRY")


@since_5_7
@pytest.mark.parametrize("ignored", [True, False])
def test_a_task_that_was_completed_before_its_process_was_lost_is_not_retried(ignored, shop):
    task = shop.task(working, retry_on_worker_lost=True, ignore_result=ignored)
    request = shop.given(task, link=shop.callback)
    assert shop.run(request) is None

    shop.lose(request)

    shop.settle()
    assert (shop.tasks(), shop.state(request)) == (["callback"], None if ignored else "SUCCESS")
