"""Is every message always in exactly one place?

A model of the store in a few dictionaries, and hypothesis, which looks for a sequence of steps after which the two
differ: publishers whose transactions stay open, consumers that claim, settle, die in the middle of a claim, come back
or are reaped, clocks that move. Time is moved by ageing rows.
"""

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from watching import eventually

from kombu_pg.database import Session, Statement, wait_readable
from kombu_pg.feed import Marks
from kombu_pg.options import Options
from kombu_pg.store import Caller, Claim, Claimed, Outgoing, QueueDefinition, Settlement, Store

DELIVERY_LIMIT = 4
SUSPECT_RETURNS = 3
BIG = 16 * 1024 * 1024
#: Queue -> its x-max-priority.
QUEUES = {"first-in": None, "by-priority": 2}
RETURNED, DUE, FRESH = range(3)

#: Priority, later, task, size.
DRAFT = st.tuples(st.integers(0, 3), st.sampled_from([False, False, True]), st.booleans(), st.integers(0, 200))
OUTCOME = st.sampled_from(["requeued", "acked", "given_back", "rejected", "expired", "recorded"])

STATE = """
SELECT ARRAY(SELECT ARRAY[m.id, m.returns] FROM kombu_pg.message m),
       ARRAY(SELECT r.message_id FROM kombu_pg.ready r JOIN kombu_pg.message m ON m.id = r.message_id),
       ARRAY(SELECT s.message_id FROM kombu_pg.scheduled s JOIN kombu_pg.message m ON m.id = s.message_id),
       ARRAY(SELECT ARRAY[l.consumer_id, m.id] FROM kombu_pg.lease l CROSS JOIN unnest(l.message_ids) AS held (id)
               JOIN kombu_pg.message m ON m.id = held.id),
       ARRAY(SELECT d.id FROM kombu_pg.dead_letter d)
"""


@dataclass(eq=False)
class Message:
    """What the model knows of a message. `place`: ready, scheduled, leased, dead, gone."""

    id: int
    queue: int
    priority: int
    size: int
    task: str | None
    place: str
    returns: int = 0
    holder: int | None = None
    due: bool = False
    expired: bool = False
    revoked: bool = False


@dataclass(eq=False)
class Entry:
    """A row of `ready`. `key`: its place in the queue. `locked`: in a claim that has not committed."""

    message: Message
    key: tuple[int, ...]
    returned: bool
    locked: bool = False


@dataclass(eq=False)
class Worker:
    """A consuming process, and what it believes to hold."""

    session: Session | None
    id: int
    token: int = 1
    marks: Marks = field(default_factory=Marks)
    armed: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)
    leases: dict[int, set[int]] = field(default_factory=dict)
    claiming: list[Entry] | None = None
    noticed: bool = False
    reaped: bool = False

    @property
    def free(self) -> bool:
        return self.session is not None and self.claiming is None


def said(sql: str) -> Statement[Any]:
    return Statement(sql, None, lambda rows: rows)


def place_in_queue(message: Message, arrival: int) -> tuple[int, ...]:
    """Suspects first, those with the fewest returns before others; then priority; then how it came; then age."""
    if arrival == RETURNED and message.returns >= SUSPECT_RETURNS:
        return (0, message.returns, message.id)
    return (1, -message.priority, arrival, message.id)


class StoreModel(RuleBasedStateMachine):
    """Steps on the store, and what they should do."""

    def __init__(self, broker: str) -> None:
        super().__init__()
        self.options = Options.parse(broker)
        self.store = Store(self.options)
        self.admin = Session(self.options.dsn, None)
        self.admin.run(said("SET synchronous_commit = off"))
        self.messages: dict[int, Message] = {}
        self.ready: dict[int, Entry] = {}
        self.workers: list[Worker] = []
        self.publishing: list[tuple[Session, Message]] = []
        self.empty()
        self.queues = [self.declare(name, priority) for name, priority in QUEUES.items()]
        self.keeper = self.admin.run(self.store.attach(None, "keeper", 0, heartbeat=False)).consumer_id
        self.start_a_worker()

    def empty(self) -> None:
        tables = "message ready scheduled lease consumer dead_letter queue subscription revoked".split()
        self.sql("TRUNCATE " + ", ".join(f"kombu_pg.{table}" for table in tables))

    def declare(self, name: str, max_priority: int | None) -> int:
        definition = QueueDefinition(
            name, True, False, False, max_priority, None, None, None, None, None, None, None, None, "{}"
        )
        declared = self.admin.run(self.store.declare_queue(definition, Caller(None, 0, ()), passive=False))
        assert declared.queue_id is not None
        return declared.queue_id

    def sql(self, statement: str) -> Any:
        return self.admin.run(said(statement))

    def teardown(self) -> None:
        for session in [worker.session for worker in self.workers] + [session for session, _ in self.publishing]:
            if session is not None:
                session.close()
        self.admin.close()

    # Publish

    @initialize(first=st.lists(DRAFT, min_size=2, max_size=8), second=st.lists(DRAFT, max_size=8))
    def begin(self, first, second):
        self.publish(0, first)
        self.publish(1, second)

    @precondition(lambda self: len(self.ready) < 15)
    @rule(queue=st.integers(0, 1), drafts=st.lists(DRAFT, min_size=1, max_size=6))
    def publish(self, queue, drafts):
        for draft in drafts:
            self.publish_one(queue, *draft)

    def publish_one(self, queue, priority, later, task, size):
        message = self.outgoing(queue, priority, later and task, task, size)
        listening = [worker for worker in self.workers if worker.free and self.queues[queue] in worker.armed]

        self.admin.run(self.store.publish(message))

        assert self.admin.take_notices() == []
        self.arrives(self.sketch(self.admin, message, queue))
        if listening and message.due is None:
            told = self.queues[queue]
            eventually(lambda: any(was_told(worker, told) for worker in listening), 20, "an idle one is told")

    def outgoing(self, queue, priority, later, task, size) -> Outgoing:
        return Outgoing(
            persistent=False,
            exchange="",
            routing_key=list(QUEUES)[queue],
            priority=priority,
            ttl=None,
            due="2999-01-01T00:00:00+00:00" if later else None,
            task="t" if task else None,
            task_id=uuid.uuid4().hex if task else None,
            reply_to=None,
            properties=b'{"h":{},"p":{}}',
            body=b"x" * size,
            publish_id=uuid.uuid4().hex,
            retry_age=None,
            mandatory=False,
        )

    def sketch(self, session: Session, message: Outgoing, queue: int) -> Message:
        """The message that was just written on this session, as the model sees it."""
        drawn = session.run(said("SELECT currval('kombu_pg.message_id_seq')"))[0][0]
        highest = list(QUEUES.values())[queue] or 0
        size = len(message.properties) + len(message.body)
        place = "scheduled" if message.due else "ready"
        return Message(drawn, self.queues[queue], min(message.priority, highest), size, message.task_id, place)

    def arrives(self, message: Message) -> None:
        self.messages[message.id] = message
        if message.place == "ready":
            self.enters(message, FRESH)

    def enters(self, message: Message, arrival: int) -> None:
        message.place, message.holder = "ready", None
        self.ready[message.id] = Entry(message, place_in_queue(message, arrival), arrival == RETURNED)

    @precondition(lambda self: len(self.ready) < 15 and len(self.publishing) < 2)
    @rule(queue=st.integers(0, 1), priority=st.integers(0, 2))
    def begin_to_publish(self, queue, priority):
        """A publisher has drawn its message's id, and takes its time to commit."""
        session = Session(self.options.dsn, None)
        message = self.outgoing(queue, priority, False, True, 10)
        session.run(said("BEGIN; SET LOCAL synchronous_commit = off"))
        session.run(self.store.enqueue(message))
        self.publishing.append((session, self.sketch(session, message, queue)))

    @precondition(lambda self: self.publishing)
    @rule(commit=st.booleans(), which=st.integers(0, 1))
    def end_publishing(self, commit, which):
        session, message = self.publishing.pop(which % len(self.publishing))
        session.run(said("COMMIT" if commit else "ROLLBACK"))
        session.close()
        if commit:
            self.arrives(message)

    # Claim

    @precondition(lambda self: len(self.workers) < 3)
    @rule()
    def start_a_worker(self):
        worker = Worker(None, 0)
        self.connect(worker)
        attached = worker.session.run(self.store.attach(None, "host", 1, heartbeat=False))
        worker.id = attached.consumer_id
        self.workers.append(worker)

    def connect(self, worker: Worker) -> None:
        worker.session = Session(self.options.dsn, None)
        backend_pid = worker.session.run(self.store.prepare_claims())
        worker.session.run(self.store.listen(self.store.consumer_channel(backend_pid)))
        worker.marks, worker.armed, worker.claiming = Marks(), set(), None

    @precondition(lambda self: self.ready and self.some_free())
    @rule(data=st.data(), limit=st.integers(1, 6), each=st.integers(1, 5), tight=st.booleans(), turn=st.booleans())
    def claim(self, data, limit, each, tight, turn):
        worker = data.draw(st.sampled_from(self.some_free()))
        claimed, expected, armed = self.claims(worker, limit, each, tight, turn)
        self.has_claimed(worker, claimed, expected, armed)

    @precondition(lambda self: self.ready and self.some_free() and not self.open_claims())
    @rule(data=st.data(), limit=st.integers(1, 4))
    def begin_to_claim(self, data, limit):
        """A claim whose transaction is still open: others see its messages as ready, and skip them."""
        worker = data.draw(st.sampled_from(self.some_free()))
        worker.session.run(said("BEGIN"))
        claimed, expected, armed = self.claims(worker, limit, limit, False, False)
        for entry in expected:
            entry.locked = True
        worker.claiming = expected
        self.open_claim = claimed, armed

    @precondition(lambda self: self.open_claims())
    @rule()
    def end_claiming(self):
        worker = self.open_claims()[0]
        expected, worker.claiming = worker.claiming, None
        worker.session.run(said("COMMIT"))
        claimed, armed = self.open_claim
        self.has_claimed(worker, claimed, expected, armed, late=True)

    def claims(self, worker, limit, each, tight, turn) -> tuple[Claimed, list[Entry], list[bool]]:
        queues = self.queues[::-1] if turn else self.queues
        held = [self.messages[message_id] for message_id in worker.held]
        suspects = 0 if any(m.returns >= SUSPECT_RETURNS and m.holder == worker.id for m in held) else 1
        claim = Claim(
            consumer_id=worker.id,
            token=worker.token,
            queues=queues,
            keys=queues,
            limits=[each] * 2,
            armed=[queue in worker.armed for queue in queues],
            marks=worker.marks.of(queues),
            limit=limit,
            max_bytes=100 if tight else BIG,
            suspects=suspects,
            gate=True,
            advance=True,
        )
        expected, armed = self.expected(claim)
        claimed = worker.session.run(self.store.claim(claim))
        worker.marks.advance(queues, claimed)
        worker.armed = {queue for queue, is_armed in zip(queues, armed, strict=True) if is_armed}
        return claimed, expected, armed

    def expected(self, claim: Claim) -> tuple[list[Entry], list[bool]]:
        """What the claim takes, in this order, and which queues it leaves empty-handed."""
        taken: list[Entry] = []
        armed = []
        left, size_left, suspects = claim.limit, claim.max_bytes, claim.suspects
        for queue, limit in zip(claim.queues, claim.limits, strict=True):
            want = min(limit, left)
            waiting = [e for e in self.ready.values() if e.message.queue == queue and not e.locked]
            waiting.sort(key=lambda entry: entry.key)
            accused = [entry for entry in waiting if entry.key[0] == 0]
            innocent = [entry for entry in waiting if entry.key[0] == 1]
            before, got = 0, []
            for entry in (accused[:suspects] + innocent)[:want]:
                if before < size_left:
                    got.append(entry)
                before += entry.message.size
            taken += got
            left, want = left - len(got), want - len(got)
            size_left -= sum(entry.message.size for entry in got)
            suspects -= sum(entry.key[0] == 0 for entry in got)
            armed.append(want > 0 and size_left > 0)
        return taken, armed

    def has_claimed(self, worker, claimed, expected, armed, *, late=False) -> None:
        alive = [entry for entry in expected if entry.message.place == "ready"]
        if not late:
            assert [row.id for row in claimed.rows] == [entry.message.id for entry in alive], alive
            assert [row.expired for row in claimed.rows] == [entry.message.expired for entry in alive]
            assert [row.revoked for row in claimed.rows] == [entry.message.revoked for entry in alive]
        assert [row.redelivered for row in claimed.rows if self.ready[row.id] in alive] == [
            entry.returned or entry.message.returns > 0 for entry in alive
        ]
        assert claimed.armed == armed
        for entry in expected:
            del self.ready[entry.message.id]
        for entry in alive:
            entry.message.place, entry.message.holder = "leased", worker.id
        if claimed.rows:
            ids = {row.id for row in claimed.rows}
            worker.held |= ids
            worker.leases[claimed.rows[0].lease_id] = ids

    def some_free(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.free]

    def open_claims(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.claiming is not None]

    # Settle

    @precondition(lambda self: self.some_free())
    @rule(data=st.data(), rounds=st.lists(st.lists(OUTCOME, min_size=1, max_size=4), min_size=1, max_size=4))
    def work(self, data, rounds):
        """Claim, settle, and claim again: that also moves the marks."""
        worker = data.draw(st.sampled_from(self.some_free()))
        for whats in rounds:
            claimed, expected, armed = self.claims(worker, len(whats), len(whats), False, False)
            self.has_claimed(worker, claimed, expected, armed)
            for row, what in zip(claimed.rows, whats, strict=False):
                self.settles(worker, [row.id], what)

    @precondition(lambda self: self.holders())
    @rule(data=st.data(), what=OUTCOME)
    def settle(self, data, what):
        """Also of what it no longer holds: it does not know that."""
        worker = data.draw(st.sampled_from(self.holders()))
        ids = data.draw(st.lists(st.sampled_from(sorted(worker.held)), min_size=1, max_size=3, unique=True))
        self.settles(worker, ids, what)

    def settles(self, worker: Worker, ids: list[int], what: str) -> None:
        leases = list(self.let_go(worker, ids))

        worker.session.run(self.store.settle(worker.id, Settlement(**{what: ids}, leases=leases)))

        for message in map(self.messages.__getitem__, ids):
            if what == "acked":
                self.ends(message, "gone")
            elif message.holder == worker.id:
                self.settled(message, what)

    def let_go(self, worker: Worker, ids: Iterable[int]) -> Iterator[int]:
        """The worker holds these no more. -> leases of which nothing is left."""
        worker.held -= set(ids)
        for lease_id, left in list(worker.leases.items()):
            left -= set(ids)
            if not left:
                del worker.leases[lease_id]
                yield lease_id

    def settled(self, message: Message, what: str) -> None:
        if what == "given_back":
            self.enters(message, RETURNED)
        elif what == "requeued":
            if self.counts(message):
                self.enters(message, RETURNED)
        else:
            self.ends(message, "dead" if message.task else "gone")

    def counts(self, message: Message) -> bool:
        """One return more; true if it may go on."""
        message.returns += 1
        if message.returns > DELIVERY_LIMIT:
            self.ends(message, "dead" if message.task else "gone")
        return message.returns <= DELIVERY_LIMIT

    def ends(self, message: Message, place: str) -> None:
        if message.place not in ("dead", "gone"):
            message.place, message.holder = place, None

    @precondition(lambda self: self.holders())
    @rule(data=st.data(), later=st.booleans())
    def requeue_later_or_bury(self, data, later):
        worker = data.draw(st.sampled_from(self.holders()))
        message = self.messages[data.draw(st.sampled_from(sorted(worker.held)))]
        leases = list(self.let_go(worker, [message.id]))

        if later:
            worker.session.run(self.store.requeue_later(worker.id, message.id, 3e9))
        else:
            worker.session.run(self.store.dead_letter(worker.id, message.id, "malformed", "no use"))
        worker.session.run(self.store.settle(worker.id, Settlement(leases=leases)))

        if message.holder == worker.id:
            if not later:
                self.ends(message, "dead")
            elif self.counts(message):
                message.place, message.holder, message.due = "scheduled", None, False

    def holders(self) -> list[Worker]:
        return [worker for worker in self.some_free() if worker.held]

    # Die, come back, be reaped

    @precondition(lambda self: self.busy())
    @rule(data=st.data())
    def kill(self, data):
        """Its session is gone; a claim under way has not happened."""
        self.dies(data.draw(st.sampled_from(self.busy())))

    def dies(self, worker: Worker) -> None:
        pid = worker.session.backend_pid
        self.sql(f"SELECT pg_terminate_backend({pid})")
        eventually(lambda: not self.sql(f"SELECT pid FROM pg_stat_activity WHERE pid = {pid}"), 20, "it is gone")
        worker.session.close()
        for entry in worker.claiming or ():
            entry.locked = False
        worker.session, worker.claiming, worker.armed, worker.noticed = None, None, set(), False

    def busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.session and (worker.held or worker.claiming)]

    # (It waits for a claim under way that has got what it works on: here, that would never end.)
    @precondition(lambda self: any(worker.session is None for worker in self.workers) and not self.open_claims())
    @rule(data=st.data())
    def come_back(self, data):
        """It works on with some of what it held, and has forgotten the rest."""
        worker = data.draw(st.sampled_from([worker for worker in self.workers if worker.session is None]))
        held = sorted(worker.held)
        self.comes_back(worker, data.draw(st.sets(st.sampled_from(held))) if held else set())

    def comes_back(self, worker: Worker, kept: set[int]) -> None:
        self.connect(worker)
        attached = worker.session.run(self.store.attach(worker.id, "host", 1, heartbeat=False))

        assert (attached.consumer_id is None) == worker.reaped
        list(self.let_go(worker, worker.held - kept))
        worker.leases = {}  # nobody ends the leases of a lost connection by their ids
        if worker.reaped:
            worker.id = worker.session.run(self.store.attach(None, "host", 1, heartbeat=False)).consumer_id
            worker.reaped = False
        else:
            self.agree(worker, kept)
        worker.token += 1

    @precondition(lambda self: self.holders() and not self.open_claims())
    @rule(data=st.data(), limit=st.integers(1, 5))
    def be_away_for_too_long(self, data, limit):
        """It comes back with everything in hand, which somebody else may have by now."""
        worker = data.draw(st.sampled_from(self.holders()))
        self.dies(worker)
        self.upkeep_runs(age=False, sweep=False)
        self.upkeep_runs(age=True, sweep=False)
        for other in self.some_free():
            self.has_claimed(other, *self.claims(other, limit, limit, False, False))
        self.comes_back(worker, set(worker.held))

    @precondition(lambda self: any(message.returns < DELIVERY_LIMIT for message in self.at("leased")))
    @rule(data=st.data())
    def come_of_age(self, data):
        """A message has been returned as often as it may."""
        message = data.draw(st.sampled_from([m for m in self.at("leased") if m.returns < DELIVERY_LIMIT]))
        self.sql(f"UPDATE kombu_pg.message SET returns = {DELIVERY_LIMIT} WHERE id = {message.id}")
        message.returns = DELIVERY_LIMIT

    def agree(self, worker: Worker, kept: set[int]) -> None:
        forgotten = [m for m in self.messages.values() if m.holder == worker.id and m.id not in kept]
        lost = [self.messages[i] for i in kept if self.messages[i].place in ("ready", "scheduled")]

        back = worker.session.run(self.store.reconcile(worker.id, worker.token, (), sorted(kept), reassert=True))

        assert back == len(forgotten)
        for message in forgotten:
            self.enters(message, RETURNED)
        for message in lost:
            self.ready.pop(message.id, None)
            message.place, message.holder = "leased", worker.id

    @precondition(lambda self: self.forgettable())
    @rule(data=st.data())
    def forget_a_claim(self, data):
        """A crash of the server, as it looks to one worker: what it had just claimed stands in the queue again."""
        message = data.draw(st.sampled_from(self.forgettable()))
        self.sql(
            f"UPDATE kombu_pg.lease SET message_ids = array_remove(message_ids, {message.id});"
            "INSERT INTO kombu_pg.ready (queue_id, band, position, message_id, size)"
            " SELECT queue_id, band, id, id, octet_length(properties) + octet_length(body)"
            f" FROM kombu_pg.message WHERE id = {message.id}"
        )
        self.enters(message, FRESH)
        for worker in self.workers:
            worker.marks = Marks()  # after a crash of the server everybody connects anew

    def forgettable(self) -> list[Message]:
        away = {worker.id for worker in self.workers if worker.session is None}
        return [m for m in self.messages.values() if m.place == "leased" and m.holder in away and not m.returns]

    @precondition(lambda self: not self.open_claims() and self.is_work_for_upkeep())
    @rule(age=st.booleans(), sweep=st.booleans())
    def upkeep(self, age, sweep):
        self.upkeep_runs(age=age, sweep=sweep)

    def upkeep_runs(self, *, age: bool, sweep: bool) -> None:
        if age:
            self.sql("UPDATE kombu_pg.consumer SET lost_at = lost_at - interval '1 day'")

        assert self.admin.run(self.store.upkeep(self.keeper, sweep=sweep)).known

        self.promoted()
        for worker in self.workers:
            if worker.session is None and not worker.reaped:
                if worker.noticed and age:
                    self.reaped(worker)
                worker.noticed = True
        if sweep:
            for message in self.messages.values():
                if message.expired and message.place in ("ready", "scheduled"):
                    self.ready.pop(message.id, None)
                    self.ends(message, "dead" if message.task else "gone")

    def is_work_for_upkeep(self) -> bool:
        lost = any(worker.session is None and not worker.reaped for worker in self.workers)
        return lost or any(message.due or message.expired for message in self.at("ready", "scheduled"))

    def reaped(self, worker: Worker) -> None:
        worker.reaped = True
        for message in self.messages.values():
            if message.holder == worker.id and self.counts(message):
                self.enters(message, RETURNED)

    # The clock

    @precondition(lambda self: self.scheduled() and not any(message.due for message in self.scheduled()))
    @rule(data=st.data())
    def fall_due(self, data):
        message = data.draw(st.sampled_from(self.scheduled()))
        self.sql(f"UPDATE kombu_pg.scheduled SET due_at = clock_timestamp() WHERE message_id = {message.id}")
        message.due = True

    @precondition(lambda self: any(message.due for message in self.scheduled()))
    @rule()
    def promote(self):
        due = sum(message.due for message in self.scheduled())
        assert self.admin.run(self.store.promote(500)) >= due
        self.promoted()

    def promoted(self) -> None:
        for message in self.scheduled():
            if message.due:
                self.enters(message, DUE)

    def scheduled(self) -> list[Message]:
        return [message for message in self.messages.values() if message.place == "scheduled"]

    @precondition(lambda self: self.may_expire())
    @rule(data=st.data())
    def expire(self, data):
        message = data.draw(st.sampled_from(self.may_expire()))
        # Long enough ago for it to be a sweep's; what has just expired goes with any round.
        long_ago = "clock_timestamp() - interval '1 minute'"
        self.sql(f"UPDATE kombu_pg.message SET expires_at = {long_ago} WHERE id = {message.id}")
        message.expired = True

    @precondition(lambda self: any(message.task and not message.revoked for message in self.at("ready", "scheduled")))
    @rule(data=st.data())
    def revoke(self, data):
        """It is still handed over, once, and marked."""
        tasks = [message for message in self.at("ready", "scheduled") if message.task and not message.revoked]
        message = data.draw(st.sampled_from(tasks))
        self.sql(f"SELECT kombu_pg.revoke(ARRAY['{message.task}'])")
        message.revoked = True

    def may_expire(self) -> list[Message]:
        """One at a time: the rule should not take the turns of the others."""
        there = self.at("ready", "scheduled", "leased")
        return [] if any(message.expired for message in there) else there

    @precondition(lambda self: len(self.at("ready", "scheduled")) > 12)
    @rule(queue=st.integers(0, 1))
    def purge(self, queue):
        queue_id = self.queues[queue]
        entries = [e for e in self.ready.values() if e.message.queue == queue_id and not e.locked]
        later = [message for message in self.scheduled() if message.queue == queue_id]

        self.admin.run(self.store.purge(queue_id, 1000))

        for entry in entries:
            del self.ready[entry.message.id]
            self.ends(entry.message, "gone")
        for message in later:
            self.ends(message, "gone")

    # What must always be true

    @invariant()
    def every_message_is_in_exactly_one_place(self):
        stored, ready, scheduled, leased, dead = self.sql(STATE)[0]

        assert sorted(map(tuple, stored)) == sorted((m.id, m.returns) for m in self.at("ready", "scheduled", "leased"))
        assert sorted(ready) == sorted(message.id for message in self.at("ready"))
        assert sorted(scheduled) == sorted(message.id for message in self.at("scheduled"))
        assert sorted(map(tuple, leased)) == sorted((message.holder, message.id) for message in self.at("leased"))
        assert sorted(dead) == sorted(message.id for message in self.at("dead"))

    def at(self, *places: str) -> list[Message]:
        return [message for message in self.messages.values() if message.place in places]


def was_told(worker: Worker, queue_id: int) -> bool:
    """The worker's session has been notified of the queue, since it last asked."""
    while wait_readable([worker.session.fileno()], 0):
        worker.session.receive()
    told = any(notification.payload == str(queue_id) for notification in worker.session.notifications)
    worker.session.notifications.clear()
    return told


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("examples", "steps"), [(60, 40), pytest.param(600, 60, marks=pytest.mark.slow)])
def test_whatever_happens_every_message_is_in_one_place_and_is_claimed_in_order(store, examples, steps):
    is_short = examples == 60
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=is_short,
        # To shrink what was found takes minutes: the long form is for that.
        phases=[Phase.generate] if is_short else [Phase.generate, Phase.shrink],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    broker = store.broker(delivery_limit=DELIVERY_LIMIT, reconnect_grace=60)

    run_state_machine_as_test(lambda: StoreModel(broker), settings=chosen)
