"""Is what is published in the user's transaction committed with it, on whatever connection?"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import asyncpg
import django
import flask
import flask_sqlalchemy
import kombu
import psycopg
import psycopg2
import psycopg2.extras
import pytest
import sqlalchemy as sa
from acceptance.workers import hang_up
from celery import Celery, chain, chord, group
from django.conf import settings
from django.db import connections, transaction
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from watching import Consuming, eventually

from celery_pg import publish_in
from celery_pg.transaction import UnusableConnection
from kombu_pg.errors import Rejected


class Theirs:
    """A connection of the user's: what to give to publish_in, how they write, and how their transactions read."""

    def __init__(self, argument: Any, execute: Callable[[str], Any], begin: Callable[[], Any], nest: Callable[[], Any]):
        self.argument = argument
        self.execute = execute
        self.transaction = begin
        self.savepoint = nest


@contextlib.contextmanager
def psycopg2_connection(url):
    with contextlib.closing(psycopg2.connect(url)) as connection:

        def execute(statement):
            with connection.cursor() as cursor:
                cursor.execute(statement)

        yield Theirs(connection, execute, lambda: connection, lambda: savepoint(execute))


@contextlib.contextmanager
def savepoint(execute):
    execute("SAVEPOINT inner_block")
    try:
        yield
    except BaseException:
        execute("ROLLBACK TO SAVEPOINT inner_block")
        raise
    finally:
        execute("RELEASE SAVEPOINT inner_block")  # or the next one would hide those around it


@contextlib.contextmanager
def psycopg_connection(url, **options):
    with psycopg.connect(url, **options) as connection:
        yield Theirs(connection, connection.execute, connection.transaction, connection.transaction)


def psycopg_autocommit_connection(url):
    return psycopg_connection(url, autocommit=True)


def engine(url, driver):
    return sa.create_engine(url.replace("postgresql:", f"postgresql+{driver}:"), poolclass=sa.NullPool)


@contextlib.contextmanager
def sqlalchemy_connection(url):
    with engine(url, "psycopg2").connect() as connection:
        yield Theirs(
            connection,
            lambda statement: connection.execute(sa.text(statement)),
            connection.begin,
            connection.begin_nested,
        )


def of_session(session):
    return Theirs(session, lambda statement: session.execute(sa.text(statement)), session.begin, session.begin_nested)


@contextlib.contextmanager
def sqlalchemy_session(url, driver="psycopg2"):
    with orm.Session(engine(url, driver)) as session:
        yield of_session(session)


def sqlalchemy_session_on_psycopg(url):
    return sqlalchemy_session(url, "psycopg")


@contextlib.contextmanager
def flask_session(url):
    app = flask.Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = url.replace("postgresql:", "postgresql+psycopg2:")
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"poolclass": sa.NullPool}
    database = flask_sqlalchemy.SQLAlchemy(app)
    with app.app_context():
        yield of_session(database.session)


@contextlib.contextmanager
def django_alias(url):
    configure_django(url)
    try:
        yield of_django("default")
    finally:
        connections["default"].close()


@contextlib.contextmanager
def django_connection(url):
    configure_django(url)
    try:
        yield of_django(connections["default"])
    finally:
        connections["default"].close()


def of_django(argument):
    def execute(statement):
        with connections["default"].cursor() as cursor:
            cursor.execute(statement)

    return Theirs(argument, execute, transaction.atomic, transaction.atomic)


def configure_django(url):
    if not settings.configured:
        parts = psycopg2.extensions.parse_dsn(url)
        database = {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": parts["dbname"],
            "USER": parts.get("user", ""),
            "PASSWORD": parts.get("password", ""),
            "HOST": parts.get("host", ""),
            "PORT": parts.get("port", ""),
        }
        other = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
        settings.configure(DATABASES={"default": database, "other": other}, USE_TZ=True)
        django.setup()


SYNCHRONOUS = {
    "psycopg2": psycopg2_connection,
    "psycopg": psycopg_connection,
    "psycopg in autocommit mode": psycopg_autocommit_connection,
    "SQLAlchemy Connection": sqlalchemy_connection,
    "SQLAlchemy Session": sqlalchemy_session,
    "SQLAlchemy Session on psycopg": sqlalchemy_session_on_psycopg,
    "Flask-SQLAlchemy": flask_session,
    "Django alias": django_alias,
    "Django connection": django_connection,
}
ASYNCHRONOUS = {"AsyncSession on asyncpg": "asyncpg", "AsyncSession on psycopg": "psycopg"}


@pytest.fixture(params=[*SYNCHRONOUS, *ASYNCHRONOUS])
def tell(request, shop) -> Callable[[Callable[[Theirs], Any]], Any]:
    """Runs a story on a connection of each kind."""
    if request.param in SYNCHRONOUS:

        def told(story):
            with SYNCHRONOUS[request.param](shop.url) as theirs:
                return story(theirs)

        return told
    return lambda story: asyncio.run(on_async_session(shop.url, ASYNCHRONOUS[request.param], story))


async def on_async_session(url, driver, story):
    made = create_async_engine(url.replace("postgresql:", f"postgresql+{driver}:"), poolclass=sa.NullPool)
    async with AsyncSession(made) as session:
        answer = await session.run_sync(lambda inner: story(of_session(inner)))
    await made.dispose()
    return answer


@pytest.fixture
def shop(store):
    """A store beside the user's own table."""
    store.execute("CREATE TABLE purchase (id bigserial PRIMARY KEY, what text)")
    yield store
    store.execute("DROP TABLE purchase")


@pytest.fixture
def app(store) -> Iterator[Celery]:
    app = Celery("shop", broker=store.broker(), set_as_current=False)
    app.conf.task_ignore_result = True
    yield app
    hang_up(app)
    app.close()


@pytest.fixture
def receipt(app):
    @app.task(name="shop.receipt", shared=False)
    def receipt(*_args, **_kwargs):
        return None

    return receipt


def tasks(store):
    """Ids of the tasks that are in the store."""
    return {row[0] for row in store.execute("SELECT task_id FROM kombu_pg.message WHERE task IS NOT NULL")}


def purchases(store):
    return store.value("SELECT count(*) FROM purchase")


def kombu_queue(**options):
    return kombu.Queue("celery", kombu.Exchange("celery"), "celery", **options)


#: Tables of groups and chords, which are written before their tasks are.
BOOKKEEPING = ("group_result", "chord")

BUY = "INSERT INTO purchase (what) VALUES ('a book')"


def test_a_task_exists_with_the_commit_and_not_before(tell, shop, app, receipt):
    def story(theirs):
        with theirs.transaction():
            theirs.execute(BUY)
            with publish_in(theirs.argument, app):
                sent = receipt.delay(1)
            assert sent.id
            assert tasks(shop) == set()
        return sent.id

    assert tell(story) in tasks(shop)
    assert purchases(shop) == 1


def test_a_task_of_a_transaction_that_was_rolled_back_never_was(tell, shop, app, receipt):
    def story(theirs):
        with contextlib.suppress(ZeroDivisionError), theirs.transaction():
            theirs.execute(BUY)
            with publish_in(theirs.argument, app):
                receipt.delay(1)
            raise ZeroDivisionError

    tell(story)

    assert tasks(shop) == set()
    assert purchases(shop) == 0


def test_a_savepoint_takes_back_what_was_published_since_also_in_savepoints_within(tell, shop, app, receipt):
    def story(theirs):
        with theirs.transaction(), publish_in(theirs.argument, app):
            before = receipt.delay("before")
            with theirs.savepoint():
                inside = receipt.delay("inside")
                with contextlib.suppress(ZeroDivisionError), theirs.savepoint():
                    receipt.delay("taken back")
                    with theirs.savepoint():
                        receipt.delay("kept in what is taken back")
                    raise ZeroDivisionError
            return {before.id, inside.id, receipt.delay("after").id}

    assert tell(story) == tasks(shop)


def test_an_exception_out_of_the_block_leaves_the_transaction_to_its_owner(tell, shop, app, receipt):
    def story(theirs):
        with theirs.transaction():
            with contextlib.suppress(ZeroDivisionError), publish_in(theirs.argument, app):
                sent = receipt.delay()
                raise ZeroDivisionError
            theirs.execute(BUY)
        return {sent.id}

    assert tell(story) == tasks(shop)
    assert purchases(shop) == 1


def test_a_refused_task_leaves_the_transaction_usable(tell, shop, app, receipt):
    def story(theirs):
        with theirs.transaction(), publish_in(theirs.argument, app):
            with pytest.raises(Rejected, match="no queue bound to exchange"):
                receipt.apply_async(exchange="amq.direct", routing_key="nowhere")
            theirs.execute(BUY)
            return {receipt.delay().id}

    assert tell(story) == tasks(shop)
    assert purchases(shop) == 1


def test_every_canvas_is_part_of_the_transaction(tell, shop, app, receipt):
    def story(theirs):
        with theirs.transaction(), publish_in(theirs.argument, app):
            sent = group(receipt.si(n) for n in range(3)).delay()
            chained = chain(receipt.si(4), receipt.si(5)).delay()
            linked = app.send_task("shop.receipt", link=receipt.si(6), link_error=receipt.si(7))
            assert tasks(shop) == set()
        return {*(child.id for child in sent.children), chained.parent.id, linked.id}

    assert tell(story) == tasks(shop)


@pytest.mark.parametrize("kept", [True, False], ids=["committed", "rolled back"])
def test_a_chord_and_its_bookkeeping_go_with_the_transaction(tell, shop, app, receipt, kept):
    app.conf.update(task_ignore_result=False, result_backend=app.conf.broker_url)
    receipt.ignore_result = False

    def story(theirs):
        with contextlib.suppress(ZeroDivisionError), theirs.transaction():
            with publish_in(theirs.argument, app):
                chord((receipt.si(n) for n in range(3)), receipt.s()).delay()
                group(receipt.si(n) for n in range(2)).delay().save()
            if not kept:
                raise ZeroDivisionError

    tell(story)

    assert len(tasks(shop)) == (5 if kept else 0)
    assert {
        table: bool(shop.value(f"SELECT count(*) FROM kombu_pg.{table}")) for table in BOOKKEEPING
    } == dict.fromkeys(BOOKKEEPING, kept)


# Above READ COMMITTED ------------------------------------------------------------------------------------------


def test_a_snapshot_older_than_the_queue_is_no_obstacle(tell, shop, app, receipt):
    def story(theirs):
        with theirs.transaction():
            theirs.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            theirs.execute(BUY)
            with publish_in(theirs.argument, app):
                first = receipt.apply_async(queue="declared by this publish")
                later = receipt.apply_async(countdown=60)
            assert tasks(shop) == set()
        return {first.id, later.id}

    assert tell(story) == tasks(shop)
    assert shop.value("SELECT state FROM kombu_pg.task_message WHERE queue = 'celery'") == "scheduled"


@pytest.fixture
def theirs(shop):
    with psycopg2_connection(shop.url) as theirs:
        yield theirs


@contextlib.contextmanager
def serializable(theirs):
    with theirs.transaction():
        theirs.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        yield


def test_serializable_transactions_that_publish_into_one_queue_do_not_fail_each_other(shop, theirs, app, receipt):
    app.conf.task_queues = [kombu_queue(max_length=100)]
    with psycopg_connection(shop.url) as others, serializable(theirs):
        with publish_in(theirs.argument, app):
            one = receipt.delay()
        with serializable(others), publish_in(others.argument, app):
            two = receipt.delay()

    assert tasks(shop) == {one.id, two.id}


def test_a_transaction_that_the_user_tries_again_publishes_once(shop, theirs, app, receipt):
    """Two that count and then buy: one of them fails and begins anew."""
    attempts = []

    def buy_once_more(others):
        attempts.append(1)
        with serializable(theirs):
            theirs.execute("SELECT count(*) FROM purchase")
            theirs.execute(BUY)
            with publish_in(theirs.argument, app):
                sent = receipt.delay()
            if len(attempts) == 1:
                with serializable(others):
                    others.execute("SELECT count(*) FROM purchase")
                    others.execute(BUY)
        return sent.id

    with psycopg_connection(shop.url) as others:
        with pytest.raises(psycopg2.errors.SerializationFailure):
            buy_once_more(others)
        assert tasks(shop) == set()
        assert {buy_once_more(others)} == tasks(shop)


def test_a_full_queue_refuses_above_read_committed_too(shop, theirs, app, receipt):
    app.conf.task_queues = [kombu_queue(max_length=1, queue_arguments={"x-overflow": "reject-publish"})]
    kept = receipt.delay()

    with serializable(theirs), publish_in(theirs.argument, app):
        with pytest.raises(Rejected, match="full"):
            receipt.delay()
        theirs.execute(BUY)

    assert tasks(shop) == {kept.id}
    assert purchases(shop) == 1


def test_exchanges_route_above_read_committed_too(shop, theirs, app):
    with app.producer_pool.acquire() as producer:
        channel = producer.channel
        for kind, arguments in (("topic", {}), ("headers", {"paid": True})):
            channel.exchange_declare(kind, kind, durable=True, auto_delete=False)
            channel.queue_declare(f"by {kind}", durable=True, auto_delete=False)
            channel.queue_bind(f"by {kind}", kind, "order.#", arguments=arguments)

        with serializable(theirs), publish_in(theirs.argument, app):
            producer.publish("by its key", exchange="topic", routing_key="order.new", priority=3, expiration=60)
            producer.publish("by its header", exchange="headers", headers={"paid": True})
            producer.publish("to nobody", exchange="topic", routing_key="elsewhere")

    assert shop.execute(
        "SELECT q.name, convert_from(m.body, 'UTF8'), m.priority, m.expires_at > clock_timestamp() "
        "FROM kombu_pg.message m JOIN kombu_pg.queue q ON q.id = m.queue_id ORDER BY 1"
    ) == [("by headers", "by its header", 0, None), ("by topic", "by its key", 3, True)]


def test_a_message_for_a_queue_that_was_deleted_meanwhile_goes_with_the_queue(shop, theirs, app, receipt):
    with serializable(theirs), publish_in(theirs.argument, app):
        receipt.apply_async(queue="gone")
        with app.producer_pool.acquire() as producer:
            producer.channel.queue_delete("gone")

    with Consuming(shop.broker()):
        eventually(lambda: tasks(shop) == set(), 30, "the sweep removes what has no queue")


# Who is in the block -------------------------------------------------------------------------------------------


def at_once(shop):
    """How many of fifty transactions the server takes at once, beside what else is connected."""
    room = shop.value("SELECT current_setting('max_connections')::int - count(*) FROM pg_stat_activity")
    return next(count for count in (50, 25, 10) if count + 25 <= room or count == 10)


def test_fifty_threads_each_publish_in_a_transaction_of_their_own(shop, app, receipt):
    receipt.delay()  # the queue is there
    committed, failures = tasks(shop), []
    together = threading.Barrier(at_once(shop))
    connections_left = threading.Semaphore(together.parties)

    def work(number):
        try:
            with connections_left, psycopg2_connection(shop.url) as theirs:
                buy(number, theirs)
        except Exception as exc:  # noqa: BLE001 - shown by the assertion
            failures.append(exc)

    def buy(number, theirs):
        with contextlib.suppress(ZeroDivisionError), theirs.transaction():
            theirs.execute(BUY)
            with publish_in(theirs.argument, app):
                sent = [receipt.delay(number).id for _ in range(3)]
                together.wait(60)  # all of them are open
            committed.update(sent if number % 2 else [1 / 0])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)

    assert failures == []
    assert purchases(shop) == 25
    assert len(committed) == 76
    assert tasks(shop) == committed


def test_another_thread_publishes_outside_of_the_block(shop, theirs, app, receipt):
    with theirs.transaction(), publish_in(theirs.argument, app):
        thread = threading.Thread(target=receipt.delay)
        thread.start()
        thread.join(30)

        assert len(tasks(shop)) == 1


def test_another_asyncio_task_publishes_outside_of_the_block(shop, app, receipt):
    async def main():
        with psycopg2_connection(shop.url) as theirs, theirs.transaction(), publish_in(theirs.argument, app):
            receipt.delay()
            await asyncio.create_task(elsewhere())
            return tasks(shop)

    async def elsewhere():
        receipt.delay("at once")

    assert len(asyncio.run(main())) == 1
    assert len(tasks(shop)) == 2


def test_after_the_block_a_task_is_published_at_once(shop, theirs, app, receipt):
    with theirs.transaction():
        with publish_in(theirs.argument, app):
            receipt.delay()
        sent = receipt.delay()
        assert tasks(shop) == {sent.id}


def test_of_two_blocks_the_inner_one_counts(shop, theirs, app, receipt):
    with psycopg_connection(shop.url) as others, theirs.transaction(), publish_in(theirs.argument, app):
        with others.transaction(), publish_in(others.argument, app):
            inner = receipt.delay()
        assert tasks(shop) == {inner.id}
        outer = receipt.delay()

    assert tasks(shop) == {inner.id, outer.id}


def test_a_queue_that_was_declared_in_the_block_survives_its_rollback(shop, theirs, app, receipt):
    with contextlib.suppress(ZeroDivisionError), theirs.transaction(), publish_in(theirs.argument, app):
        receipt.apply_async(queue="new")
        raise ZeroDivisionError

    assert shop.value("SELECT count(*) FROM kombu_pg.queue WHERE name = 'new'") == 1


# What is left alone --------------------------------------------------------------------------------------------


def test_settings_cursors_and_paths_of_a_connection_are_neither_used_nor_changed(shop, app, receipt):
    settings = (
        "SELECT setting FROM pg_settings WHERE name IN ('search_path', 'transaction_isolation', 'client_encoding')"
    )
    with contextlib.closing(psycopg2.connect(shop.url, cursor_factory=psycopg2.extras.RealDictCursor)) as connection:
        connection.set_client_encoding("LATIN1")
        connection.set_session("REPEATABLE READ")
        with connection, connection.cursor() as cursor:
            cursor.execute("SET search_path TO ''; SET plan_cache_mode = force_custom_plan; " + settings)
            before = cursor.fetchall()
            with publish_in(connection, app):
                sent = app.send_task("shop.квитанция", ("за книгу",), queue="почта")
            cursor.execute(settings)
            assert cursor.fetchall() == before
        assert (connection.isolation_level, connection.autocommit) == (
            psycopg2.extensions.ISOLATION_LEVEL_REPEATABLE_READ,
            False,
        )

    assert tasks(shop) == {sent.id}


class Recording(psycopg2.extensions.connection):
    """A connection that notes what is executed on it, by whatever cursor."""

    executed: list[str]

    def cursor(self, *_args, **_kwargs):
        executed = self.executed

        class Cursor(psycopg2.extensions.cursor):
            def execute(self, statement, parameters=None):
                executed.append(statement)
                super().execute(statement, parameters)

        return super().cursor(cursor_factory=Cursor)


def test_one_statement_for_each_message_runs_in_the_transaction_and_at_first_two_that_ask_which_store_it_is(
    shop, app, receipt
):
    with contextlib.closing(psycopg2.connect(shop.url, connection_factory=Recording)) as connection:
        connection.executed = []
        for messages in (1, 3):
            with connection, publish_in(connection, app):
                for number in range(messages):
                    receipt.apply_async((number,), countdown=60 * number)

    allowed, installation, *statements = connection.executed
    assert "has_schema_privilege" in allowed
    assert ".installation" in installation
    assert len(statements) == 4
    assert all(statement.startswith("SELECT") and statement.count("enqueue_borrowed") == 1 for statement in statements)


def test_a_row_factory_of_psycopg_is_not_used(shop, app, receipt):
    factories = {"row_factory": psycopg.rows.dict_row, "cursor_factory": psycopg.RawCursor}
    with psycopg_connection(shop.url, **factories) as theirs, theirs.transaction(), publish_in(theirs.argument, app):
        sent = receipt.delay()

    assert tasks(shop) == {sent.id}


def test_a_session_is_flushed_so_that_a_new_object_has_its_key(shop, app, receipt):
    class Base(orm.DeclarativeBase):
        pass

    class Purchase(Base):
        __tablename__ = "purchase"
        id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
        what: orm.Mapped[str]

    with orm.Session(engine(shop.url, "psycopg2")) as session, session.begin():
        purchase = Purchase(what="a book")
        session.add(purchase)
        with publish_in(session, app):
            receipt.delay(purchase.id)

    argument = shop.value("SELECT convert_from(body, 'UTF8')::json #>> '{0,0}' FROM kombu_pg.message")
    assert int(argument) == shop.value("SELECT id FROM purchase")


DRIVERS = ("psycopg2", "psycopg", "sqlalchemy", "django")


def test_an_error_of_the_connection_reaches_its_owner_and_nothing_is_tried_again(tell, shop, app, receipt):
    def story(theirs):
        with contextlib.suppress(Exception), theirs.transaction(), publish_in(theirs.argument, app):
            receipt.delay()
            shop.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND state = 'idle in transaction'"
            )
            with pytest.raises(Exception) as raised:  # noqa: PT011 - of whatever driver
                receipt.delay()
            errors.append(raised.value)

    errors = []
    tell(story)

    assert [type(error).__module__.partition(".")[0] in DRIVERS for error in errors] == [True]
    assert tasks(shop) == set()


def test_a_transaction_that_has_failed_says_so_in_its_owners_words(tell, shop, app, receipt):
    def story(theirs):
        with contextlib.suppress(Exception), theirs.transaction(), publish_in(theirs.argument, app):
            receipt.delay()
            with contextlib.suppress(Exception):
                theirs.execute("SELECT 1 / 0")
            with pytest.raises(Exception) as raised:  # noqa: PT011 - of whatever driver
                receipt.delay()
            errors.append(raised.value)

    errors = []
    tell(story)

    assert [type(error).__module__.partition(".")[0] in DRIVERS for error in errors] == [True]
    assert tasks(shop) == set()


# Who is told ---------------------------------------------------------------------------------------------------

# The safety poll of these consumers is off: they learn of a message by being told, or not at all.


def told(shop, theirs, app, receipt, **options):
    """The task is delivered; the answer is whether housekeeping had to tell."""
    with Consuming(shop.broker(), "celery") as consuming:
        consuming.rest()
        with theirs.transaction(), publish_in(theirs.argument, app, **options):
            with theirs.savepoint():
                receipt.delay()
            left_to_housekeeping = shop.value("SELECT count(*) FROM kombu_pg.unannounced")
        consuming.until(1, 30)
        return left_to_housekeeping


def test_idle_consumers_learn_of_a_committed_task(tell, shop, app, receipt):
    tell(lambda theirs: told(shop, theirs, app, receipt))

    eventually(lambda: shop.value("SELECT count(*) FROM kombu_pg.unannounced") in (0, 1))


def test_wake_tells_idle_consumers_with_the_commit(tell, shop, app, receipt):
    tell(lambda theirs: told(shop, theirs, app, receipt, wake=True))


@pytest.mark.parametrize("kind", ["SQLAlchemy Session", "Flask-SQLAlchemy", "Django alias"])
def test_after_the_commit_of_a_session_or_of_atomic_they_are_told_at_once(shop, app, receipt, kind):
    with SYNCHRONOUS[kind](shop.url) as theirs, Consuming(shop.broker(), "celery") as consuming:
        consuming.rest()
        with theirs.transaction(), publish_in(theirs.argument, app), theirs.savepoint():
            receipt.delay()
        assert shop.value("SELECT count(*) FROM kombu_pg.unannounced") == 0
        consuming.until(1, 30)


@pytest.mark.parametrize("mode", ["conditional_savepoint", "create_savepoint"])
def test_of_a_session_in_an_outer_transaction_they_learn_after_the_outer_commit(shop, app, receipt, mode):
    with (
        engine(shop.url, "psycopg2").connect() as connection,
        orm.Session(connection, join_transaction_mode=mode) as session,
        Consuming(shop.broker(), "celery") as consuming,
    ):
        outer = connection.begin()
        with publish_in(session, app):
            receipt.delay()
        session.commit()
        consuming.rest()
        outer.commit()

        consuming.until(1, 5)


def test_a_commit_inside_the_block_tells_and_the_block_goes_on(shop, app, receipt):
    with orm.Session(engine(shop.url, "psycopg2")) as session, Consuming(shop.broker(), "celery") as consuming:
        consuming.rest()
        with publish_in(session, app):
            receipt.delay()
            session.commit()
            consuming.until(1, 30)
            receipt.delay()
        session.rollback()

    assert len(tasks(shop)) == 1


def test_what_was_rolled_back_is_announced_to_nobody(shop, app, receipt):
    with orm.Session(engine(shop.url, "psycopg2")) as session:
        with publish_in(session, app):
            receipt.delay()
        session.rollback()
        hook = session.info["celery_pg.connections"]
        assert [wakes.take(database) for database, wakes in hook.wakes.items()] == [None]


def test_a_hook_that_fails_does_not_fail_the_commit(shop, app, receipt, caplog):
    with orm.Session(engine(shop.url, "psycopg2")) as session:
        with session.begin(), publish_in(session, app):
            sent = receipt.delay()
            shop.execute("ALTER FUNCTION kombu_pg.wake(bigint[]) RENAME TO awake")
        assert "not told" in caplog.text

    assert tasks(shop) == {sent.id}


# What is refused -----------------------------------------------------------------------------------------------


def refused(connection, app, words):
    with pytest.raises(UnusableConnection, match=words), publish_in(connection, app):
        pass


def test_autocommit_is_refused(shop, app):
    configure_django(shop.url)
    with contextlib.closing(psycopg2.connect(shop.url)) as connection:
        connection.autocommit = True
        refused(connection, app, "autocommit")
    with psycopg.connect(shop.url, autocommit=True) as connection:
        refused(connection, app, "autocommit")
    with engine(shop.url, "psycopg2").connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        refused(connection, app, "autocommit")
        refused(orm.Session(connection), app, "autocommit")
    with contextlib.closing(connections["default"]):
        refused("default", app, "autocommit")


def test_a_transaction_that_ends_in_the_block_leaves_no_autocommit_behind(shop, app, receipt):
    with psycopg.connect(shop.url, autocommit=True) as connection:
        connection.execute("BEGIN")
        with publish_in(connection, app):
            receipt.delay()
            connection.execute("ROLLBACK")
            with pytest.raises(UnusableConnection, match="autocommit"):
                receipt.delay()

    assert tasks(shop) == set()


def test_a_connection_to_another_store_is_refused_and_its_transaction_is_usable(shop, app, database_url, receipt):
    with psycopg2_connection(database_url) as elsewhere, elsewhere.transaction():
        refused(elsewhere.argument, app, 'no schema "kombu_pg"|leads to another store')
        elsewhere.execute("SELECT 1")
    shop.install(schema="other")
    with Celery(broker=shop.broker(schema="other"), set_as_current=False) as other:
        with psycopg2_connection(shop.url) as theirs, theirs.transaction():
            with publish_in(theirs.argument, other):
                other.send_task("t")
            assert shop.value("SELECT count(*) FROM kombu_pg.message") == 0
        hang_up(other)


def test_a_store_that_was_installed_anew_is_recognised(shop, theirs, app, receipt):
    with theirs.transaction(), publish_in(theirs.argument, app):
        receipt.delay()
    hang_up(app)
    shop.execute("DROP SCHEMA kombu_pg CASCADE")
    shop.install()
    app.amqp.queues.clear()

    with theirs.transaction(), publish_in(theirs.argument, app):
        sent = app.send_task("shop.receipt", queue="after")

    assert tasks(shop) == {sent.id}


def test_a_role_that_may_not_publish_is_told_so_and_keeps_its_transaction(shop, app):
    shop.execute("CREATE ROLE publish_in_guest LOGIN")
    try:
        with contextlib.closing(psycopg2.connect(shop.url)) as connection, connection, connection.cursor() as cursor:
            cursor.execute("SET ROLE publish_in_guest")
            refused(connection, app, "GRANT USAGE ON SCHEMA kombu_pg")
            cursor.execute("SELECT 1")
    finally:
        shop.execute("DROP ROLE publish_in_guest")


def test_what_is_no_connection_to_postgresql_is_refused(shop, app):
    configure_django(shop.url)
    with orm.Session(sa.create_engine("sqlite://")) as session:
        refused(session, app, "sqlite, not to PostgreSQL")
    refused("other", app, "sqlite, not PostgreSQL")
    refused("nowhere", app, "no database 'nowhere'")
    refused(engine(shop.url, "psycopg2"), app, "takes a SQLAlchemy Session .* not Engine")
    refused(None, app, "not NoneType")


def test_asynchronous_connections_are_refused_with_the_way_out(shop, app):
    async def main():
        made = create_async_engine(shop.url.replace("postgresql:", "postgresql+asyncpg:"), poolclass=sa.NullPool)
        async with AsyncSession(made) as session:
            refused(session, app, "run_sync")
        async with made.connect() as connection:
            refused(connection, app, "run_sync")
        async with await psycopg.AsyncConnection.connect(shop.url) as connection:
            refused(connection, app, "publish_task")
        connection = await asyncpg.connect(shop.url)
        refused(connection, app, "publish_task")
        await connection.close()
        await made.dispose()

    asyncio.run(main())


def test_an_app_with_another_broker_is_refused(shop, theirs):
    with (
        Celery("rabbit", broker="amqp://guest:s3cret@h//", set_as_current=False) as app,
        pytest.raises(UnusableConnection, match="'rabbit' is amqp://") as raised,
        publish_in(theirs.argument, app),
    ):
        pass

    assert "s3cret" not in str(raised.value)


def test_the_current_app_is_the_default(shop, theirs):
    with Celery("current", broker=shop.broker()) as app:
        with theirs.transaction(), publish_in(theirs.argument):
            sent = app.send_task("t")
            assert tasks(shop) == set()
        hang_up(app)

    assert tasks(shop) == {sent.id}
