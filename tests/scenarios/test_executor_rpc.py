"""A web backend, an executor, callbacks: does examples/executor_rpc do what it says?"""

import contextlib
import re
import uuid

import kombu
import pytest
from acceptance import atomic_app
from acceptance.workers import hang_up
from celery import Celery, chord, signals
from celery.exceptions import NotRegistered, TimeoutError
from kombu.exceptions import ContentDisallowed, DecodeError, EncodeError, OperationalError
from scenarios.deployment import DEAD, PATIENCE, placed
from scenarios.executor_app import VALUES
from scenarios.running import run_example
from test_gate import recorder
from watching import eventually

from celery_pg.dead_letters import DeadLettered
from examples.executor_rpc.__main__ import listen
from examples.executor_rpc.app import CALLBACKS, COMPLETE, ERROR, EXTRACT, EXTRACTIONS
from examples.executor_rpc.dispatch import Dispatcher
from examples.executor_rpc.web import make_web
from examples.http import get, post, serving

MODES = ("wait", "async", "callback")
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def place(server_url, worker_id, tmp_path_factory):
    """One worker on PostgreSQL, the flag on for everything, and no RabbitMQ anywhere."""
    with placed(server_url, worker_id, tmp_path_factory.mktemp("executor")) as place:
        place.start("postgres")
        yield place


@pytest.fixture(scope="module")
def web(place):
    with serving(make_web(place.app, place.events)) as url:
        yield url


# The three ways --------------------------------------------------------------------------------------------------


def test_dispatch_blocks_for_the_result(place):
    assert place.dispatcher.dispatch(EXTRACT, {"document": "x"}, timeout=PATIENCE) == "x"


def test_dispatch_raises_when_its_time_is_over(place):
    with pytest.raises(TimeoutError):
        place.dispatcher.dispatch("nobody_runs_it", {}, timeout=0.1)


def test_dispatch_raises_what_the_task_raised(place):
    with pytest.raises(LookupError, match="no such word"):
        place.dispatcher.dispatch(EXTRACT, {"document": {"do": "raise", "args": ["no such word"]}}, timeout=PATIENCE)


def test_an_asynchronous_dispatch_is_found_by_its_id(place):
    handle = place.dispatcher.dispatch_async(EXTRACT, {"document": "y"})

    assert place.app.AsyncResult(handle.task_id).get(timeout=PATIENCE) == "y"


@every_mode
def test_the_web_backend_dispatches_in_each_of_the_three_ways(mode, web):
    status, told = post(f"{web}/prompts", mode=mode, document="z")

    assert status == (200 if mode == "wait" else 202)
    if mode == "wait":
        assert told == {"result": "z"}
    elif mode == "async":
        eventually(
            lambda: get(f"{web}/results/{told['task_id']}") == (200, {"state": "SUCCESS", "result": "z"}), PATIENCE
        )
    else:
        assert listen(f"{web}/prompts/{told['prompt_id']}/events") == ("complete", {"result": "z"})


@every_mode
def test_a_worker_dispatches_in_each_of_the_three_ways(mode, place):
    told = repeated_by(place, "postgres", mode, "w")

    if mode == "wait":
        assert told == {"result": "w"}
    elif mode == "async":
        assert place.app.AsyncResult(told["task_id"]).get(timeout=PATIENCE) == "w"
    else:
        *_, event = place.events.stream(told["prompt_id"])
        assert event.startswith("event: complete")


def test_the_browser_gets_the_errbacks_event_with_the_real_exception(web):
    _, told = post(f"{web}/prompts", mode="callback", document={"do": "raise", "args": ["no such word"]})

    assert listen(f"{web}/prompts/{told['prompt_id']}/events") == (
        "error",
        {"type": "LookupError", "text": "no such word"},
    )


def test_what_the_web_backend_waits_for_and_fails_is_an_error_of_its_own(web):
    status, told = post(f"{web}/prompts", mode="wait", document={"do": "raise", "args": ["no such word"]})

    assert (status, told) == (500, {"error": "LookupError", "text": "no such word"})


def test_a_dispatch_is_waited_for_or_has_callbacks(place):
    signature = place.signature("ide_probe")

    with pytest.raises(ValueError, match="not both"):
        place.dispatcher.dispatch(EXTRACT, {}, timeout=1, on_success=signature)
    with pytest.raises(ValueError, match="not both"):
        place.dispatcher.dispatch_with_callback(EXTRACT, {}, on_success=signature, on_error=signature, timeout=1)


def test_a_task_without_a_name_raises_where_it_is_called(place):
    probe, dispatcher = place.signature("ide_probe"), place.dispatcher

    for call in (
        lambda: dispatcher.dispatch("", {}, timeout=1),
        lambda: dispatcher.dispatch_async("", {}),
        lambda: dispatcher.dispatch_with_callback("", {}, on_success=probe, on_error=probe),
        lambda: dispatcher.dispatch_with_callback(EXTRACT, {}, on_success=place.signature(""), on_error=probe),
    ):
        with pytest.raises(ValueError, match="without a name"):
            call()


@every_mode
def test_a_publish_that_fails_raises_and_the_web_backend_promises_nothing(mode, place, web):
    with place.flagged("off"):
        status, told = post(f"{web}/prompts", mode=mode, document="x")
        with pytest.raises(OperationalError):
            place.dispatcher.dispatch_async("nobody_takes_it", {})

    assert (status, told["error"]) == (503, "OperationalError")
    assert place.messages("nobody_takes_it") == 0


# What arrives ----------------------------------------------------------------------------------------------------


def test_arguments_and_results_arrive_as_celerys_serializer_defines(place):
    assert place.dispatcher.dispatch(EXTRACT, {"document": {"do": "values"}}, timeout=PATIENCE) == VALUES
    assert place.dispatcher.dispatch(EXTRACT, {"document": VALUES}, timeout=PATIENCE) == VALUES


def test_a_callback_gets_the_result_then_its_own_arguments(place):
    mine = str(uuid.uuid4())
    on_success = place.signature("ide_probe", "first", "second", mine=mine, **VALUES)
    place.dispatcher.dispatch_with_callback(
        EXTRACT, {"document": {"do": "values"}}, on_success=on_success, on_error=place.signature("ide_probe_error")
    )

    eventually(lambda: [given for given in place.notes("probe") if given["kwargs"].get("mine") == mine], PATIENCE)
    (given,) = [given for given in place.notes("probe") if given["kwargs"].get("mine") == mine]
    assert given == {"args": [VALUES, "first", "second"], "kwargs": {"mine": mine, **VALUES}}


def test_an_errback_gets_its_own_arguments_too(place):
    handle = place.dispatcher.dispatch_with_callback(
        EXTRACT,
        {"document": {"do": "raise", "args": ["x"]}},
        on_success=place.signature("ide_probe"),
        on_error=place.signature("ide_probe_error", **VALUES),
    )

    assert place.note("error", id=handle.task_id)["kwargs"] == VALUES


def test_what_cannot_be_encoded_raises_where_it_is_called(place):
    probe = place.signature("ide_probe")
    with pytest.raises(EncodeError):
        place.dispatcher.dispatch_async("nobody_takes_it", {"document": object()})
    with pytest.raises(EncodeError):
        place.dispatcher.dispatch_with_callback(
            "nobody_takes_it", {}, on_success=place.signature("ide_probe", it=object()), on_error=probe
        )
    assert place.messages("nobody_takes_it") == 0


def test_a_result_that_cannot_be_encoded_fails_its_task(place):
    kind, text = place.errors(place.call({"do": "unencodable"}))

    assert (kind, "not JSON serializable" in text) == ("EncodeError", True)


def test_a_signature_without_a_queue_goes_where_the_routes_say(place):
    for queue in (CALLBACKS, EXTRACTIONS):
        prompt_id = str(uuid.uuid4())
        on_success = place.signature("ide_probe", prompt_id=prompt_id)
        place.dispatcher.dispatch_with_callback(
            EXTRACT,
            {"document": "x"},
            on_success=on_success if queue == CALLBACKS else on_success.set(queue=queue),
            on_error=place.signature("ide_probe_error"),
        )
        assert place.note("run", prompt=prompt_id)["queue"] == queue


def test_a_failure_that_is_returned_is_a_success(web):
    returned_failure_is_a_success(web)


def returned_failure_is_a_success(web):
    failure = {"status": "failure", "error": "the model had no idea"}
    _, told = post(f"{web}/prompts", mode="callback", document=failure)

    assert listen(f"{web}/prompts/{told['prompt_id']}/events") == ("complete", {"result": failure})


# What failed -----------------------------------------------------------------------------------------------------

#: The task, the document, what on_error finds, and a word of its text.
BROKEN = {
    "raising": (EXTRACT, {"do": "raise", "args": ["no such word"]}, LookupError, "no such word"),
    "unknown": ("unknown_extraction", "x", NotRegistered, "unknown_extraction"),
    "undecodable": (EXTRACT, {"__type__": "the web backend's own", "__value__": 1}, DecodeError, "Unsupported type"),
    "malformed": (EXTRACT, "malformed", Exception, "timelimit"),
    "poison": (EXTRACT, {"do": "die"}, DeadLettered, "more than its delivery limit allows"),
}


@pytest.fixture
def broken(request):
    """Whatever has the document "malformed" gets a header that no worker can read."""

    def spoil(body, headers, **_):
        if body[1].get("document") == "malformed":
            headers["timelimit"] = "for ever"

    signals.before_task_publish.connect(spoil)
    yield BROKEN[request.param]
    signals.before_task_publish.disconnect(spoil)


@pytest.mark.parametrize("broken", BROKEN, indirect=True)
def test_on_error_finds_the_real_exception_the_caller_hears_of_it_and_a_chord_ends(broken, place):
    task, document, exception, text = broken
    failed = place.call(document, task=task)
    parts = [place.signature(EXTRACT, document="x"), place.signature(task, document=document)]
    body = chord(parts, app=place.app)(place.signature("ide_probe").on_error(place.signature("ide_probe_error")))

    with pytest.raises(exception, match=text):
        place.dispatcher.dispatch(task, {"document": document}, timeout=PATIENCE)
    found = place.errors(failed)
    assert text in found[1]
    assert exception is Exception or found[0] == exception.__name__
    with pytest.raises(Exception, match=text):
        body.get(timeout=PATIENCE)
    assert place.errors(body.id)[0] == "ChordError"
    assert [error["id"] for error in place.notes("error")].count(failed) == 1


def test_the_caller_hears_of_a_message_that_is_not_even_json(place):
    pickling = place.make_app()
    pickling.conf.task_serializer = "pickle"

    with contextlib.closing(pickling), pytest.raises(ContentDisallowed):
        Dispatcher(pickling).dispatch(EXTRACT, {"document": "x"}, timeout=PATIENCE)


# Who dies --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mortal(server_url, worker_id, tmp_path_factory):
    """Workers for extractions that may die; nobody takes the callbacks, so that they can be counted."""
    with placed(server_url, worker_id, tmp_path_factory.mktemp("mortal")) as place:
        for name in ("mortal1", "mortal2"):
            place.start(name, "-c", "3", "-Q", EXTRACTIONS)
        yield place


def standing(place, task_id, callback):
    """What is there at this moment: of the result, of the callback, of the message."""
    return place.store.execute(
        "SELECT (SELECT count(*) FROM kombu_pg.result WHERE task_id = %s AND state = 'SUCCESS'),"
        " (SELECT count(*) FROM kombu_pg.message WHERE task = %s),"
        " (SELECT count(*) FROM kombu_pg.message WHERE task_id = %s)",
        (task_id, callback, task_id),
    )[0]


#: Where a task strikes by itself.
POINTS = tuple(point for point in atomic_app.POINTS if point != "stored")


@pytest.mark.parametrize(
    ("victim", "points"),
    [("child", POINTS), *(("executor", [point]) for point in ("after publish", "ended"))],
)
def test_whoever_is_killed_and_whenever_either_nothing_has_happened_or_all_of_it(victim, points, mortal):
    calls = {}
    for point in points:
        callback = f"ide_{uuid.uuid4().hex}"
        handle = mortal.dispatcher.dispatch_with_callback(
            EXTRACT,
            {"document": point, "fault": [point, victim]},
            on_success=mortal.signature(callback),
            on_error=mortal.signature("ide_never"),
        )
        calls[point] = (handle.task_id, callback)

    def ended():
        mortal.keep_workers()
        seen = [standing(mortal, *call) for call in calls.values()]
        assert set(seen) <= {(0, 0, 1), (1, 1, 0)}
        return set(seen) == {(1, 1, 0)}

    eventually(ended, PATIENCE)
    for point, (task_id, _) in calls.items():
        runs = [run["done"] for run in mortal.notes("run") if run["id"] == task_id]
        assert runs == ([False] if point in ("succeeded", "ended") else [False, False]), point
    assert mortal.messages("ide_never") == 0


def test_on_error_fires_for_a_message_that_kills_the_executor_at_every_attempt(mortal):
    """The executor's main process and its pool: nobody is left to say what happened."""
    callback = f"ide_{uuid.uuid4().hex}"
    failed = mortal.dispatcher.dispatch_with_callback(
        EXTRACT,
        {"document": {"do": "die", "who": "executor"}},
        on_success=mortal.signature("ide_never"),
        on_error=mortal.signature(callback),
    )

    def told():
        mortal.keep_workers()
        return mortal.messages(callback)

    eventually(told, PATIENCE)
    with pytest.raises(DeadLettered, match="more than its delivery limit allows"):
        mortal.app.AsyncResult(failed.task_id).get(timeout=PATIENCE)
    assert len([run for run in mortal.notes("run") if run["id"] == failed.task_id]) == 3
    assert (mortal.messages(callback), mortal.messages("ide_never")) == (1, 0)


# The gate --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(server_url, worker_id, tmp_path_factory, rabbitmq):
    """A worker on each side, and a flag between them."""
    prefix = f"executor.{uuid.uuid4().hex[:12]}."
    directory = tmp_path_factory.mktemp("both")
    with placed(server_url, worker_id, directory, rabbitmq=rabbitmq, prefix=prefix) as place:
        place.start("postgres")
        place.start("rabbitmq", reads=rabbitmq)
        yield place


@pytest.fixture(scope="module")
def both_web(both):
    with serving(make_web(both.app, both.events)) as url:
        yield url


@every_mode
@pytest.mark.parametrize("by", ["web", "postgres", "rabbitmq"])
@pytest.mark.parametrize(("flag", "broker"), [("on", "postgres"), ("off", "rabbitmq"), ("unreachable", "rabbitmq")])
def test_the_flag_decides_for_each_call_and_callbacks_follow_their_call(mode, by, flag, broker, both, both_web):
    document, worker = {"do": "where"}, f"{broker}@test"

    with both.flagged(flag):
        if by == "web":
            _, told = post(f"{both_web}/prompts", mode=mode, document=document)
        else:
            told = repeated_by(both, by, mode, document)
        if mode == "async":
            assert both.app.AsyncResult(told["task_id"]).get(timeout=PATIENCE) == worker
        if mode == "callback":
            both.note("run", task=EXTRACT, id=told["task_id"])

    if mode == "wait":
        assert told["result"] == worker
    if mode == "callback":
        assert listen(f"{both_web}/prompts/{told['prompt_id']}/events") == ("complete", {"result": worker})
        assert both.note("run", task=COMPLETE, prompt=told["prompt_id"])["worker"] == worker


@pytest.mark.parametrize(("then", "callback"), [("return", COMPLETE), ("raise", ERROR)])
@pytest.mark.parametrize(("before", "after", "broker"), [("on", "off", "postgres"), ("off", "on", "rabbitmq")])
def test_callbacks_follow_their_call_although_the_flag_has_changed(
    before, after, broker, then, callback, both, both_web
):
    with both.flagged(before):
        document = {"do": "until", "flag": after, "then": then, "args": ["no such word"]}
        _, told = post(f"{both_web}/prompts", mode="callback", document=document)
        both.note("run", task=EXTRACT, id=told["task_id"])
        both.flag.write_text(after)
        listen(f"{both_web}/prompts/{told['prompt_id']}/events")

    assert both.note("run", task=callback, prompt=told["prompt_id"])["worker"] == f"{broker}@test"


def repeated_by(place, worker, mode, document):
    """A task on the worker that reads from that broker has dispatched it. -> what that one was told."""
    prompt_id = str(uuid.uuid4())
    place.events.expect(prompt_id)
    url = place.url if worker == "postgres" else place.rabbitmq
    with contextlib.closing(Celery("no gate", broker=url, backend=place.url, set_as_current=False)) as app:
        app.conf.task_routes = place.app.conf.task_routes
        sent = app.send_task("ide_repeat_prompt", (prompt_id, document, mode))
        told = sent.get(timeout=PATIENCE)
        hang_up(app)
    assert place.note("run", task="ide_repeat_prompt", id=sent.id)["worker"] == f"{worker}@test"
    return told


@pytest.mark.parametrize("flag", ["on", "off"])
def test_a_returned_failure_is_a_success_on_both_sides(flag, both, both_web):
    with both.flagged(flag):
        returned_failure_is_a_success(both_web)


def test_off_the_message_is_byte_for_byte_what_celery_sends_without_this_library(place, rabbitmq):
    routes = {f"{EXTRACT}.recorded": {"queue": f"executor.{uuid.uuid4().hex}"}}
    task, kwargs = f"{EXTRACT}.recorded", {"document": "x", **VALUES}
    recorded = []
    for gated in (False, True):
        with recorder(rabbitmq) as (url, written):
            app = gated_app(place, url) if gated else Celery("executor_rpc", broker=url, set_as_current=False)
            app.conf.update(task_routes=routes, result_backend=place.url)
            on = {name: app.signature(f"ide_{name}", ("a",), {"k": 1}) for name in ("success", "error")}
            with place.flagged("off"):
                if gated:
                    dispatcher = Dispatcher(app)
                    dispatcher.dispatch_async(task, kwargs)
                    dispatcher.dispatch_with_callback(task, kwargs, on_success=on["success"], on_error=on["error"])
                    with pytest.raises(TimeoutError):
                        dispatcher.dispatch(task, kwargs, timeout=0.01)
                else:
                    app.send_task(task, kwargs=kwargs)
                    app.send_task(task, kwargs=kwargs, link=on["success"], link_error=on["error"])
                    app.send_task(task, kwargs=kwargs)
            with app.producer_or_acquire() as producer:
                producer.connection._close()
            recorded.append(re.sub(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", b"an id", bytes(written)))
    with kombu.Connection(rabbitmq) as connection:
        connection.default_channel.queue_delete(routes[task]["queue"])
        connection.default_channel.exchange_delete(routes[task]["queue"])

    assert len(recorded[0]) > 2000
    assert recorded[0] == recorded[1]


def gated_app(place, rabbitmq):
    app = place.make_app()
    app.conf.pg_gate = {**app.conf.pg_gate, "brokers": {"rabbitmq": rabbitmq, "postgres": place.url}}
    app.conf.broker_transport_options = {}
    return app


# All of it -------------------------------------------------------------------------------------------------------


def test_the_example_runs_as_its_readme_says_without_rabbitmq(scenario_store, monkeypatch, tmp_path):
    monkeypatch.setenv("RABBITMQ_URL", DEAD)
    monkeypatch.setenv("PG_QUEUE_ENABLED", str(tmp_path / "flag"))

    ran = run_example("executor_rpc", scenario_store)

    assert ran.stdout.splitlines() == [
        "wait: 200 {'result': {'words': 6}}",
        "async: 202 ['task_id']",
        "callback: 202 complete {'result': {'words': 6}}",
        "callback: 202 error {'type': 'ValueError', 'text': 'the document is empty'}",
    ]
