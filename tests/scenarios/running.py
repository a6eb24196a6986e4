"""How is an example run as its README says, on a database of the test's own?"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from conftest import own_database
from watching import Store

TOP = Path(__file__).parent.parent.parent
#: Seconds; an example takes a few.
DEADLINE = 100.0
#: Where a module of these tests is found by a process of its own.
PYTHONPATH = os.pathsep.join([str(TOP), str(TOP / "tests")])


@contextlib.contextmanager
def database(server_url, worker_id):
    """An empty one, until the block ends."""
    with own_database(server_url, "scenario", worker_id) as url:
        yield Store(url)


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
