"""Can an operator look after the queues from a shell?"""

import datetime
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import kombu
import pytest
from celery import Celery
from click.testing import CliRunner, Result
from terminal import MAIN, on_terminal
from watching import Consuming, Store, eventually, publish, publisher

from celery_pg.commands import pg
from celery_pg.screen import duration, number, shortened, visible
from celery_pg.store.operator import CAP
from kombu_pg import schema
from kombu_pg.url import Url

NEWEST = max(schema.migrations())
PROMPT = 2.0
READING = (["status"], ["status", "--all"], ["queues"], ["peek", "q"], ["check"], ["migrate"])
WRITING = (["pause", "q"], ["resume", "q"], ["purge", "q", "-f"])


def run(url: str, *arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(pg, ["--url", url, *arguments], input=answer, env={"CELERY_PG_URL": None})


def told(url: str, *arguments: str) -> str:
    """What a command that succeeds prints."""
    result = run(url, *arguments)
    assert result.exit_code == 0, result.output
    return result.output


def as_json(url: str, *arguments: str):
    return json.loads(told(url, *arguments, "--json"))


@pytest.fixture
def broker(store: Store) -> str:
    return store.broker()


@pytest.fixture
def queue(broker: str) -> str:
    declare(broker, "q")
    return "q"


def test_a_purge_ends_while_somebody_publishes_as_fast_as_it_drops(store: Store, broker: str, queue: str) -> None:
    store.execute(
        "CREATE FUNCTION one_more() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO kombu_pg.ready (queue_id, band, position, message_id, size)"
        " VALUES (old.queue_id, old.band, old.position + 1, old.position + 1, 0); RETURN old; END $$;"
        "CREATE TRIGGER one_more AFTER DELETE ON kombu_pg.ready FOR EACH ROW EXECUTE FUNCTION one_more()"
    )
    publish(broker, "first")

    assert as_json(broker, "purge", queue, "-f") == {"queue": queue, "purged": 1}
    store.execute("DROP FUNCTION one_more CASCADE")


def declare(broker: str, name: str, **arguments: object) -> None:
    with kombu.Connection(broker) as connection:
        kombu.Queue(name, channel=connection.channel(), **arguments).declare()


def status_of(url: str, name: str) -> dict:
    return next(queue for queue in as_json(url, "status")["queues"] if queue["name"] == name)


# Schema


def test_migrate_installs_an_empty_database_and_does_nothing_the_second_time(empty):
    url = empty.broker()

    assert as_json(url, "migrate") == {"schema": "kombu_pg", "before": 0, "version": NEWEST}
    assert as_json(url, "migrate") == {"schema": "kombu_pg", "before": NEWEST, "version": NEWEST}
    assert "nothing to do" in told(url, "migrate")


def test_migrate_brings_an_old_schema_to_this_release(empty):
    url = empty.broker(schema="other")
    old = "\n".join(sql for version, sql in schema.migrations().items() if version <= 5).replace("kombu_pg", "other")
    empty.execute(f"CREATE SCHEMA other; {old}; INSERT INTO other.installation (version, serves) VALUES (5, 1)")
    assert run(url, "check").exit_code == 1

    assert as_json(url, "migrate") == {"schema": "other", "before": 5, "version": NEWEST}

    assert run(url, "check").exit_code == 0
    assert as_json(url, "status")["schema"] == {"name": "other", "version": NEWEST, "release": NEWEST}


@pytest.mark.parametrize("command", [["check"], ["status"], ["queues"], ["peek", "q"], ["pause", "q"], ["purge", "q"]])
def test_without_a_schema_commands_say_what_to_run_and_install_nothing(empty, command):
    result = run(empty.broker(), *command)

    assert result.exit_code == 1
    assert 'schema "kombu_pg" is not installed: run "celery -A app pg migrate"' in result.output
    assert empty.value("SELECT to_regclass('kombu_pg.installation')") is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [("version = 1", f"is at version 1 but this release needs {NEWEST}"), ("serves = 99", "no longer serves code")],
)
def test_check_finds_a_schema_that_does_not_fit(store, broker, change, sentence):
    store.execute(f"UPDATE kombu_pg.installation SET {change}")

    result = run(broker, "check")
    answer = run(broker, "check", "--json")

    assert (result.exit_code, answer.exit_code) == (1, 1)
    assert sentence in result.output
    assert sentence in json.loads(answer.output)["problem"]


def test_check_is_content_with_a_fresh_install(broker):
    assert as_json(broker, "check") == {
        "schema": "kombu_pg", "version": NEWEST, "release": NEWEST, "ok": True, "problem": None,
    }  # fmt: skip


def test_sql_needs_no_server_where_it_is_told_the_version():
    nowhere = "pg://nobody:hidden@127.0.0.1:1/none?schema=jobs"

    assert "nothing to do" in told(nowhere, "sql", "--since", str(NEWEST))
    assert "CREATE SCHEMA IF NOT EXISTS jobs" in told(nowhere, "sql", "--since", "0")
    assert "kombu_pg" not in told(nowhere, "sql", "--since", "5")
    assert CliRunner().invoke(pg, ["sql", "--since", "5"], env={"CELERY_PG_URL": None}).exit_code == 0


def test_a_dba_can_run_the_sql_that_migrate_would_run(empty):
    url = empty.broker()

    empty.execute(told(url, "sql"))

    assert run(url, "check").exit_code == 0
    assert "nothing to do" in told(url, "sql")


# Status


def test_status_counts_what_is_ready_scheduled_and_held(store, broker, queue):
    due = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1)
    publish(broker, *range(5))
    publish(broker, "later", headers={"task": "t", "id": "1", "eta": due.isoformat()})
    with Consuming(broker, prefetch=2) as consuming:
        consuming.until(2)
        seen = as_json(broker, "status")

    found = next(queue for queue in seen["queues"] if queue["name"] == "q")
    assert {name: found[name] for name in ("ready", "unacked", "scheduled", "dead", "consumers", "capped")} == {
        "ready": 3, "unacked": 2, "scheduled": 1, "dead": 0, "consumers": 1, "capped": [],
    }  # fmt: skip
    assert 0 < found["oldest_age"] < 60
    assert 3500 < found["next_due"] <= 3600


def test_status_says_which_process_holds_how_much_and_for_how_long(store, broker, queue):
    with publisher(broker) as producer:
        producer.publish({}, routing_key="q", headers={"task": "shop.charge", "id": "1"})
    with Consuming(broker) as consuming:
        consuming.until(1)
        store.execute("UPDATE kombu_pg.lease SET claimed_at = claimed_at - interval '1 hour'")
        (consumer,) = as_json(broker, "status")["consumers"]
        screen = told(broker, "status")

    assert (consumer["pid"], consumer["hostname"], consumer["alive"]) == (os.getpid(), socket.gethostname(), True)
    assert (consumer["queues"], consumer["held"]) == (["q"], 1)
    assert 3600 <= consumer["held_for"] < 3660
    assert [held["task"] for held in consumer["longest"]] == ["shop.charge"]
    assert re.search(rf"{os.getpid()}\s+alive\s+1\s+60 min\s+shop.charge\s+q", screen)


def test_a_dead_process_is_shown_as_lost_and_does_not_count_as_a_consumer(store, broker, queue):
    publish(broker, "held")
    store.execute(
        "WITH dead AS (INSERT INTO kombu_pg.consumer (hostname, pid, backend_pid, heartbeat, epoch, lost_at,"
        "   grace, heartbeat_timeout)"
        "  VALUES ('morgue', 4711, 1, false, '', clock_timestamp() - interval '2 s', 3, 30) RETURNING id),"
        " held AS (INSERT INTO kombu_pg.lease (consumer_id, token, message_ids)"
        "  SELECT d.id, 1, array_agg(r.message_id) FROM dead d, kombu_pg.ready r GROUP BY d.id)"
        " INSERT INTO kombu_pg.subscription (consumer_id, token, tag, queue_id)"
        "  SELECT d.id, 1, 't', q.id FROM dead d, kombu_pg.queue q"
    )

    (consumer,) = as_json(broker, "status")["consumers"]

    assert (consumer["alive"], consumer["held"]) == (False, 1)
    assert status_of(broker, "q")["consumers"] == 0
    assert re.search(r"morgue\s+4711\s+lost 2\.\d s\s+1 ", told(broker, "status"))


def test_status_names_the_session_that_keeps_vacuum_from_its_work(store, broker):
    with store.session() as session, session.cursor() as cursor:
        cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone()

        horizon = as_json(broker, "status")["horizon"]
        screen = told(broker, "status")

    assert (horizon["pid"], horizon["application"], horizon["state"]) == (pid, "test", "idle in transaction")
    assert f"held back by session {pid} test" in screen


def test_dead_letters_of_a_queue_that_is_gone_are_still_shown(store, broker):
    store.execute(
        "INSERT INTO kombu_pg.dead_letter (id, queue_id, queue, reason, enqueued_at, returns, priority, exchange,"
        " routing_key, properties, body) SELECT n, 99, 'gone', 'rejected', now(), 0, 0, '', '', '', ''"
        " FROM generate_series(1, 3) AS n"
    )

    found = status_of(broker, "gone")

    assert (found["dead"], found["deleted"]) == (3, True)
    assert re.search(r"gone .* 3 .*deleted", told(broker, "status"))


def test_queues_of_a_process_are_left_out_of_the_screen_while_they_are_empty(broker):
    declare(broker, "mail")
    declare(broker, "host.celery.pidbox", auto_delete=True, durable=False)

    screen = told(broker, "status")

    assert "mail" in screen
    assert "pidbox" not in screen
    assert "and 1 for control" in screen
    assert "pidbox" in told(broker, "status", "--all")


def fill(store: Store, count: int) -> None:
    """Put so many messages into queue q."""
    store.execute(
        "INSERT INTO kombu_pg.message (id, queue_id, priority, band, exchange, routing_key, properties, body)"
        " SELECT nextval('kombu_pg.message_id_seq'), q.id, 0, 3, '', 'q', '{}', 'x'"
        " FROM kombu_pg.queue q, generate_series(1, %s) WHERE q.name = 'q'",
        (count,),
    )
    store.execute(
        "INSERT INTO kombu_pg.ready (queue_id, band, position, message_id, size)"
        " SELECT m.queue_id, m.band, m.id, m.id, 1 FROM kombu_pg.message m"
    )


def test_counts_end_at_the_cap_and_say_so(store, broker, queue):
    fill(store, CAP + 5)

    found = status_of(broker, "q")

    assert (found["ready"], found["capped"]) == (CAP, ["ready"])
    assert "10,000+" in told(broker, "status")


@pytest.mark.parametrize("count", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_status_and_peek_take_less_than_a_second_however_much_is_queued_or_dead(store, broker, queue, count):
    with store.session() as holder, holder.cursor() as cursor:
        fill(store, count)
        cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        store.execute("DELETE FROM kombu_pg.ready WHERE message_id % 10 <> 0")  # dead, and not to be removed

        begun = time.monotonic()
        found = status_of(broker, "q")
        told(broker, "peek", "q")
        seconds = time.monotonic() - begun

    assert found["ready"] == min(CAP, count // 10)
    assert seconds < 1


# Messages of every kind


@pytest.fixture
def odd(store: Store, broker: str, queue: str) -> str:
    """A broker whose queue q holds what SQL's json cannot and a terminal should not."""
    declare(broker, "\x1b]0;owned\x07", durable=True)
    app = Celery("odd", broker=broker, set_as_current=False)
    app.conf.task_default_queue = "q"
    app.send_task("nul\0name", ("a\0b",), task_id="id\0")
    app.send_task("lone\ud800", ("\ud800",), {"\ud800": 1}, headers={"x\0": "\ud800", "raw": b"\xff\0"})
    app.send_task("esc\x1b[2J", ("\x1b[31m", "\u202e"), headers={"when": datetime.datetime.now(), "t": "\x9b2J"})
    app.close()
    with publisher(broker) as producer:
        for body in (b"\0\xff\x1b[2J", b"\xed\xa0\x80", b""):
            producer.publish(body, routing_key="q", content_type="application/octet-stream", content_encoding="binary")
        producer.publish({"nan": float("nan")}, routing_key="q", headers={"nan": float("nan")})
    store.execute(
        "UPDATE kombu_pg.message SET properties = 'not json' WHERE id = (SELECT max(id) FROM kombu_pg.message)"
    )
    return broker


@pytest.mark.parametrize("command", [*READING, *WRITING], ids=" ".join)
def test_every_command_works_with_a_nul_a_lone_surrogate_and_escapes_in_the_store(odd, command):
    assert_harmless(odd, *command)


@pytest.mark.parametrize("command", ["list", "show", "retry", "delete"])
def test_every_command_works_with_such_dead_letters_and_results(odd, store, command):
    with kombu.Connection(odd) as connection:
        for _ in range(6):
            connection.default_channel.basic_get("q").dead_letter("so\0it\ud800is\x1b[2J")
    backend = Celery("odd", broker=odd, backend=odd, set_as_current=False).backend
    backend.store_result("t", {"\0": "\ud800\x1b[2J"}, "PROGRESS")
    (last,) = store.execute("SELECT max(id) FROM kombu_pg.dead_letter")[0]

    assert_harmless(odd, "results")
    if command == "list":
        assert_harmless(odd, "dead", "list")
    else:
        assert_harmless(odd, "dead", command, str(last), *([] if command == "show" else ["-f"]))


@pytest.mark.parametrize("view", ["queue_status", "task_message", "task_dead_letter", "task_result"])
def test_every_view_shows_such_messages(odd, store, view):
    with kombu.Connection(odd) as connection:
        for _ in range(3):
            connection.default_channel.basic_get("q").dead_letter("so\0it\ud800is\x1b[2J")
    app = Celery("odd", broker=odd, backend=odd, set_as_current=False)
    app.send_task("esc\x1b[2J", ("\0\ud800",), queue="q")
    app.backend.store_result("t", "\0\ud800", "PROGRESS")

    assert store.execute(f"SELECT * FROM kombu_pg.{view}")


def assert_harmless(broker: str, *command: str) -> None:
    """It succeeds twice, and what it prints moves no cursor."""
    screen = told(broker, *command)
    result = run(broker, *command, "--json")

    assert screen
    if result.exit_code:  # what was asked for was done by the first
        assert command[0] == "dead", result.output
    else:
        assert json.loads(result.output) is not None
    assert set(re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", screen)) == set()


def test_peek_shows_a_task_by_name_arguments_and_age(broker, queue):
    app = Celery("peeked", broker=broker, set_as_current=False)
    app.send_task("shop.charge", (1, "mug"), {"card": "visa"}, queue="q", task_id="an-id", tenant="acme",
                  headers={"tenant": "acme"})  # fmt: skip
    app.send_task("shop.later", countdown=3600, queue="q")
    app.close()

    screen = told(broker, "peek", "q")
    first, second = as_json(broker, "peek", "q")

    assert "shop.charge" in screen
    assert "(1, 'mug') {'card': 'visa'}" in screen
    assert "tenant=acme" in screen
    assert "due in 60 min" in screen
    assert (first["task"], first["task_id"], first["due_in"], first["returns"]) == ("shop.charge", "an-id", None, 0)
    assert first["headers"]["tenant"] == "acme"
    assert (second["task"], 3500 < second["due_in"] <= 3600) == ("shop.later", True)


def test_peek_shows_as_many_as_asked_in_the_order_of_claims_and_claims_none(broker):
    declare(broker, "q", queue_arguments={"x-max-priority": 5})
    for priority in (0, 5, 3):
        publish(broker, priority, priority=priority)

    seen = [message["priority"] for message in as_json(broker, "peek", "q", "-n", "2")]

    assert seen == [5, 3]
    with kombu.Connection(broker) as connection:
        got = [connection.default_channel.basic_get("q", no_ack=True).payload for _ in range(3)]
    assert got == [5, 3, 0]


def test_peek_shortens_long_arguments_on_the_screen(broker, queue):
    app = Celery("long", broker=broker, set_as_current=False)
    app.send_task("t", ("x" * 5000,), queue="q")
    app.close()

    assert max(map(len, told(broker, "peek", "q").splitlines())) < 300


def test_an_empty_queue_and_an_empty_store_say_so(broker):
    assert "there is no queue" in told(broker, "queues")
    assert "nothing will run" in told(broker, "status")
    declare(broker, "q")
    assert "nothing waits in queue 'q'" in told(broker, "peek", "q")
    assert as_json(broker, "peek", "q") == []


def test_queues_lists_what_was_declared(broker):
    declare(broker, "mail", queue_arguments={"x-max-priority": 10})
    declare(broker, "mine", durable=False, auto_delete=True)

    mail, mine = as_json(broker, "queues")

    assert (mail["name"], mail["durable"], mail["arguments"]) == ("mail", True, {"x-max-priority": 10})
    assert (mine["durable"], mine["auto_delete"]) == (False, True)
    assert "x-max-priority=10" in told(broker, "queues")


# Purge, pause, resume


def test_purge_asks_first_and_leaves_what_is_held(store, broker, queue):
    publish(broker, *range(5))
    with Consuming(broker, prefetch=2) as consuming:
        consuming.until(2)
        refused = run(broker, "purge", "q", answer="n\n")
        assert (refused.exit_code, status_of(broker, "q")["ready"]) == (1, 3)
        accepted = run(broker, "purge", "q", answer="y\n")
        left = status_of(broker, "q")

    assert "dropped 3 messages" in accepted.output
    assert (left["ready"], left["unacked"]) == (0, 2)


def test_purge_drops_scheduled_messages_too_in_batches(store, broker, queue):
    fill(store, 25_000)
    due = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1)
    publish(broker, "later", headers={"task": "t", "id": "1", "eta": due.isoformat()})

    assert as_json(broker, "purge", "q", "-f") == {"queue": "q", "purged": 25_001}


def test_a_paused_queue_gives_nothing_until_it_is_resumed_and_then_wakes_who_is_idle(store, broker, queue):
    with Consuming(broker) as consuming:
        assert consuming.rest() == []
        eventually(lambda: store.idle() == 1)
        assert as_json(broker, "pause", "q") == {"queue": "q", "paused": True, "changed": True}
        publish(broker, "waits")
        assert consuming.rest(quiet=0.5) == []

        assert as_json(broker, "resume", "q") == {"queue": "q", "paused": False, "changed": True}

        assert consuming.until(1, within=PROMPT) == ["waits"]


def test_a_queue_that_is_resumed_while_a_consumer_is_about_to_sleep_wakes_it(store, broker, queue):
    told(broker, "pause", "q")
    publish(broker, "waits")
    with store.session() as holder, holder.cursor() as cursor, Consuming(broker) as consuming:
        # Held exclusively, the idle lock stops the claim between its look and its sleep.
        key = "SELECT {}(kombu_pg.lock_key('idle', id)) FROM kombu_pg.queue WHERE name = 'q'"
        cursor.execute(key.format("pg_advisory_lock"))
        with ThreadPoolExecutor(1) as pool:
            received = pool.submit(consuming.until, 1, within=PROMPT)
            eventually(lambda: store.value("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"))
            told(broker, "resume", "q")
            cursor.execute(key.format("pg_advisory_unlock"))

            assert received.result() == ["waits"]


def test_a_busy_consumer_takes_nothing_more_once_its_queue_is_paused(broker, queue):
    publish(broker, *range(10))
    with Consuming(broker, prefetch=2) as consuming:
        consuming.until(2)
        told(broker, "pause", "q")
        consuming.ack()
        assert len(consuming.rest(quiet=0.5)) == 2

        told(broker, "resume", "q")

        consuming.until(4, within=PROMPT)


def test_pausing_twice_says_so_and_status_shows_it(broker, queue):
    told(broker, "pause", "q")

    assert "was paused already" in told(broker, "pause", "q")
    assert status_of(broker, "q")["paused"] is True
    assert re.search(r"q .* paused", told(broker, "status"))


@pytest.mark.parametrize("command", [["peek"], ["purge", "-f"], ["pause"], ["resume"]], ids=" ".join)
def test_an_unknown_queue_is_refused_with_the_nearest_name(broker, command):
    declare(broker, "mail")

    result = run(broker, *command, "mial")

    assert result.exit_code == 2
    assert "there is no queue 'mial': did you mean 'mail'?" in result.output


# Where to


def test_no_password_is_ever_shown():
    commands: Sequence[Sequence[str]] = (*READING, *WRITING, ["sql"])
    for command in commands:
        result = run("pg://user:s3cret%2Fword@127.0.0.1:1/none", *command)
        assert result.exit_code == 1, command
        assert "Connection refused" in result.output or "refused" in result.output
        assert "s3cret" not in result.output
    assert "s3cret" not in run("pg://user:s3cret@host/x?schma=y", "status").output
    assert "s3cret" not in run("pg://user:s3cret@host:port/x", "status").output


@pytest.mark.parametrize(
    ("url", "sentence"),
    [("pg://h/d?schma=x", 'did you mean "schema"'), ("redis://h/0", "unknown URL scheme"), ("", "which database?")],
)
def test_a_url_that_is_none_of_ours_is_a_matter_of_usage(url, sentence):
    result = run(url, "status")

    assert result.exit_code == 2
    assert sentence in result.output


def shell(*command: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CELERY_")}
    return subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, timeout=60)


def test_the_same_commands_belong_to_celery_and_take_the_apps_broker(store):
    url = str(Url.cut(store.broker(schema="kombu_pg")))
    celery = (sys.executable, "-m", "celery")

    ours = shell(*celery, "--broker", url, "pg", "check")
    foreign = shell(*celery, "--broker", "amqp://guest:hidden@127.0.0.1:1//", "pg", "check")

    assert (ours.returncode, foreign.returncode) == (0, 2), ours.stderr + foreign.stderr
    assert f"is at version {NEWEST}" in ours.stdout
    assert "not PostgreSQL: name the app with -A, or give --url" in foreign.stderr
    assert "hidden" not in foreign.stderr


def test_transport_options_of_the_app_count(empty, tmp_path):
    url = str(Url.cut(empty.url)).replace("postgresql://", "pg://")
    (tmp_path / "shop.py").write_text(
        f"from celery import Celery\napp = Celery(broker={url!r})\n"
        "app.conf.broker_transport_options = {'schema': 'other'}\n"
    )

    migrated = shell(sys.executable, "-m", "celery", "-A", "shop", "pg", "migrate", PYTHONPATH=str(tmp_path))

    assert 'schema "other" is installed' in migrated.stdout, migrated.stderr
    assert empty.value("SELECT to_regclass('other.message') IS NOT NULL")


def test_the_commands_run_as_a_module_and_have_their_entry_points(store):
    module = shell(sys.executable, "-m", "celery_pg", "check", CELERY_PG_URL=store.broker())

    assert module.returncode == 0, module.stderr
    scripts = importlib.metadata.entry_points(group="console_scripts", name="celery-pg")
    plugins = importlib.metadata.entry_points(group="celery.commands", name="pg")
    assert [entry.value for entry in (*scripts, *plugins)] == ["celery_pg.commands:main", "celery_pg.commands:pg"]


def test_a_worker_that_loads_the_commands_does_not_get_the_demos_tasks():
    loaded = shell(sys.executable, "-c", "import sys, celery_pg.commands; print('celery_pg.demo_tasks' in sys.modules)")

    assert loaded.stdout.strip() == "False"


# What it looks like

BLOCK_RICH = "import sys; sys.modules['rich'] = None; sys.modules['rich.console'] = None; "


@pytest.mark.parametrize("columns", [80, 200])
def test_no_line_of_the_status_is_wider_than_the_terminal(broker, columns):
    declare(broker, "a-queue-with-a-rather-long-name." + "x" * 60)
    with Consuming(broker, queue="q"):
        written = on_terminal(MAIN, broker, "status", columns=columns)

    lines = re.sub(r"\x1b\[[0-9;]*m", "", written).splitlines()
    assert "\x1b[" in written
    assert max(map(len, lines)) <= columns


@pytest.mark.parametrize(
    ("code", "environment"),
    [(MAIN, {"TERM": "dumb"}), (MAIN, {"NO_COLOR": "1"}), (BLOCK_RICH + MAIN, {})],
    ids=["dumb", "no color", "no rich"],
)
def test_without_colour_or_rich_the_same_is_said_in_plain_text(broker, queue, code, environment):
    publish(broker, 1)

    written = on_terminal(code, broker, "status", **environment)

    assert re.search(r"q +1 +0 +0 +0 +\d", written)
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", written)


def test_output_that_the_encoding_cannot_hold_is_escaped(broker):
    declare(broker, "grüße-☃")

    plain = shell(sys.executable, "-m", "celery_pg", "queues", CELERY_PG_URL=broker, PYTHONIOENCODING="ascii")

    assert plain.returncode == 0, plain.stderr
    assert r"gr\xfc\xdfe-\u2603" in plain.stdout


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (-1, "0.0 s"), (0.04, "0.0 s"), (9.94, "9.9 s"), (42, "42 s"), (125, "2.1 min"), (3600, "60 min"),
     (9000, "2.5 h"), (86400 * 30, "30 d")],
)  # fmt: skip
def test_a_duration_has_a_unit_that_fits(seconds, text):
    assert duration(seconds) == text


def test_what_is_not_printable_is_shown_as_an_escape():
    assert visible("a\x1b[0m\0\ud800\u202e\n") == r"a\x1b[0m\x00\ud800\u202e\n"
    assert shortened("x" * 50, 10) == "xxxxxxx..."
    assert shortened("\0" * 9, 10) == r"\x00\x0..."
    assert number(10_001, 10_000) == "10,000+"
