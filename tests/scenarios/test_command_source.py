"""A worker that pulls, and is no Celery worker: does examples/command_source do what it says?"""

import contextlib
import json
from dataclasses import replace

import kombu
import pytest
from kombu.exceptions import MessageStateError
from scenarios.running import TOP, run_example
from watching import eventually, process

from examples.command_source.commands import AlreadyClaimed, Claimed, Command, Failed, RetryLater
from examples.command_source.control import Control
from examples.command_source.source import QUEUE, CommandSource, publish
from examples.command_source.worker import work

COMMAND = Command("c1", "e1", "render", "template", {"text": "hello"})


@pytest.fixture
def connection(scenario_store):
    with kombu.Connection(scenario_store.broker(reconnect_grace=0.5)) as connection:
        connection.connect()
        yield connection


@pytest.fixture
def diagnostics():
    return []


@pytest.fixture
def source(scenario_store, connection, diagnostics):
    control = Control(scenario_store.url, "w1")
    control.install()
    return CommandSource(connection, control, lambda what, why: diagnostics.append((what, why)), retry_delay=0)


@contextlib.contextmanager
def another(store):
    """The source of another worker, which stops when the block ends."""
    with kombu.Connection(store.broker()) as connection:
        yield CommandSource(connection, Control(store.url, "w2"), print, retry_delay=0)


def replaced(**fields):
    """COMMAND as JSON, with other fields."""
    return json.dumps({**json.loads(COMMAND.to_json()), **fields})


def pulled(source):
    return eventually(source.next)


def publish_text(connection, text):
    kombu.Producer(connection.channel()).publish(text, routing_key=QUEUE.name, declare=[QUEUE], message_id="one")


def stored(store):
    return store.value("SELECT count(*) FROM kombu_pg.message")


def test_a_command_survives_json_and_what_has_a_default_may_be_missing():
    assert Command.from_json(COMMAND.to_json()) == COMMAND
    required = {
        key: value for key, value in json.loads(COMMAND.to_json()).items() if key not in ("render_context", "attempts")
    }
    assert Command.from_json(json.dumps(required)) == COMMAND


def test_a_command_is_claimed_and_its_handle_carries_the_outcome(source, connection):
    publish(connection, COMMAND)

    pull = source.next()

    assert pull.outcome == Claimed(COMMAND)
    assert pull.handle.outcome is pull.outcome


def test_next_is_none_when_the_source_is_exhausted(source, connection):
    publish(connection, COMMAND)
    source.ack(source.next().handle)

    assert source.next() is None


def test_what_another_worker_has_claimed_is_acknowledged_without_running(source, connection, scenario_store):
    Control(scenario_store.url, "w2").claim(COMMAND, "another message")
    publish(connection, COMMAND)
    ran = []

    assert work(source, ran.append) == 0

    assert ran == []
    assert stored(scenario_store) == 0


def test_a_command_that_was_published_twice_runs_once(source, connection):
    publish(connection, COMMAND)
    publish(connection, COMMAND)

    assert work(source, lambda _: None) == 1


def test_the_claim_is_one_row_and_one_of_two_workers_has_it(source, scenario_store):
    assert Control(scenario_store.url, "w2").claim(COMMAND, "one") == Claimed(COMMAND)
    assert Control(scenario_store.url, "w3").claim(COMMAND, "two") == AlreadyClaimed()
    assert scenario_store.execute("SELECT worker FROM claimed_command") == [("w2",)]


def test_a_command_of_a_worker_that_stopped_before_it_ran_is_claimed_by_another_one(source, connection, scenario_store):
    publish(connection, COMMAND)
    with another(scenario_store) as stopping:
        assert stopping.next().outcome == Claimed(COMMAND)

    assert pulled(source).outcome == Claimed(COMMAND)


def test_a_duplicate_of_a_finished_command_does_not_run_when_its_own_holder_dies(source, connection, scenario_store):
    publish(connection, COMMAND)
    source.ack(source.next().handle)
    publish(connection, COMMAND)
    with another(scenario_store) as stopping:
        stopping.nack(stopping.next().handle)

    pull = pulled(source)

    assert pull.handle.message.returns == 1
    assert pull.outcome == AlreadyClaimed()


def test_a_finished_command_does_not_run_again_when_its_ack_was_forgotten(source, connection, scenario_store):
    publish(connection, COMMAND)
    with another(scenario_store) as stopping:
        Control(scenario_store.url, "w2").finish(stopping.next().outcome.command)

    assert pulled(source).outcome == AlreadyClaimed()


def test_a_command_that_raises_comes_back_with_a_higher_attempt(source, connection, caplog):
    publish(connection, COMMAND)
    seen = []

    def run(command):
        seen.append(command.attempts)
        if command.attempts < 2:
            raise ValueError("not yet")

    eventually(lambda: work(source, run))

    assert seen == [0, 1, 2]
    assert "command c1 failed at attempt 1" in caplog.text


def test_retry_later_comes_back_with_a_higher_attempt(connection, source):
    unreachable = Control("postgresql://nobody@127.0.0.1:1/nowhere", "w1")
    blind = CommandSource(connection, unreachable, lambda *_: None, retry_delay=0)
    publish(connection, COMMAND)
    pull = blind.next()
    assert isinstance(pull.outcome, RetryLater)

    blind.nack(pull.handle)

    assert pulled(source).outcome.command.attempts == 1


def test_retry_later_comes_back_after_its_delay(connection, scenario_store):
    unreachable = Control("postgresql://nobody@127.0.0.1:1/nowhere", "w1")
    blind = CommandSource(connection, unreachable, lambda *_: None, retry_delay=3600)
    publish(connection, COMMAND)

    blind.nack(blind.next().handle)

    assert blind.next() is None
    assert scenario_store.value("SELECT due_at > now() + interval '55 minutes' FROM kombu_pg.scheduled")


NO_COMMANDS = {
    "another object": '{"not": "a command"}',
    "no object": "[1]",
    "not json": "not json",
    "too deep": "[" * 100_000,
    "an id of another type": replaced(command_id={"id": 1}),
    "an input of another type": replaced(input="text"),
    "an id with a nul": replaced(command_id="a\0b"),
    "an id that is no text": replaced(command_id="\ud800"),
}


@pytest.mark.parametrize("text", NO_COMMANDS.values(), ids=NO_COMMANDS)
def test_what_is_no_command_is_failed_and_goes_to_the_dead_letters_with_its_reason(
    text, source, connection, scenario_store, diagnostics
):
    publish_text(connection, text)
    pull = source.next()
    assert isinstance(pull.outcome, Failed)

    source.nack(pull.handle)

    assert scenario_store.execute("SELECT detail FROM kombu_pg.dead_letter") == [(pull.outcome.reason,)]
    assert diagnostics == [("command failed", pull.outcome.reason)]


def test_a_command_that_came_back_too_often_is_failed_and_not_lost(source, connection, scenario_store):
    publish(connection, COMMAND)
    source.nack(source.next().handle)
    scenario_store.execute("UPDATE kombu_pg.message SET returns = 20")
    pull = pulled(source)

    source.nack(pull.handle)

    assert pull.outcome == Failed("it came back 20 times")
    assert scenario_store.execute("SELECT detail FROM kombu_pg.dead_letter") == [(pull.outcome.reason,)]


def test_a_message_without_an_id_is_failed(source, connection):
    kombu.Producer(connection.channel()).publish(COMMAND.to_json(), routing_key=QUEUE.name)

    assert source.next().outcome == Failed(
        "the message has no message_id: nobody could tell its return from a duplicate"
    )


@pytest.mark.parametrize("first", ["ack", "nack"])
@pytest.mark.parametrize("second", ["ack", "nack"])
def test_a_handle_is_settled_exactly_once(first, second, source, connection):
    publish(connection, COMMAND)
    handle = source.next().handle
    getattr(source, first)(handle)

    with pytest.raises(MessageStateError):
        getattr(source, second)(handle)


def test_several_handles_may_be_outstanding(source, connection, scenario_store):
    for number in range(3):
        publish(connection, Command(f"c{number}", "e1", "render", "template", {}))
    handles = [source.next().handle for _ in range(3)]
    assert source.next() is None

    source.ack(handles[2])
    source.nack(handles[0])
    source.ack(handles[1])

    assert pulled(source).outcome.command.command_id == "c0"
    assert stored(scenario_store) == 1


def test_an_ack_may_come_before_the_execution(source, connection, scenario_store):
    publish(connection, COMMAND)
    pull = source.next()

    source.ack(pull.handle)

    eventually(lambda: stored(scenario_store) == 0)
    assert pull.outcome.command == COMMAND


def test_attempts_is_the_stores_count_of_returns_and_0_on_the_first_delivery(source, connection):
    publish(connection, Command("c1", "e1", "render", "template", {}, attempts=7))

    seen = []
    for _ in range(3):
        pull = pulled(source)
        seen.append(pull.outcome.command.attempts)
        source.nack(pull.handle)

    assert seen == [0, 1, 2]


def test_the_command_of_a_worker_that_died_is_claimed_by_another_one(source, connection, scenario_store):
    publish(connection, COMMAND)
    url = scenario_store.broker(reconnect_grace=0.5)
    program = (
        f"sys.path.append({str(TOP)!r}); from examples.command_source.__main__ import *\n"
        f"source = CommandSource(kombu.Connection({url!r}), Control({scenario_store.url!r}, 'dying'), print)\n"
        "pull = source.next(); print(pull.outcome, flush=True); sys.stdin.read()"
    )

    with process(program) as dying:
        assert dying.stdout.readline().startswith("Claimed")
        assert source.next() is None

    assert eventually(source.next, within=30).outcome == Claimed(replace(COMMAND, attempts=1))


def test_two_workers_run_twenty_commands_once_each(scenario_store):
    ran = run_example("command_source", scenario_store)

    runs = [line.split()[-1] for line in ran.stdout.splitlines() if " runs " in line]
    assert (len(runs), len(set(runs))) == (20, 20)
    assert stored(scenario_store) == 0
