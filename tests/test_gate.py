"""Does each call go to the broker that was chosen for it, and everything else where Celery sends it?"""

import collections
import contextlib
import contextvars
import logging
import os
import socket
import threading
import uuid

import kombu
import psycopg2
import pytest
from celery import Celery, chord, group
from celery.exceptions import SoftTimeLimitExceeded
from kombu import pools
from kombu.exceptions import OperationalError
from watching import eventually

from celery_pg import publish_in
from celery_pg.gate import install
from celery_pg.gate_choice import Call, Choice, Plan
from celery_pg.transaction import UnusableConnection
from kombu_pg.errors import OptionError

BROKERS = {"rabbitmq": "amqp://one//", "postgres": "pg://two/db"}
SETTING = {"brokers": BROKERS, "default": "rabbitmq"}


def choice(choose, **more):
    return Choice(Plan.parse({**SETTING, "choose": choose, **more}))


def call(task="proj.add", unit="", **options):
    return Call(task, unit or str(uuid.uuid4()), (1,), {"y": 2}, options)


def broker_for(task, args, kwargs, options):
    return "postgres" if (task, args, kwargs, options) == ("proj.add", (1,), {"y": 2}, {"queue": "q"}) else None


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        (None, 'app.conf.pg_gate is not set: set it to {"brokers":'),
        ("rabbitmq", "app.conf.pg_gate is no mapping"),
        ({**SETTING, "chose": {}}, 'unknown key "chose" in pg_gate: did you mean "choose"?'),
        ({"default": "rabbitmq"}, 'pg_gate has no "brokers": give a mapping from a name to a broker URL'),
        ({**SETTING, "brokers": {"a": 1}}, """pg_gate["brokers"]['a'] is no broker URL"""),
        ({**SETTING, "brokers": {"a": "pg-gate://"}}, """pg_gate["brokers"]['a'] is the gate itself"""),
        ({"brokers": BROKERS}, 'pg_gate has no "default": name one of its brokers, postgres, rabbitmq'),
        ({**SETTING, "default": "rabitmq"}, """unknown broker 'rabitmq': did you mean "rabbitmq"?"""),
        ({**SETTING, "default": "kafka"}, "unknown broker 'kafka': known are postgres, rabbitmq"),
        ({**SETTING, "choose": 7}, 'pg_gate["choose"] is 7: give a "module:function", a callable or a mapping'),
        ({**SETTING, "choose": "no.such:function"}, '"no.such:function" cannot be imported'),
        ({**SETTING, "choose": "os:no_such"}, '"os:no_such" cannot be imported'),
        ({**SETTING, "choose": {"task": {}}}, 'unknown key "task" in pg_gate["choose"]: did you mean "tasks"?'),
        ({**SETTING, "choose": {"tasks": "a"}}, """pg_gate["choose"]["tasks"] is 'a': give a mapping"""),
        ({**SETTING, "choose": {"tasks": {"a": "postgre"}}}, """broker 'postgre': did you mean "postgres"?"""),
        ({**SETTING, "choose": {"queues": {"q": None}}}, 'pg_gate["choose"]["queues"]["q"] names an unknown broker'),
        ({**SETTING, "choose": {"percent": 10}}, 'give a mapping such as {"postgres": 10}'),
        ({**SETTING, "choose": {"percent": {"pg": 10}}}, 'pg_gate["choose"]["percent"] names an unknown broker'),
        ({**SETTING, "choose": {"percent": {"postgres": 101}}}, '["postgres"] is 101: give a number from 0 to 100'),
        ({**SETTING, "choose": {"percent": {"postgres": -1}}}, '["postgres"] is -1: give a number from 0 to 100'),
        ({**SETTING, "choose": {"percent": {"postgres": True}}}, '["postgres"] is True: give a number'),
        ({**SETTING, "choose": {"percent": {"postgres": 60, "rabbitmq": 50}}}, "adds up to 110: give at most 100"),
        ({**SETTING, "timeout": 0}, 'pg_gate["timeout"] is 0: give seconds above 0, or None for no limit'),
    ],
)
def test_a_wrong_setting_says_what_to_write(setting, advice):
    with pytest.raises(OptionError) as raised:
        Plan.parse(setting)

    assert advice in str(raised.value)


def test_without_a_chooser_every_call_goes_to_the_default_broker():
    assert Choice(Plan.parse(SETTING)).broker(call()) == "rabbitmq"


def test_a_task_is_chosen_by_its_name_before_its_queue_and_its_share():
    chosen = choice(
        {
            "tasks": {"proj.*": "postgres", "proj.mail.*": "rabbitmq", "proj.mail.one": "postgres"},
            "queues": {"slow": "postgres"},
            "percent": {"rabbitmq": 100},
        }
    )

    assert chosen.broker(call("proj.mail.one", queue="slow")) == "postgres"
    assert chosen.broker(call("proj.mail.two")) == "postgres"  # the first pattern that fits
    assert chosen.broker(call("other", queue="slow")) == "postgres"
    assert chosen.broker(call("other", queue="fast")) == "rabbitmq"


def test_a_share_is_as_large_as_it_says_and_grows_without_moving_anybody_back():
    ids = [str(uuid.UUID(int=n)) for n in range(5000)]
    moved = {
        percent: {
            unit for unit in ids if choice({"percent": {"postgres": percent}}).broker(call(unit=unit)) != "rabbitmq"
        }
        for percent in (0, 0.5, 10, 50, 100)
    }

    assert not moved[0]
    assert moved[0.5] < moved[10] < moved[50] < moved[100] == set(ids)
    assert 400 < len(moved[10]) < 600
    assert 2350 < len(moved[50]) < 2650


def test_a_chooser_is_found_by_its_path_and_gets_the_call():
    chosen = choice("test_gate:broker_for")

    assert chosen.broker(call(queue="q")) == "postgres"
    assert chosen.broker(call("proj.mail", queue="q")) == "rabbitmq"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (ConnectionError("flags are down"), "the chooser raised ConnectionError('flags are down')"),
        (TimeoutError("too slow"), "the chooser raised TimeoutError('too slow')"),
        ("kafka", "the chooser named the broker 'kafka', which pg_gate does not know"),
        (True, "the chooser named the broker True, which pg_gate does not know"),
    ],
)
def test_a_chooser_that_fails_means_the_default_broker_and_is_said_once_for_each_task(answer, reason, caplog):
    def choose(*_call):
        if isinstance(answer, Exception):
            raise answer
        return answer

    chosen = choice(choose)
    caplog.set_level(logging.DEBUG, "celery_pg")

    assert {chosen.broker(call(task)) for task in ("a", "b", "a", "b", "a")} == {"rabbitmq"}

    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    warned = [f"{task}: {reason}: it goes to the default broker rabbitmq" for task in "ab"]
    assert [text for level, text in said if level == "WARNING"] == warned
    assert [level for level, _ in said].count("DEBUG") == 3


def test_a_chooser_that_hangs_costs_each_caller_one_timeout_at_most_and_is_asked_again_when_it_is_back(caplog):
    hangs, asked = threading.Event(), []

    def choose(*_call):
        asked.append(1)
        hangs.wait(30)
        return "postgres"

    chosen = choice(choose, timeout=0.05)

    assert {chosen.broker(call()) for _ in range(50)} == {"rabbitmq"}
    assert len(asked) == 4
    hangs.set()

    assert eventually(lambda: chosen.broker(call()) == "postgres")
    assert "no answer within 0.05 s" in caplog.text


def test_a_chooser_sees_the_context_of_the_call():
    tenant = contextvars.ContextVar("tenant", default="rabbitmq")
    chosen = choice(lambda *_call: tenant.get())
    tenant.set("postgres")

    assert chosen.broker(call()) == "postgres"


def test_without_a_timeout_a_chooser_runs_in_the_thread_of_the_call():
    chosen = choice(lambda *_call: threading.current_thread().name, timeout=None)
    threading.current_thread().name, name = "postgres", threading.current_thread().name
    try:
        assert chosen.broker(call()) == "postgres"
    finally:
        threading.current_thread().name = name


def test_the_soft_time_limit_of_the_calling_task_is_not_taken_for_a_failure_of_the_chooser():
    def choose(*_call):
        raise SoftTimeLimitExceeded

    with pytest.raises(SoftTimeLimitExceeded):
        choice(choose, timeout=None).broker(call())


def test_a_chooser_that_was_asked_before_a_fork_answers_in_the_child():
    chosen = choice(lambda *_call: "postgres")
    assert chosen.broker(call()) == "postgres"

    pid = os.fork()
    if pid == 0:
        os._exit(0 if chosen.broker(call()) == "postgres" else 1)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class Two:
    """Two brokers, and apps whose gate stands before them; "old" is the default one."""

    def __init__(self, old, new):
        self.urls = {"old": old, "new": new}
        self.queue = f"gate.{uuid.uuid4().hex}"
        self._apps = []

    def app(self, choose=None, by="install", **settings):
        app = Celery("gated", broker=self.urls["old"], set_as_current=False)
        app.conf.pg_gate = {"brokers": self.urls, "default": "old", "choose": choose}
        app.conf.update(task_default_queue=self.queue, task_ignore_result=True, **settings)
        if by == "install":
            install(app)
        elif by == "url":
            app.conf.broker_write_url = "pg-gate://"
        self._apps.append(app)
        return app

    def sent(self, name):
        """Takes what is in the queue of one broker. Returns the ids of the tasks."""
        with kombu.Connection(self.urls[name]) as connection, connection.channel() as channel:
            kombu.Queue(self.queue, kombu.Exchange(self.queue), self.queue, channel=channel).declare()
            raw = iter(lambda: channel.basic_get(self.queue, no_ack=True), None)
            return [channel.message_to_python(message).headers["id"] for message in raw]

    def close(self):
        pools.reset()
        for app in self._apps:
            app.close()
        for name in ("old", "new"):
            with contextlib.suppress(OSError, OperationalError), kombu.Connection(self.urls[name]) as connection:
                connection.default_channel.queue_delete(self.queue)
                connection.default_channel.exchange_delete(self.queue)


@pytest.fixture
def two(store):
    """Two schemas of one database are two brokers."""
    with contextlib.closing(Two(store.broker(), store.broker(schema="other"))) as brokers:
        yield brokers


@pytest.fixture
def rabbit(rabbitmq, store):
    """From RabbitMQ to PostgreSQL."""
    with contextlib.closing(Two(rabbitmq, store.broker())) as brokers:
        yield brokers


def tasks(**chosen):
    return {"tasks": chosen}


@pytest.mark.parametrize("by", ["install", "url"])
def test_from_the_first_call_on_each_goes_to_the_broker_that_was_chosen(two, by):
    app = two.app(tasks(moved="new"), by)

    moved, stays = app.send_task("moved").id, app.send_task("stays").id

    assert two.sent("new") == [moved]
    assert two.sent("old") == [stays]


def test_the_environment_alone_puts_the_gate_in(two, monkeypatch):
    monkeypatch.setenv("CELERY_BROKER_WRITE_URL", "pg-gate://")
    app = two.app(tasks(moved="new"), by="environment")

    moved = app.send_task("moved").id

    assert two.sent("new") == [moved]


def test_a_gate_may_be_installed_before_the_app_is_configured(two):
    app = Celery("early", set_as_current=False)
    install(app)
    assert not app.configured
    app.config_from_object(
        {
            "PROJ_BROKER_URL": two.urls["old"],
            "PROJ_TASK_DEFAULT_QUEUE": two.queue,
            "PROJ_PG_GATE": {"brokers": two.urls, "default": "old", "choose": tasks(moved="new")},
        },
        namespace="PROJ",
    )

    moved, stays = app.send_task("moved", ignore_result=True).id, app.send_task("stays", ignore_result=True).id

    assert two.sent("new") == [moved]
    assert two.sent("old") == [stays]


def test_the_setting_is_read_at_each_call(two):
    app = two.app({"percent": {"new": 0}})
    before = app.send_task("a").id

    app.conf.pg_gate["choose"]["percent"]["new"] = 100
    after = app.send_task("a").id

    assert (two.sent("old"), two.sent("new")) == ([before], [after])


def test_a_chooser_is_given_what_the_call_said(two):
    asked = []
    app = two.app(lambda *question: asked.append(question))

    app.send_task("a", (1, "two"), {"three": [3]}, task_id="id", priority=3, headers={"tenant": "t"})

    task, args, kwargs, options = asked.pop()
    assert (task, args, kwargs) == ("a", (1, "two"), {"three": [3]})
    assert options["task_id"] == "id"
    assert options["queue"] == two.queue
    assert options["priority"] == 3
    assert options["headers"] == {"tenant": "t"}


def test_one_chord_or_group_is_on_one_broker_whatever_the_share(two):
    app = two.app({"percent": {"new": 50}}, result_backend="cache+memory://")
    step = app.signature("step")

    for _ in range(8):
        chord([step, step | step, chord([step, step], step)], step, app=app).apply_async()
        group([step, step, step], app=app).apply_async()

    taken = [collections.Counter(two.sent(name)) for name in ("old", "new")]
    assert sum(map(len, taken)) == 8 * (4 + 3)


def test_a_setting_that_is_wrong_fails_the_call(two):
    app = two.app({"percent": {"nwe": 1}})

    with pytest.raises(OptionError, match='did you mean "new"'):
        app.send_task("a")


def test_a_caller_that_brings_a_connection_to_another_broker_has_chosen(two):
    app = two.app(tasks(stays="old"))

    with kombu.Connection(two.urls["new"]) as connection:
        brought = app.send_task("stays", connection=connection).id
    with app.connection_for_write() as connection:
        usual = app.send_task("stays", connection=connection).id

    assert (two.sent("new"), two.sent("old")) == ([brought], [usual])


def test_a_producer_of_celerys_own_does_not_go_around_the_gate(two):
    app = two.app(tasks(moved="new"))

    with app.producer_or_acquire() as pooled:
        ids = [app.send_task("moved", producer=pooled).id]
    with app.connection_for_write() as connection:  # as beat keeps one
        ids.append(app.send_task("moved", producer=kombu.Producer(connection)).id)

    assert two.sent("new") == ids


def test_a_broker_that_cannot_be_reached_raises_and_no_other_gets_the_call(two):
    reachable = two.urls
    two.urls = {**reachable, "new": "amqp://guest:guest@127.0.0.1:9//"}
    app = two.app(tasks(moved="new"), task_publish_retry_policy={"max_retries": 1, "interval_start": 0})

    with pytest.raises(OperationalError):
        app.send_task("moved")

    two.urls = reachable
    assert (two.sent("old"), two.sent("new")) == ([], [])


def test_a_default_broker_that_cannot_be_reached_does_not_matter_to_calls_for_another(two):
    reachable = two.urls
    two.urls = {**reachable, "old": "amqp://guest:guest@127.0.0.1:9//"}
    app = two.app(tasks(moved="new"))

    moved = app.send_task("moved").id

    assert two.sent("new") == [moved]
    two.urls = reachable


@pytest.mark.parametrize("by", ["install", "url"])
def test_two_apps_of_a_process_have_a_gate_each(two, by):
    apps = [two.app(tasks(moved="new"), by), two.app(tasks(stays="old"), by)]
    apps[1].conf.pg_gate["default"] = "new"

    ids = [app.send_task(name).id for app in apps for name in ("moved", "stays")]

    assert two.sent("new") == [ids[0], ids[2]]
    assert two.sent("old") == [ids[1], ids[3]]


def test_a_report_of_the_settings_is_made_with_a_gate_too(two):
    app = two.app(by="url")

    assert "broker_write_url: " in app.bugreport()


def test_a_gate_that_nobody_set_says_so():
    with (
        pytest.raises(OptionError, match="leads nowhere without a Celery app"),
        kombu.Connection("pg-gate://") as alone,
    ):
        alone.connect()


def test_a_worker_that_would_read_from_the_gate_is_told_to_read_from_a_broker(two):
    app = two.app()
    app.conf.broker_read_url = "pg-gate://"
    app.use_fast_trace_task = True

    with pytest.raises(OptionError, match="a worker reads from one broker, not from pg-gate://: set broker_read_url"):
        app.connection_for_read()


def test_when_nothing_is_chosen_rabbitmq_gets_byte_for_byte_what_celery_sends(rabbit):
    def send(app):
        step = app.signature("step", (1,), {"x": "y"}, task_id="step")
        always = {"reply_to": "r", "origin": "o"}
        app.send_task("a", (1, [2]), {"k": None}, task_id="a", link=step, link_error=step, priority=3, **always)
        app.send_task("a", task_id="b", eta="2050-01-01T00:00:00+00:00", headers={"h": 1}, **always)
        app.send_task("a", task_id="c", chain=[step, step], group_id="g", group_index=1, **always)

    recorded = []
    for by in (None, "install", "url"):
        with recorder(rabbit.urls["old"]) as (url, written):
            app = Celery("gated", broker=url, set_as_current=False)
            app.conf.update(task_default_queue=rabbit.queue, task_ignore_result=True)
            app.conf.pg_gate = {"brokers": {"old": url, "new": rabbit.urls["new"]}, "default": "old", "choose": None}
            if by == "install":
                install(app)
            elif by == "url":
                app.conf.broker_write_url = "pg-gate://"
            send(app)
            with app.producer_or_acquire() as producer:
                producer.connection._close()
            recorded.append(bytes(written))

    assert len(recorded[0]) > 2000
    assert recorded[0] == recorded[1] == recorded[2]


@contextlib.contextmanager
def recorder(url):
    """A port that leads to RabbitMQ, and all that clients wrote to it."""
    broker = kombu.Connection(url)
    written = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as server:
        through = threading.Thread(target=relay, args=(server, (broker.hostname, broker.port or 5672), written))
        through.start()
        credentials = f"{broker.userid or 'guest'}:{broker.password or 'guest'}"
        yield f"amqp://{credentials}@127.0.0.1:{server.getsockname()[1]}/{broker.virtual_host}", written
        through.join(30)


def relay(server, target, written):
    """Lead one connection there, until both sides have closed it."""
    client, _ = server.accept()
    with client, socket.create_connection(target) as broker:
        answers = threading.Thread(target=pump, args=(broker, client, bytearray()))
        answers.start()
        pump(client, broker, written)
        answers.join(30)


def pump(source, target, written):
    with contextlib.suppress(OSError):
        while chunk := source.recv(65536):
            written += chunk
            target.sendall(chunk)
        target.shutdown(socket.SHUT_WR)


def test_what_rabbitmq_was_to_delay_waits_in_the_database_when_that_is_chosen(rabbit):
    queue = kombu.Queue(
        rabbit.queue,
        kombu.Exchange(rabbit.queue, "topic"),
        f"{rabbit.queue}.key",
        queue_arguments={"x-queue-type": "quorum"},
    )
    app = rabbit.app(tasks(moved="new"), task_queues=[queue], task_default_exchange_type="topic")

    app.send_task("moved", countdown=60)

    with kombu.Connection(rabbit.urls["new"]) as connection:
        channel = connection.default_channel
        assert channel.basic_get(rabbit.queue) is None
        assert channel.queue_purge(rabbit.queue) == 1


@pytest.mark.parametrize("by", ["install", "url"])
def test_a_default_broker_that_cannot_be_reached_is_tried_again_and_raises_what_celery_raises(by):
    app = Celery("gated", broker="amqp://guest:guest@127.0.0.1:9//", set_as_current=False)
    app.conf.pg_gate = {"brokers": {"old": app.conf.broker_url}, "default": "old"}
    if by == "install":
        install(app)
    else:
        app.conf.broker_write_url = "pg-gate://"
    tried = []

    with pytest.raises(OperationalError):
        app.send_task("a", retry=True, retry_policy={"max_retries": 1, "errback": lambda *_: tried.append(1)})

    assert tried


# Inside a transaction ------------------------------------------------------------------------------------------------


@pytest.fixture
def theirs(store):
    with contextlib.closing(psycopg2.connect(store.url)) as connection:
        yield connection


@pytest.mark.parametrize("by", ["install", "url"])
def test_in_a_transaction_a_call_for_its_broker_is_part_of_it(rabbit, theirs, by):
    app = rabbit.app(tasks(moved="new"), by)

    with publish_in(theirs, app):
        app.send_task("moved")
    theirs.rollback()
    with publish_in(theirs, app):
        moved = app.send_task("moved").id
    assert rabbit.sent("new") == []
    theirs.commit()

    assert rabbit.sent("new") == [moved]


@pytest.mark.parametrize("default", ["old", "new"])
def test_in_a_transaction_a_call_for_another_broker_is_refused_and_leaves_nothing(rabbit, theirs, default):
    app = rabbit.app(tasks(moved="new", stays="old"))
    app.conf.pg_gate["default"] = default

    with publish_in(theirs, app):
        with pytest.raises(UnusableConnection, match="task stays is called inside publish_in, but its broker is 'old'"):
            app.send_task("stays")
        moved = app.send_task("moved").id
    theirs.commit()
    stays = app.send_task("stays").id

    assert rabbit.sent("old") == [stays]
    assert rabbit.sent("new") == [moved]


def test_a_transaction_is_the_one_of_the_broker_in_its_store(two, theirs):
    app = two.app(tasks(moved="new"))
    app.conf.pg_gate["brokers"] = {"rabbitmq": "amqp://one//", "old": "pg://127.0.0.1:9/nowhere", **two.urls}

    with publish_in(theirs, app), pytest.raises(UnusableConnection, match="its broker is 'new'"):
        app.send_task("moved")


def test_a_gate_without_postgresql_has_no_transaction(rabbit, theirs):
    app = rabbit.app()
    app.conf.pg_gate["brokers"] = {"old": rabbit.urls["old"]}

    with (
        pytest.raises(UnusableConnection, match="none of the brokers in pg_gate of app 'gated'"),
        publish_in(theirs, app),
    ):
        pass
