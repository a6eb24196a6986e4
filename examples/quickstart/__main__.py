"""Start a worker, send it tasks, wait for what they say, stop it."""

import sys

from celery import chain

from examples.quickstart.app import add, report
from examples.running import worker

PATIENCE = 60.0


def main() -> int:
    print("starting PostgreSQL and a worker ...", flush=True)
    with worker("examples.quickstart.app", "--concurrency", "2"):
        called = add.apply_async((2, 2), link=report.s("2 + 2"))
        chained = chain(add.s(1, 2), add.s(3), report.s("1 + 2 + 3")).apply_async()
        delayed = chain(add.s(40, 2).set(countdown=1), report.s("a second later")).apply_async()
        print("sent three workflows", flush=True)
        called.get(PATIENCE)
        for result in (*called.children, chained, delayed):
            print(" ", result.get(PATIENCE), flush=True)
    print("all of it ran on PostgreSQL alone", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
