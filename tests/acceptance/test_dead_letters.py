import json
import pickle

import celery
import kombu
import pytest
from acceptance.hearing import lab as laboratory
from acceptance.workers import eventually
from celery.exceptions import ChordError, InvalidTaskError, NotRegistered, Reject, TaskRevokedError
from kombu.exceptions import ContentDisallowed, DecodeError

from celery_pg.dead_letters import DeadLettered

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def lab(server_url, worker_id, tmp_path_factory):
    """One worker for all tests here: it must live through all of them."""
    with laboratory(server_url, worker_id, tmp_path_factory.mktemp("lab")) as lab:
        lab.start("-Q", "celery,limited,short,paused", task_acks_late=True)
        lab.pause("short", "paused")
        yield lab


@pytest.fixture(autouse=True)
def the_worker_lives_on(lab):
    yield
    lab.settle()
    assert lab.workers[0].alive


def assert_heard(lab, result, body, exception, reason, state="FAILURE"):
    """The result says so, the errback ran once, the chord has ended, the message is a dead letter."""
    assert lab.letter(result.id) == reason
    ended, found = lab.end(result)
    assert (ended, type(found).__name__) == (state, exception.__name__), found
    ended, error = lab.end(body)
    assert (ended, type(error)) == ("FAILURE", ChordError)
    assert result.id in str(error)
    eventually(lambda: lab.heard(result.id), 30, "the errback has run")
    lab.settle(result.id)
    assert lab.heard(result.id) == 1


def test_an_unknown_task_has_failed(lab):
    result, body = lab.send_in_chord("nobody")

    assert_heard(lab, result, body, NotRegistered, "unknown_task")


def set_eta(fields):
    fields["headers"]["eta"] = "soon"


def set_expires(fields):
    fields["headers"]["expires"] = "never"


def set_time_limit(fields):
    fields["headers"]["timelimit"] = "abc"


def set_endless_time_limit(fields):
    fields["headers"]["timelimit"] = [None, 10**400]


def set_shadow(fields):
    fields["headers"]["shadow"] = ["not", "hashable"]


def set_args(fields):
    fields["body"] = json.dumps([1, *json.loads(fields["body"])[1:]])


def set_kwargs(fields):
    args, _, embed = json.loads(fields["body"])
    fields["body"] = json.dumps([args, "x", embed])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_eta, "invalid_header"),
        (set_expires, "invalid_header"),
        (set_time_limit, "malformed"),
        (set_endless_time_limit, "malformed"),
        (set_shadow, "malformed"),
        (set_args, "malformed"),
        (set_kwargs, "malformed"),
    ],
)
def test_a_malformed_task_has_failed(lab, change, reason):
    result, body = lab.send_in_chord("note", queue="bench")
    lab.tamper("bench", change)

    assert_heard(lab, result, body, InvalidTaskError, reason)


def test_a_malformed_task_that_waited_for_a_place_in_the_pool_has_failed_and_leaves_the_place_to_others(lab):
    busy = lab.send("nap", 2)
    eventually(lambda: lab.runs(busy.id), 30, "the pool is busy")
    result, body = lab.send_in_chord("note", queue="bench")

    lab.tamper("bench", set_time_limit)

    assert_heard(lab, result, body, InvalidTaskError, "malformed")
    assert lab.end(busy) == ("SUCCESS", 2)


def refuse(fields):
    fields.update(body=pickle.dumps([[], {}, {}]), content_type="application/x-python-serialize")
    fields["content_encoding"] = "binary"


def garble(fields):
    fields["body"] = "{not json"


def encode_unknown(fields):
    fields["content_type"] = "application/x-nobody-knows"


def compress(fields):
    fields["headers"]["compression"] = "application/x-gzip"


def shorten(fields):
    fields["body"] = "[1]"


def reduce(fields):
    fields["body"] = "5"


def embed(fields):
    fields["body"] = "[[], {}, 5]"


def empty(fields):
    fields["body"] = ""


@pytest.mark.parametrize(
    ("change", "exception", "reason"),
    [
        (refuse, ContentDisallowed, "content_type"),
        (garble, DecodeError, "undecodable"),
        (shorten, InvalidTaskError, "malformed"),
        (reduce, InvalidTaskError, "malformed"),
        (embed, InvalidTaskError, "malformed"),
        (empty, InvalidTaskError, "malformed"),
    ],
)
def test_a_task_whose_body_cannot_be_read_has_failed_and_the_letter_says_who_could_not_be_told(
    lab, change, exception, reason
):
    result, _ = lab.send_in_chord("note", queue="bench")
    lab.tamper("bench", change)

    ended, found = lab.end(result)
    assert (ended, type(found).__name__) == ("FAILURE", exception.__name__), found
    assert lab.letter(result.id) == reason
    detail = lab.store.value("SELECT detail FROM kombu_pg.dead_letter WHERE task_id = %s", (result.id,))
    assert "link_error" in detail


def send_unknown_type(fields):
    args, _, embed = json.loads(fields["body"])
    fields["body"] = json.dumps([args, {"x": {"__type__": "the sender's own", "__value__": 1}}, embed])


@pytest.mark.parametrize(
    ("change", "exception", "reason"),
    [
        (encode_unknown, ContentDisallowed, "content_type"),
        (compress, DecodeError, "undecodable"),
        (send_unknown_type, DecodeError, "undecodable"),
    ],
)
def test_a_task_that_cannot_be_decoded_has_failed_and_everybody_hears_of_it_who_can_be_read_from_plain_json(
    lab, change, exception, reason
):
    result, body = lab.send_in_chord("note", queue="bench")
    lab.tamper("bench", change)

    assert_heard(lab, result, body, exception, reason)


@pytest.mark.parametrize("headers", [{}, {"task": "heard_app.note"}, {"task": ["x"], "id": "x"}, {"id": 5, "task": 7}])
@pytest.mark.parametrize("body", ["5", "null", '{"a": 1}', "[[], {}, {}]", "{not json", ""])
def test_what_is_no_task_at_all_is_kept(lab, headers, body):
    known = lab.store.value("SELECT coalesce(max(id), 0) FROM kombu_pg.dead_letter")
    with lab.app.connection_for_write() as connection:
        channel = connection.default_channel
        message = channel.prepare_message(
            body, content_type="application/json", content_encoding="utf-8", headers=headers
        )
        channel.basic_publish(message, routing_key="celery")

    count = "SELECT count(*) FROM kombu_pg.dead_letter WHERE id > %s AND heard_at IS NOT NULL"
    eventually(lambda: lab.store.value(count, (known,)) == 1, 30, "it is a dead letter")
    detail = lab.store.value("SELECT detail FROM kombu_pg.dead_letter WHERE id > %s", (known,))
    assert "nobody could be told: " not in detail


def test_a_task_of_the_first_protocol_that_is_unknown_has_failed(lab):
    task_id = "first-protocol"
    payload = {"task": "heard_app.nobody", "id": task_id, "args": [], "kwargs": {}, "errbacks": [dict(lab.errback)]}
    with lab.app.connection_for_write() as connection:
        kombu.Producer(connection.default_channel).publish(payload, routing_key="celery", serializer="json")

    assert lab.end(lab.app.AsyncResult(task_id))[0] == "FAILURE"
    eventually(lambda: lab.heard(task_id) == 1, 30, "the errback has run")


def test_a_task_past_its_delivery_limit_has_failed(lab):
    result, body = lab.send_in_chord("reject_always", queue="limited")

    assert_heard(lab, result, body, DeadLettered, "delivery_limit")
    assert lab.runs(result.id) == 3


def test_a_task_that_a_full_queue_dropped_has_failed(lab):
    result, body = lab.send_in_chord("note", queue="short")
    lab.send("note", queue="short")

    assert_heard(lab, result, body, DeadLettered, "maxlen")


def test_a_task_that_a_plain_consumer_rejects_has_failed(lab):
    result, body = lab.send_in_chord("note", queue="paused")
    lab.app.control.cancel_consumer("paused", reply=True, timeout=10, limit=1)
    lab.store.execute("UPDATE kombu_pg.queue SET paused = false WHERE name = 'paused'")
    with lab.app.connection_for_write() as connection:
        connection.default_channel.basic_get("paused").reject()
    lab.pause("paused")
    lab.app.control.add_consumer("paused", reply=True, timeout=10, limit=1)

    assert_heard(lab, result, body, Reject, "rejected")


def test_a_task_whose_time_in_its_queue_is_over_is_revoked(lab):
    result, body = lab.send_in_chord("note", queue="paused")
    lab.store.execute("UPDATE kombu_pg.message SET expires_at = clock_timestamp() WHERE task_id = %s", (result.id,))

    assert_heard(lab, result, body, TaskRevokedError, "expired", state="REVOKED")
    assert lab.runs(result.id, "end") == 0


# What Celery records itself is recorded once.


def set_far_eta(fields):
    fields["headers"]["eta"] = "0001-01-01T00:00:00+14:00"


def test_an_eta_out_of_range_has_failed(lab):
    result, body = lab.send_in_chord("note", queue="bench")
    lab.tamper("bench", set_far_eta)

    if celery.VERSION < (5, 7):
        assert_heard(lab, result, body, InvalidTaskError, "malformed")
    else:
        assert_heard(lab, result, body, OverflowError, "rejected")


def test_a_task_that_rejects_its_message_has_failed(lab):
    result, body = lab.send_in_chord("reject")

    assert_heard(lab, result, body, Reject, "rejected")


def test_an_expired_task_is_revoked(lab):
    result, body = lab.send_in_chord("note", expires=-10)

    assert lab.end(result)[0] == "REVOKED"
    assert lab.end(body)[0] == "FAILURE"
    lab.settle(result.id)
    assert lab.runs(result.id, "end") == 0
    assert (lab.letters(result.id), lab.heard(result.id)) == ([], 0)


# How it is told.


def test_an_errback_that_cannot_be_called_does_not_keep_the_result_and_the_chord_waiting(lab):
    part = lab.sig("nobody")
    part.link_error(lab.sig("heard", queue="bench").set(exchange="nowhere", routing_key="nowhere"))
    result = part.apply_async()

    assert lab.end(result)[0] == "FAILURE"
    assert lab.letter(result.id) == "unknown_task"


def test_a_dead_letter_exchange_gets_the_message_instead(lab):
    lab.app.control.add_consumer("diverted", reply=True, timeout=10, limit=1)

    result = lab.send("nobody", queue="diverted")

    where = "SELECT q.name FROM kombu_pg.message m JOIN kombu_pg.queue q ON q.id = m.queue_id WHERE m.task_id = %s"
    eventually(lambda: lab.store.execute(where, (result.id,)) == [("elsewhere",)], 30)
    assert lab.letters(result.id) == []


def test_what_died_while_no_worker_ran_is_heard_when_one_starts(lab):
    first = lab.send("note", queue="later")
    lab.send("note", queue="later")
    assert lab.letters(first.id) == [("maxlen", False)]

    lab.app.control.add_consumer("later", reply=True, timeout=10, limit=1)

    assert lab.end(first)[0] == "FAILURE"
    assert lab.letter(first.id) == "maxlen"
    eventually(lambda: lab.heard(first.id) == 1, 30)


def test_a_task_whose_callback_cannot_be_published_has_failed_and_its_link_error_hears_of_it(lab):
    with lab.app.connection_for_write() as connection:
        kombu.Queue("other", channel=connection.default_channel, max_priority=3).declare()
    lab.start()

    result = lab.send("note", link=lab.sig("note").set(queue="other"))  # Celery declares it, without priorities

    state, error = lab.end(result)
    assert (state, type(error).__name__) == ("FAILURE", "PreconditionFailed")
    lab.settle(result.id)
    eventually(lambda: lab.heard(result.id), 30)
    lab.settle()
    assert lab.heard(result.id) == 1
