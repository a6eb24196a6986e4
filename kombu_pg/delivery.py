"""When do we look for messages?

One pump per consuming connection, driven by a hub (`register`) or by `drain_events`. It owns the session that listens,
claims and settles; every statement on it is sent without waiting and read when the socket is readable.

What is to be claimed, and when, is the feeds' to say (see `feed`); this module sends, reads, hands over and settles.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from kombu_pg import errors
from kombu_pg.consumer import SUSPECT_RETURNS, Consumer
from kombu_pg.database import Database, Session, Statement, T, wait_readable
from kombu_pg.feed import Feed, Subscription
from kombu_pg.pushes import Pushes
from kombu_pg.store import Claim, Claimed, Row, Settlement, Store, read_pushed

__all__ = ["Delivery"]

logger = logging.getLogger(__name__)

#: The most bytes of one claim, unless a single message is larger.
BATCH_BYTES = 16 * 1024 * 1024
#: Seconds after a settlement until a hungry feed claims for less than half of its window.
REFILL_DELAY = 0.005
#: Deliveries after which it is looked whether half of the window is free again.
LOOK_AHEAD = 10
#: Idle locks of one session; further queues share one key (0), whose holders are told of every message of them.
IDLE_LOCKS = 31
#: Seconds after which a safety poll looks below the marks, too.
WHOLE_LOOK_PERIOD = 300.0
#: Seconds after which a safety poll also looks for messages that were pushed as long ago, and never came.
SEARCH_PERIOD = 30.0
#: Seconds without an answer to a claim after which the connection counts as lost.
ANSWER_TIMEOUT = 30.0
#: Seconds between two looks behind a pooler, where nobody can notify us.
POOLER_POLL = 0.25


class Hub(Protocol):
    on_tick: set[Callable[[], None]]

    def add_reader(self, fd: int, callback: Callable[..., None], *args: Any) -> None: ...
    def remove_reader(self, fd: int) -> None: ...
    def call_later(self, delay: float, callback: Callable[..., None], *args: Any) -> Any: ...
    def call_repeatedly(self, delay: float, callback: Callable[..., None], *args: Any) -> Any: ...


@dataclass(frozen=True)
class _Sent:
    """The statement under way: a claim for a feed, or something alone; what it settles, and who takes its answer."""

    deadline: float
    settlement: Settlement = field(default_factory=Settlement)
    feed: Feed | None = None
    queues: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    then: Callable[[Any], None] | None = None


class Delivery:
    """The pump. Safe from several threads: none holds the lock while it waits or runs a callback."""

    def __init__(self, database: Database, store: Store, consumer: Consumer, token: int) -> None:
        self._database = database
        self._store = store
        self._options = database.options
        self.consumer = consumer
        self.token = token
        self._generation = consumer.generation
        self._lock = threading.RLock()
        self._feeds: list[Feed] = []
        self._next_feed = 0
        self._undelivered: deque[tuple[Feed, Row]] = deque()
        self._cancelled: deque[Subscription] = deque()
        self._pushes = Pushes()
        self._settlement = Settlement()
        self._leases: dict[int, int] = {}
        self._sent: _Sent | None = None
        self._session: Session | None = None
        self._gate = True
        self.epoch: str | None = None  # in which everything here is claimed, or an earlier one
        self._loop: int | None = None  # the thread that receives what arrives
        self._polled_at = time.monotonic()
        self._whole_look_at = self._polled_at + WHOLE_LOOK_PERIOD
        self._search_at = self._polled_at + SEARCH_PERIOD
        self._hub: Hub | None = None
        self._timers: list[Any] = []
        self.lost = False

    # Channels

    def subscribe(self, feed: Feed, subscription: Subscription) -> None:
        """Deliver the queue's messages to this subscription from now on."""
        with self._lock:
            self._open_session()
        self._offer()
        with self._lock:
            if feed not in self._feeds:
                self._feeds.append(feed)
            feed.subscriptions[subscription.tag] = subscription
            feed.look_into([subscription.queue_id])

    def unsubscribe(self, feed: Feed, tag: str) -> None:
        """Deliver nothing more to this tag; what was claimed for it goes back, what it holds stays its own."""
        with self._lock:
            subscription = feed.subscriptions.pop(tag, None)
            if subscription is None:
                return
            if not feed.subscriptions:
                self._feeds.remove(feed)
        if self._session is not None and not self.lost:
            self._wait_answer()  # a claim that is under way still brings some
            self._give_back_undelivered(feed, subscription.queue_id)
            self.flush()
            self._disarm(feed, subscription.queue_id)

    def _give_back_undelivered(self, feed: Feed, queue_id: int) -> None:
        with self._lock:
            if any(s.queue_id == queue_id for s in feed.subscriptions.values()):
                return
            for row in self._pushes.take(feed, queue_id):
                self._note(row, "given_back")
            claimed, self._undelivered = self._undelivered, deque()
            for item in claimed:
                if item[0] is feed and item[1].queue_id == queue_id:
                    feed.waiting[queue_id] -= 1
                    self._give_back(*item)
                else:
                    self._undelivered.append(item)

    def _disarm(self, feed: Feed, queue_id: int) -> None:
        if any(s.queue_id == queue_id for s in feed.subscriptions.values()):
            return
        key = feed.armed.pop(queue_id, None)
        if key is not None:
            self._run(self._store.disarm([key]))
        # Who had seen the lock may still push, and perhaps nobody reads that before long.
        self._withdraw_offer()
        if self._feeds:
            self._offer()

    # Settling

    def settle(self, feed: Feed, subscription: Subscription | None, row: Row, what: str | None) -> None:
        """Note what was decided about a message: `what` is a field of Settlement (None: the store knows already).

        `subscription`: to whom it was delivered; None if it was got by basic.get.
        """
        with self._lock:
            self._note(row, what)
            if subscription is not None:
                subscription.unacked -= 1
                feed.unacked -= 1
            if row.returns >= SUSPECT_RETURNS:
                feed.hungry.add(row.queue_id)  # the next suspect may have been waiting for the end of this one
            if feed.hungry and feed.refill_at is None:
                feed.refill_at = time.monotonic() + REFILL_DELAY
                if self._hub is not None:
                    self._hub.call_later(REFILL_DELAY, self._tick)

    def _note(self, row: Row, what: str | None) -> None:
        if what is not None:
            getattr(self._settlement, what).append(row.id)
        # What basic.get has leased is not counted here: one message, one lease.
        left = self._leases.pop(row.lease_id, 1) - 1
        if left > 0:
            self._leases[row.lease_id] = left
        else:
            self._settlement.leases.append(row.lease_id)
        self.consumer.let_go(row.id)

    def _give_back(self, feed: Feed, row: Row) -> None:
        feed.unacked -= 1
        self._note(row, "given_back")

    def settled_outside_a_loop(self) -> None:
        """Send what was settled, unless somebody is about to: a hub's tick, or `drain_events` after its callbacks."""
        if self._loop is None:
            self.flush(wait=False)
        elif self._loop != threading.get_ident():
            # The loop may sleep; the answer to this wakes it.
            with self._lock:
                if self._sent is None and self._settlement and self._session is not None:
                    self._send(None)

    def flush(self, *, wait: bool = True) -> None:
        """Send what was settled; afterwards the server has it, with `wait` it has also answered.

        Raises:
            Unavailable: the connection is lost (nothing of the settlement is).
        """
        while True:
            with self._lock:
                if self._sent is None:
                    if not self._settlement:
                        return
                    self._open_session()
                    self._send(None)
                    if not wait:
                        return
            self._wait_answer()

    def hand_over(self) -> Settlement:
        """Take out what was settled and not answered, for somebody else to send."""
        with self._lock:
            settlement, self._settlement = self._settlement, Settlement()
            if self._sent is not None:
                settlement.add(self._sent.settlement)
                self._sent = None
            return settlement

    # A hub

    def register(self, hub: Hub) -> None:
        """Let the hub drive the pump; may be called again."""
        with self._lock:
            if self._hub is not hub:
                self._unregister()
                self._hub = hub
                self._loop = threading.get_ident()
                hub.on_tick.add(self._tick)
            if self._session is not None:
                self._watch()

    def _watch(self) -> None:
        assert self._hub is not None
        assert self._session is not None
        self._hub.add_reader(self._session.fileno(), self._on_readable)
        for timer in self._timers:
            timer.cancel()
        self._timers = [self._hub.call_repeatedly(period, self._tick) for period in self._periods()]

    def _periods(self) -> Iterator[float]:
        # The hub sleeps for up to a second: whatever else is due must be due to a timer.
        if self._poll_interval:
            yield self._poll_interval
        if not self.consumer.settled:
            yield 0.1

    def _unregister(self) -> None:
        hub, self._hub = self._hub, None
        if hub is None:
            return
        self._loop = None
        hub.on_tick.discard(self._tick)
        for timer in self._timers:
            timer.cancel()
        self._timers = []
        if self._session is not None and not self._session.closed:
            hub.remove_reader(self._session.fileno())

    def _tick(self) -> None:
        if not self.lost:
            self.deliver()  # what came while something else waited for an answer
            self.pump()

    def _on_readable(self, *_: Any) -> None:
        if not self.lost:
            self._receive()
            self.deliver()
            self.pump()

    # No hub

    def drain(self, timeout: float | None) -> None:
        """Deliver what is there, and wait for something if nothing is; returns after at least one delivery.

        Raises:
            socket.timeout: nothing came within `timeout` seconds.
            Unavailable: the connection is lost.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        loop, self._loop = self._loop, threading.get_ident()
        try:
            while not self.deliver():
                self.pump()
                left = self._sleep_for(deadline)
                if left <= 0 and deadline is not None and time.monotonic() >= deadline and not self._claiming():
                    raise TimeoutError("no message arrived in time")
                if self._session is None:
                    time.sleep(min(left, 0.1))
                elif wait_readable([self._session.fileno()], left):
                    self._receive()
        finally:
            self._loop = loop
        self.pump()

    def _claiming(self) -> bool:
        sent = self._sent
        return sent is not None and sent.feed is not None

    def _sleep_for(self, deadline: float | None) -> float:
        now = time.monotonic()
        until = [now + 1.0]
        if self._sent is not None:
            until.append(self._sent.deadline)
        elif deadline is not None:
            until.append(deadline)
        if deadline is not None and not self._claiming():
            until.append(deadline)
        if self._poll_interval:
            until.append(self._polled_at + self._poll_interval)
        if not self.consumer.settled:
            until.append(now + 0.05)
        if self._sent is None:
            until += [feed.refill_at for feed in self._feeds if feed.refill_at is not None and feed.can_claim]
        return max(0.0, min(until) - now)

    # The machine

    def pump(self) -> None:
        """Send whatever is due, if the session is free. Never blocks.

        Raises:
            Unavailable: the connection is lost.
        """
        with self._lock:
            if self._session is None:
                return
            self._check_lost()
            if self._sent is not None:
                return
            self._poll()
            if self._pushes.offered and self._pushes.is_overdue:
                self._look_after_offer()
                return
            # What is returned goes alone: those who are told of it look once it is committed.
            feed = None if self._settlement.returns else self._claimer(time.monotonic())
            if feed is not None or self._settlement:
                self._send(feed)
            elif self._pushes.offered:
                self._look_after_offer()

    def deliver(self) -> int:
        """Hand over everything that was claimed, then tell the consumers whose queue is gone; returns how many times.

        A callback's exception passes through.
        """
        count = 0
        with self._lock:
            if any(feed.is_told_in_vain for feed in self._feeds):
                self._claim_ahead()  # before a callback, which may take long
        while True:
            with self._lock:
                if not self._undelivered:
                    break
                feed, row = self._undelivered.popleft()
                feed.waiting[row.queue_id] -= 1
                subscription = feed.receiver(row.queue_id)
                if subscription is None or not subscription.room:
                    # (No room: of two consumers of the queue, the one with room has been cancelled since.)
                    self._give_back(feed, row)
                    continue
                if subscription.no_ack:
                    feed.unacked -= 1
                    self._note(row, "acked")
                else:
                    subscription.unacked += 1
            count += 1
            subscription.deliver(row, subscription)
            if not count % LOOK_AHEAD:
                self._claim_ahead()
        while self._cancelled:
            count += 1
            subscription = self._cancelled.popleft()
            if subscription.on_cancel is not None:
                subscription.on_cancel(subscription.tag)
        return count

    def _claim_ahead(self) -> None:
        """Have the server work on the next claim while what is left of the last one is handed over."""
        with self._lock:
            if self._session is None or self._sent is not None or self._settlement.returns or self.lost:
                return
            feed = self._claimer(time.monotonic())
            if feed is not None:
                self._check_lost()
                self._send(feed)

    def close(self) -> None:
        """Let go of the session. What was settled and not sent is in `hand_over`."""
        with self._lock:
            self._unregister()
            self.lost = True
            self._undelivered.clear()
            self._pushes.clear()
            self._cancelled.clear()
            if self._session is not None:
                self._session.close()

    @property
    def _poll_interval(self) -> float:
        return self._options.poll_interval if self._gate else POOLER_POLL

    def _poll(self) -> None:
        now = time.monotonic()
        if self._poll_interval and now - self._polled_at >= self._poll_interval:
            self._polled_at = now
            if now >= self._search_at:
                self._search_at = now + SEARCH_PERIOD
                self._pushes.search()
            if now >= self._whole_look_at:
                self._whole_look_at = now + WHOLE_LOOK_PERIOD
                for feed in self._feeds:
                    feed.marks.distrust()
            for feed in self._feeds:
                feed.look_into(s.queue_id for s in feed.subscriptions.values())

    def _claimer(self, now: float) -> Feed | None:
        if not self.consumer.settled:
            return None
        for feed in self._feeds:
            if feed.is_told_in_vain:
                return feed
        for offset in range(len(self._feeds)):
            feed = self._feeds[(self._next_feed + offset) % len(self._feeds)]
            if feed.wants_to_claim(now):
                self._next_feed += offset + 1
                return feed
        return None

    def _send(self, feed: Feed | None) -> None:
        assert self._session is not None
        assert self.consumer.id is not None
        settlement, self._settlement = self._settlement, Settlement()
        deadline = time.monotonic() + ANSWER_TIMEOUT
        statement: Statement[Any]
        if feed is None:
            self._sent = _Sent(deadline, settlement)
            statement = self._store.settle(self.consumer.id, settlement)
        else:
            feed.hungry.clear()
            feed.refill_at = None
            claim = self._claim(feed)
            self._sent = _Sent(
                deadline, settlement, feed, queues=list(claim.queues), keys=list(claim.keys), limits=list(claim.limits)
            )
            statement = self._store.claim(claim, settlement)
        self._send_statement(statement)

    def _send_alone(self, statement: Statement[T], then: Callable[[T], None] | None = None) -> None:
        self._sent = _Sent(time.monotonic() + ANSWER_TIMEOUT, then=then)
        self._send_statement(statement)

    def _send_statement(self, statement: Statement[Any]) -> None:
        assert self._session is not None
        try:
            self._session.send(statement)
        except BaseException:
            self._restore()
            raise

    def _claim(self, feed: Feed) -> Claim:
        queues = feed.queues()
        assert self.consumer.id is not None
        return Claim(
            consumer_id=self.consumer.id,
            token=self.token,
            queues=list(queues),
            keys=[feed.armed.get(queue_id, self._key(queue_id)) for queue_id in queues],
            limits=list(queues.values()),
            armed=[queue_id in feed.armed for queue_id in queues],
            marks=feed.marks.of(queues),
            limit=feed.room,
            max_bytes=BATCH_BYTES,
            suspects=self.consumer.suspects_allowed,
            gate=self._gate,
            advance=feed.marks.worth_advancing,
        )

    def _key(self, queue_id: int) -> int:
        locks = {key for feed in self._feeds for key in feed.armed.values()}
        wanted = {s.queue_id for feed in self._feeds for s in feed.subscriptions.values()}
        return queue_id if len(wanted) <= IDLE_LOCKS or queue_id in locks else 0

    def _restore(self) -> None:
        sent, self._sent = self._sent, None
        if sent is not None:
            sent.settlement.add(self._settlement)
            self._settlement = sent.settlement
            if sent.feed is not None:
                sent.feed.look_into(sent.queues)

    def _receive(self) -> None:
        with self._lock:
            if self._session is None or self.lost:
                return
            try:
                done, answer = self._session.receive()
            except BaseException:
                self._restore()
                raise
            self._take_notifications()
            if done:
                sent, self._sent = self._sent, None
                if sent is not None and sent.feed is not None:
                    self._claimed(sent, answer)
                elif sent is not None and sent.then is not None:
                    sent.then(answer)
                elif sent is not None and sent.settlement.returns:
                    # Nobody is told of what he has returned himself.
                    for feed in self._feeds:
                        feed.look_into(s.queue_id for s in feed.subscriptions.values())

    def _take_notifications(self) -> None:
        assert self._session is not None
        notifications = self._session.notifications
        while notifications:
            notification = notifications.popleft()
            if notification.channel == self._pushes.channel:
                self._receive_pushed(notification.payload)
            else:
                self._told(notification.payload)

    def _told(self, queue_id: str) -> None:
        for feed in self._feeds:
            feed.look_into({s.queue_id for s in feed.subscriptions.values() if str(s.queue_id) == queue_id})

    # What was pushed

    def _offer(self) -> None:
        if self._gate and not self._pushes.offered:

            def offered(_: None) -> None:
                self._pushes.offered = True

            self._run(self._store.offer(self._registration(), self.token, self._pushes.channel), offered)

    def _withdraw_offer(self) -> None:
        """Nothing is pushed any more, and what is on its way is given back."""
        if self._pushes.offered:

            def withdrawn(pushed: list[tuple[int, int]]) -> None:
                self._pushes.offered = False
                self._refuse_unknown(pushed)

            self._run(self._store.withdraw_offer(self._registration(), self.token), withdrawn)
            self.flush()

    def _registration(self) -> int:
        if self.consumer.id is None:
            raise errors.Unavailable("this process was away for too long, and is just being registered again")
        return self.consumer.id

    def _look_after_offer(self) -> None:
        if self._pushes.is_worn:
            self._pushes.renewed()
            self._send_alone(self._store.renew_offer())
        elif self._pushes.is_search_due:
            self._pushes.searched()
            statement = self._store.pushed_before(SEARCH_PERIOD, self._registration(), self.token)
            self._send_alone(statement, self._refuse_unknown)

    def _refuse_unknown(self, pushed: list[tuple[int, int]]) -> None:
        """Give back what was pushed to us and has not come; it may still come."""
        for lease_id, message_id in pushed:
            if lease_id not in self._leases and lease_id not in self._settlement.leases:
                self._pushes.refuse(message_id)
                self._settlement.given_back.append(message_id)

    def _receive_pushed(self, payload: str) -> None:
        try:
            row = read_pushed(payload)
        except ValueError as exc:
            logger.warning("a notification on a channel of ours is no message: %s", exc)
            return
        if not self._pushes.count(row):
            return
        self._leases[row.lease_id] = 1
        feed = next((feed for feed in self._feeds if feed.room_for(row.queue_id) > 0), None)
        if feed is None:
            self._note(row, "given_back")
            return
        row.routing_key = next(s.queue for s in feed.subscriptions.values() if s.queue_id == row.queue_id)
        claiming = self._sent is not None and self._sent.feed is feed
        if claiming or row.queue_id in feed.hungry:
            self._pushes.keep(feed, row)  # what was published before it may come with a claim
        elif feed.room_for(row.queue_id) == 1 and (self._sent is not None or self._settlement.returns):
            # It fills the room, and before its callback nothing can be sent that releases the idle lock.
            feed.look_into([row.queue_id])
            self._pushes.keep(feed, row)
        else:
            self._take_in(feed, row)

    def _claimed(self, sent: _Sent, claimed: Claimed) -> None:
        feed = sent.feed
        assert feed is not None
        if claimed.armed is None:
            raise errors.Unavailable("this process was away for too long: its messages were returned to their queues")
        taken = Counter(row.queue_id for row in claimed.rows)
        more: list[int] = []
        for queue_id, key, limit, armed in zip(sent.queues, sent.keys, sent.limits, claimed.armed, strict=True):
            if armed:
                feed.armed[queue_id] = key
            else:
                feed.armed.pop(queue_id, None)
                if armed is None:
                    self._queue_gone(feed, queue_id)
                elif self._gate or taken[queue_id] >= limit:
                    more.append(queue_id)
        if claimed.rows:
            self._leases[claimed.rows[0].lease_id] = len(claimed.rows)
            feed.marks.count(len(claimed.rows))
        feed.marks.advance(sent.queues, claimed)
        pushed = self._pushes.keeps_for(feed)
        for row in self._pushes.take_with(feed, claimed.rows) if pushed else claimed.rows:
            if row.expired:
                self._note(row, "expired")
            elif pushed and not feed.room_for(row.queue_id):
                self._note(row, "given_back")  # the claim knew nothing of what was pushed
            else:
                self._take_in(feed, row)
        # Only now is it known how much room is left. Behind what had expired there may be more.
        feed.look_into(sent.queues if any(row.expired for row in claimed.rows) else more)

    def _take_in(self, feed: Feed, row: Row) -> None:
        feed.unacked += 1
        feed.waiting[row.queue_id] += 1
        self.consumer.hold(row.id, row, row.returns)
        self._undelivered.append((feed, row))

    def _queue_gone(self, feed: Feed, queue_id: int) -> None:
        for subscription in [s for s in feed.subscriptions.values() if s.queue_id == queue_id]:
            logger.warning("queue %s was deleted: consumer %s gets nothing more", subscription.queue, subscription.tag)
            del feed.subscriptions[subscription.tag]
            self._cancelled.append(subscription)

    # The session

    def _open_session(self) -> None:
        if self._session is not None:
            return
        self.epoch = self.consumer.epoch
        session = self._database.connect(listen=True)
        try:
            # Behind a pooler no session is ours: no idle locks, no notifications, only polling.
            self._gate = not self.consumer.heartbeat
            if self._gate:
                backend_pid = session.run(self._store.prepare_claims())
                session.run(self._store.listen(self._store.consumer_channel(backend_pid)))
        except BaseException:
            session.close()
            raise
        self._session = session
        if self._hub is not None:
            self._watch()

    def _check_lost(self) -> None:
        assert self._session is not None
        if self.consumer.generation != self._generation:
            raise errors.Unavailable("this process was away for too long: its messages were returned to their queues")
        if self._session.closed:
            self._restore()
            raise errors.Unavailable("the session that claims messages is closed")
        now = time.monotonic()
        if self._sent is not None and now > self._sent.deadline:
            if wait_readable([self._session.fileno()], 0):
                # It was the callbacks that took so long: the answer, or some of it, is here.
                self._sent = replace(self._sent, deadline=now + ANSWER_TIMEOUT)
                self._receive()
                return
            self._restore()
            self._session.close()
            raise errors.Unavailable(f"no answer to a claim within {ANSWER_TIMEOUT:g} seconds")

    def _wait_answer(self) -> None:
        while (sent := self._sent) is not None:
            assert self._session is not None
            if wait_readable([self._session.fileno()], min(1.0, max(0.0, sent.deadline - time.monotonic()))):
                self._receive()
            with self._lock:
                self._check_lost()

    def _run(self, statement: Statement[T], then: Callable[[T], None] | None = None) -> None:
        """Run a statement on the claiming session, after what is under way, and take its answer."""
        while True:
            self._wait_answer()
            with self._lock:
                if self._sent is None:
                    self._check_lost()
                    assert self._session is not None
                    answer = self._session.run(statement)
                    self._take_notifications()
                    if then is not None:
                        then(answer)
                    return
