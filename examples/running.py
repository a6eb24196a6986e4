"""How does an example start its processes, and wait for what they do?

Every example is run as ``python -m examples.NAME`` from the top of the repository, on a private PostgreSQL that starts
with its first process and stops with its last. EXAMPLE_STORE=pg://user:secret@host/database runs it on
a server of yours.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
TOP = Path(__file__).parent.parent


def store_url(example: str) -> str:
    """The one URL of an example: broker, results and tables of its own are in the same database."""
    private = Path(tempfile.gettempdir()) / "celery-pg-examples" / example
    return os.environ.get("EXAMPLE_STORE") or f"pg+embedded://{private}"


@contextlib.contextmanager
def process(*arguments: str, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`python -m ARGUMENTS`, told to end when the block ends."""
    running = subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=TOP, env={**os.environ, **environment}, stdout=sys.stderr
    )
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(20)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def worker(app: str, *options: str, **environment: str) -> "contextlib.AbstractContextManager[subprocess.Popen[bytes]]":
    """A `celery worker` of the app."""
    return process("celery", "-A", app, "worker", "--loglevel", "WARNING", *options, **environment)


def eventually(condition: Callable[[], T], what: str, within: float = 60.0) -> T:
    """Return the first true value of the condition; raise TimeoutError when it has none within so many seconds."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within:g} s: {what}")
        time.sleep(0.05)
    return value
