"""Do results come back as they were stored, and only what may be decoded?"""

import json
import pickle
import threading
import warnings
from datetime import datetime, timedelta, timezone

import pytest
from celery import Celery, states
from celery.app.task import Context
from celery.backends import base
from celery.beat import Scheduler
from celery.exceptions import BackendGetMetaError, TaskRevokedError
from celery.result import GroupResult
from click.testing import CliRunner
from kombu.exceptions import ContentDisallowed
from kombu.utils.uuid import uuid
from sqlalchemy import create_engine, select
from sqlalchemy.dialects import postgresql
from watching import Consuming, eventually

from celery_pg import tables
from celery_pg.backend import PGBackend
from celery_pg.commands import pg
from kombu_pg import transaction
from kombu_pg.errors import OptionError, SchemaMissing


class Odd(Exception):
    """Its constructor does not take its args."""

    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")


class Unpicklable(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


@pytest.fixture
def make_app(store):
    apps = []

    def make(**settings):
        url = store.broker()
        app = Celery("results", broker=url, backend=settings.pop("backend", url), set_as_current=False)
        app.conf.update(settings)
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.close()


@pytest.fixture
def backend(make_app):
    return make_app().backend


def request(**fields):
    given = {"id": uuid(), "task": "shop.pay", "hostname": "w1@host", "retries": 2, "args": [1], "kwargs": {"a": 2},
             "delivery_info": {"routing_key": "mail"}, "reply_to": uuid(), **fields}  # fmt: skip
    return Context(given)


def test_a_url_of_every_form_leads_to_the_backend(store):
    url = store.broker()
    for form in (url, url.replace("pg://", "postgresql://"), url.replace("pg://", "postgres://"),
                 url.replace("pg://", "postgresql+psycopg2://"), url.replace("pg://", "pg+postgresql://")):  # fmt: skip
        app = Celery("forms", backend=form, set_as_current=False)
        app.backend.store_result("one", form, states.SUCCESS)
        app.backend.forget("one")

        assert type(app.backend) is PGBackend


def test_the_url_is_shown_without_its_password():
    app = Celery("shown", backend="pg://me:secret@a:1,b:2/db", set_as_current=False)

    assert app.backend.as_uri() == "pg://me:**@a:1,b:2/db"
    assert "secret" in app.backend.as_uri(include_password=True)


def test_an_embedded_url_is_shown_as_it_was_given(tmp_path):
    app = Celery("shown", backend=f"pg+embedded://{tmp_path}/db", set_as_current=False)

    assert app.backend.as_uri() == f"pg+embedded://{tmp_path}/db"
    assert app.backend.options.embedded == f"{tmp_path}/db"


def test_an_unknown_option_is_refused_by_its_name():
    app = Celery("wrong", backend="pg://host/db?shema=x", set_as_current=False)

    with pytest.raises(OptionError, match='did you mean "schema"'):
        app.backend  # noqa: B018 - it is made


def test_nothing_is_connected_until_something_is_asked(make_app, store):
    app = make_app(backend="pg://nobody@127.0.0.1:1/none")

    assert app.backend.as_uri() == "pg://nobody@127.0.0.1:1/none"
    assert app.AsyncResult("x").id == "x"


def test_a_task_without_a_result_is_pending_and_does_not_exist(backend):
    assert backend.get_task_meta("none") == {"status": states.PENDING, "result": None}
    assert not backend.task_result_exists("none")


@pytest.mark.parametrize("value", [None, 0, "é\0\ud800", [1, {"a": None}], {"x": [1.5, True]}, "x" * 100_000])
def test_a_value_comes_back_as_it_was(backend, value):
    backend.mark_as_done("one", value)

    meta = backend.get_task_meta("one")

    assert (meta["status"], meta["result"], meta["children"]) == (states.SUCCESS, value, [])
    assert datetime.now(timezone.utc) - datetime.fromisoformat(meta["date_done"]) < timedelta(minutes=1)


def test_states_follow_each_other_and_success_is_final(backend):
    task = request()
    seen = []
    for state, value in [(states.STARTED, {"pid": 1}), ("PROGRESS", {"done": 3}), (states.RETRY, ValueError("again")),
                         (states.FAILURE, ValueError("no")), (states.SUCCESS, 42), (states.FAILURE, ValueError("late")),
                         (states.STARTED, {"pid": 2})]:  # fmt: skip
        backend.store_result("one", value, state, request=task)
        meta = backend.get_task_meta("one", cache=False)
        seen.append((meta["status"], str(meta["result"])))

    assert seen == [
        ("STARTED", "{'pid': 1}"), ("PROGRESS", "{'done': 3}"), ("RETRY", "again"), ("FAILURE", "no"),
        ("SUCCESS", "42"), ("SUCCESS", "42"), ("SUCCESS", "42"),
    ]  # fmt: skip


def test_a_state_that_is_not_final_has_no_date_done(backend):
    backend.store_result("one", None, states.STARTED)

    assert backend.get_task_meta("one")["date_done"] is None


def test_what_a_column_cannot_hold_comes_back_all_the_same(backend):
    task = request(task="a\0b", group="g\ud800", parent_id="p\0")
    backend.mark_as_failure("one", ValueError("x"), traceback='File "\0\udc80"', request=task)

    meta = backend.get_task_meta("one")

    assert (meta["traceback"], meta["group_id"], meta["parent_id"]) == ('File "\0\udc80"', "g\ud800", "p\0")


def test_children_group_and_parent_come_back_as_results(backend):
    child = backend.app.AsyncResult("child")
    backend.mark_as_done("one", 1, request=request(_children=[child], group="g", parent_id="p"))

    result = backend.app.AsyncResult("one")

    assert result.children == [child]
    assert (backend.get_task_meta("one")["group_id"], backend.get_task_meta("one")["parent_id"]) == ("g", "p")


def test_result_extended_keeps_what_was_called_and_by_whom(make_app):
    backend = make_app(result_extended=True).backend
    task = request(stamped_headers=["order"], stamps={"order": 7})
    backend.mark_as_done("one", 1, request=task)

    result = backend.app.AsyncResult("one")

    assert (result.name, result.args, result.kwargs, result.worker, result.retries, result.queue) == (
        "shop.pay", [1], {"a": 2}, "w1@host", 2, "mail",
    )  # fmt: skip
    assert backend.get_task_meta("one")["order"] == 7


def test_without_result_extended_the_arguments_are_not_stored(backend, store):
    backend.mark_as_done("one", 1, request=request(kwargs={"card": "4111"}))

    assert "name" not in backend.get_task_meta("one")
    assert store.value("SELECT meta FROM kombu_pg.result") is None


# Exceptions


@pytest.mark.parametrize("serializer", ["json", "pickle"])
@pytest.mark.parametrize("exc", [ValueError("no", 1), KeyError("k"), Odd(3, "text"), TaskRevokedError("away")])
def test_an_exception_comes_back_with_its_type_and_args(make_app, serializer, exc):
    backend = make_app(result_serializer=serializer, accept_content=["json", "pickle"]).backend
    backend.mark_as_failure("one", exc, traceback="Traceback\n  ...")

    result = backend.app.AsyncResult("one")

    with pytest.raises(type(exc)) as raised:
        result.get(timeout=10)
    assert raised.value.args == exc.args
    assert result.traceback == "Traceback\n  ..."


def test_an_exception_whose_constructor_takes_something_else_says_what_it_is_and_can_be_pickled(make_app):
    backend = make_app().backend
    backend.mark_as_failure("one", Odd(3, "text"))

    rebuilt = backend.app.AsyncResult("one").result

    for exc in (rebuilt, pickle.loads(pickle.dumps(rebuilt))):
        assert isinstance(exc, Odd)
        assert str(exc) == repr(exc) == "Odd('3: text')"


def test_an_exception_that_cannot_be_pickled_comes_back_as_what_it_said(make_app):
    backend = make_app(result_serializer="pickle", accept_content=["pickle"]).backend
    backend.mark_as_failure("one", Unpicklable("its text"))

    exc = backend.app.AsyncResult("one").result

    assert isinstance(exc, Exception)
    assert "its text" in str(exc)
    assert "Unpicklable" in repr(exc) + type(exc).__name__


def test_an_exception_that_cannot_be_imported_here_comes_back_under_its_name(backend):
    gone = type("Gone", (Exception,), {"__module__": "no.such.module"})
    backend.mark_as_failure("one", gone("its text", 3))

    exc = backend.app.AsyncResult("one").result

    assert (type(exc).__name__, exc.args) == ("Gone", ("its text", 3))


def test_a_stored_name_that_is_no_exception_is_not_called(backend, store):
    backend.mark_as_failure("one", ValueError("x"))
    evil = json.dumps({"exc_module": "os", "exc_type": "system", "exc_message": ["true"]})
    store.execute("UPDATE kombu_pg.result SET result = %s", (evil.encode(),))

    with pytest.raises(Exception, match="Expected an exception class"):
        backend.get_task_meta("one")


# What may be decoded


class Trap:
    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


@pytest.mark.parametrize("content_type", ["application/json", "application/x-python-serialize"])
def test_a_pickle_that_nobody_asked_for_is_not_touched(backend, store, content_type):
    backend.mark_as_done("one", 1)
    store.execute("UPDATE kombu_pg.result SET result = %s, content_type = %s", (pickle.dumps(Trap()), content_type))

    with pytest.raises(Exception) as raised:  # noqa: PT011 - two kinds
        backend.app.AsyncResult("one").get(timeout=10)

    assert not Trap.sprung
    if content_type != "application/json":
        assert isinstance(raised.value, ContentDisallowed)


def test_a_result_of_another_serializer_is_read_where_it_is_accepted(make_app):
    make_app(result_serializer="pickle").backend.mark_as_done("one", {1: (2,)})

    reader = make_app(result_serializer="json", result_accept_content=["json", "pickle"]).backend
    strict = make_app(result_serializer="pickle", accept_content=["pickle"], result_accept_content=["json"]).backend

    assert reader.get_result("one") == {1: (2,)}
    with pytest.raises(ContentDisallowed):
        strict.get_result("one")


def test_a_value_that_cannot_be_encoded_is_refused_and_nothing_is_stored(backend):
    with pytest.raises(Exception, match="serializable"):
        backend.mark_as_done("one", object())

    assert not backend.task_result_exists("one")


@pytest.mark.skipif(not hasattr(base, "compress_payload"), reason="this Celery does not compress results")
@pytest.mark.parametrize("compression", ["gzip", "bzip2"])
def test_a_compressed_result_is_small_and_is_read_by_everybody(make_app, store, compression):
    make_app(result_compression=compression).backend.mark_as_done("one", "x" * 100_000)

    assert store.value("SELECT octet_length(result) FROM kombu_pg.result") < 2000
    assert make_app().backend.get_result("one") == "x" * 100_000


# Forgetting and expiry


def test_what_is_forgotten_is_pending_again(backend):
    backend.mark_as_done("one", 1)
    assert backend.get_result("one") == 1

    backend.app.AsyncResult("one").forget()

    assert backend.get_task_meta("one")["status"] == states.PENDING


def test_forget_and_store_at_once_leave_one_of_the_two(make_app):
    app = make_app()
    ends = []

    def store_all():
        for number in range(200):
            app.backend.store_result(f"t{number}", number, states.SUCCESS)

    def forget_all():
        for number in range(200):
            app.backend.forget(f"t{number}")

    threads = [threading.Thread(target=act) for act in (store_all, forget_all, store_all, forget_all)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(200):
        meta = app.backend.get_task_meta(f"t{number}", cache=False)
        ends.append((meta["status"], meta["result"]) in [(states.SUCCESS, number), (states.PENDING, None)])

    assert all(ends)


def age(store, by):
    store.execute("UPDATE kombu_pg.result SET expires_at = expires_at - %s::interval", (by,))
    store.execute("UPDATE kombu_pg.group_result SET expires_at = expires_at - %s::interval", (by,))


def test_every_state_expires_and_what_expired_is_not_seen_before_it_is_deleted(make_app, store):
    backend = make_app(result_expires=60).backend
    for state in (states.STARTED, states.RETRY, states.SUCCESS, "OWN"):
        backend.store_result(state, None, state)
    backend.save_group("g", GroupResult("g", [backend.app.AsyncResult(states.SUCCESS)], app=backend.app))
    age(store, "61 seconds")

    assert [backend.get_task_meta(state, cache=False)["status"] for state in ("STARTED", "SUCCESS")] == ["PENDING"] * 2
    assert backend.restore_group("g", cache=False) is None
    assert store.value("SELECT count(*) FROM kombu_pg.task_result") == 0
    backend.cleanup()
    assert store.value("SELECT count(*) FROM kombu_pg.result") == 0
    assert store.value("SELECT count(*) FROM kombu_pg.group_result") == 0


def test_an_expired_success_gives_way_to_another_run(make_app, store):
    backend = make_app(result_expires=60).backend
    backend.mark_as_done("one", 1)
    age(store, "61 seconds")

    backend.mark_as_done("one", 2)

    assert backend.get_result("one") == 2


@pytest.mark.parametrize(("settings", "expected"), [
    ({"result_expires": 60}, {"SUCCESS": 60, "FAILURE": 60}),
    ({"result_expires": timedelta(minutes=2)}, {"SUCCESS": 120, "FAILURE": 120}),
    ({"result_expires": 60, "result_failure_expires": 600}, {"SUCCESS": 60, "FAILURE": 600}),
    ({"result_expires": None}, {"SUCCESS": None, "FAILURE": None}),
    ({"result_expires": 0}, {"SUCCESS": None, "FAILURE": None}),
])  # fmt: skip
def test_results_live_as_long_as_the_settings_say(make_app, store, settings, expected):
    backend = make_app(**settings).backend
    backend.store_result("1", 1, states.SUCCESS)
    backend.store_result("2", ValueError(), states.FAILURE)

    lives = store.execute("SELECT state, extract(epoch FROM expires_at - stored_at)::int FROM kombu_pg.result")

    assert dict(lives) == expected


def test_what_has_not_expired_stays(make_app, store):
    backend = make_app(result_expires=60).backend
    backend.mark_as_done("one", 1)

    backend.cleanup()

    assert backend.get_result("one") == 1


def test_expiry_deletes_so_many_at_a_time_and_the_oldest_first(make_app, store):
    backend = make_app(result_expires=60).backend
    for number in range(5):
        backend.mark_as_done(str(number), number)
    age(store, "61 seconds")

    assert store.value("SELECT kombu_pg.expire_results(2)") == 2
    assert store.execute("SELECT task_id FROM kombu_pg.result ORDER BY 1") == [("2",), ("3",), ("4",)]


def test_a_consumers_housekeeping_deletes_what_expired(make_app, store):
    backend = make_app(result_expires=60).backend
    backend.mark_as_done("one", 1)
    age(store, "61 seconds")

    with Consuming(store.broker(poll_interval=0)) as consuming:
        consuming.rest()

        eventually(lambda: store.value("SELECT count(*) FROM kombu_pg.result") == 0, 30, "it is deleted")


def test_with_another_broker_whoever_ends_a_task_deletes_what_expired(make_app, store):
    ours, other = make_app(result_expires=60), make_app(result_expires=60, broker_url="memory://")
    ours.backend.mark_as_done("one", 1)
    age(store, "61 seconds")

    ours.backend.process_cleanup()
    left = store.value("SELECT count(*) FROM kombu_pg.result")
    other.backend.process_cleanup()

    assert (left, store.value("SELECT count(*) FROM kombu_pg.result")) == (1, 0)


def test_with_a_broker_in_another_schema_whoever_ends_a_task_deletes_what_expired(make_app, store):
    """Consumers sweep only the schema that they consume from."""
    backend = make_app(result_expires=60, backend=store.broker(schema="other")).backend
    app = backend.app
    backend.mark_as_done("one", 1)
    backend.save_group("g", GroupResult("g", [app.AsyncResult("one")], app=app))
    backend.set_chord_size("c", 2)
    tables = ("result", "group_result", "chord")
    for table in tables:
        store.execute(f"UPDATE other.{table} SET expires_at = expires_at - interval '200 years'")
    with Consuming(store.broker()) as consuming:
        consuming.rest()

    backend.process_cleanup()

    assert [store.value(f"SELECT count(*) FROM other.{table}") for table in tables] == [0] * 3


def test_a_task_leaves_expired_results_to_the_consumers_of_the_same_store_whatever_its_url_says(make_app, store):
    backend = make_app(result_expires=60, backend=store.broker(poll_interval=1)).backend
    backend.mark_as_done("one", 1)
    age(store, "61 seconds")

    backend.process_cleanup()

    assert store.value("SELECT count(*) FROM kombu_pg.result") == 1


def test_a_task_that_cannot_reach_the_broker_ends_all_the_same(make_app, caplog):
    backend = make_app(broker_url="pg://nobody@127.0.0.1:1/none").backend

    backend.process_cleanup()

    assert "expired results are not deleted yet" in caplog.text


def test_beat_has_nothing_to_clean_up(make_app):
    scheduler = Scheduler(make_app(result_expires=60), lazy=True)

    scheduler.install_default_entries({})

    assert scheduler.schedule == {}


# Groups


def test_a_saved_group_is_restored_with_its_parts_and_can_be_deleted(backend):
    app = backend.app
    inner = GroupResult("inner", [app.AsyncResult("c")], app=app)
    group = GroupResult("g", [app.AsyncResult("a"), app.AsyncResult("b", parent=app.AsyncResult("p")), inner], app=app)

    group.save(backend)
    restored = backend.restore_group("g", cache=False)

    assert restored == group
    assert restored.results[2].results[0].id == "c"
    group.delete(backend)
    assert backend.restore_group("g") is None


# SQL


def test_sql_sees_results_with_what_is_known_of_their_tasks(backend, store):
    task = request(group="g", parent_id="p")
    backend.store_result("one", {"pid": 1}, states.STARTED, request=task)
    store.execute("UPDATE kombu_pg.result SET started_at = started_at - interval '5 seconds'")
    backend.mark_as_done("one", 1, request=task)

    row = store.execute(
        "SELECT id, name, state, worker, queue, retries, group_id, parent_id, date_done IS NOT NULL,"
        " runtime BETWEEN '5 seconds' AND '65 seconds' FROM kombu_pg.task_result"
    )

    assert row == [("one", "shop.pay", "SUCCESS", "w1@host", "mail", 2, "g", "p", True, True)]


# In transactions, and without a server


def test_a_result_is_stored_by_the_transaction_that_is_open(backend, store):
    with transaction.transaction(backend.database):
        backend.mark_as_done("one", 1)
        seen_inside = backend.get_result("one")
        seen_outside = store.value("SELECT count(*) FROM kombu_pg.result")

    assert (seen_inside, seen_outside) == (1, 0)
    assert store.value("SELECT count(*) FROM kombu_pg.result") == 1


def test_a_transaction_that_fails_takes_its_results_with_it(backend, store):
    def store_and_fail():
        with transaction.transaction(backend.database):
            backend.mark_as_done("one", 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store_and_fail()

    assert store.value("SELECT count(*) FROM kombu_pg.result") == 0


@pytest.mark.parametrize(("query", "expected"), [("", "off"), ("&result_synchronous_commit=true", "on")])
def test_a_result_waits_for_the_flush_only_if_asked(make_app, store, query, expected):
    backend = make_app(backend=store.broker() + query).backend
    store.execute("CREATE TABLE IF NOT EXISTS kombu_pg.level (level text)")
    store.execute(
        "CREATE FUNCTION kombu_pg.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO kombu_pg.level VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$;"
        "CREATE TRIGGER note AFTER INSERT ON kombu_pg.result FOR EACH ROW EXECUTE FUNCTION kombu_pg.note()"
    )

    backend.mark_as_done("one", 1)

    assert store.execute("SELECT level FROM kombu_pg.level") == [(expected,)]


def test_a_lost_session_does_not_lose_a_result(backend, store):
    backend.mark_as_done("one", 1)
    store.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'kombu_pg'"
    )

    backend.mark_as_done("two", 2)

    assert backend.get_result("two") == 2


def test_retries_are_bounded_and_end_with_celerys_own_error(make_app):
    app = make_app(
        backend="pg://nobody@127.0.0.1:1/none",
        result_backend_max_retries=2, result_backend_max_sleep_between_retries_ms=10,
    )  # fmt: skip

    with pytest.raises(BackendGetMetaError):
        app.AsyncResult("one").state  # noqa: B018 - it asks


def test_always_retry_is_on_and_bounded_unless_the_user_says_otherwise(make_app):
    assert (make_app().backend.always_retry, make_app().backend.max_retries) == (True, 15)
    assert not make_app(result_backend_always_retry=False).backend.always_retry
    assert make_app(result_backend_max_retries=3).backend.max_retries == 3


def test_an_empty_database_is_refused_where_it_may_not_be_installed(make_app, empty):
    empty.execute("DROP SCHEMA kombu_pg CASCADE")
    app = make_app(backend=empty.broker(auto_install="false"))

    with pytest.raises(SchemaMissing):
        app.AsyncResult("one").state  # noqa: B018 - it asks


def test_a_backend_is_pickled_with_its_url_and_its_expiry(make_app):
    backend = make_app(result_expires=77).backend
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy = pickle.loads(pickle.dumps(backend))

    assert (copy.url, copy.expires) == (backend.url, 77)


@pytest.mark.parametrize("name", ["task_result", "task_message", "queue_status"])
def test_sqlalchemys_tables_are_the_stores_views(store, name):
    described = getattr(tables.tables(), name)

    columns = store.execute(
        "SELECT column_name, data_type FROM information_schema.columns"
        " WHERE table_schema = 'kombu_pg' AND table_name = %s ORDER BY ordinal_position", (name,)
    )  # fmt: skip

    assert [(column.name, column.type.compile(postgresql.dialect()).lower()) for column in described.columns] == [
        (column, kind) for column, kind in columns
    ]


def test_a_query_by_sqlalchemy_finds_failures_in_any_schema(make_app, store):
    backend = make_app(backend=store.broker(schema="other")).backend
    backend.mark_as_failure("bad", ValueError("no"), traceback="Traceback: no")
    backend.mark_as_done("good", 1)
    results = tables.tables("other").task_result

    with create_engine(store.url.replace("postgresql://", "postgresql+psycopg2://")).connect() as connection:
        found = connection.execute(select(results.c.id, results.c.traceback).where(results.c.state == "FAILURE")).all()
        connection.engine.dispose()

    assert found == [("bad", "Traceback: no")]


# The command


def run(store, *arguments):
    return CliRunner().invoke(pg, ["--url", store.broker(), "results", *arguments], env={"CELERY_PG_URL": None})


def test_the_command_lists_results_the_latest_first(backend, store):
    backend.mark_as_done("first", 1, request=request(task="shop.pay"))
    backend.mark_as_failure("second", ValueError("no"), traceback="Traceback\x1b[31m", request=request(task="shop.\0x"))

    lines = run(store).output.splitlines()
    told = json.loads(run(store, "--json").output)

    assert [line.split()[0] for line in lines[2:]] == ["second", "first"]
    assert [(one["id"], one["state"], one["worker"], one["retries"]) for one in told] == [
        ("second", "FAILURE", "w1@host", 2), ("first", "SUCCESS", "w1@host", 2),
    ]  # fmt: skip


def test_the_command_finds_by_state_by_task_and_by_id(backend, store):
    backend.mark_as_done("first", 1, request=request(task="shop.pay"))
    backend.mark_as_failure(
        "second", ValueError("no"), traceback="Traceback\x1b[31m", request=request(task="shop.ship")
    )

    def ids(*arguments):
        return [one["id"] for one in json.loads(run(store, *arguments, "--json").output)]

    assert ids("--state", "FAILURE") == ["second"]
    assert ids("--task", "shop.pay") == ["first"]
    assert ids("-n", "1") == ["second"]
    assert "Traceback\\x1b[31m" in run(store, "second").output
    assert (run(store, "none").exit_code, run(store, "first").exit_code) == (1, 0)
