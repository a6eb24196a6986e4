"""What does a worker do with what it pulls?"""

from collections.abc import Callable

from examples.command_source.commands import AlreadyClaimed, Claimed, Command
from examples.command_source.source import CommandSource


def work(source: CommandSource, run: Callable[[Command], None]) -> int:
    """Run every command that can be claimed until the source is exhausted; returns how many."""
    count = 0
    while (pulled := source.next()) is not None:
        if isinstance(pulled.outcome, Claimed):
            run(pulled.outcome.command)
            count += 1
            source.ack(pulled.handle)
        elif isinstance(pulled.outcome, AlreadyClaimed):
            source.ack(pulled.handle)
        else:
            source.nack(pulled.handle)
    return count
