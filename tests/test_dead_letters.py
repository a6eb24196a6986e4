import json

import kombu
import pytest
from celery import Celery
from click.testing import CliRunner
from watching import Consuming, eventually, publisher

from celery_pg import commands, dead_letters
from celery_pg.store.dead_letters import DeadLetterStore
from kombu_pg.database import database_for
from kombu_pg.options import Options


@pytest.fixture
def full(store):
    """Two queues that keep one message each, which have dropped three tasks and two."""
    with kombu.Connection(store.broker()) as connection:
        for name in ("one", "two"):
            kombu.Queue(name, channel=connection.default_channel, queue_arguments={"x-max-length": 1}).declare()
        kombu.Queue("spare", channel=connection.default_channel).declare()
    with publisher(store.broker()) as producer:
        for queue, count in (("one", 4), ("two", 3)):
            for n in range(count):
                headers = {"task": f"task.{n % 2}", "id": f"{queue}-{n}"}
                producer.publish([[n], {}, {}], routing_key=queue, headers=headers)
    return store


def dead(store, *arguments):
    return CliRunner().invoke(commands.pg, ["--url", store.broker(), "dead", *arguments])


def answer(store, *arguments):
    done = dead(store, *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def left(store):
    return [row[0] for row in store.execute("SELECT task_id FROM kombu_pg.dead_letter ORDER BY id")]


def ids(store):
    return [str(row[0]) for row in store.execute("SELECT id FROM kombu_pg.dead_letter ORDER BY id")]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ((), ["one-0", "one-1", "one-2", "two-0", "two-1"]),
        (("--queue", "two"), ["two-0", "two-1"]),
        (("--task", "task.1"), ["one-1", "two-1"]),
        (("--task-id", "one-2"), ["one-2"]),
        (("--reason", "maxlen", "-n", "2"), ["one-0", "one-1"]),
        (("--reason", "rejected"), []),
    ],
)
def test_dead_letters_are_listed_by_what_they_are(full, choice, expected):
    listed = answer(full, "list", *choice)

    assert [one["task_id"] for one in listed] == expected
    assert {one["reason"] for one in listed} <= {"maxlen"}


def test_a_person_sees_a_table_and_that_there_is_more(full):
    shown = dead(full, "list", "-n", "1").stdout

    assert "one-0" in shown
    assert "and more" in shown


def test_one_dead_letter_is_shown_with_headers_and_body(full):
    shown = answer(full, "show", ids(full)[0])

    assert (shown["task"], shown["queue"], shown["heard_at"]) == ("task.0", "one", None)
    assert json.loads(shown["body"]) == [[0], {}, {}]
    assert shown["headers"]["id"] == "one-0"
    assert "one-0" in dead(full, "show", ids(full)[0]).stdout


def test_what_json_has_no_word_for_is_shown_as_text(full):
    with publisher(full.broker()) as producer:
        for _ in range(2):
            producer.publish("", routing_key="one", headers={"task": "odd", "nan": float("nan"), "nul": "\0\ud800"})

    (listed,) = answer(full, "list", "--task", "odd")

    shown = dead(full, "show", str(listed["id"]), "--json").stdout
    headers = json.loads(shown, parse_constant=pytest.fail)["headers"]
    assert (headers["nan"], headers["nul"]) == ("nan", "\0\ud800")


def test_dead_letters_are_tried_again_in_the_queue_they_died_in(full):
    with Consuming(full.broker(), "spare") as consuming:
        consuming.rest()
        assert answer(full, "retry", *ids(full)[:2], "--to", "spare", "-f") == {"retried": 2, "left": 0}

        assert consuming.until(2) == [[[0], {}, {}], [[1], {}, {}]]
        assert [message.headers["id"] for message in consuming.received] == ["one-0", "one-1"]
    assert left(full) == ["one-2", "two-0", "two-1"]


def test_what_a_full_queue_drops_again_is_dead_again_and_not_tried_for_ever(full):
    # The two that were not dropped are older than what comes back, and are dropped for it. One of them was published
    # after all that was dead: the command, on its way through the ids, comes upon that one, too.
    assert answer(full, "retry", "--all", "-f")["retried"] == 6

    assert len(left(full)) == 5


def test_a_dead_letter_whose_queue_is_gone_stays(full):
    full.execute("UPDATE kombu_pg.dead_letter SET queue = 'gone' WHERE task_id = 'one-0'")

    tried = dead(full, "retry", "--queue", "gone", "-f")

    assert tried.exit_code == 1
    assert "--to" in tried.stdout
    assert "one-0" in left(full)


def test_dead_letters_are_deleted(full):
    assert answer(full, "delete", "--queue", "one", "-f") == {"deleted": 3}

    assert left(full) == ["two-0", "two-1"]


def test_nothing_is_done_to_everything_by_mistake(full):
    assert dead(full, "delete", "-f").exit_code == 2
    assert dead(full, "delete", "--all").exit_code == 1
    assert dead(full, "retry", "--all", "-f", "--to", "nowhere").exit_code == 2

    assert len(left(full)) == 5


def test_a_dead_letter_is_dropped_when_its_retention_is_over(full):
    full.execute("UPDATE kombu_pg.dead_letter SET dead_at = dead_at - interval '100 days'")
    full.execute("UPDATE kombu_pg.dead_letter SET heard_at = now() - interval '14 days' WHERE queue = 'one'")
    options = Options.parse(full.broker())

    assert database_for(options).run(DeadLetterStore(options).forget()) == 3
    assert left(full) == ["two-0", "two-1"], "nobody has heard of them yet"


def test_each_is_heard_by_one_listener_and_the_view_says_so(full):
    database = database_for(Options.parse(full.broker()))
    app = Celery(set_as_current=False, broker=full.broker(), backend=full.broker())
    heard = []
    listeners = [dead_letters.Listener(app, database) for _ in range(2)]

    for listener in listeners:
        listener.look(["one", "nowhere"], lambda letter: heard.append(letter.request.id))

    assert heard == ["one-0", "one-1", "one-2"]
    assert app.AsyncResult("one-0").state == "FAILURE"
    assert full.execute("SELECT task_id FROM kombu_pg.task_dead_letter WHERE heard_at IS NULL ORDER BY id") == [
        ("two-0",),
        ("two-1",),
    ]
    app.close()


def test_what_cannot_be_told_is_tried_again_and_given_up_in_the_end(full):
    database = database_for(Options.parse(full.broker()))
    app = Celery(set_as_current=False, broker=full.broker(), backend="celery_pg.nobody:Backend")
    listener = dead_letters.Listener(app, database)

    for _ in range(dead_letters.ATTEMPTS - 1):
        listener.look(["one"], lambda letter: None)
        assert full.value("SELECT count(*) FROM kombu_pg.dead_letter WHERE heard_at IS NOT NULL") == 0
    listener.look(["one"], lambda letter: None)

    details = full.execute("SELECT detail FROM kombu_pg.dead_letter WHERE heard_at IS NOT NULL")
    assert len(details) == 3
    assert all("nobody could be told" in detail for (detail,) in details)


@pytest.mark.parametrize(
    ("payload", "word"),
    [
        (5, "body"),
        ([1, 2], "body"),
        ([1, {}, {}], "args"),
        ([[], 1, {}], "kwargs"),
        ([[], {}, 1], "embedded"),
        ([[], {}, {"errbacks": 5}], "errbacks"),
        ([[], {}, {"chord": []}], "chord"),
    ],
)
def test_a_malformed_body_is_told_from_a_good_one(payload, word):
    assert word in dead_letters.malformed(payload)
    assert dead_letters.malformed([[], {}, {"chord": None, "chain": [], "errbacks": None}]) is None
    assert dead_letters.malformed([(), {}, None]) is None


def test_revokes_are_forgotten_when_what_was_there_is_gone(full):
    upper = "UPDATE kombu_pg.revoked SET revoked_at = revoked_at - interval '4 hours'"
    full.execute("SELECT kombu_pg.revoke(ARRAY['x', 'y'])")
    assert full.value("SELECT kombu_pg.forget_revokes(10)") == 0
    full.execute(upper)
    assert full.value("SELECT kombu_pg.forget_revokes(10)") == 0

    full.execute("DELETE FROM kombu_pg.message")

    assert eventually(lambda: full.value("SELECT kombu_pg.forget_revokes(10)")) == 2
