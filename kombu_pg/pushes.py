"""What has come to a session without having been claimed?

A publisher that finds a consumer idle leases the message to it and sends it along in the notification (`push` in
migration 0002). Here is what one session has offered for that, and what has come of it and is not yet taken in. Not
thread-safe: the pump's lock guards it.
"""

from __future__ import annotations

import uuid

from kombu_pg.feed import Feed
from kombu_pg.store import Row

__all__ = ["Pushes"]

#: Pushed messages after which a session makes another offer: where vacuum is held back, each look whether the lease of
#: an offer is there meets all that ever were.
PUSHES_PER_OFFER = 100


class Pushes:
    """The pushes to one session.

    Attributes:
        channel: where they come; whoever does not read the table of sessions cannot know it.
        offered: publishers may push.
    """

    def __init__(self) -> None:
        self.channel = f"kombu.push.{uuid.uuid4().hex}"
        self.offered = False
        self._search = 0
        self._kept: list[tuple[Feed, Row]] = []
        self._refused: set[int] = set()
        self._left = PUSHES_PER_OFFER

    def count(self, row: Row) -> bool:
        """A message has come. False: it was given back before that, and is nobody's here."""
        if row.id in self._refused:
            self._refused.discard(row.id)
            return False
        self._left -= 1
        return True

    def refuse(self, message_id: int) -> None:
        """It is given back, and may still come."""
        self._refused.add(message_id)

    # What is due from time to time

    @property
    def is_worn(self) -> bool:
        """Another offer is due."""
        return self._left <= 0

    def renewed(self) -> None:
        self._left = PUSHES_PER_OFFER

    def search(self) -> None:
        """It is time to look for what was pushed and never came."""
        self._search += 1

    @property
    def is_search_due(self) -> bool:
        return self._search > 0

    def searched(self) -> None:
        self._search = 0

    @property
    def is_overdue(self) -> bool:
        """There was always something else to do."""
        return self._search > 1 or self._left <= -PUSHES_PER_OFFER

    # Until a claim is answered, which may bring what was published before

    def keep(self, feed: Feed, row: Row) -> None:
        self._kept.append((feed, row))

    def keeps_for(self, feed: Feed) -> bool:
        return any(owner is feed for owner, _ in self._kept)

    def take(self, feed: Feed, queue_id: int | None = None) -> list[Row]:
        """What was kept for the feed, of one queue or of all; it is kept no longer."""
        taken = [(owner, row) for owner, row in self._kept if owner is feed and queue_id in (None, row.queue_id)]
        self._kept = [item for item in self._kept if item not in taken]
        return [row for _, row in taken]

    def take_with(self, feed: Feed, claimed: list[Row]) -> list[Row]:
        """The same and what was claimed, in the order in which one publisher has sent it."""
        rows = list(claimed)
        for row in self.take(feed):
            rows.insert(_place_of(row, rows), row)
        return rows

    def clear(self) -> None:
        """The session is gone."""
        self._kept.clear()


def _place_of(pushed: Row, rows: list[Row]) -> int:
    """Before which of the rows a pushed message belongs: the ids are in the order of publishing."""
    for place, row in enumerate(rows):
        if row.queue_id == pushed.queue_id and row.id > pushed.id and not row.redelivered:
            return place
    return len(rows)
