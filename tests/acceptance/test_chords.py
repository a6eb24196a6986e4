import contextlib

import pytest
from acceptance.conftest import broker_url
from acceptance.workers import Store, Worker, eventually, hang_up
from celery import Celery, chain, chord, group, states
from celery.exceptions import ChordError
from conftest import own_database

WITHIN = 60
IMPORTS = {"imports": ["chord_tasks"], "task_ignore_result": False}


@pytest.fixture(scope="module")
def canvas_store(server_url, worker_id):
    """A database for the worker that runs every canvas of this module."""
    with own_database(server_url, "chords", worker_id) as url:
        yield Store(url)


@contextlib.contextmanager
def sending(broker):
    app = Celery("chords", broker=broker, backend=broker, set_as_current=False)
    app.conf.task_ignore_result = False
    try:
        yield app
    finally:
        hang_up(app)
        app.close()


@pytest.fixture(scope="module")
def canvas(canvas_store, tmp_path_factory):
    """An app whose tasks a worker of four processes runs."""
    broker = broker_url(canvas_store.url)
    log = tmp_path_factory.mktemp("chords") / "worker.log"
    worker = Worker("chords", broker, canvas_store.url, log, ["-c", "4"], {**IMPORTS, "result_backend": broker})
    try:
        worker.wait_ready()
        with sending(broker) as app:
            yield app
    finally:
        worker.kill()


@pytest.fixture
def app(broker):
    with sending(broker) as app:
        yield app


class Tasks:
    """`t.add(1, 2)` is the signature of the task `chords.add`."""

    def __init__(self, app):
        self.app = app

    def __getattr__(self, name):
        return lambda *args, **options: self.app.signature(f"chords.{name}", args=args, **options)

    def chord(self, header, body=None, **options):
        return chord(header, body or self.listed(), app=self.app, **options)

    def group(self, *tasks):
        return group(*tasks, app=self.app)

    def chain(self, *tasks):
        return chain(*tasks, app=self.app)


SIMPLE = {
    "a chord": (lambda t: t.chord([t.add(n) for n in range(10)]), list(range(10))),
    "a chord of one": (lambda t: t.chord([t.add(1)]), [1]),
    "an empty chord": (lambda t: t.chord([]), []),
    "a header from a generator": (lambda t: t.chord(t.add(n) for n in range(10)), list(range(10))),
    "a body that is a chain": (lambda t: t.chord([t.add(1), t.add(2)], t.chain(t.total(), t.add(10))), 13),
    "a body that is a group": (lambda t: t.chord([t.add(1)], t.group(t.total(), t.listed())), [1, [1]]),
    "a body that is a chord": (lambda t: t.chord([t.add(1)], t.chord([t.total(), t.listed()])), [1, [1]]),
    "a chord of chains": (lambda t: t.chord([t.chain(t.add(n), t.add(10), t.add(100)) for n in (1, 2)]), [111, 112]),
    "a chain of chords": (
        lambda t: t.chain(t.chord([t.add(1), t.add(2)], t.total()), t.chord([t.add(10), t.add(20)], t.total())),
        36,
    ),
    "a chord in a chain": (lambda t: t.chain(t.add(1), t.chord([t.add(10), t.add(20)], t.total()), t.add(100)), 132),
    "a group in a chain": (lambda t: t.chain(t.add(1), t.group(t.add(10), t.add(20)), t.total()), 32),
    "nested chords": (
        lambda t: t.chord([t.chord([t.add(n), t.add(10)], t.total()) for n in range(3)] + [t.add(7)]),
        [10, 11, 12, 7],
    ),
    "chords nested three deep": (
        lambda t: t.chord([t.chord([t.chord([t.add(1), t.add(2)], t.total()), t.add(3)], t.total())], t.total()),
        6,
    ),
    "a nested group": (lambda t: t.chord([t.add(1), t.group(t.add(2), t.add(3))], t.total()), 6),
    "a part whose body is a group": (
        lambda t: t.chord([t.chord([t.add(1), t.add(2)], t.group(t.total(), t.listed())), t.add(5)]),
        [[3, [1, 2]], 5],
    ),
    "ignored results": (lambda t: t.chord([t.silent(n) for n in range(3)]), [0, 1, 2]),
    "a part that is retried": (lambda t: t.chord([t.again(1), t.add(2)]), [1, 2]),
    "a part that is replaced": (lambda t: t.chord([t.replaced(1), t.add(2)]), [1001, 2]),
    "a part that is replaced by a group": (lambda t: t.chord([t.replaced_by_group(5), t.add(2)]), [[5, 6], 2]),
    "a part that is replaced by a chord": (lambda t: t.chord([t.replaced_by_chord(5), t.add(2)]), [11, 2]),
    "parts in reverse": (lambda t: t.chord([t.later(n, 0.4 - n / 10) for n in range(4)]), [0, 1, 2, 3]),
}


@pytest.mark.parametrize("name", SIMPLE)
def test_the_body_gets_the_results_of_the_header_in_its_order(canvas, canvas_store, name):
    build, expected = SIMPLE[name]

    result = build(Tasks(canvas)).apply_async()

    assert result.get(timeout=WITHIN) == expected
    assert "chord_unlock" not in str(canvas_store.execute("SELECT DISTINCT name FROM kombu_pg.task_result"))
    assert canvas_store.execute("SELECT task_id FROM kombu_pg.chord_part") == []


def test_a_part_may_add_another(canvas):
    t = Tasks(canvas)

    result = t.chord([t.adding(1), t.add(5)]).apply_async()

    assert sorted(result.get(timeout=WITHIN)) == [1, 2, 5]


def test_a_countdown_delays_the_header_and_not_the_body(canvas):
    t = Tasks(canvas)

    result = t.chord([t.add(1), t.add(2)], t.total()).apply_async(countdown=1)

    assert result.get(timeout=WITHIN) == 3


def body(app, result):
    """What is waited for alone: Celery's own result looks at the header, too, and raises what it finds there."""
    return app.AsyncResult(result.id)


FAILING = {
    "a part": lambda t, body: t.chord([t.add(1), t.failing()], body),
    "a part that is a chain": lambda t, body: t.chord([t.add(1), t.chain(t.add(1), t.failing(), t.add(2))], body),
    "a part of a nested chord": lambda t, body: t.chord([t.add(1), t.chord([t.failing(), t.add(2)])], body),
    "the body of a nested chord": lambda t, body: t.chord([t.add(1), t.chord([t.add(2)], t.failing())], body),
    "a part of a header from a generator": lambda t, body: t.chord((s for s in (t.failing(), t.add(1))), body),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_failure_reaches_the_body_and_its_errbacks(canvas, canvas_store, name):
    t = Tasks(canvas)

    result = FAILING[name](t, heard(t, name)).apply_async()

    fails(canvas, canvas_store, result, name, "no")


def heard(t, name):
    """A body with an errback."""
    return t.listed(link_error=[t.errback(task_id=f"errback of {name}")])


def fails(canvas, canvas_store, result, name, error):
    """The body fails with this error of a part, and its errback is called."""
    with pytest.raises(ChordError, match=error):
        body(canvas, result).get(timeout=WITHIN)
    eventually(lambda: f"errback of {name}" in canvas_store.ended(), WITHIN, "the errback runs")


def test_a_failure_in_the_body_is_its_own(canvas):
    t = Tasks(canvas)

    with pytest.raises(ValueError, match="no"):
        body(canvas, t.chord([t.add(1)], t.failing()).apply_async()).get(timeout=WITHIN)


LOST = {
    "an expired part": (lambda t: t.add(2).set(expires=-1), "TaskRevokedError"),
    "a part whose process is lost": (lambda t: t.dying(), "WorkerLostError"),
    "a part that is out of time": (lambda t: t.endless(), "TimeLimitExceeded"),
}


@pytest.mark.parametrize("name", LOST)
def test_a_part_that_never_returns_reaches_the_body_and_its_errbacks(canvas, canvas_store, name):
    part, error = LOST[name]
    t = Tasks(canvas)

    result = t.chord([t.add(1), part(t)], heard(t, name)).apply_async()

    fails(canvas, canvas_store, result, name, error)


def test_a_revoked_part_reaches_the_body_and_its_errbacks(canvas, canvas_store):
    t = Tasks(canvas)
    canvas.control.revoke("revoked part", reply=True, timeout=30, limit=1)

    result = t.chord([t.add(1), t.add(2, task_id="revoked part")], heard(t, "revoked")).apply_async()

    fails(canvas, canvas_store, result, "revoked", "TaskRevokedError")


def test_a_terminated_part_reaches_the_body_and_its_errbacks(canvas, canvas_store):
    t = Tasks(canvas)
    result = t.chord([t.add(1), t.later(2, 60, task_id="terminated part")], heard(t, "terminated")).apply_async()
    eventually(lambda: "terminated part" in canvas_store.started(), WITHIN)

    canvas.control.terminate("terminated part")

    fails(canvas, canvas_store, result, "terminated", "TaskRevokedError")


def test_a_part_that_ran_in_a_killed_worker_counts_once_elsewhere(app, store, start_worker, broker):
    settings = {**IMPORTS, "result_backend": broker}
    victim = start_worker("-c", "2", **settings)
    t = Tasks(app)
    result = t.chord([t.late(n, 300) for n in range(2)]).apply_async()
    eventually(lambda: len(store.started()) == 2, WITHIN)

    victim.kill()
    start_worker("-c", "2", **settings)

    assert result.get(timeout=WITHIN) == [0, 1]
    bodies = "SELECT count(*) FROM kombu_pg.task_result WHERE name = 'chords.listed'"
    assert (store.value(bodies), result.state) == (1, states.SUCCESS)
