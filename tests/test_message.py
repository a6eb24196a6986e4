import json
import uuid
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal

import pytest
from amqp.basic_message import Message as BasicMessage
from amqp.exceptions import PreconditionFailed
from hypothesis import given
from hypothesis import strategies as st

from kombu_pg.errors import Rejected
from kombu_pg.message import Draft, checked_name, decode, encode
from kombu_pg.store import Outgoing, Row

ANY_TEXT = st.text(st.characters(exclude_categories=[]))  # lone surrogates and NUL included
# Whole minutes: before Python 3.12, fromisoformat() takes an offset of less than a second for UTC.
ZONES = st.none() | st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | ANY_TEXT
    | st.binary()
    | st.datetimes(timezones=ZONES).map(lambda moment: moment.replace(fold=0))  # ISO 8601 has no word for it
    | st.dates()
    | st.times().map(lambda moment: moment.replace(fold=0))
    | st.decimals(allow_nan=False)
    | st.uuids()
)
TABLES = st.dictionaries(
    ANY_TEXT,
    st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner), max_leaves=10),
    max_size=5,
)


def draft(body="", *, priority=None, content_type=None, content_encoding=None, headers=None, properties=None):
    return Draft(
        body, priority, content_type, content_encoding, headers or {}, {} if properties is None else properties
    )


def encoded(message: Draft, exchange: str = "", routing_key: str = "queue", max_size: int = 1000) -> Outgoing:
    return encode(message, exchange, routing_key, mandatory=False, max_size=max_size)


def delivered(out: Outgoing, *, redelivered: bool = False, returns: int = 0):
    """What a consumer gets of it."""
    row = Row(
        id=7,
        queue_id=1,
        redelivered=redelivered,
        returns=returns,
        priority=out.priority,
        expired=False,
        exchange=out.exchange,
        routing_key=out.routing_key,
        properties=out.properties,
        body=out.body,
        lease_id=1,
        deaths=None,
    )
    return decode(row, "tag", 3)


@given(headers=TABLES)
def test_headers_arrive_as_they_were_sent(headers):
    arrived = delivered(encoded(draft(headers=headers))).headers

    assert arrived == headers
    assert repr(arrived) == repr(headers)  # 1 is not True, nor 1.0


PROPERTIES = sorted({name for name, _ in BasicMessage.PROPERTIES} - {"expiration"})


@given(
    properties=st.dictionaries(st.sampled_from(PROPERTIES) | ANY_TEXT, SCALARS).filter(lambda p: "expiration" not in p)
)
def test_properties_of_amqp_arrive_as_they_were_sent_but_for_none_and_others_do_not(properties):
    sent = {key: value for key, value in properties.items() if value is not None and key in PROPERTIES}

    arrived = delivered(encoded(draft(properties=properties))).properties

    assert {key: value for key, value in arrived.items() if not key.startswith("pg_")} == sent


@given(body=ANY_TEXT | st.binary())
def test_a_body_arrives_as_it_was_sent(body):
    arrived = delivered(encoded(draft(body))).body

    assert (type(arrived), arrived) == (type(body), body)


@given(headers=TABLES, body=ANY_TEXT)
def test_what_is_stored_needs_no_care_from_sql(headers, body):
    out = encoded(draft(body, headers={**headers, "task": body}, properties={"reply_to": body}))

    json.loads(out.properties.decode("ascii"))
    for column in (out.task, out.reply_to):
        assert column in (None, body)
        assert b"\0" not in (column or "").encode()


@pytest.mark.parametrize("kind", ["bytes", "datetime", "date", "time", "decimal", "uuid", "table", "unknown", None])
@pytest.mark.parametrize("value", ["¿", "", "2000-01-01", [["a", b"b"]]])
def test_a_header_that_looks_like_ours_but_is_not_arrives_as_it_is(kind, value):
    headers = {"value": {"\0type": kind, "v": value}, "another": [{"\0type": {"\0type": kind}}]}

    assert delivered(encoded(draft(headers=headers))).headers == headers


@pytest.mark.parametrize("value", [bytearray(b"\0a"), memoryview(b"\0a")])
def test_bytes_of_any_kind_arrive_as_bytes(value):
    assert delivered(encoded(draft(headers={"value": value}))).headers == {"value": b"\0a"}


@pytest.mark.parametrize("value", [object(), {1, 2}, {b"key": 1}, 10**5000], ids=["object", "set", "key", "integer"])
def test_a_header_that_cannot_be_encoded_is_rejected(value):
    with pytest.raises(Rejected, match="cannot be encoded"):
        encoded(draft(headers={"value": value}))


def test_a_header_that_holds_itself_is_rejected():
    endless = []
    endless.append(endless)

    with pytest.raises(Rejected):
        encoded(draft(headers={"endless": endless}))


@pytest.mark.parametrize("body", ["é" * 501, b"x" * 1001])
def test_a_body_is_measured_in_bytes(body):
    with pytest.raises(Rejected, match=r"1,00[12] bytes .* 1,000 bytes"):
        encoded(draft(body))


def test_a_message_says_where_it_came_from_and_how_often_it_came_back():
    out = encoded(draft(priority=5, content_type="text/plain", content_encoding="utf-8"), "exchange", "key")

    raw = delivered(out, redelivered=True, returns=2)

    assert raw.delivery_info == {
        "exchange": "exchange", "routing_key": "key", "redelivered": True, "consumer_tag": "tag", "delivery_tag": 3,
        "priority": 5,
    }  # fmt: skip
    assert (raw.properties["pg_message_id"], raw.properties["pg_returns"]) == (7, 2)
    assert (raw.content_type, raw.content_encoding) == ("text/plain", "utf-8")


def test_a_message_sent_on_does_not_carry_the_marks_of_its_delivery():
    raw = delivered(encoded(draft()), returns=2)

    again = delivered(encoded(draft(properties=raw.properties)))

    assert again.properties["pg_returns"] == 0
    assert "pg_publish_id" not in again.properties


def test_the_same_properties_again_are_a_retry():
    properties = {}

    first, second = (encoded(draft(properties=properties)) for _ in range(2))
    other = encoded(draft())

    assert (first.retry_age, first.publish_id) == (None, second.publish_id)
    assert second.retry_age >= 0
    assert other.publish_id != first.publish_id


def test_a_tasks_columns_come_from_its_headers():
    headers = {"task": "app.add", "id": "1", "eta": "2030-01-02T03:04:05"}

    out = encoded(draft(headers=headers, priority=3, properties={"reply_to": "me", "delivery_mode": 1}))

    assert (out.task, out.task_id, out.reply_to, out.priority) == ("app.add", "1", "me", 3)
    assert (out.due, out.persistent) == ("2030-01-02T03:04:05+00:00", False)


def test_what_is_no_task_has_no_eta():
    out = encoded(draft(headers={"id": "1", "eta": "2030-01-02T03:04:05"}))

    assert (out.task, out.task_id, out.due) == (None, None, None)


@pytest.mark.parametrize(
    ("eta", "due"),
    [
        ("2030-01-02T03:04:05Z", "2030-01-02T03:04:05+00:00"),
        ("2030-01-02T03:04:05.678901+02:00", "2030-01-02T03:04:05.678901+02:00"),
        ("tomorrow", None),
        ("", None),
        (None, None),
        (1.5, None),
    ],
)
def test_an_eta_is_read_where_it_is_one(eta, due):
    assert encoded(draft(headers={"task": "t", "eta": eta})).due == due


@pytest.mark.parametrize(("expiration", "ttl"), [(None, None), ("0", 0), ("1500", 1500), (20, 20)])
def test_an_expiration_is_milliseconds(expiration, ttl):
    assert encoded(draft(properties={"expiration": expiration})).ttl == ttl


@pytest.mark.parametrize("expiration", ["", "1.5", "-1", b"1", float("inf"), 10**14])
def test_an_expiration_that_is_none_is_refused(expiration):
    with pytest.raises(PreconditionFailed):
        encoded(draft(properties={"expiration": expiration}))


@pytest.mark.parametrize("name", ["", "a", "ü" * 127, "a.b/c d\n'\"\\%"])
def test_a_name_of_255_bytes_is_one(name):
    assert checked_name("queue", name) == name


@pytest.mark.parametrize("name", ["a" * 256, "ü" * 128, "a\0b", "\ud800"])
def test_a_name_that_amqp_or_postgresql_cannot_hold_is_rejected(name):
    with pytest.raises(Rejected, match="queue"):
        checked_name("queue", name)


def test_every_kind_of_value_keeps_its_kind():
    values = [
        b"\0",
        datetime(2024, 2, 29, tzinfo=timezone.utc),
        date(2024, 2, 29),
        time(1, 2),
        Decimal("1.10"),
        uuid.UUID(int=1),
    ]

    arrived = delivered(encoded(draft(headers={"values": values}))).headers["values"]

    assert repr(arrived) == repr(values)
