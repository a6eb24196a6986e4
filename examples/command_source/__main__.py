"""What does it look like? Two workers pull from one queue; one command came twice, one is none."""

import sys
import uuid
from concurrent.futures import ThreadPoolExecutor

import kombu

from examples.command_source.commands import Command
from examples.command_source.control import Control
from examples.command_source.source import QUEUE, CommandSource, publish
from examples.command_source.worker import work
from examples.running import store_url
from kombu_pg import libpq_url

COMMANDS = 20


def main() -> int:
    url = store_url("command_source")
    with kombu.Connection(url) as connection:
        connection.connect()
        Control(libpq_url(url), "installer").install()
        execution = uuid.uuid4().hex[:8]
        commands = [
            Command(f"{execution}-{number}", execution, "render", "template", {"number": number})
            for number in range(COMMANDS)
        ]
        for command in [*commands, commands[0]]:  # one comes twice
            publish(connection, command)
        kombu.Producer(connection.channel()).publish('{"not": "a command"}', routing_key=QUEUE.name)
        with ThreadPoolExecutor() as threads:
            counts = list(threads.map(pull, (url, url), ("w1", "w2")))
    print(f"{sum(counts)} commands ran")
    return 0 if sum(counts) == COMMANDS else 1


def pull(url: str, worker: str) -> int:
    with kombu.Connection(url) as connection:
        source = CommandSource(connection, Control(libpq_url(url), worker), emit=diagnose)
        return work(source, run=lambda command: say(f"{worker} runs {command.command_id}"))


def diagnose(what: str, reason: str) -> None:
    say(f"{what}: {reason}")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")  # in one piece: print() of two threads may mix


if __name__ == "__main__":
    sys.exit(main())
