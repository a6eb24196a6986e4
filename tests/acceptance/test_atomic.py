"""Is a task's end one commit, whatever dies, and wherever?"""

import contextlib
import itertools
import os
import subprocess
import sys
from collections import Counter

import psutil
import psycopg2
import pytest
from acceptance import atomic_app
from acceptance.conftest import broker_url
from acceptance.workers import HERE, Store, eventually, hang_up
from celery import Celery, chain, chord
from conftest import own_database

PATIENCE = 60.0
PYTHONPATH = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))


class Workers:
    """One worker, started again whenever it has ended."""

    def __init__(self, broker, server, log, *options):
        self._log = log
        self._command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "atomic_app",
            "worker",
            "-l",
            "INFO",
            "-n",
            "atomic@test",
        ]
        self._command += options
        self._environment = {
            **os.environ,
            atomic_app.STORE: broker,
            "ATOMIC_SERVER": server,
            "PYTHONPATH": PYTHONPATH,
            "PYTHONWARNINGS": "ignore",
        }
        self.process = None
        self.keep()

    def keep(self):
        if self.process is None or self.process.poll() is not None:
            with self._log.open("ab") as out:
                self.process = subprocess.Popen(
                    self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=HERE
                )

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log(self):
        return self._log.read_text(errors="replace")


@pytest.fixture(scope="module")
def store(server_url, worker_id):
    """One database for all of this module; each test begins with empty tables."""
    with own_database(server_url, "atomic", worker_id) as url:
        store = Store(url)
        store.execute("CREATE TABLE counter (id bigserial, task_id text, task text, note text)")
        yield store


@pytest.fixture(scope="module")
def broker(store):
    return broker_url(store.url)


@pytest.fixture
def counters(store):
    """What the tasks of this test have written."""
    store.execute("TRUNCATE counter")
    return lambda: [row[0] for row in store.execute("SELECT note FROM counter ORDER BY id")]


@pytest.fixture(scope="module")
def app(broker):
    app = Celery("atomic", broker=broker, backend=broker, set_as_current=False)
    assert app.backend.database  # the schema is there from here on
    yield app
    hang_up(app)
    app.close()


@pytest.fixture(scope="module", params=["prefork", "threads", "solo", "gevent"])
def workers(request, broker, store, tmp_path_factory):
    workers = Workers(broker, store.url, tmp_path_factory.mktemp("atomic") / "log", "-P", request.param, "-c", "2")
    yield workers
    workers.stop()


#: Where processes die.
in_prefork = pytest.mark.parametrize("workers", ["prefork"], indirect=True)


def send(app, name, *args, **options):
    return app.signature(f"atomic_app.{name}", args=args, app=app).apply_async(**options)


def settled(app, results, workers, store):
    """Every result is there, and no message of a task is left."""

    def done():
        workers.keep()
        return all(result.ready() for result in results) and store.messages() == 0

    eventually(done, PATIENCE, f"all is done: {workers.log()[-3000:]}")


def test_what_a_task_writes_is_stored_with_its_result(app, workers, store, counters):
    result = send(app, "work", 1)

    assert result.get(timeout=PATIENCE) == 1
    eventually(lambda: counters() == ["work 1"] and store.messages() == 0, PATIENCE)


def test_a_chain_a_chord_and_a_callback_go_on(app, workers, store, counters):
    work = app.signature("atomic_app.work", app=app)
    callback = app.signature("atomic_app.callback", app=app)
    results = [
        chain(work.clone((1,)), callback).apply_async(),
        chord([work.clone((2,)), work.clone((3,))], callback).apply_async(),
        work.apply_async((4,), link=callback),
    ]

    settled(app, results, workers, store)

    assert sorted(counters()) == ["callback 1", "callback 4", "callback [2, 3]", "work 1", "work 2", "work 3", "work 4"]


@pytest.mark.parametrize("how", ["error", "reject"])
def test_what_a_failed_task_wrote_is_rolled_back_and_its_errback_runs(how, app, workers, store, counters):
    result = send(app, "failing", how, link_error=app.signature("atomic_app.errback", app=app))

    settled(app, [result], workers, store)

    assert result.state == "FAILURE"
    assert counters() == [f"errback {result.id} FAILURE"]


@in_prefork
def test_an_ignored_task_is_gone_with_what_it_wrote(app, workers, store, counters):
    send(app, "failing", "ignore")
    eventually(lambda: store.messages() == 0, PATIENCE)

    assert counters() == []


def test_of_a_retried_task_the_last_run_writes(app, workers, store, counters):
    result = send(app, "retried")

    assert result.get(timeout=PATIENCE) == 2
    settled(app, [result], workers, store)
    assert counters() == ["attempt 2"]


def test_a_replaced_task_hands_over_in_the_commit_that_ends_it(app, workers, store, counters):
    result = send(app, "replaced", link=app.signature("atomic_app.callback", app=app))

    assert result.get(timeout=PATIENCE) == 7
    settled(app, [result], workers, store)
    eventually(lambda: counters() == ["work 7", "callback 7"], PATIENCE)


def test_a_task_without_a_result_completes_too(app, workers, store, counters):
    send(app, "quiet", 1)

    eventually(lambda: counters() == ["quiet 1"] and store.messages() == 0, PATIENCE)


def test_a_plain_call_inside_a_task_does_not_wait_for_its_completion(app, workers, store, counters):
    result = send(app, "immediate")

    settled(app, [result], workers, store)
    assert counters() == ["callback immediate"]


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_published_in_its_transaction_is_there_if_the_task_is_completed(fails, app, workers, store, counters):
    result = send(app, "publishing", fails)

    settled(app, [result], workers, store)
    assert counters() == ([] if fails else ["callback published"])


@in_prefork
@pytest.mark.parametrize("name", ["slow", "stuck", "lost"])
def test_what_ran_out_of_time_or_lost_its_process_has_failed_and_written_nothing(name, app, workers, store, counters):
    result = send(app, name, link_error=app.signature("atomic_app.errback", app=app))

    settled(app, [result], workers, store)
    assert result.state == "FAILURE"
    assert counters() == [f"errback {result.id} FAILURE"]


@pytest.mark.parametrize("how", ["raised", "translated", "swallowed"])
def test_a_task_that_loses_its_transaction_runs_again_whatever_its_function_makes_of_it(
    how, app, workers, store, counters
):
    result = send(app, "cut_off", how, link=app.signature("atomic_app.callback", app=app))

    settled(app, [result], workers, store)
    assert result.get() == how
    assert sorted(counters()) == [f"callback {how}", "written"]


@in_prefork
def test_an_exception_out_of_a_block_takes_back_what_the_block_wrote(app, workers, store, counters):
    result = send(app, "caught")

    settled(app, [result], workers, store)
    assert counters() == ["kept", "by the ORM"]


@in_prefork
def test_a_commit_inside_a_task_is_refused(app, workers, store, counters):
    result = send(app, "committing")

    settled(app, [result], workers, store)
    assert "leave that to it" in str(result.result)
    assert counters() == []


@in_prefork
def test_a_task_whose_process_dies_behind_its_commit_is_neither_failed_nor_retried(app, workers, store, counters):
    follow = {kind: app.signature(f"atomic_app.{kind}", app=app) for kind in ("callback", "errback")}
    before = len(workers.log())

    results = [
        app.signature(f"atomic_app.{name}", (number,), {"fault": ("ended", "child")}, app=app).apply_async(
            link=follow["callback"], link_error=follow["errback"]
        )
        for number, name in enumerate(atomic_app.SURVIVED)
    ]

    def known():
        # Celery 5.7 asks for the result where there is one, and we for the message where there is none.
        words = ("succeeded before the worker was lost", "completed before its process was lost")
        return sum(map(workers.log()[before:].count, words))

    eventually(lambda: known() == len(results), PATIENCE, "the main process knows")
    eventually(lambda: store.messages() == 0, PATIENCE)
    assert sorted(counters()) == [*(f"callback {n}" for n in range(3)), *(f"survived {n}" for n in range(3))]
    assert [result.state for result in results] == ["SUCCESS", "PENDING", "PENDING"]


def linked(app, work, callback):
    return work("work").apply_async(link=callback)


def chained(app, work, callback):
    return chain(work("work"), callback).apply_async()


def part(app, work, callback):
    return chord([work("work")], callback).apply_async()


def failed(app, work, callback):
    return work("broken").apply_async(link_error=app.signature("atomic_app.errback", app=app))


def retried(app, work, callback):
    return work("again").apply_async(link=callback)


def replaced(app, work, callback):
    return work("handing_over").apply_async(link=callback)


#: What follows a task -> what is written in the end, once.
KINDS = {
    linked: "work {n}, callback {n}",
    chained: "work {n}, callback {n}",
    part: "work {n}, callback [{n}]",
    failed: "errback {id} FAILURE",
    retried: "again {n}, callback {n}",
    replaced: "work {n}, callback {n}",
}


def strikes(times):
    """(kind, point, victim) so often. Each kind meets each victim in one round of the faults, each fault in six."""
    kinds, faults = [*KINDS], [*itertools.product(atomic_app.POINTS, atomic_app.VICTIMS)]
    for number in range(times):
        around, fault = divmod(number, len(faults))
        yield kinds[(fault + fault // len(kinds) + around) % len(kinds)], *faults[fault]


@pytest.fixture
def stop(store):
    """Whoever has stored a result waits before his commit, as long as the test holds the lock."""
    store.execute(
        f"""
        CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_xact_lock_shared({atomic_app.STOPPED}); RETURN NULL; END $$;
        CREATE TRIGGER stop AFTER INSERT OR UPDATE ON kombu_pg.result FOR EACH ROW EXECUTE FUNCTION stop();
        """
    )
    yield
    store.execute("DROP FUNCTION stop CASCADE")


@contextlib.contextmanager
def stopped(store, workers, victim):
    """Who stores a result in the block stands before his commit, and the victim dies there."""
    waiting = (
        "SELECT l.pid FROM pg_locks l JOIN pg_database d ON d.oid = l.database WHERE d.datname = current_database() "
        f"AND l.locktype = 'advisory' AND l.classid = 0 AND l.objid = {atomic_app.STOPPED} AND NOT l.granted"
    )

    def stand():
        workers.keep()
        return store.execute(waiting)

    with contextlib.closing(psycopg2.connect(store.url)) as holder, holder.cursor() as cursor:
        cursor.execute(f"SELECT pg_advisory_lock({atomic_app.STOPPED})")
        yield
        pids = {row[0] for row in eventually(stand, PATIENCE, f"a task is stopped: {workers.log()[-3000:]}")}
        if victim == "backend":
            store.terminate(pids)
        elif victim == "parent":
            workers.process.kill()
        else:
            for child in psutil.Process(workers.process.pid).children():
                child.kill()


@in_prefork
@pytest.mark.parametrize("times", [18, pytest.param(216, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])])
def test_whatever_dies_between_the_functions_end_and_the_ack_every_effect_is_there_once(
    times, app, workers, store, counters, stop
):
    dead = "SELECT count(*) FROM kombu_pg.dead_letter"
    before = store.value(dead)
    callback = app.signature("atomic_app.callback", app=app)
    results, expected = [], []
    for number, (kind, point, victim) in enumerate(strikes(times)):

        def work(name, number=number, fault=(point, victim)):
            return app.signature(f"atomic_app.{name}", args=(number,), kwargs={"fault": fault}, app=app)

        with stopped(store, workers, victim) if point == "stored" else contextlib.nullcontext():
            results.append(kind(app, work, callback))
        expected += KINDS[kind].format(n=number, id=results[-1].id).split(", ")

        def done(result=results[-1]):
            workers.keep()
            return result.ready()

        eventually(done, PATIENCE, f"{kind.__name__}, {point}, {victim}: {workers.log()[-3000:]}")

    settled(app, results, workers, store)
    assert Counter(counters()) == Counter(expected)
    assert store.value(dead) == before


def test_a_task_that_is_not_acks_late_is_refused_when_the_worker_starts(broker, store, tmp_path, counters):
    log = tmp_path / "refused.log"
    program = (
        "from atomic_app import app\n"
        "@app.task(atomic_completion=True, acks_late=False, name='early')\n"
        "def early(): pass\n"
        "app.worker_main(['worker', '-P', 'solo'])"
    )
    environment = {**os.environ, atomic_app.STORE: broker, "PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "ignore"}

    with log.open("w") as out:
        subprocess.run([sys.executable, "-c", program], env=environment, stdout=out, stderr=out, timeout=60)

    assert "task early has atomic_completion, but not acks_late" in log.read_text()


def test_results_that_are_elsewhere_are_refused_when_the_worker_starts(broker, tmp_path, counters):
    log = tmp_path / "refused.log"
    program = "from atomic_app import app; app.conf.result_backend = 'cache+memory://'\n"
    program += "app.worker_main(['worker', '-P', 'solo'])"
    environment = {**os.environ, atomic_app.STORE: broker, "PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "ignore"}

    with log.open("w") as out:
        subprocess.run([sys.executable, "-c", program], env=environment, stdout=out, stderr=out, timeout=60)

    assert "set result_backend to the URL of the broker" in log.read_text()
