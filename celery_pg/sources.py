"""By what is a process told of its results?

A result names its sender: the thread that has sent the task, if that waits for results at all. A process waits for each
of its senders by a lock and a channel of its own, as long as these are few; for tasks that others have sent, and for
those of further senders, by one of 64 buckets that the task's id falls into (see migration 0008). These are sources.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from celery_pg.store.results import Results, bucket
from kombu_pg.database import Session

__all__ = ["Sent", "Sources"]

#: Sent tasks that are remembered as this process's own.
SENT_LIMIT = 10_000
#: Senders that are waited for at a time, each by a lock of its own; the tasks of more of them are waited for by bucket.
SENDERS_LIMIT = 32
#: Seconds between two attempts to do without a sender that no task is waited for any more.
SENDERS_INTERVAL = 1.0
#: The sender of results that nobody is known to have asked for.
ANYBODY = ""


class Sent:
    """Who has sent which task, of those that this process has sent, and not too long ago."""

    def __init__(self) -> None:
        self._recent: dict[str, str] = {}
        self._older: dict[str, str] = {}

    def note(self, task_id: str, sender: str) -> None:
        self._recent[task_id] = sender
        if len(self._recent) > SENT_LIMIT:
            # In this order: whoever asks meanwhile finds them in both, not in neither.
            self._older, self._recent = self._recent, {}

    def sender(self, task_id: str) -> str | None:
        return self._recent.get(task_id) or self._older.get(task_id)


class Sources:
    """What one session waits for, listens to and holds. For one thread at a time.

    Attributes:
        held: the keys of the locks that the session holds, or will with the next look.
    """

    def __init__(self, results: Results) -> None:
        self._results = results
        self._keys: dict[str | int, int] = {}  # sender or bucket -> key: what the session listens for
        self._dropped_at = 0.0
        self.held: set[int] = set()
        self._senders = {ANYBODY}
        self._buckets: set[int] = set()

    def release(self) -> set[int]:
        """No lock is held any more. -> the keys of those that the caller is to release."""
        held, self.held = self.held, set()
        return held

    def clear(self) -> set[int]:
        """The same, and nothing is waited for any more."""
        self._senders, self._buckets = {ANYBODY}, set()
        return self.release()

    def add(self, task_id: str, sender: str | None) -> bool:
        """Wait for the task by its sender; where that is not known, by its bucket. False: there are too many."""
        if sender is None:
            self._buckets.add(bucket(task_id))
        elif sender not in self._senders:
            if len(self._senders) > SENDERS_LIMIT:
                return False
            self._senders.add(sender)
        return True

    def widen(self, task_ids: Iterable[str]) -> bool:
        """Wait for the tasks by their buckets, too. False: so it was already."""
        buckets = {bucket(task_id) for task_id in task_ids}
        if buckets <= self._buckets:
            return False
        self._buckets |= buckets
        return True

    def drop(self, waited: Iterable[tuple[str, str | None]]) -> set[str]:
        """Wait only for senders of these tasks, unless that was tried just now. -> tasks that nothing tells of then."""
        now = time.monotonic()
        if now < self._dropped_at + SENDERS_INTERVAL:
            return set()
        self._dropped_at = now
        senders, untold = {ANYBODY}, set()
        for task_id, sender in waited:
            if sender is not None:
                senders.add(sender)
            elif bucket(task_id) not in self._buckets:
                untold.add(task_id)  # its sender is forgotten: it is a stranger from now on
        self._senders &= senders
        return untold

    def listen(self, session: Session) -> set[int]:
        """The session listens for all that is waited for, and holds no lock of anything else.

        -> the keys of the locks that it is still to take.
        """
        sources: set[str | int] = self._senders | self._buckets
        surplus = self.held - {self._keys[source] for source in sources & self._keys.keys()}
        if surplus:
            session.run(self._results.stop_waiting(surplus))
            self.held -= surplus
        self._listen(session, sources)
        missing = {self._keys[source] for source in sources} - self.held
        self.held |= missing
        return missing

    def _listen(self, session: Session, sources: set[str | int]) -> None:
        """Listen for these; no more for what was listened for before, unless that is little."""
        new = sources - self._keys.keys()
        old = self._keys.keys() - sources
        if new and len(old) > SENDERS_LIMIT:
            session.run(self._results.stop_listening([self._keys.pop(source) for source in old]))
        if new:
            senders = [source for source in new if isinstance(source, str)]
            buckets = [source for source in new if not isinstance(source, str)]
            keys = session.run(self._results.listen(senders, buckets))
            self._keys.update(zip([*senders, *buckets], keys, strict=True))
