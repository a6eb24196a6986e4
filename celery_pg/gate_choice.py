"""Which broker does the setting `pg_gate` choose for a call?

Nothing here publishes or connects. `Plan` is the setting, checked; `Choice` asks it and never fails: what goes wrong
means the default broker, and is said once as a warning for each task and reason.
"""

import contextvars
import difflib
import fnmatch
import hashlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from kombu.utils.imports import symbol_by_name

from kombu_pg.errors import OptionError

__all__ = ["GATE", "SETTING", "Call", "Choice", "Plan", "is_gate"]

GATE = "pg-gate"
SETTING = "pg_gate"

#: Seconds that a function which chooses may take, unless the setting says otherwise.
TIMEOUT = 1.0

#: How many calls of the chooser may be late at once before further ones are not even begun.
LATE_AT_MOST = 4

#: How many different warnings a process gives; a chooser that invents names shall not fill its memory.
WARNINGS_AT_MOST = 10_000

logger = logging.getLogger(__name__)


def is_gate(url: object) -> bool:
    """Whether the URL leads to the gate instead of a broker."""
    return isinstance(url, str) and url.startswith(f"{GATE}:")


@dataclass(frozen=True)
class Call:
    """What the chooser may look at: the call as the caller made it.

    `unit` is what a percentage goes by: the task's id, and for the parts of a chord or group what they have in common.
    """

    task: str
    unit: str
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def queue(self) -> str:
        return str(self.options.get("queue") or self.options.get("routing_key") or "")


Chooses = Callable[[Call], Any]


@dataclass(frozen=True)
class Plan:
    """The setting `pg_gate`: brokers by name, the default one, and who chooses."""

    brokers: Mapping[str, str]
    default: str
    choose: Chooses

    @classmethod
    def parse(cls, given: object) -> "Plan":
        """Return the setting, checked.

        Raises:
            OptionError: it is missing, or something in it is wrong; the message says what to write.
        """
        if not isinstance(given, Mapping):
            raise OptionError(
                f'app.conf.{SETTING} is {"not set" if given is None else "no mapping"}: set it to {{"brokers": '
                '{"rabbitmq": "amqp://...", "postgres": "pg://..."}, "default": "rabbitmq", "choose": ...}'
            )
        _known(SETTING, given, ("brokers", "choose", "default", "timeout"))
        brokers = _brokers(given.get("brokers"))
        if given.get("default") is None:
            raise OptionError(f'{SETTING} has no "default": name one of its brokers, {_listed(brokers)}')
        _broker(f'{SETTING}["default"]', given["default"], brokers)
        return cls(brokers, given["default"], _chooses(given.get("choose"), brokers, _timeout(given)))


class Choice:
    """Asks a plan; whatever happens, the answer is one of its brokers."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._said: set[tuple[str, str]] = set()

    def broker(self, call: Call) -> str:
        """Return the name of the broker for this call.

        Raises:
            SoftTimeLimitExceeded: the calling task's own limit was reached meanwhile.
        """
        try:
            name = self.plan.choose(call)
        except SoftTimeLimitExceeded:
            raise
        except Exception as exc:  # noqa: BLE001 - whatever the users' function raises
            self._say(call.task, type(exc).__name__, f"the chooser raised {exc!r}")
            return self.plan.default
        if name is None:
            return self.plan.default
        if not isinstance(name, str) or name not in self.plan.brokers:
            self._say(call.task, repr(name), f"the chooser named the broker {name!r}, which {SETTING} does not know")
            return self.plan.default
        return name

    def _say(self, task: str, reason: str, what: str) -> None:
        known = (task, reason) in self._said or len(self._said) >= WARNINGS_AT_MOST
        self._said.add((task, reason))
        logger.log(
            logging.DEBUG if known else logging.WARNING,
            "%s: %s: it goes to the default broker %s", task, what, self.plan.default,
        )  # fmt: skip


def _brokers(given: object) -> dict[str, str]:
    if not isinstance(given, Mapping) or not given:
        raise OptionError(f'{SETTING} has no "brokers": give a mapping from a name to a broker URL')
    for name, url in given.items():
        if not isinstance(name, str) or not isinstance(url, str) or not url:
            raise OptionError(f'{SETTING}["brokers"][{name!r}] is no broker URL: give a string such as "amqp://host//"')
        if is_gate(url):
            raise OptionError(f'{SETTING}["brokers"][{name!r}] is the gate itself: give the URL of a broker')
    return dict(given)


def _timeout(given: Mapping[str, Any]) -> float | None:
    seconds = given.get("timeout", TIMEOUT)
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0:
        raise OptionError(f'{SETTING}["timeout"] is {seconds!r}: give seconds above 0, or None for no limit')
    return float(seconds)


def _chooses(given: object, brokers: Collection[str], timeout: float | None) -> Chooses:
    if given is None:
        return lambda _call: None
    if isinstance(given, Mapping):
        return _Rules.parse(given, brokers)
    if isinstance(given, str):
        given = _imported(given)
    if not callable(given):
        raise OptionError(f'{SETTING}["choose"] is {given!r}: give a "module:function", a callable or a mapping')
    return _Asked(given, timeout)


def _imported(path: str) -> Any:
    try:
        return symbol_by_name(path)
    except (ImportError, AttributeError, ValueError) as exc:
        raise OptionError(
            f'{SETTING}["choose"] "{path}" cannot be imported ({exc}): give the "module:function" that chooses, '
            "or a mapping"
        ) from exc


@dataclass(frozen=True)
class _Rules:
    """By the task's name, else by its queue, else by a share of all calls."""

    tasks: Mapping[str, str]
    queues: Mapping[str, str]
    shares: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, given: Mapping[str, Any], brokers: Collection[str]) -> "_Rules":
        where = f'{SETTING}["choose"]'
        _known(where, given, ("percent", "queues", "tasks"))
        named = {}
        for kind in ("tasks", "queues"):
            named[kind] = _mapping(f'{where}["{kind}"]', given.get(kind), '{"proj.tasks.add": "postgres"}')
            for pattern, name in named[kind].items():
                _broker(f'{where}["{kind}"]["{pattern}"]', name, brokers)
        percent = _mapping(f'{where}["percent"]', given.get("percent"), '{"postgres": 10}')
        return cls(named["tasks"], named["queues"], _shares(f'{where}["percent"]', percent, brokers))

    def __call__(self, call: Call) -> str | None:
        return _match(self.tasks, call.task) or _match(self.queues, call.queue) or self._share(call.unit)

    def _share(self, unit: str) -> str | None:
        place = _percentile(unit) if self.shares else 0.0
        upto = 0.0
        for name, percent in self.shares:
            upto += percent
            if place < upto:
                return name
        return None


def _percentile(unit: str) -> float:
    """Where in [0, 100) this id stands: the same everywhere and always."""
    digest = hashlib.blake2b(unit.encode(errors="replace"), digest_size=6).digest()
    return int.from_bytes(digest, "big") * 100 / 2**48


def _match(rules: Mapping[str, str], name: str) -> str | None:
    """The exact name wins; among patterns, the first that fits."""
    if name in rules:
        return rules[name]
    return next((broker for pattern, broker in rules.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _shares(where: str, given: Mapping[str, Any], brokers: Collection[str]) -> tuple[tuple[str, float], ...]:
    for name, percent in given.items():
        _broker(where, name, brokers)
        if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent <= 100:
            raise OptionError(f'{where}["{name}"] is {percent!r}: give a number from 0 to 100')
    if sum(given.values()) > 100:
        raise OptionError(f"{where} adds up to {sum(given.values()):g}: give at most 100 in all")
    return tuple(given.items())


def _mapping(where: str, given: object, example: str) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise OptionError(f"{where} is {given!r}: give a mapping such as {example}")
    return dict(given)


def _known(where: str, given: Mapping[Any, Any], known: Collection[str]) -> None:
    for key in given:
        if key not in known:
            raise OptionError(f'unknown key "{key}" in {where}: {_meant(key, known)}')


def _broker(where: str, name: object, brokers: Collection[str]) -> None:
    if not isinstance(name, str) or name not in brokers:
        raise OptionError(f"{where} names an unknown broker {name!r}: {_meant(name, brokers)}")


def _meant(name: object, known: Collection[str]) -> str:
    close = difflib.get_close_matches(str(name), sorted(known), n=1)
    return f'did you mean "{close[0]}"?' if close else f"known are {_listed(known)}"


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))


class _Asked:
    """A function that chooses, asked in a thread beside the caller, who waits so many seconds and no longer.

    It sees the caller's context variables, not its thread-local ones; with a timeout of None it runs in the caller's
    own thread. While several calls are late, further ones fail at once: a flag service that hangs costs a publisher
    one timeout, not one for each call.
    """

    def __init__(self, function: Callable[..., Any], timeout: float | None) -> None:
        self._function = function
        self._timeout = timeout
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._idle: list[queue.SimpleQueue[Any]] = []
        self._late: set[Future[Any]] = set()

    def __call__(self, call: Call) -> Any:
        question = (call.task, call.args, call.kwargs, dict(call.options))
        if self._timeout is None:
            return self._function(*question)
        if self._pid != os.getpid():  # the threads stayed in the parent
            self._begin()
        if len(self._late) >= LATE_AT_MOST:
            raise TimeoutError("it has not answered earlier calls yet")
        answer: Future[Any] = Future()
        self._runner().put((contextvars.copy_context(), question, answer))
        return self._wait(answer, self._timeout)

    def _wait(self, answer: "Future[Any]", timeout: float) -> Any:
        if not wait([answer], timeout).done:
            self._late.add(answer)
            answer.add_done_callback(self._late.discard)
            raise TimeoutError(f"no answer within {timeout:g} s")
        return answer.result()

    def _runner(self) -> "queue.SimpleQueue[Any]":
        try:
            return self._idle.pop()
        except IndexError:
            questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
            threading.Thread(target=self._run, args=(questions, self._idle), name=GATE, daemon=True).start()
            return questions

    def _run(self, questions: "queue.SimpleQueue[Any]", idle: "list[queue.SimpleQueue[Any]]") -> None:
        while True:
            context, question, answer = questions.get()
            try:
                settle, outcome = answer.set_result, context.run(self._function, *question)
            except BaseException as exc:  # noqa: BLE001 - it is the caller's
                settle, outcome = answer.set_exception, exc
            idle.append(questions)
            settle(outcome)
