"""How is an example run as its README says, on a database of the test's own?"""

import contextlib
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from conftest import execute
from watching import Store

from kombu_pg.url import Url

TOP = Path(__file__).parent.parent.parent
#: Seconds; an example takes a few.
DEADLINE = 100.0
#: Where a module of these tests is found by a process of its own.
PYTHONPATH = os.pathsep.join([str(TOP), str(TOP / "tests")])
_numbers = itertools.count(1)


@contextlib.contextmanager
def database(server_url, worker_id):
    """An empty one, until the block ends."""
    name = f"scenario_{os.getpid()}_{worker_id}_{next(_numbers)}"
    execute(server_url, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
    try:
        yield Store(str(replace(Url.cut(server_url), path=f"/{name}")))
    finally:
        execute(server_url, f"DROP DATABASE {name} WITH (FORCE)")


def run_example(name, store):
    """`python -m examples.NAME` has ended, without an error."""
    ran = subprocess.run(
        [sys.executable, "-m", f"examples.{name}"],
        cwd=TOP,
        env={**os.environ, "EXAMPLE_STORE": store.broker(poll_interval=1)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran
