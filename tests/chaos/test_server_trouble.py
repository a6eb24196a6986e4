import contextlib
from concurrent.futures import ThreadPoolExecutor

import kombu
import pytest
from watching import Consuming, Store, eventually

from kombu_pg.errors import Unavailable


@pytest.fixture
def store(site):
    """A store whose owner is nobody special, so that limits hold for him; `store.admin` is."""
    role = site.name.replace("chaos", "owner")
    admin = Store(site.database())
    admin.execute(f"CREATE ROLE {role} LOGIN; ALTER DATABASE {site.name} OWNER TO {role}")
    store = Store(admin.url.replace("postgres@", f"{role}@"))
    store.admin, store.role, store.name = admin, role, site.name
    store.install()
    return store


@contextlib.contextmanager
def setting(store, change, back):
    """The server's settings are changed, for new sessions, and there are no others."""
    store.admin.execute(change)
    end_sessions(store)
    yield
    store.admin.execute(back)


def end_sessions(store):
    store.admin.execute(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = '{store.role}'")


def read_only(store):
    role = f"ALTER ROLE {store.role}"
    return setting(
        store, f"{role} SET default_transaction_read_only = on", f"{role} RESET default_transaction_read_only"
    )


def too_many_connections(store):
    return setting(store, f"ALTER ROLE {store.role} CONNECTION LIMIT 0", f"ALTER ROLE {store.role} CONNECTION LIMIT -1")


@contextlib.contextmanager
def timeout(store, name):
    role = f"ALTER ROLE {store.role}"
    with setting(store, f"{role} SET {name} = '100ms'", f"{role} RESET {name}"), store.admin.session() as session:
        session.autocommit = False
        session.cursor().execute("LOCK TABLE kombu_pg.message IN EXCLUSIVE MODE")
        yield
        session.rollback()


def statement_timeout(store):
    return timeout(store, "statement_timeout")


def lock_timeout(store):
    return timeout(store, "lock_timeout")


@pytest.mark.parametrize("trouble", [read_only, too_many_connections, statement_timeout, lock_timeout])
def test_a_server_that_refuses_for_now_is_unavailable_and_the_next_publish_arrives(store, trouble):
    with Consuming(store.broker(poll_interval=1)) as consumer, kombu.Connection(store.broker()) as connection:
        consumer.rest()
        producer = kombu.Producer(connection.channel())
        producer.publish("before", routing_key="q")
        consumer.until(1, 30)

        with trouble(store), pytest.raises(Unavailable):
            producer.publish("meanwhile", routing_key="q")
        producer.publish("after", routing_key="q")

        assert next_of(store) == "after"


def next_of(store):
    """What a consumer that comes now is given, other than what it is given again."""
    with Consuming(store.broker(reconnect_grace=0)) as consumer:
        fresh = eventually(lambda: [m for m in consumer.rest() if m != "before"], 30)
        consumer.ack()
    return fresh[0]


def test_a_serialization_failure_is_unavailable_and_the_next_attempt_succeeds(store):
    store.admin.execute(f"ALTER ROLE {store.role} SET default_transaction_isolation = 'serializable'")
    with kombu.Connection(store.broker()) as connection, ThreadPoolExecutor() as pool:
        queue = kombu.Queue("q", channel=connection.channel(), expires=3600)
        queue.declare()
        store.admin.execute("UPDATE kombu_pg.queue SET used_at = used_at - interval '50 minutes'")

        with store.admin.session() as session:
            session.autocommit = False
            session.cursor().execute("UPDATE kombu_pg.queue SET used_at = used_at - interval '1 second'")
            declaring = pool.submit(queue.declare)
            eventually(lambda: is_waiting(store), 30, "the declaration waits for the row")
            session.commit()

        with pytest.raises(Unavailable, match="could not serialize"):
            declaring.result(30)
        queue.declare()


def is_waiting(store):
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s AND wait_event_type = 'Lock'"
    return store.admin.value(waiting, (store.role,))


def test_a_consumer_that_comes_upon_a_standby_finds_the_store_unavailable_for_now(site):
    primary = site.new_server("primary").create_from(site.template).start()
    url = site.database(primary)
    Store(url).install()
    standby = site.new_server("standby").create_standby_of(primary).start()
    url = url.replace(str(primary.port), str(standby.port))

    with kombu.Connection(Store(url).broker()) as connection, pytest.raises(Unavailable):
        connection.channel().queue_declare("mine", exclusive=True)
