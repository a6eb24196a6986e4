"""How are many messages published at once?

What kombu's `Producer.batch()` drives: messages are gathered, and each `max_size` of them is stored in one transaction,
all or none, with one flush of the server's disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kombu.exceptions import BatchPublishError

from kombu_pg import errors
from kombu_pg.message import Draft
from kombu_pg.store import Outgoing

if TYPE_CHECKING:
    from kombu_pg.channel import Channel

__all__ = ["PublishBatch"]


class PublishBatch:
    """One batch of a channel, for one thread."""

    def __init__(self, channel: Channel, max_size: int) -> None:
        self.channel = channel
        self._max_size = max_size
        self._gathered: list[Outgoing] = []
        self._usable = True

    def publish(
        self, message: Draft, exchange: str = "", routing_key: str = "", mandatory: bool = False, **_: object
    ) -> None:
        """Gather the message; store what has been gathered when that is `max_size`.

        Raises:
            Rejected: this message can never be accepted. Those before it are still gathered.
            BatchPublishError: as `flush`.
        """
        self._check()
        self._gathered.append(self.channel.encode(message, exchange, routing_key, mandatory=mandatory))
        if len(self._gathered) >= self._max_size:
            self.flush()

    def flush(self) -> None:
        """Everything gathered is stored, durably if one of the messages is persistent. Blocks for one round trip.

        Raises:
            Rejected, NotFound: one message was refused; nothing of the batch was stored.
            BatchPublishError: the connection was lost; it is not known whether the batch was stored, and it cannot be
                used any more.
        """
        self._check()
        gathered, self._gathered = self._gathered, []
        if not gathered:
            return
        try:
            self.channel.publish_many(gathered)
        except errors.Unavailable as exc:
            self._usable = False
            raise BatchPublishError(f"it is not known whether {len(gathered)} messages were stored: {exc}") from exc

    def discard(self) -> None:
        """Forget what was gathered and not stored."""
        self._gathered = []
        self._usable = False

    def close(self) -> None:
        """Nothing is held that would have to be given up."""

    def _check(self) -> None:
        if not self._usable:
            raise BatchPublishError("this batch has failed or was discarded: begin a new one")
