import contextlib
import os
import signal
import subprocess
import sys
import threading
import traceback

import psycopg2
import pytest
from conftest import execute, through
from watching import eventually, process

from kombu_pg.database import Database, Session, Statement, wait_readable
from kombu_pg.errors import OptionError, Rejected, SchemaError, SchemaMissing, Unavailable
from kombu_pg.options import Options


def statement(sql, *parameters):
    return Statement(sql, parameters, lambda rows: rows[0][0] if rows else None)


ONE = statement("SELECT 1")


@pytest.fixture
def session(empty):
    with contextlib.closing(Session(empty.url, None)) as session:
        yield session


@pytest.fixture
def database(empty):
    database = Database(Options.parse(empty.broker()))
    database.retain()
    yield database
    database.release()


def terminate(store, pid):
    assert store.value("SELECT pg_terminate_backend(%s, 5000)", (pid,))


# A session


def test_a_notification_that_arrives_behind_a_result_is_not_lost(session, empty):
    session.run(statement("LISTEN news"))
    for number in range(20):
        # In one answer: the row, and what this session has told itself.
        session.run(statement("SELECT pg_notify('news', %s), 1", str(number)))

    assert [notification.payload for notification in session.notifications] == [str(n) for n in range(20)]


def test_a_notification_from_elsewhere_wakes_a_session_that_waits(session, empty):
    session.run(statement("LISTEN news"))

    empty.execute("NOTIFY news, 'hello'")

    assert wait_readable([session.fileno()], 5)
    assert session.receive() == (False, None)
    assert session.notifications.popleft().payload == "hello"


def test_what_is_sent_is_answered_without_blocking(session):
    session.send(statement("SELECT 42"))

    done, answer = eventually(lambda: (received := session.receive())[0] and received)

    assert (done, answer) == (True, 42)
    assert not session.busy


def test_a_statement_that_is_not_answered_in_time_costs_the_session(session, empty):
    with pytest.raises(Unavailable, match="timed out while waiting for an answer"):
        session.run(statement("SELECT pg_sleep(60)"), timeout=0.05)

    assert session.closed


def test_a_parameter_that_cannot_be_sent_costs_nothing(session):
    with pytest.raises(psycopg2.ProgrammingError):
        session.run(statement("SELECT %s", object()))

    assert session.run(ONE) == 1


def test_a_failed_statement_leaves_the_session_usable(session):
    with pytest.raises(SchemaMissing, match='run "celery -A app pg migrate"'):
        session.run(statement("SELECT * FROM nowhere.at_all"))

    assert session.run(ONE) == 1


def test_a_statement_that_fails_while_nobody_waits_leaves_the_session_usable(session):
    session.send(statement("SELECT 1 / 0"))

    with pytest.raises(Rejected, match="division by zero"):
        eventually(lambda: session.receive()[0])

    assert session.run(ONE) == 1


def test_closing_twice_is_closing_once(session):
    session.close()
    session.close()

    assert session.closed


# Errors


@pytest.mark.parametrize(
    ("sqlstate", "expected"),
    [
        ("57P01", Unavailable),  # admin shutdown
        ("57P03", Unavailable),  # starting up
        ("53100", Unavailable),  # disk full
        ("53300", Unavailable),  # too many connections
        ("25006", Unavailable),  # read-only: a standby
        ("40P01", Unavailable),  # deadlock
        ("55P03", Unavailable),  # lock not available
        ("22021", Rejected),  # not representable
        ("54000", Rejected),  # over a limit
        ("3F000", SchemaMissing),
        ("42P01", SchemaMissing),
        ("42501", SchemaError),
    ],
)
def test_the_servers_errors_are_what_the_caller_can_do(session, sqlstate, expected):
    raising = f"DO $$ BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = '{sqlstate}'; END $$"

    with pytest.raises(expected, match="refused") as raised:
        session.run(Statement(raising, None, lambda _: None))

    assert type(raised.value) is expected
    assert isinstance(raised.value.__cause__, psycopg2.Error)


def test_a_mistake_of_ours_passes_unchanged(session):
    with pytest.raises(psycopg2.errors.SyntaxError):
        session.run(statement("SELEKT"))


def test_an_administrator_who_ends_a_session_makes_it_unavailable(session, empty):
    terminate(empty, session.backend_pid)

    with pytest.raises(Unavailable, match=r"terminat|closed"):
        session.run(ONE)

    assert session.closed


def test_a_read_only_server_is_unavailable(session):
    session.run(statement("SET default_transaction_read_only = on"))

    with pytest.raises(Unavailable, match="read-only"):
        session.run(statement("CREATE TABLE t ()"))


def test_a_server_with_too_many_connections_is_unavailable(server_url, empty):
    role = f"wake_limited_{os.getpid()}"
    execute(server_url, f"CREATE ROLE {role} LOGIN PASSWORD 'limited-secret' CONNECTION LIMIT 0")
    try:
        with pytest.raises(Unavailable, match="too many connections"):
            Session(psycopg2.extensions.make_dsn(empty.url, user=role, password="limited-secret"), None)
    finally:
        execute(server_url, f"DROP ROLE {role}")


def test_a_server_that_is_not_there_is_unavailable():
    with pytest.raises(Unavailable, match="refused"):
        Session("postgresql://nobody:hidden-secret@127.0.0.1:1/nowhere", None)


def test_a_server_that_does_not_answer_is_given_up_in_time(tcp_proxy, empty):
    tcp_proxy.stall()

    with pytest.raises(Unavailable, match="timed out while waiting to connect"):
        Session(through(tcp_proxy, empty.url), 0.2)


def test_a_cut_connection_is_unavailable(tcp_proxy, empty):
    with contextlib.closing(Session(through(tcp_proxy, empty.url), None)) as session:
        tcp_proxy.drop()

        with pytest.raises(Unavailable):
            session.run(ONE)


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://nobody:hidden-secret@127.0.0.1:1/nowhere",
        "postgresql://nobody:hidden-secret@127.0.0.1:1/nowhere?sslmode=sometimes",
        "postgresql://nobody:hidden-secret%zz@127.0.0.1:1/nowhere",
        "postgresql://nobody@127.0.0.1:1/nowhere?password=hidden-secret&nonsense=1",
    ],
)
def test_no_error_shows_the_password(dsn):
    with pytest.raises((Unavailable, OptionError)) as raised:
        Session(dsn, 1)

    assert "hidden-secret" not in "".join(traceback.format_exception(raised.value))


# The database's sessions


def test_sessions_are_kept_for_the_next_statement(database, empty):
    first = database.run(statement("SELECT pg_backend_pid()"))

    assert database.run(statement("SELECT pg_backend_pid()")) == first
    assert len(sessions(empty)) == 1


def sessions(store):
    """The sessions of the code under test."""
    return store.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'kombu_pg'"
    )


def test_the_last_user_closes_what_was_kept(empty):
    database = Database(Options.parse(empty.broker()))
    database.retain()
    database.retain()
    database.run(ONE)

    database.release()
    assert len(sessions(empty)) == 1
    database.release()

    eventually(lambda: not sessions(empty))


def test_a_kept_session_that_broke_is_replaced(database, empty):
    first = database.run(statement("SELECT pg_backend_pid()"))
    terminate(empty, first)

    assert database.run(statement("SELECT pg_backend_pid()")) != first
    assert len(sessions(empty)) == 1


def test_a_session_that_breaks_in_use_is_not_kept(database, empty):
    with database.session() as session:
        terminate(empty, session.backend_pid)
        with pytest.raises(Unavailable):
            session.run(ONE)

    assert database.run(ONE) == 1


def test_a_session_that_was_left_in_the_middle_of_a_statement_is_not_kept(database, empty):
    with contextlib.suppress(KeyError), database.session() as session:
        session.send(statement("SELECT pg_sleep(60)"))
        raise KeyError

    assert database.run(ONE) == 1


def test_threads_do_not_share_a_session(database):
    together = threading.Barrier(4)
    pids = []

    def hold():
        with database.session() as session:
            together.wait(10)
            pids.append(session.backend_pid)

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(pids)) == 4


# Forks

PARENT = """
import os
from kombu_pg.database import database_for, Statement
from kombu_pg.options import Options
ONE = Statement("SELECT pg_backend_pid()", (), lambda rows: rows[0][0])
database = database_for(Options.parse(sys.argv[1]))
database.retain()
before = database.run(ONE)
"""


def test_a_child_that_exits_does_not_end_its_parents_sessions(empty):
    program = PARENT + (
        "\npid = os.fork()\nif not pid:\n    sys.exit(0)\nos.waitpid(pid, 0)\nprint(database.run(ONE) == before)"
    )

    with process(program, empty.broker()) as parent:
        assert parent.stdout.readline() == "True\n"


def test_a_child_opens_sessions_of_its_own(empty):
    program = PARENT + (
        "\nread, write = os.pipe()"
        "\nif not os.fork():"
        "\n    os.write(write, str(database_for(Options.parse(sys.argv[1])).run(ONE)).encode())"
        "\n    os._exit(0)"
        "\nos.wait()"
        "\nprint(int(os.read(read, 20)) != before and database.run(ONE) == before)"
    )

    with process(program, empty.broker()) as parent:
        assert parent.stdout.readline() == "True\n"


def test_a_killed_parents_sessions_end_although_its_child_lives(empty):
    program = PARENT + (
        "\nif not os.fork():"
        "\n    print(f'child {os.getpid()}\\n', end='', flush=True)"
        "\n    time.sleep(60)"
        "\nprint('parent\\n', end='', flush=True)"
        "\nsys.stdin.read()"
    )
    with process(program, empty.broker()) as parent:
        said = sorted([parent.stdout.readline(), parent.stdout.readline()])
        child = int(said[0].split()[1])
        assert len(sessions(empty)) == 1
        try:
            parent.kill()

            eventually(lambda: not sessions(empty), 2)
            os.kill(child, 0)  # it lives
        finally:
            os.kill(child, signal.SIGKILL)


def test_forking_while_others_connect_inherits_no_connection(empty):
    """A connection that is being made during a fork would be neither parent's nor child's."""
    program = PARENT + (
        "\nimport threading"
        "\nfrom kombu_pg.database import Session"
        "\nstop = []"
        "\ndef connect():"
        "\n    while not stop:"
        "\n        Session(database.options.dsn, None).close()"
        "\nthreads = [threading.Thread(target=connect) for _ in range(3)]"
        "\nfor thread in threads: thread.start()"
        "\nchildren = []"
        "\nfor _ in range(30):"
        "\n    child = os.fork()"
        "\n    if not child:"
        "\n        sockets = [fd for fd in os.listdir('/proc/self/fd')"
        "\n                   if 'socket:' in os.path.realpath(f'/proc/self/fd/{fd}')]"
        "\n        os._exit(len(sockets))"
        "\n    children.append(child)"
        "\nleft = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]"
        "\nstop.append(1)"
        "\nfor thread in threads: thread.join()"
        "\nprint(sum(left))"
    )

    with process("import warnings; warnings.simplefilter('ignore');" + program, empty.broker()) as parent:
        assert parent.stdout.readline() == "0\n"


def test_the_driver_is_not_loaded_before_it_is_needed():
    program = "import sys, kombu_pg; print('psycopg2' in sys.modules)"

    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert said == "False\n"
