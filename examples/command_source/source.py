"""How is the next command pulled, and settled once?"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import kombu
from kombu.utils.uuid import uuid

from examples.command_source.commands import Claimed, Command, Failed, Outcome

#: A command that came back so often is Failed. The store's own limit would drop it without a word.
MOST_RETURNS = 20
QUEUE = kombu.Queue("commands", durable=True, queue_arguments={"x-delivery-limit": 2 * MOST_RETURNS})


class Control(Protocol):
    def claim(self, command: Command, message_id: str) -> Outcome: ...

    def finish(self, command: Command) -> None: ...


@dataclass(frozen=True, eq=False)
class Handle:
    """A message that is not settled yet: as long as this object is alive, the message is this worker's."""

    outcome: Outcome
    message: kombu.Message


@dataclass(frozen=True)
class Pulled:
    outcome: Outcome
    handle: Handle


class CommandSource:
    """The queue of commands, as one worker sees it. Any number of handles may be outstanding."""

    def __init__(
        self,
        connection: kombu.Connection,
        control: Control,
        emit: Callable[[str, str], None],
        retry_delay: float = 5.0,
    ) -> None:
        """`emit(what, reason)` sends a diagnostic; `retry_delay` in seconds, doubled at each return up to the tenth."""
        self._queue = QUEUE(connection.channel())
        self._queue.declare()
        self._control = control
        self._emit = emit
        self._retry_delay = retry_delay

    def next(self) -> Pulled | None:
        """The next command and what became of the claim; None if there is none now. Blocks for the round trips."""
        message = self._queue.get()
        if message is None:
            return None
        outcome = self._claim(message)
        return Pulled(outcome, Handle(outcome, message))

    def ack(self, handle: Handle) -> None:
        """The message is gone, and nobody claims the command again: before it runs, or after it.

        Raises:
            kombu.exceptions.MessageStateError: the handle was settled before.
            Exception: of the control table; the handle is not settled.
        """
        if isinstance(handle.outcome, Claimed) and not handle.message.acknowledged:
            self._control.finish(handle.outcome.command)  # first: an ack that the server forgets must not run it again
        handle.message.ack()

    def nack(self, handle: Handle) -> None:
        """The message is a dead letter where its outcome was Failed; any other comes back later, with a higher attempt.

        Raises:
            kombu.exceptions.MessageStateError: the handle was settled before.
        """
        if isinstance(handle.outcome, Failed):
            handle.message.dead_letter(handle.outcome.reason)
            self._emit("command failed", handle.outcome.reason)
        else:
            handle.message.requeue(delay=self._retry_delay * 2 ** min(handle.message.returns, 10))

    def _claim(self, message: kombu.Message) -> Outcome:
        try:
            command = Command.from_json(message.body)
        except ValueError as exc:
            return Failed(str(exc))
        if message.returns >= MOST_RETURNS:
            return Failed(f"it came back {message.returns} times")
        message_id = message.properties.get("message_id")
        if not isinstance(message_id, str):
            return Failed("the message has no message_id: nobody could tell its return from a duplicate")
        return self._control.claim(replace(command, attempts=message.returns), message_id)


def publish(connection: kombu.Connection, command: Command) -> None:
    """The command is in the queue, durably, in a message with an id of its own."""
    producer = kombu.Producer(connection.channel())
    producer.publish(
        command.to_json(),
        routing_key=QUEUE.name,
        declare=[QUEUE],
        content_type="application/json",
        message_id=uuid(),
    )
