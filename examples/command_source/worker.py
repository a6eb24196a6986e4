"""What does a worker do with what it pulls?"""

import logging
from collections.abc import Callable

from examples.command_source.commands import AlreadyClaimed, Claimed, Command
from examples.command_source.source import CommandSource

logger = logging.getLogger(__name__)


def work(source: CommandSource, run: Callable[[Command], None]) -> int:
    """Run every command that can be claimed until the source is exhausted; returns how many have run.

    One that raises comes back later, with a higher attempt.
    """
    count = 0
    while (pulled := source.next()) is not None:
        ran = isinstance(pulled.outcome, Claimed) and has_run(pulled.outcome.command, run)
        if ran or isinstance(pulled.outcome, AlreadyClaimed):
            source.ack(pulled.handle)
        else:
            source.nack(pulled.handle)
        count += ran
    return count


def has_run(command: Command, run: Callable[[Command], None]) -> bool:
    try:
        run(command)
    except Exception:
        logger.exception("command %s failed at attempt %s", command.command_id, command.attempts)
        return False
    return True
