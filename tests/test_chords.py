"""When does the body of a chord run, and with what?"""

import contextlib
import json
import threading
import uuid

import pytest
from celery import Celery, chord, states
from celery.app.task import Context
from celery.exceptions import ChordError
from celery.signals import after_task_publish, before_task_publish

from kombu_pg.transaction import transaction


@pytest.fixture
def app(store):
    app = Celery("chords", broker=store.broker(), backend=store.broker(), set_as_current=False)

    @app.task(name="body", shared=False)
    def body(results):
        return results

    @app.task(name="errback", shared=False)
    def errback(task_id):
        return task_id

    app.task(name="other", shared=False)(errback.run)

    with app.connection_for_write() as connection:
        app.amqp.queues["celery"].bind(connection).declare()
    yield app
    app.close()


class Header:
    """A chord that canvas has published, and whose tasks this test ends itself."""

    def __init__(self, app, store, size=None, body=None):
        self.id = str(uuid.uuid4())
        self.backend = app.backend
        self.store = store
        self.body = body or app.signature("body")
        self.body.options.setdefault("task_id", str(uuid.uuid4()))
        if size is not None:
            self.backend.set_chord_size(self.id, size)

    def request(self, position, **options):
        given = {"id": f"{self.id}/{position}", "group": self.id, "group_index": position, "chord": dict(self.body)}
        return Context(**{**given, **options})

    def done(self, position, **options):
        """Its task returns 100 + position."""
        request = self.request(position, **options)
        self.backend.mark_as_done(request.id, 100 + position, request=request)

    def fail(self, position, error):
        request = self.request(position)
        self.backend.mark_as_failure(request.id, error, request=request)

    def published(self):
        """What each message to the body says is its argument."""
        return [body[0][0] for body in messages(self.store, self.body.id)]

    def counted(self):
        return self.store.value(
            "SELECT count(*) FROM kombu_pg.chord_part p JOIN kombu_pg.chord c ON c.key = p.chord_key WHERE c.id = %s",
            (self.id,),
        )


@pytest.fixture
def header(app, store):
    return lambda *args, **kwargs: Header(app, store, *args, **kwargs)


def messages(store, task_id=None, task=None):
    rows = store.execute(
        "SELECT body FROM kombu_pg.message "
        "WHERE coalesce(task_id = %s, true) AND coalesce(task = %s, true) ORDER BY id",
        (task_id, task),
    )
    return [json.loads(bytes(body)) for (body,) in rows]


def at_once(*acts):
    """Run them in threads that begin at the same moment."""
    barrier = threading.Barrier(len(acts))
    failed = []

    def run(act):
        barrier.wait()
        try:
            act()
        except BaseException as exc:
            failed.append(exc)
            raise

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# Counting


def test_a_part_is_counted_in_the_transaction_that_stores_its_result(header, store):
    chord = header(2)

    chord.done(0)

    assert store.value("SELECT r.xmin = p.xmin FROM kombu_pg.result r JOIN kombu_pg.chord_part p USING (task_id)")


def test_the_last_part_its_result_and_the_body_are_one_transaction(header, store):
    chord = header(2)
    chord.done(0)
    assert chord.published() == []

    chord.done(1)

    assert chord.published() == [[100, 101]]
    transactions = store.execute(
        "SELECT xmin::text FROM kombu_pg.message WHERE task = 'body' UNION SELECT xmin::text FROM kombu_pg.chord "
        "UNION SELECT xmin::text FROM kombu_pg.result WHERE task_id = %s",
        (f"{chord.id}/1",),
    )
    assert len(transactions) == 1


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_two_parts_that_finish_together_publish_one_body(header, times):
    for _ in range(times):
        chord = header(2)

        at_once(lambda: chord.done(0), lambda: chord.done(1))  # noqa: B023 - they have ended before the next round

        assert chord.published() == [[100, 101]]


def test_all_parts_that_finish_together_with_the_size_publish_one_body(app, header):
    for _ in range(20):
        chord = header()
        app.backend.apply_chord((chord.id, []), chord.body)
        size = lambda: app.backend.set_chord_size(chord.id, 3)  # noqa: B023, E731

        at_once(size, *(lambda n=n: chord.done(n) for n in range(3)))  # noqa: B023

        assert chord.published() == [[100, 101, 102]]


def test_copies_of_the_last_part_that_finish_together_publish_one_body(header):
    for _ in range(20):
        chord = header(2)
        chord.done(0)

        at_once(*[lambda: chord.done(1)] * 4)  # noqa: B023

        assert chord.published() == [[100, 101]]


def test_a_part_that_comes_again_counts_once(header):
    chord = header(3)

    chord.done(0)
    chord.done(0)
    chord.done(1)
    chord.done(1)
    assert chord.published() == []
    chord.done(2)

    assert chord.published() == [[100, 101, 102]]


def test_a_part_that_comes_again_with_another_outcome_counts_as_it_did(header):
    chord = header(2)
    chord.done(0)

    chord.fail(0, ValueError("the second run"))
    chord.done(1)

    assert chord.published() == [[100, 101]]


def test_a_part_that_comes_after_the_end_changes_nothing(header, store):
    chord = header(2)
    chord.done(0)
    chord.done(1)

    chord.done(1)
    chord.done(7)

    assert chord.published() == [[100, 101]]
    assert chord.counted() == 0
    assert store.value("SELECT state FROM kombu_pg.result WHERE task_id = %s", (f"{chord.id}/7",)) == "SUCCESS"


def test_tasks_of_a_header_that_share_an_id_count_each(header):
    chord = header(2)

    chord.done(0, id="shared")
    chord.done(1, id="shared")

    assert chord.published() == [[100, 101]]


def test_a_part_that_forgot_its_place_is_the_same_part(header):
    chord = header(2)

    chord.done(0)
    chord.done(0, group_index=None)

    assert chord.counted() == 1


def test_results_come_in_the_headers_order(header):
    chord = header(12)

    for position in (11, 3, 10, 0, 1, 9, 2, 8, 7, 4, 6, 5):
        chord.done(position)

    assert chord.published() == [[100 + position for position in range(12)]]


def test_parts_without_a_place_come_last_in_the_order_they_came(header):
    chord = header(3)

    chord.done(7, group_index=None)
    chord.done(5, group_index=None)
    chord.done(2)

    assert chord.published() == [[102, 107, 105]]


def test_the_result_of_a_part_may_be_ignored(header, store):
    chord = header(1)

    chord.done(0, ignore_result=True)

    assert chord.published() == [[100]]
    assert store.value("SELECT count(*) FROM kombu_pg.result") == 0


# The size


def test_the_size_may_come_after_the_first_parts(app, header):
    chord = header()
    chord.done(0)
    chord.done(1)

    app.backend.set_chord_size(chord.id, 3)
    assert chord.published() == []
    chord.done(2)

    assert chord.published() == [[100, 101, 102]]


def test_the_size_may_come_after_the_last_part(app, header):
    chord = header()
    app.backend.apply_chord((chord.id, []), chord.body)
    chord.done(0)
    chord.done(1)

    app.backend.set_chord_size(chord.id, 2)

    assert chord.published() == [[100, 101]]


def test_a_part_that_comes_again_ends_a_chord_whose_size_came_last_from_elsewhere(app, header):
    chord = header()
    chord.done(0)
    app.backend.set_chord_size(chord.id, 1)

    chord.done(0)

    assert chord.published() == [[100]]


def test_a_size_that_is_said_twice_counts_once(app, header):
    chord = header(2)
    chord.done(0)

    app.backend.set_chord_size(chord.id, 2)
    chord.done(1)

    assert chord.published() == [[100, 101]]


def test_a_part_may_add_another_to_its_chord(app, header):
    chord = header(1)

    app.backend.add_to_chord(chord.id, app.AsyncResult("added"))
    chord.done(0)
    assert chord.published() == []
    chord.done(0, id="added")

    assert chord.published() == [[100, 100]]


def test_a_chord_that_is_applied_again_runs_again(app, header):
    chord = header(2)
    chord.done(0)
    chord.done(1)

    app.backend.set_chord_size(chord.id, 2)
    chord.done(0)
    assert len(chord.published()) == 1
    chord.done(1)

    assert chord.published() == [[100, 101]] * 2


def test_a_chord_that_is_applied_again_counts_parts_that_come_before_its_size(app, header):
    chord = header(2)
    chord.done(0)
    chord.done(1)

    app.backend.apply_chord((chord.id, []), chord.body)
    chord.done(0)
    app.backend.set_chord_size(chord.id, 2)
    chord.done(1)

    assert chord.published() == [[100, 101]] * 2


# Failures


def test_a_failed_part_fails_the_body_when_all_have_come(app, header):
    chord = header(2)

    chord.fail(0, ValueError("no"))
    assert app.AsyncResult(chord.body.id).state == states.PENDING
    chord.done(1)

    result = app.AsyncResult(chord.body.id)
    assert (result.state, chord.published()) == (states.FAILURE, [])
    assert isinstance(result.result, ChordError)
    assert str(result.result) == f"Dependency {chord.id}/0 raised ValueError('no')"


def test_a_failed_parts_result_and_errbacks_of_the_body_are_one_transaction(app, header, store):
    chord = header(1, body=app.signature("body", link_error=[app.signature("errback")]))

    chord.fail(0, ValueError("no"))

    assert [body[0] for body in messages(store, task="errback")] == [[chord.body.id]]
    transactions = store.execute(
        "SELECT xmin::text FROM kombu_pg.message WHERE task = 'errback' UNION SELECT xmin::text FROM kombu_pg.result"
    )
    assert len(transactions) == 1


def test_a_revoked_part_fails_the_body(app, header):
    chord = header(1)
    request = chord.request(0)

    app.backend.mark_as_revoked(request.id, "expired", request=request)

    assert app.AsyncResult(request.id).state == states.REVOKED
    assert "TaskRevokedError('expired')" in str(app.AsyncResult(chord.body.id).result)


def test_a_failure_in_a_chain_is_the_failure_of_the_part_at_its_end(app, header):
    chord = header(1)
    last = app.signature("body", task_id="last", group_id=chord.id, group_index=0, chord=dict(chord.body))

    request = Context(id="first", chain=[dict(last)])
    app.backend.mark_as_failure("first", ValueError("no"), request=request)

    assert [app.AsyncResult(task_id).state for task_id in ("first", "last", chord.body.id)] == [states.FAILURE] * 3


def test_a_chord_whose_body_is_part_of_another_chord_fails_that_too(app, header):
    outer = header(1)
    inner = header(1, body=app.signature("body", group_id=outer.id, group_index=0, chord=dict(outer.body)))

    inner.fail(0, ValueError("no"))

    assert app.AsyncResult(outer.body.id).state == states.FAILURE
    assert "no" in str(app.AsyncResult(outer.body.id).result)


def test_an_errback_that_two_nested_chords_share_is_called_once(app, header, store):
    shared, other = app.signature("errback"), app.signature("other")
    outer = header(1, body=app.signature("body", link_error=[shared, other]))
    options = {"group_id": outer.id, "group_index": 0, "chord": dict(outer.body), "link_error": [shared.clone()]}
    inner = header(1, body=app.signature("body", **options))

    inner.fail(0, ValueError("no"))

    assert [body[0] for body in messages(store, task="errback")] == [[inner.body.id]]
    assert [body[0] for body in messages(store, task="other")] == [[outer.body.id]]


def test_a_body_that_nobody_can_get_has_failed_and_its_last_part_has_not(app, header, store):
    chord = header(1, body=app.signature("body", exchange="nowhere", routing_key="nothing"))

    chord.done(0)

    assert app.AsyncResult(f"{chord.id}/0").state == states.SUCCESS
    assert str(app.AsyncResult(chord.body.id).result).startswith("Callback error: ")
    assert store.value("SELECT done_at IS NOT NULL FROM kombu_pg.chord")


@contextlib.contextmanager
def losing_the_transaction(store, signal):
    """The first time that the signal is sent, the session whose transaction is open is gone."""
    lost = []

    def lose(**_):
        if not lost:
            lost.append("once")
            store.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND state = 'idle in transaction'"
            )

    signal.connect(lose)
    try:
        yield
    finally:
        signal.disconnect(lose)
    assert lost


@pytest.mark.parametrize("signal", [before_task_publish, after_task_publish], ids=["before", "after"])
def test_a_connection_that_is_lost_around_the_publish_of_the_body_does_not_double_it(app, header, store, signal):
    chord = header(1)

    with losing_the_transaction(store, signal):
        chord.done(0)

    assert chord.published() == [[100]]
    assert app.AsyncResult(f"{chord.id}/0").state == states.SUCCESS


# Transactions


def test_in_an_open_transaction_everything_is_part_of_it(app, header):
    chord = header(2)

    def end_all():
        with transaction(app.backend.database):
            chord.done(0)
            chord.done(1)
            assert (chord.counted(), chord.published()) == (0, [])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        end_all()
    assert (chord.counted(), chord.published()) == (0, [])

    with transaction(app.backend.database):
        chord.done(0)
        chord.done(1)
    assert chord.published() == [[100, 101]]


def test_a_part_holds_its_chord_over_no_flush(header, store):
    chord = header(3)
    with store.session() as connection, connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT kombu_pg.count_part(%s, 'other', 1, 'SUCCESS', '1', NULL, false)", (chord.id,))
        cursor.execute("SELECT current_setting('synchronous_commit')")

        assert cursor.fetchone() == ("off",)


def test_a_synchronous_result_is_flushed_when_the_part_is_counted(store):
    url = store.broker(result_synchronous_commit="true")
    app = Celery("synchronous", broker=url, backend=url, set_as_current=False)
    with contextlib.closing(app):
        chord = Header(app, store, 2)
        before = store.value("SELECT pg_current_wal_insert_lsn()")

        chord.done(0)

        assert store.value("SELECT pg_current_wal_flush_lsn() > %s", (before,))
        assert chord.counted() == 1


def test_counting_a_part_reads_no_other_part_whenever_it_was_planned(store):
    count = "SELECT kombu_pg.count_part('chord', %s, %s, 'SUCCESS', '1', NULL, false)"
    read = "SELECT sum(seq_scan)::int FROM pg_stat_xact_user_tables WHERE relname IN ('chord', 'chord_part')"
    store.execute("VACUUM ANALYZE kombu_pg.chord")
    store.execute("VACUUM ANALYZE kombu_pg.chord_part")
    with store.session() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT kombu_pg.size_chord('chord', 100, NULL, false)")
        for position in range(10):
            cursor.execute("BEGIN")
            cursor.execute(count, (str(position), position))
            cursor.execute(read)
            assert cursor.fetchone() == (0,)
            cursor.execute("COMMIT")


# With the broker elsewhere


def test_with_another_broker_the_body_is_published_before_the_commit(store):
    app = Celery("elsewhere", broker="memory://", backend=store.broker(), set_as_current=False)
    with contextlib.closing(app):
        chord = Header(app, store, 2)
        chord.done(0)

        with losing_the_transaction(store, after_task_publish):
            chord.done(1)
        chord.done(1)

        assert from_memory(app) == [[100, 101]] * 2
        assert chord.counted() == 0


def from_memory(app):
    """What the messages to the body in the broker of this process say is its argument."""
    with app.connection_for_read() as connection:
        queue = app.amqp.queues["celery"](connection.default_channel)
        return [message.payload[0][0] for message in iter(queue.get, None)]


# What canvas makes of it


def test_canvas_sends_no_unlock_task(app, store):
    chord([app.signature("body", args=(n,)) for n in range(3)], app.signature("body"), app=app).apply_async()

    assert {row[0] for row in store.execute("SELECT task FROM kombu_pg.message")} == {"body"}
    assert store.execute("SELECT size, structure FROM kombu_pg.chord") == [(3, None)]


def test_a_header_may_be_a_generator(app, store):
    chord((app.signature("body", args=(n,)) for n in range(5)), app.signature("body"), app=app).apply_async()

    assert store.execute("SELECT size, structure FROM kombu_pg.chord") == [(5, None)]
    assert [body[0] for body in messages(store, task="body")] == [[n] for n in range(5)]


def test_an_empty_header_publishes_the_body_at_once(app, store):
    chord([], app.signature("body"), app=app).apply_async()

    assert [body[0] for body in messages(store, task="body")] == [[[]]]
    assert store.execute("SELECT 1 FROM kombu_pg.chord") == []


# Expiry


def expire(store):
    store.execute("UPDATE kombu_pg.chord SET expires_at = clock_timestamp() - interval '1 s'")


def test_an_expired_chord_is_swept_with_its_parts(app, header, store):
    chord = header(2)
    chord.done(0)
    expire(store)
    store.execute("UPDATE kombu_pg.chord_part SET counted_at = counted_at - interval '2 days'")

    app.backend.cleanup()

    assert store.execute("SELECT 1 FROM kombu_pg.chord UNION ALL SELECT 1 FROM kombu_pg.chord_part") == []


def test_a_chord_expires_after_its_latest_part(app, header, store):
    chord = header(2)
    chord.done(0)
    expire(store)

    app.backend.cleanup()
    chord.done(1)

    assert chord.published() == [[100, 101]]


def test_a_part_that_comes_when_its_chord_has_expired_publishes_nothing(app, header, store):
    chord = header(1)
    chord.done(0)
    expire(store)
    app.backend.cleanup()
    assert store.value("SELECT count(*) FROM kombu_pg.chord") == 0

    chord.done(0)

    assert chord.published() == [[100]]


def test_a_chord_is_kept_as_long_as_the_setting_says(store):
    app = Celery("keeps", broker=store.broker(), backend=store.broker(), set_as_current=False)
    app.conf.result_chord_expires = 10
    with contextlib.closing(app):
        app.backend.set_chord_size("chord", 1)

    left = store.value("SELECT extract(epoch FROM expires_at - clock_timestamp())::float8 FROM kombu_pg.chord")
    assert 0 < left <= 10
