"""How are numbered tasks published while something is broken?

`publisher.py FIRST STEP PROCESSES LINKS PER_SECOND SECONDS PADDING`: each of so many processes publishes its numbers at
that rate until stdin ends. It says each number on stdout, once its publish has returned; or "failed" and the error.
"""

import os
import select
import sys
import time

from chaos.chaos_app import linked


def publish(first: int, step: int, links: int, per_second: float, seconds: float, padding: str) -> None:
    number, due = first, time.monotonic()
    while not is_over(due):
        try:
            linked(number, links, seconds, padding).apply_async()
            say(f"{number}")
        except Exception as exc:  # noqa: BLE001 - the test says what may fail
            say(f"failed {number} {type(exc).__name__}: {exc!r}".replace("\n", " "))
        number += step
        due = max(due + 1 / per_second, time.monotonic())


def is_over(due: float) -> bool:
    """Wait until the next publish is due; true if stdin has ended before."""
    return bool(select.select([0], [], [], max(0.0, due - time.monotonic()))[0])


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")  # one write: the processes share the file


def main(first: int, step: int, processes: int, links: int, per_second: float, seconds: float, padding: int) -> int:
    children = []
    for nth in range(processes):
        child = os.fork()
        if not child:
            publish(first + nth * step, processes * step, links, per_second, seconds, "x" * padding)
            os._exit(0)
        children.append(child)
    return max(os.waitpid(child, 0)[1] for child in children)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:5]), *map(float, sys.argv[5:7]), int(sys.argv[7])))
