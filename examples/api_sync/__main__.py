"""What does it look like? A worker, beat, and an HTTP server that triggers a run."""

import sys
from contextlib import AbstractContextManager
from subprocess import Popen
from tempfile import TemporaryDirectory
from typing import Any

import sqlalchemy

from examples.api_sync.app import app, engine
from examples.api_sync.runs import API, Runs, run
from examples.api_sync.web import make_web
from examples.http import post, serving
from examples.running import eventually, worker


def main() -> int:
    Runs(engine(), app).install()
    before = last_run()
    with TemporaryDirectory() as directory, beat_in(directory), serving(make_web(app)) as url:
        status, _ = post(f"{url}/policies/countries/run")
        print(f"POST /policies/countries/run: {status}")
        asked = eventually(lambda: ended_after(before), "the run has ended")
    print(f"run {asked.id} of {asked.policy} by {asked.source}: {asked.state}, {asked.chunks} chunk")
    return 0


def beat_in(directory: str) -> "AbstractContextManager[Popen[bytes]]":
    """A worker with beat, which keeps its schedule in a file."""
    return worker("examples.api_sync.app", "--beat", "--schedule", f"{directory}/schedule", "--concurrency", "1")


def last_run() -> int:
    """Its id; 0 before the first one."""
    with engine().connect() as connection:
        return connection.scalar(sqlalchemy.select(sqlalchemy.func.max(run.c.id))) or 0


def ended_after(before: int) -> Any:
    """The run that was asked for over HTTP, once it has ended: the database keeps those of earlier days."""
    asked = (run.c.id > before) & (run.c.source == API) & run.c.ended_at.is_not(None)
    with engine().connect() as connection:
        return connection.execute(run.select().where(asked)).first()


if __name__ == "__main__":
    sys.exit(main())
