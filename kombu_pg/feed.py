"""What does a channel consume, and how much has it room for?

A *feed* is what one channel consumes. Each of its queues is always in one of these states, and these are all its
transitions:

    HUNGRY   there may be messages that were not looked for      -> claim as soon as there is room
    SATED    the last claim emptied the queue, after the idle    -> nothing, until a notification, or the safety poll
             lock was taken: publishers know we wait

    subscribe, notification, claim that filled the room, poll, failed claim   => HUNGRY
    claim sent                                                                => SATED (what arrives meanwhile makes it
                                                                                 HUNGRY again: no wake-up is lost)

A message that its publisher has pushed changes nothing; unless it fills the room: then a claim (of nothing from that
queue) releases its idle lock at once, and it is HUNGRY.

Where there is room when a queue becomes hungry, it is claimed at once. Where there is none, room is made by settling,
and the claim waits until half of the window is free, or REFILL_DELAY after something was settled: half alone would
starve a wide worker of long tasks, every ack alone would cost a claim per task.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from kombu_pg.store import Claimed, Row

__all__ = ["BATCH", "Feed", "Marks", "Subscription"]

#: The most messages of one claim.
BATCH = 200
#: Claimed messages, or seconds (others claim, too), after which the low-water marks of a feed are looked up again.
MARK_PERIOD = 1000
MARK_INTERVAL = 1.0


@dataclass(eq=False)
class Subscription:
    """One basic.consume: who gets the messages of a queue. prefetch 0 = no limit."""

    tag: str
    queue: str
    queue_id: int
    no_ack: bool
    prefetch: int
    deliver: Callable[[Row, Subscription], None]
    on_cancel: Callable[[str], None] | None = None
    unacked: int = 0

    @property
    def room(self) -> int:
        if self.no_ack or not self.prefetch:
            return BATCH
        return max(0, self.prefetch - self.unacked)


@dataclass(eq=False)
class Feed:
    """What one channel consumes, and how much it has room for. prefetch 0 = no limit."""

    prefetch: int = 0
    unacked: int = 0
    hungry: set[int] = field(default_factory=set)  # queue ids
    refill_at: float | None = None  # from when on any room is enough; None: half of the window is
    subscriptions: dict[str, Subscription] = field(default_factory=dict)
    armed: dict[int, int] = field(default_factory=dict)  # queue id -> key of the idle lock that is held for it
    waiting: Counter[int] = field(default_factory=Counter)  # queue id -> messages taken in and not yet handed over
    marks: Marks = field(default_factory=lambda: Marks())
    turn: int = 0

    @property
    def window(self) -> int:
        limits = [self.prefetch or BATCH, sum(s.prefetch or BATCH for s in self.subscriptions.values())]
        return min([BATCH, *limits])

    @property
    def room(self) -> int:
        return self._room(self.rooms())

    def _room(self, rooms: Mapping[int, int]) -> int:
        channel = self.prefetch - self.unacked if self.prefetch else BATCH
        return max(0, min(BATCH, channel, sum(rooms.values())))

    def rooms(self) -> dict[int, int]:
        """Queue id -> how many messages its consumers have room for, besides those that wait for them."""
        rooms = dict.fromkeys((s.queue_id for s in self.subscriptions.values()), 0)
        for subscription in self.subscriptions.values():
            rooms[subscription.queue_id] += subscription.room
        return {queue_id: max(0, room - self.waiting[queue_id]) for queue_id, room in rooms.items()}

    def room_for(self, queue_id: int) -> int:
        rooms = self.rooms()
        return min(self._room(rooms), rooms.get(queue_id, 0))

    @property
    def can_claim(self) -> bool:
        """There is room for messages of a hungry queue."""
        rooms = self.rooms()
        return self._room(rooms) > 0 and any(rooms.get(queue_id) for queue_id in self.hungry)

    def wants_to_claim(self, now: float) -> bool:
        if not self.hungry:
            return False
        rooms = self.rooms()
        room = self._room(rooms)
        enough = 2 * room >= self.window or (self.refill_at is not None and now >= self.refill_at)
        return enough and room > 0 and any(rooms.get(queue_id) for queue_id in self.hungry)

    @property
    def is_told_in_vain(self) -> bool:
        """An idle lock is held for a queue without room: a claim releases it, and passes on what we were told.

        What was pushed can fill a queue's room; a claim that does has released the lock.
        """
        if not self.armed:
            return False
        rooms = self.rooms()
        full = self._room(rooms) == 0
        return any(full or not rooms[queue_id] for queue_id in self.armed if queue_id in rooms)

    def look_into(self, queue_ids: Iterable[int]) -> None:
        """Claim from these queues: at once if there is room."""
        self.hungry.update(queue_ids)
        if self.can_claim:
            self.refill_at = 0.0

    def queues(self) -> dict[int, int]:
        """Queue id -> the most to claim from it, starting at another queue every time."""
        rooms = self.rooms()
        ids = sorted(rooms)
        self.turn += 1
        start = self.turn % len(ids)
        return {queue_id: min(rooms[queue_id], BATCH) for queue_id in ids[start:] + ids[:start]}

    def receiver(self, queue_id: int) -> Subscription | None:
        """Who gets the next message of the queue: its consumers in turn, those without room passed over."""
        candidates = [s for s in self.subscriptions.values() if s.queue_id == queue_id]
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        chosen = next((s for s in candidates if s.room > 0), candidates[0])
        self.subscriptions[chosen.tag] = self.subscriptions.pop(chosen.tag)  # to the end of the line
        return chosen


class Marks:
    """Below which position the fresh bands of a queue are empty for good.

    A claim would otherwise walk over every dead entry that vacuum may not yet remove. A mark may pass a position only
    if no running transaction can still fill it. Publishers have a transaction id before they draw a position, so three
    claims move the marks: one reads `upper`, the last position drawn; a later one gets the transaction id `xid`, which
    is younger than any that drew up to there; and one that begins when every older transaction is over (`xmin`) looks
    for the first position that is left (`firsts`). Rows that another claim has locked are still visible to that look:
    a claim that rolls back loses nothing.
    """

    def __init__(self) -> None:
        self._marks: dict[int, int] = {}
        self._upper: int | None = None
        self._xid: int | None = None
        self._claimed = 0
        self._advance_at = 0.0
        self._trusted = True

    def of(self, queue_ids: Iterable[int]) -> list[int]:
        """Where a claim that is sent now begins."""
        trusted, self._trusted = self._trusted, True
        return [self._marks.get(queue_id, 0) if trusted else 0 for queue_id in queue_ids]

    def distrust(self) -> None:
        """Let the next claim look at everything, once."""
        self._trusted = False

    def count(self, claimed: int) -> None:
        self._claimed += claimed

    @property
    def worth_advancing(self) -> bool:
        return self._claimed >= MARK_PERIOD or time.monotonic() >= self._advance_at

    def advance(self, queues: list[int], claimed: Claimed) -> None:
        if claimed.firsts is None or claimed.xmin is None or claimed.upper is None:
            return
        if self._upper is not None and self._xid is not None and claimed.xmin >= self._xid:
            settled = self._upper + 1
            for queue_id, first in zip(queues, claimed.firsts, strict=True):
                mark = settled if first is None else min(settled, first)
                self._marks[queue_id] = max(self._marks.get(queue_id, 0), mark)
            self._claimed = 0
            self._advance_at = time.monotonic() + MARK_INTERVAL
            self._upper = self._xid = None
        if self._upper is None:
            self._upper = claimed.upper
        elif self._xid is None:
            self._xid = claimed.xid
