"""What else might somebody publish?

A message of Celery's with one to three things changed: into something of another type, beyond a limit, not encodable,
in another serializer, or into SQL. Nothing waits for ever, and nothing kills the pool by doing as it is told.
"""

import json
import pickle
import random
import uuid
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

__all__ = ["names", "sabotaged"]

SQL = ["'; DROP TABLE kombu_pg.message; --", "%s %(a)s %%", '"; SELECT 1; --', "$1", "\\'", "kombu_pg.message", "NULL"]
TEXTS = [
    *SQL,
    "",
    " ",
    "\0",
    "a\0b",
    "\ud800",
    "Ünïcödé ☃ \U0001f600",
    "x" * 300,
    "x" * 20_000,
    "\r\n",
    "..",
    "{}",
    "#.*",
]
NUMBERS: list[Any] = [0, -1, 1, 2**31, 2**63, -(2**70), 10**30, 0.5, -0.0, float("inf"), float("nan"), 1e308, True]
ODDITIES: list[Any] = [None, [], {}, [[]], {"a": {"b": [None]}}, b"\xff\0", Decimal("1.10"), uuid.UUID(int=7), ["x", 1]]
ANYTHING: list[Any] = [*TEXTS, *NUMBERS, *ODDITIES]

HEADERS = (
    "lang task id shadow expires group group_index retries root_id parent_id argsrepr kwargsrepr origin "
    "timelimit stamped_headers stamps ignore_result replaced_task_nesting compression x-death x-delay sentry-trace"
).split()
PROPERTIES = (
    "correlation_id reply_to delivery_mode priority app_id message_id type user_id timestamp cluster_id odd".split()
)
TYPES = [
    "application/json", "application/x-python-serialize", "application/x-yaml", "application/x-msgpack", "text/plain",
    "application/data", "nonsense", "", None, *SQL[:2],
]  # fmt: skip
ENCODINGS = ["utf-8", "binary", "utf-16", "latin1", "ascii", "zlib", "nonsense", "", None]
BODIES: list[str | bytes] = [
    "", "null", "[]", "{}", "[[], {}]", "[[], {}, {}, {}]", "[{}, [], {}]", '"text"', "1e999", "[[], {}", "\ud800",
    "[" * 5000, b"", b"\xff\xfe", b"\0" * 100, pickle.dumps([[], {}, {}]), "[[NaN], {}, {}]", '[[], {"": 1}, {}]',
    "[null, null, null]",
]  # fmt: skip


def sabotaged(number: int) -> dict[str, Any]:
    """The message with this number: always the same. Its header `fuzz` is never touched."""
    chance = random.Random(number)
    fields = valid(chance)
    for sabotage in chance.sample(SABOTAGES, chance.choice([1, 1, 2, 3])):
        sabotage(fields, chance)
    fields["headers"]["fuzz"] = number
    return fields


def valid(chance: random.Random) -> dict[str, Any]:
    task_id = str(uuid.UUID(int=chance.getrandbits(128)))
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    headers = {
        "lang": "py", "task": chance.choice(["chaos.fuzz_app.anything", "chaos.fuzz_app.one"]), "id": task_id,
        "root_id": task_id, "parent_id": None, "group": None, "retries": 0, "timelimit": [None, None], "eta": None,
        "expires": None, "argsrepr": "(1,)", "kwargsrepr": "{}", "origin": "fuzz",
    }  # fmt: skip
    return {
        "body": json.dumps([[1], {}, embed]),
        "priority": 0,
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "headers": headers,
        "properties": {"correlation_id": task_id, "reply_to": str(uuid.uuid4()), "delivery_mode": 2},
    }


def drop_header(fields: dict[str, Any], chance: random.Random) -> None:
    fields["headers"].pop(chance.choice(HEADERS), None)


def change_header(fields: dict[str, Any], chance: random.Random) -> None:
    fields["headers"][chance.choice(HEADERS)] = chance.choice(ANYTHING)


def rename_task(fields: dict[str, Any], chance: random.Random) -> None:
    fields["headers"]["task"] = chance.choice(ANYTHING)


def change_id(fields: dict[str, Any], chance: random.Random) -> None:
    fields["headers"]["id"] = chance.choice(ANYTHING)


def change_times(fields: dict[str, Any], chance: random.Random) -> None:
    now = datetime.now(timezone.utc)
    moments = [(now + timedelta(seconds=seconds)).isoformat() for seconds in (-1e6, -1, 0.2)]
    wrong = ["soon", "9999-99-99", "2000-01-01", "0001-01-01T00:00:00+23:59", "2000-02-30T00:00:00", 5, [], "now()"]
    fields["headers"][chance.choice(["eta", "expires"])] = chance.choice([*moments, *wrong, *SQL])


def change_limits(fields: dict[str, Any], chance: random.Random) -> None:
    """None that ends the task: that would be as it was told."""
    limits = [None, 0, 60, 0.5e3, 1e308, 2**63, 10**30, 10**400, float("inf"), float("nan"), "60", [], True]
    fields["headers"]["timelimit"] = chance.choice(
        [[chance.choice(limits), chance.choice(limits)], chance.choice(ODDITIES)]
    )


def change_stamps(fields: dict[str, Any], chance: random.Random) -> None:
    named = [5.5, [[]], ["a"], ["a", {}], "a", {"a": 1}, [None], *TEXTS]
    stamped = [5, {"a": [[]]}, {"a": {}}, [], ["a"], {"a": "b", "": None}, *TEXTS]
    fields["headers"].update(stamped_headers=chance.choice(named), stamps=chance.choice(stamped))


def bloat_headers(fields: dict[str, Any], chance: random.Random) -> None:
    deep: Any = {}
    for _ in range(chance.choice([10, 200, 3000])):
        deep = {"d": deep}
    fields["headers"].update({f"h{n}": chance.choice(TEXTS) for n in range(chance.choice([1, 200]))}, deep=deep)


def change_property(fields: dict[str, Any], chance: random.Random) -> None:
    fields["properties"][chance.choice(PROPERTIES)] = chance.choice(ANYTHING)


def change_priority(fields: dict[str, Any], chance: random.Random) -> None:
    fields["priority"] = chance.choice([*ANYTHING, -1, 1, 255, 256, 2**31 - 1, 2**31, 0.5, float("nan")])


def change_type(fields: dict[str, Any], chance: random.Random) -> None:
    fields["content_type"] = chance.choice(TYPES)


def change_encoding(fields: dict[str, Any], chance: random.Random) -> None:
    fields["content_encoding"] = chance.choice(ENCODINGS)


def change_body(fields: dict[str, Any], chance: random.Random) -> None:
    fields["body"] = chance.choice([*BODIES, chance.randbytes(chance.choice([1, 50, 5000]))])


def change_arguments(fields: dict[str, Any], chance: random.Random) -> None:
    sendable = [value for value in ANYTHING if not isinstance(value, bytes | Decimal | uuid.UUID)]
    parts = [[1], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    which = chance.randrange(4)
    if which == 3:
        parts[2][chance.choice(["callbacks", "errbacks", "chain", "chord", "odd"])] = chance.choice(sendable)
    else:
        parts[which] = chance.choice(
            [chance.choice(sendable), [chance.choice(sendable)], {"k": chance.choice(sendable)}]
        )
    fields["body"] = json.dumps(parts, default=str)


def use_the_first_protocol(fields: dict[str, Any], chance: random.Random) -> None:
    old = {
        "task": fields["headers"].get("task"),
        "id": fields["headers"].get("id"),
        "args": [1],
        "kwargs": {},
        "eta": None,
    }
    changed = chance.choice(["task", "id", "args", "kwargs", "retries", "expires", "timelimit"])
    old[changed] = chance.choice([*TEXTS, None, [], {}, 5, [10**400, None]])
    fields["headers"] = {}
    fields["body"] = json.dumps(old, default=str)


SABOTAGES = [
    drop_header, change_header, change_header, rename_task, change_id, change_times, bloat_headers, change_property,
    change_priority, change_type, change_encoding, change_body, change_arguments, change_arguments,
    use_the_first_protocol, change_limits, change_stamps,
]  # fmt: skip


def names(chance: random.Random, count: int) -> list[str]:
    """Names of exchanges, queues and keys that somebody might think of."""
    alphabet = "'\";-%$\\(){}#*. \n\t☃é\U0001f600ab"
    return [*TEXTS, *("".join(chance.choices(alphabet, k=chance.randint(1, 60))) for _ in range(count))]
