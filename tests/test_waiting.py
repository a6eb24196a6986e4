"""Does whoever waits for a result get it: at once, and whatever is lost on the way?

The safety poll is off (see Store.broker), so that nothing but what is under test can end a wait.
"""

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery import Celery, states
from celery.app.task import Context
from celery.backends.asynchronous import geventDrainer
from celery.exceptions import TimeoutError
from celery.result import GroupResult
from conftest import through
from kombu.exceptions import ContentDisallowed
from watching import eventually, seconds

from celery_pg.sources import Sent
from kombu_pg import transaction

WITHIN = 30
TOLD = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database WHERE d.datname = current_database()" \
       " AND l.locktype = 'advisory' AND l.mode = 'ShareLock' AND l.granted"  # fmt: skip
HOLDERS = TOLD.replace("count(*)", "count(DISTINCT l.pid)", 1)
SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'kombu_pg'"


def make(url, **settings):
    app = Celery("waiting", broker=url, backend=url, set_as_current=False)
    app.conf.update(settings)
    return app


@contextlib.contextmanager
def closing(app):
    try:
        yield app
    finally:
        app.backend.result_consumer.stop()
        app.close()


@pytest.fixture
def app(store):
    with closing(make(store.broker())) as app:
        yield app


@pytest.fixture
def worker(store):
    """Another app that stores results, as a worker would."""
    app = make(store.broker())
    yield app.backend
    app.close()


def sent(app, task_id="one"):
    """A task that this thread has sent: its result, and the request that its worker sees."""
    app.backend.on_task_call(None, task_id)
    return app.AsyncResult(task_id), Context(id=task_id, reply_to=app.thread_oid)


@pytest.fixture
def getting():
    """`getting(act)` runs it in a thread; `.result(30)` is what it returned."""
    with ThreadPoolExecutor(64) as pool:
        yield lambda act, *args, **kwargs: pool.submit(act, *args, **kwargs)


def somebody_waits(store, locks=1):
    """A waiter holds its locks, and its first look is over."""
    eventually(lambda: store.value(TOLD) >= locks, WITHIN, "somebody waits")


def test_a_result_that_is_there_is_returned_at_once(app, worker):
    result, request = sent(app)
    worker.mark_as_done("one", 42, request=request)

    assert result.get(timeout=WITHIN) == 42


def test_a_get_that_waits_is_woken_by_the_result(app, worker, store, getting):
    result, request = sent(app)
    waiting = getting(result.get, timeout=WITHIN)
    somebody_waits(store)

    worker.mark_as_done("one", 42, request=request)

    assert waiting.result(WITHIN) == 42


@pytest.mark.parametrize(("value", "looks"), [({"a": "\u00e9 \x00"}, 0), ("x" * 5000, 1)])
@pytest.mark.parametrize("task_id", ["one", "\x1eone", 'a "quoted" \u00e9'])
def test_a_small_result_comes_with_its_notification(app, worker, store, getting, monkeypatch, task_id, value, looks):
    result, request = sent(app, task_id)
    request.update(group="g", parent_id="p")
    waiting = getting(result.get, timeout=WITHIN)
    somebody_waits(store)
    consumer, looked = app.backend.result_consumer, []
    eventually(lambda: not consumer._fresh and not consumer._unsettled, WITHIN, "its first look is over")
    look_at = consumer._look_at
    monkeypatch.setattr(consumer, "_look_at", lambda session, ids: looked.append(ids) or look_at(session, ids))

    worker.mark_as_done(task_id, value, request=request)

    assert waiting.result(WITHIN) == value
    assert looked == [[task_id]] * looks
    assert result._cache == {**worker.get_task_meta(task_id), "date_done": result._cache["date_done"]}
    assert result.date_done == worker.app.AsyncResult(task_id).date_done


def test_a_get_is_woken_although_somebody_has_emptied_every_table(app, worker, store, getting):
    store.execute("TRUNCATE kombu_pg.result_secret")
    result, request = sent(app)
    waiting = getting(result.get, timeout=WITHIN)
    somebody_waits(store)

    worker.mark_as_done("one", 42, request=request)

    assert waiting.result(WITHIN) == 42


def test_only_who_may_read_the_results_knows_where_they_are_told(store):
    channel = "SELECT kombu_pg.result_channel(1, %s)"
    mine = store.value("SELECT secret FROM kombu_pg.result_secret")

    assert store.value(channel, (mine,)) != store.value(channel, ("9d6cbb1c-8e2f-4b0f-a5cf-6e2f5d0f3a7e",))


def test_a_failure_is_raised_where_its_result_is_awaited(app, worker, store, getting):
    result, request = sent(app)
    waiting = getting(result.get, timeout=WITHIN)
    somebody_waits(store)

    worker.mark_as_failure("one", ValueError("no"), request=request)

    with pytest.raises(ValueError, match="no"):
        waiting.result(WITHIN)


def test_a_result_of_a_task_that_somebody_else_sent_wakes_too(app, worker, store, getting):
    waiting = getting(app.AsyncResult("foreign").get, timeout=WITHIN)
    somebody_waits(store, 2)

    worker.mark_as_done("foreign", 42, request=Context(id="foreign", reply_to="somebody else"))

    assert waiting.result(WITHIN) == 42


def test_a_result_that_is_stored_without_a_request_wakes_its_sender(app, worker, store, getting):
    result, _ = sent(app)
    waiting = getting(result.get, timeout=WITHIN)
    somebody_waits(store)

    worker.store_result("one", 42, states.SUCCESS)

    assert waiting.result(WITHIN) == 42


def test_a_task_whose_message_names_another_sender_wakes_after_a_second(app, worker, store, getting):
    result, _ = sent(app)
    waiting = getting(result.get, timeout=WITHIN)
    somebody_waits(store, 3)

    worker.mark_as_done("one", 42, request=Context(id="one", reply_to="a thread that is gone"))

    assert waiting.result(WITHIN) == 42


def test_a_result_whose_transaction_saw_nobody_wait_is_found(app, worker, store, getting):
    result, request = sent(app)
    with transaction.transaction(worker.database):
        worker.mark_as_done("one", 42, request=request)
        waiting = getting(result.get, timeout=WITHIN)
        somebody_waits(store)

    assert waiting.result(WITHIN) == 42


def test_the_wait_goes_quiet_once_older_transactions_are_over(app, worker, store, getting):
    result, request = sent(app)
    with store.session() as session, session.cursor() as cursor:
        cursor.execute("BEGIN; SELECT pg_current_xact_id()")
        waiting = getting(result.get, timeout=WITHIN)
        somebody_waits(store)
        consumer = app.backend.result_consumer
        eventually(lambda: consumer._unsettled, WITHIN, "it knows of the transaction")
        cursor.execute("COMMIT")
    eventually(lambda: not consumer._unsettled, WITHIN, "it has seen the transaction end")

    worker.mark_as_done("one", 42, request=request)

    assert waiting.result(WITHIN) == 42


def test_nobody_is_notified_where_nobody_waits(app, worker, store):
    result, request = sent(app)
    assert result.state == states.PENDING
    with store.session() as session, session.cursor() as cursor:
        cursor.execute("SELECT kombu_pg.listen_for_results(ARRAY[%s, ''], ARRAY(SELECT generate_series(0, 63)))",
                       (app.thread_oid,))  # fmt: skip
        worker.mark_as_done("one", 42, request=request)
        worker.store_result("two", 43, states.SUCCESS)
        cursor.execute("NOTIFY last")
        cursor.execute("SELECT 1")

    assert store.value(TOLD) == 0
    assert session.notifies == []


def test_after_the_last_get_nobody_is_notified_any_more(app, worker, store):
    result, request = sent(app)
    worker.mark_as_done("one", 42, request=request)
    assert result.get(timeout=WITHIN) == 42

    eventually(lambda: store.value(TOLD) == 0, WITHIN, "the locks are released")


def test_a_get_that_gave_up_leaves_nothing_behind(app, store):
    result, _ = sent(app)
    with pytest.raises(TimeoutError):
        result.get(timeout=0.1)
    del result
    gc.collect()

    eventually(lambda: store.value(TOLD) == 0, WITHIN, "the locks are released")
    assert not app.backend.result_consumer._by_task
    assert not app.backend.result_consumer._waiters


def test_a_notification_that_is_lost_is_made_up_for_by_the_safety_poll(store, worker, getting):
    with closing(make(store.broker(poll_interval=0.2))) as app:
        result, _ = sent(app)
        waiting = getting(result.get, timeout=WITHIN)
        somebody_waits(store)

        store.execute(STORE_SILENTLY, ("one", "42"))

        assert waiting.result(WITHIN) == 42


STORE_SILENTLY = (
    "INSERT INTO kombu_pg.result (task_id, stored_at, state, content_type, result)"
    " VALUES (%s, now(), 'SUCCESS', 'application/json', %s)"
)


def test_a_group_whose_every_notification_is_lost_is_complete_all_the_same(store, getting):
    with closing(make(store.broker(poll_interval=0.2))) as app:
        group, _ = group_of(app, 20)
        waiting = getting(group.get, timeout=WITHIN)
        somebody_waits(store)

        for number in range(20):
            store.execute(STORE_SILENTLY, (f"g{number}", str(number)))

        assert waiting.result(WITHIN) == list(range(20))


def test_a_callback_whose_notification_is_lost_is_called_all_the_same(store, getting):
    with closing(make(store.broker(poll_interval=0.2))) as app:
        called = []
        then, _ = sent(app, "then")
        then.then(lambda result: called.append(result.result))
        draining = getting(app.backend.result_consumer.drain_events, timeout=WITHIN)
        somebody_waits(store)

        store.execute(STORE_SILENTLY, ("then", "42"))

        draining.result(WITHIN)
        assert called == [42]


def test_callbacks_are_polled_for_in_turn_however_many_there_are(app, monkeypatch):
    monkeypatch.setattr("celery_pg.waiting.LOOK_LIMIT", 10)
    results = [sent(app, f"t{number}")[0] for number in range(25)]
    for result in results:
        result.then(lambda _: None)

    polled = [app.backend.result_consumer._polled_for() for _ in range(3)]

    assert [len(one) for one in polled] == [10, 10, 5]
    assert set().union(*polled) == {result.id for result in results}


def test_a_timeout_is_kept_and_zero_means_a_single_look(app, worker):
    result, request = sent(app)

    with pytest.raises(TimeoutError):
        result.get(timeout=0)
    assert 0.3 <= seconds(lambda: contextlib.suppress(TimeoutError).__enter__() or timed_out(result, 0.3)) < WITHIN
    worker.mark_as_done("one", 42, request=request)
    assert result.get(timeout=0) == 42


def timed_out(result, timeout):
    with pytest.raises(TimeoutError):
        result.get(timeout=timeout)


def test_every_state_is_told_to_on_message(app, worker, store, getting):
    result, request = sent(app)
    told = []
    waiting = getting(result.get, timeout=WITHIN, on_message=lambda meta: told.append(meta["status"]))
    somebody_waits(store)

    for number, state in enumerate((states.STARTED, "PROGRESS", states.SUCCESS), 1):
        worker.store_result("one", number, state, request=request)
        eventually(lambda number=number: len(told) == number, WITHIN, state)

    assert waiting.result(WITHIN) == 3
    assert told == [states.STARTED, "PROGRESS", states.SUCCESS]


def test_on_interval_is_called_while_the_wait_goes_on(app):
    result, _ = sent(app)
    called = []

    with pytest.raises(TimeoutError):
        result.get(timeout=1.5, on_interval=lambda: called.append(1))

    assert called


def test_an_exception_of_on_message_is_raised_by_its_own_get_only(app, worker, store, getting):
    first, request = sent(app, "one")
    second, other = sent(app, "two")
    waiting = [getting(first.get, timeout=WITHIN), getting(second.get, timeout=WITHIN, on_message=lambda _: 1 / 0)]
    eventually(lambda: len(app.backend.result_consumer._waiters) == 2, WITHIN)
    somebody_waits(store)

    worker.mark_as_done("two", 2, request=other)
    with pytest.raises(ZeroDivisionError):
        waiting[1].result(WITHIN)
    worker.mark_as_done("one", 1, request=request)

    assert waiting[0].result(WITHIN) == 1


def test_what_may_not_be_decoded_fails_only_the_get_that_waits_for_it(store, worker, getting):
    with closing(make(store.broker(), result_accept_content=["json"])) as app:
        first, request = sent(app, "one")
        second, other = sent(app, "two")
        waiting = [getting(result.get, timeout=WITHIN) for result in (first, second)]
        eventually(lambda: len(app.backend.result_consumer._waiters) == 2, WITHIN)
        somebody_waits(store)

        make(store.broker(), result_serializer="pickle").backend.mark_as_done("two", 2, request=other)
        with pytest.raises(ContentDisallowed):
            waiting[1].result(WITHIN)
        worker.mark_as_done("one", 1, request=request)

        assert waiting[0].result(WITHIN) == 1


# Many


def test_one_connection_listens_for_all_results_of_a_process(store, worker, getting):
    with closing(make(store.broker(application_name="waits"))) as app:
        app.backend.database  # noqa: B018 - the other connection, which reads and stores, is opened
        several = [sent(app, f"t{number}") for number in range(20)] + sent_by_many(app, 20)
        several += [(app.AsyncResult(f"s{number}"), None) for number in range(20)]
        called = []
        (then, _), *awaited = several
        then.then(lambda _: called.append(1))
        waiting = [getting(result.get, timeout=WITHIN) for result, _ in awaited]
        eventually(lambda: len(app.backend.result_consumer._waiters) == 59, WITHIN)
        somebody_waits(store, 3)

        assert store.value("SELECT count(*) FROM pg_stat_activity"
                           " WHERE datname = current_database() AND application_name = 'waits'") == 2  # fmt: skip
        assert store.value(HOLDERS) == 1
        for result, request in several:
            worker.mark_as_done(result.id, result.id, request=request)
        assert [one.result(WITHIN) for one in waiting] == [result.id for result, _ in awaited]
        eventually(lambda: called, WITHIN, "the callback is called")


def sent_by_many(app, count, name="m"):
    """So many tasks, each sent by a thread of its own: their results, and the requests that their workers see."""
    everybody = threading.Barrier(count)

    def send(number):
        everybody.wait(WITHIN)  # one thread each, all alive: idents are used again
        return sent(app, f"{name}{number}")

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(send, range(count)))
    assert len({request.reply_to for _, request in found}) == count
    return found


def test_only_the_senders_of_tasks_that_are_waited_for_have_a_lock(app, worker, store, getting):
    sent_by_many(app, 50)
    result, request = sent(app)
    waiting = getting(result.get, timeout=WITHIN)
    somebody_waits(store, 2)
    looked_once(app)

    assert store.value(TOLD) == 2  # its own, and that of results that name nobody
    worker.mark_as_done("one", 42, request=request)
    assert waiting.result(WITHIN) == 42


def looked_once(app):
    """The first look is over: the locks are taken that it takes."""
    consumer = app.backend.result_consumer
    with consumer._lock:
        assert consumer._looked


def test_tasks_of_however_many_senders_are_waited_for_by_few_locks(app, worker, store, getting):
    several = sent_by_many(app, 100)
    group = GroupResult("g", [result for result, _ in several], app=app)
    waiting = getting(group.get, timeout=WITHIN)
    somebody_waits(store, 34)
    looked_once(app)

    assert store.value(TOLD) <= 1 + 32 + 64
    for number, (_, request) in enumerate(several):
        worker.mark_as_done(f"m{number}", number, request=request)
    assert waiting.result(WITHIN) == list(range(100))


@pytest.fixture
def lasting(app, worker, store, getting, monkeypatch):
    """A get() that waits meanwhile, and what ends its task; senders may be done without at once."""
    monkeypatch.setattr("celery_pg.sources.SENDERS_INTERVAL", 0)
    result, request = sent(app, "lasting")
    waiting = getting(result.get, timeout=WITHIN)
    somebody_waits(store, 2)
    return waiting, lambda: worker.mark_as_done("lasting", 42, request=request)


def test_senders_that_are_done_with_make_room_for_others_while_the_wait_goes_on(app, worker, store, getting, lasting):
    waiting, end = lasting
    consumer = app.backend.result_consumer
    for round_ in range(4):
        several = sent_by_many(app, 30, f"r{round_}.")
        group = GroupResult("g", [result for result, _ in several], app=app)
        getting_group = getting(group.get, timeout=WITHIN)
        eventually(lambda several=several: consumer._by_task.keys() >= {one.id for one, _ in several}, WITHIN)
        for number, (_, request) in enumerate(several):
            worker.mark_as_done(f"r{round_}.{number}", number, request=request)
        assert getting_group.result(WITHIN) == list(range(30))

    assert not consumer._sources._buckets
    assert store.value(TOLD) <= 1 + 32
    assert len(consumer._sources._keys) <= 1 + 2 * 32
    end()
    assert waiting.result(WITHIN) == 42


def test_a_task_whose_sender_was_forgotten_before_another_one_took_its_place_is_waited_for_as_a_strangers(
    app, worker, getting, monkeypatch, lasting
):
    waiting, end = lasting
    consumer = app.backend.result_consumer
    monkeypatch.setattr(consumer, "_widen", lambda _: None)
    consumer._sent = Sent()

    several = sent_by_many(app, 40)
    others = getting(GroupResult("g", [result for result, _ in several], app=app).get, timeout=WITHIN)
    senders = consumer._sources._senders
    eventually(lambda: app.thread_oid not in senders and not consumer._fresh, WITHIN, "its place is taken")
    end()

    assert waiting.result(WITHIN) == 42
    for number, (_, request) in enumerate(several):
        worker.mark_as_done(f"m{number}", number, request=request)
    assert others.result(WITHIN) == list(range(40))


def group_of(app, count, name="g"):
    results = [sent(app, f"{name}{number}") for number in range(count)]
    return GroupResult("g", [result for result, _ in results], app=app), [request for _, request in results]


def test_a_group_returns_its_results_in_order_whatever_order_they_came_in(app, worker, store, getting):
    group, requests = group_of(app, 30)
    waiting = getting(group.get, timeout=WITHIN)
    somebody_waits(store)

    for number in reversed(range(30)):
        worker.mark_as_done(f"g{number}", number, request=requests[number])

    assert waiting.result(WITHIN) == list(range(30))


def test_a_group_whose_results_are_all_there_costs_one_look(app, worker, store):
    group, requests = group_of(app, 30)
    for number, request in enumerate(requests):
        worker.mark_as_done(f"g{number}", number, request=request)

    assert group.get(timeout=WITHIN) == list(range(30))
    assert group.join(timeout=WITHIN) == list(range(30))


def test_iter_native_yields_what_is_there_before_the_rest(app, worker, store):
    group, requests = group_of(app, 3)
    worker.mark_as_done("g1", 1, request=requests[1])
    arrived = group.iter_native(timeout=WITHIN)

    first = next(arrived)
    for number in (2, 0):
        worker.mark_as_done(f"g{number}", number, request=requests[number])

    assert (first[0], first[1]["result"]) == ("g1", 1)
    assert sorted(task_id for task_id, _ in arrived) == ["g0", "g2"]


def test_iter_native_is_woken_for_each_result_as_it_comes(app, worker, getting):
    group, requests = group_of(app, 3)
    arrived = group.iter_native(timeout=WITHIN)
    for number in (2, 0, 1):
        waiting = getting(next, arrived)
        quiet(app.backend.result_consumer)
        assert not waiting.done()

        worker.mark_as_done(f"g{number}", number, request=requests[number])

        task_id, meta = waiting.result(WITHIN)
        assert (task_id, meta["result"]) == (f"g{number}", number)
    assert list(arrived) == []


def test_a_group_with_a_failure_raises_it(app, worker):
    group, requests = group_of(app, 3)
    worker.mark_as_failure("g1", ValueError("no"), request=requests[1])

    with pytest.raises(ValueError, match="no"):
        group.get(timeout=WITHIN)


def test_groups_in_a_group_are_waited_for_with_one_timeout(app, worker, store, getting):
    inner, requests = group_of(app, 2)
    alone, request = sent(app, "alone")
    outer = GroupResult("outer", [alone, inner], app=app)
    with pytest.raises(TimeoutError):
        outer.get(timeout=0.1)

    waiting = getting(outer.get, timeout=WITHIN)
    for task_id, each in (("g0", requests[0]), ("g1", requests[1]), ("alone", request)):
        worker.mark_as_done(task_id, task_id, request=each)

    assert waiting.result(WITHIN) == ["alone", ["g0", "g1"]]


def test_get_many_yields_each_result_as_it_comes(app, worker):
    worker.mark_as_done("a", 1)
    many = app.backend.get_many(["a", "b"], timeout=WITHIN)

    first = next(many)
    worker.mark_as_done("b", 2)

    assert [first[0], *(task_id for task_id, _ in many)] == ["a", "b"]
    assert [task_id for task_id, _ in app.backend.get_many(["b", "none"], max_iterations=1)] == ["b"]


def test_get_many_is_woken_for_each_result_as_it_comes(app, worker, getting):
    many = app.backend.get_many(["a", "b"], timeout=WITHIN)
    for task_id in ("b", "a"):
        waiting = getting(next, many)
        quiet(app.backend.result_consumer)
        assert not waiting.done()

        worker.mark_as_done(task_id, task_id)

        assert waiting.result(WITHIN)[0] == task_id
    assert list(many) == []


def test_an_empty_group_has_no_results(app):
    assert list(app.backend.iter_native(GroupResult("g", [], app=app))) == []


def test_a_callback_is_called_while_anybody_waits(app, worker, store, getting):
    called = []
    then, request = sent(app, "then")
    then.then(lambda result: called.append(result.result))
    other, its_request = sent(app, "other")
    waiting = getting(other.get, timeout=WITHIN)
    somebody_waits(store)

    worker.mark_as_done("then", 42, request=request)
    eventually(lambda: called == [42], WITHIN, "the callback is called")
    worker.mark_as_done("other", 1, request=its_request)

    assert waiting.result(WITHIN) == 1


def test_draining_events_calls_callbacks_too(app, worker):
    called = []
    then, request = sent(app, "then")
    then.then(lambda result: called.append(result.result))
    worker.mark_as_done("then", 42, request=request)

    app.backend.result_consumer.drain_events(timeout=WITHIN)

    assert called == [42]


def quiet(consumer):
    """It waits, and looks no more by itself, as if every older transaction were over: some last, in any database."""
    eventually(lambda: consumer._sources.held, WITHIN, "it waits")
    with consumer._lock:
        consumer._horizon = None
        consumer._unsettled.clear()


def test_a_callback_is_called_after_other_states_were_told(app, worker, getting):
    called = []
    then, request = sent(app, "then")
    then.then(lambda result: called.append(result.result))
    consumer = app.backend.result_consumer
    draining = getting(consumer.drain_events, timeout=WITHIN)
    for state in (states.STARTED, "PROGRESS", states.RETRY):
        quiet(consumer)
        looked = consumer._looked
        worker.store_result("then", None, state, request=request)
        eventually(lambda looked=looked: consumer._looked > looked, WITHIN, state)

    worker.mark_as_done("then", 42, request=request)

    draining.result(WITHIN)
    assert called == [42]


def test_a_callback_that_comes_while_somebody_waits_long_is_called(app, worker, store, getting):
    called = []
    other, request = sent(app, "other")
    waiting = getting(other.get, timeout=WITHIN)
    somebody_waits(store)
    foreign = app.AsyncResult("foreign")
    foreign.then(lambda result: called.append(result.result))

    worker.mark_as_done("foreign", 42, request=Context(id="foreign", reply_to="somebody else"))

    eventually(lambda: called == [42], WITHIN, "the callback is called")
    worker.mark_as_done("other", 1, request=request)
    assert waiting.result(WITHIN) == 1


def test_a_callback_whose_result_may_not_be_decoded_is_given_up_and_logged(store, caplog):
    with closing(make(store.broker(), result_accept_content=["json"])) as app:
        then, request = sent(app, "then")
        then.then(lambda _: None)
        make(store.broker(), result_serializer="pickle").backend.mark_as_done("then", 2, request=request)

        app.backend.result_consumer.drain_events(timeout=WITHIN)

        assert "no callback of task then is called" in caplog.text
        assert not app.backend.result_consumer._pending


def test_cancelling_never_waits(app):
    consumer = app.backend.result_consumer
    taken, done = threading.Event(), threading.Event()

    def hold():
        with consumer._lock:
            taken.set()
            done.wait(WITHIN)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(WITHIN)
    result, _ = sent(app)
    result.then(lambda _: None)

    del result
    gc.collect()
    consumer.cancel_for("one")

    assert holder.is_alive()
    done.set()
    holder.join()


def test_an_app_that_only_sends_groups_never_connects_for_their_results(app, store):
    group_of(app, 10)

    assert store.value(SESSIONS) == 0


# What is lost on the way


def test_a_get_survives_the_end_of_its_session(app, worker, store, getting):
    result, request = sent(app)
    waiting = getting(result.get, timeout=WITHIN)
    for _ in range(3):
        somebody_waits(store)
        store.execute(
            "SELECT pg_terminate_backend(l.pid, 5000) FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
            " WHERE d.datname = current_database() AND l.locktype = 'advisory' AND l.mode = 'ShareLock'"
        )
    somebody_waits(store)

    worker.mark_as_done("one", 42, request=request)

    assert waiting.result(WITHIN) == 42


def test_a_result_that_came_while_the_connection_was_away_is_found(store, worker, tcp_proxy, getting):
    with closing(make(through(tcp_proxy, store.broker()))) as app:
        result, request = sent(app)
        waiting = getting(result.get, timeout=WITHIN)
        somebody_waits(store)
        tcp_proxy.cut()
        worker.mark_as_done("one", 42, request=request)
        tcp_proxy.resume()

        assert waiting.result(WITHIN) == 42


def test_who_was_never_connected_hears_that_the_server_is_not_there():
    app = make("pg://nobody@127.0.0.1:1/none", result_backend_max_retries=1,
               result_backend_max_sleep_between_retries_ms=10)  # fmt: skip

    with pytest.raises(Exception, match="refused"):
        app.AsyncResult("one").get(timeout=WITHIN)


NOWHERE = "pg://nobody@127.0.0.1:1/none"


def test_a_timeout_is_kept_while_the_server_was_never_there():
    app = make(NOWHERE)

    waited = seconds(lambda: timed_out(app.AsyncResult("one"), 0.3))

    assert 0.3 <= waited < 3


def test_a_timeout_is_kept_by_everybody_who_waits_for_the_first_connection(tcp_proxy, store, getting):
    tcp_proxy.stall()
    with closing(make(through(tcp_proxy, store.broker(connect_timeout=30)))) as app:
        waiting = [getting(app.AsyncResult(str(number)).get, timeout=0.3) for number in range(3)]

        for one in waiting:
            with pytest.raises(TimeoutError, match="no connection"):
                one.result(5)


def test_a_timeout_is_kept_while_the_server_does_not_let_a_lost_connection_come_back(tcp_proxy, store):
    with closing(make(through(tcp_proxy, store.broker(connect_timeout=30)))) as app:
        timed_out(app.AsyncResult("one"), 0)
        tcp_proxy.stall()
        tcp_proxy.drop()

        assert seconds(lambda: timed_out(app.AsyncResult("one"), 0.3)) < 5


def test_a_get_finds_a_server_that_comes_within_its_timeout(tcp_proxy, store, worker, getting, caplog):
    worker.mark_as_done("one", 42)
    tcp_proxy.cut()
    with closing(make(through(tcp_proxy, store.broker()))) as app:
        waiting = getting(app.AsyncResult("one").get, timeout=WITHIN)
        eventually(lambda: "trying again" in caplog.text, WITHIN, "it has tried")

        tcp_proxy.resume()

        assert waiting.result(WITHIN) == 42


def test_the_greenlet_that_drains_outlives_a_server_that_is_not_there(monkeypatch):
    app = make(NOWHERE, result_backend_max_retries=0)
    consumer = app.backend.result_consumer
    monkeypatch.setattr(consumer, "drainer", geventDrainer(consumer))

    consumer.drain_events(timeout=0.05)

    monkeypatch.undo()
    with pytest.raises(Exception, match="refused"):
        consumer.drain_events(timeout=0.05)


# Processes and greenlets


def test_a_child_gets_results_of_its_own_and_does_not_disturb_its_parent(app, worker, store, getting):
    result, request = sent(app)
    waiting = getting(result.get, timeout=WITHIN)
    somebody_waits(store)
    worker.mark_as_done("for the child", 7)

    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if app.AsyncResult("for the child").get(timeout=WITHIN) == 7 else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    worker.mark_as_done("one", 42, request=request)

    assert os.waitstatus_to_exitcode(status) == 0
    assert waiting.result(WITHIN) == 42


def test_a_child_waits_for_a_result_that_comes_later(app, worker, store):
    result, request = sent(app)
    with pytest.raises(TimeoutError):
        result.get(timeout=0)
    eventually(lambda: store.value(TOLD) == 0, WITHIN)

    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if app.AsyncResult("later").get(timeout=WITHIN) == 7 else 2
        finally:
            os._exit(code)
    somebody_waits(store, 2)
    worker.mark_as_done("later", 7)
    _, status = os.waitpid(child, 0)
    worker.mark_as_done("one", 42, request=request)

    assert os.waitstatus_to_exitcode(status) == 0
    assert result.get(timeout=WITHIN) == 42


GREEN = """
from gevent import monkey; monkey.patch_all()
import gevent, sys, time
from celery import Celery
app = Celery("green", broker=sys.argv[1], backend=sys.argv[1])
begun = time.monotonic()
ticks = []
def tick():
    while len(ticks) < 10_000:
        ticks.append(time.monotonic())
        gevent.sleep(0.01)
ticker = gevent.spawn(tick)
called = []
app.AsyncResult("t0").then(lambda result: called.append(result.result))
getting = [gevent.spawn(app.AsyncResult(f"t{n}").get, timeout=30) for n in range(20)]
print("waiting", flush=True)
gevent.joinall(getting, timeout=30)
print(sum(one.value for one in getting), called, len(ticks) > 3, flush=True)
"""


def test_greenlets_wait_side_by_side_and_block_nobody(store, worker):
    with subprocess.Popen([sys.executable, "-c", GREEN, store.broker()], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "waiting\n"
        somebody_waits(store, 2)
        time.sleep(0.1)  # some ticks
        for number in range(20):
            worker.mark_as_done(f"t{number}", number)

        assert running.stdout.readline() == f"{sum(range(20))} [0] True\n"


GREEN_CALLBACK = """
from gevent import monkey; monkey.patch_all()
import gevent, sys
from celery import Celery
app = Celery("green", broker=sys.argv[1], backend=sys.argv[1])
consumer = app.backend.result_consumer
called = gevent.event.Event()
def call(result):
    print(result.result, flush=True)
    called.set()
app.AsyncResult("then").then(call)
def wait(condition):
    with gevent.Timeout(30):
        while not condition():
            gevent.sleep(0.005)
wait(lambda: consumer._sources.held)
with consumer._lock:  # no more looks, as if every older transaction were over
    consumer._horizon = None
    consumer._unsettled.clear()
looked = consumer._looked
print("waiting", flush=True)
if sys.argv[2] == "started":
    wait(lambda: consumer._looked > looked)
    print("looked", flush=True)
called.wait(30)
"""


@contextlib.contextmanager
def green_callback(broker, how):
    """A process under gevent in which one result has a callback, and nobody is in get()."""
    command = [sys.executable, "-c", GREEN_CALLBACK, broker, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "waiting\n"
        yield running.stdout.readline


def test_under_gevent_a_callback_is_called_though_nobody_is_in_get(store, worker):
    with green_callback(store.broker(), "started") as said:
        worker.store_result("then", None, states.STARTED)
        assert said() == "looked\n"

        worker.mark_as_done("then", 42)

        assert said() == "42\n"


def test_under_gevent_a_callback_whose_notification_is_lost_is_called(store):
    with green_callback(store.broker(poll_interval=0.2), "lost") as said:
        store.execute(STORE_SILENTLY, ("then", "42"))

        assert said() == "42\n"


# The hunt


def hunt(app, worker, rounds, groups):
    """Results that are stored while somebody begins, or ceases, to wait for them: none may be missed."""
    with ThreadPoolExecutor(4) as pool:
        for number in range(rounds):
            result, request = sent(app, f"h{number}")
            storing = pool.submit(worker.mark_as_done, f"h{number}", number, request=request)
            assert result.get(timeout=WITHIN) == number
            storing.result(WITHIN)
        for number in range(groups):
            group, requests = group_of(app, 20, f"g{number}.")
            storing = [
                pool.submit(worker.mark_as_done, request.id, part, request=request)
                for part, request in enumerate(requests)
            ]
            assert group.get(timeout=WITHIN) == list(range(20))
            [one.result(WITHIN) for one in storing]


def test_no_wake_up_is_missed(app, worker):
    hunt(app, worker, rounds=200, groups=20)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_wake_up_is_missed_in_two_thousand_rounds_of_either(app, worker):
    hunt(app, worker, rounds=2000, groups=2000)
