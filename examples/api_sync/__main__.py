"""What does it look like? A worker, beat, and an HTTP server that triggers a run."""

import sys
import urllib.request
from contextlib import AbstractContextManager
from subprocess import Popen
from tempfile import TemporaryDirectory

import sqlalchemy

from examples.api_sync.app import engine
from examples.api_sync.runs import run
from examples.running import eventually, free_port, listening, process, worker

APP = "examples.api_sync.app"


def main() -> int:
    port = free_port()
    web = process("flask", "--app", "examples.api_sync.web", "run", "--port", str(port))
    with TemporaryDirectory() as directory, beat_in(directory), web:
        eventually(lambda: listening(port), "the HTTP server is up")
        request = urllib.request.Request(f"http://127.0.0.1:{port}/policies/countries/run", method="POST")
        with urllib.request.urlopen(request) as answer:
            print(f"POST /policies/countries/run: {answer.status}")
        last = eventually(completed, "the run is completed")
    print(f"a run of {last.policy} by {last.source}: {last.state}, {last.chunks} chunk")
    return 0


def beat_in(directory: str) -> "AbstractContextManager[Popen[bytes]]":
    """A worker with beat, which keeps its schedule in a file."""
    return worker(APP, "--beat", "--schedule", f"{directory}/schedule", "--concurrency", "1")


def completed() -> sqlalchemy.Row | None:
    if not sqlalchemy.inspect(engine()).has_table(run.name):
        return None
    with engine().connect() as connection:
        return connection.execute(run.select().where(run.c.state == "COMPLETED").order_by(run.c.id.desc())).first()


if __name__ == "__main__":
    sys.exit(main())
