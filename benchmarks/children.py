"""How does a measurement run in a process of its own, and end in time?

The process that measures nothing holds no connection and no thread, so that fork is safe; every measurement begins in
a fresh child and cannot leave anything behind in the next one.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Failed", "alone", "context", "together"]

WITHIN = 60.0

context = multiprocessing.get_context("fork")


class Failed(Exception):
    """A measurement raised, or did not end in time."""


def alone(function: Callable[..., Any], *arguments: Any, within: float = WITHIN) -> Any:
    """Return what the function returns in a child process."""
    return together([(function, arguments)], within=within)[0]


def together(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], *, within: float = WITHIN) -> list[Any]:
    """Return what each function returns, all running at once; every child has ended afterwards.

    Raises:
        Failed: one raised, or the time, in seconds, was over.
    """
    deadline = time.monotonic() + within
    running = [_start(function, arguments) for function, arguments in calls]
    try:
        return [_answer(inbox, deadline, within) for _, inbox in running]
    finally:
        for process, inbox in running:
            process.join(max(0.0, min(5.0, deadline - time.monotonic())))
            if process.is_alive():
                process.kill()
                process.join()
            inbox.close()


def _start(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Connection]:
    inbox, outbox = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(outbox, function, arguments), daemon=False)
    process.start()
    outbox.close()
    return process, inbox


def _run(outbox: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = (function(*arguments), None)
    except Exception as exc:  # noqa: BLE001 - the parent raises it
        answer = (None, f"{type(exc).__name__}: {exc}\n{traceback.format_exc()}")
    outbox.send(answer)
    outbox.close()


def _answer(inbox: Connection, deadline: float, within: float) -> Any:
    if not inbox.poll(max(0.0, deadline - time.monotonic())):
        raise Failed(f"no answer within {within:g} s")
    try:
        value, failure = inbox.recv()
    except EOFError:
        raise Failed("the measuring process died") from None
    if failure is not None:
        raise Failed(failure)
    return value
