"""Start a worker, send it tasks, wait for what they report, stop it."""

import subprocess
import sys
import time
from pathlib import Path

from app import DIRECTORY, add, report
from celery import chain

HERE = Path(__file__).parent
DEADLINE = 60.0


def main() -> int:
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    reports = DIRECTORY / "reports"
    reports.write_text("")
    print("starting PostgreSQL and a worker ...", flush=True)
    worker = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "app", "worker", "--concurrency", "2", "--loglevel", "WARNING"],
        cwd=HERE,
        stdout=subprocess.DEVNULL,
    )
    try:
        send()
        return wait_for(reports, ["2 + 2: 4", "1 + 2 + 3: 6", "a second later: 42"], worker)
    finally:
        worker.terminate()
        worker.wait(DEADLINE)


def send() -> None:
    add.apply_async((2, 2), link=report.s("2 + 2"))
    chain(add.s(1, 2), add.s(3), report.s("1 + 2 + 3")).apply_async()
    add.apply_async((40, 2), countdown=1, link=report.s("a second later"))
    print("sent three workflows", flush=True)


def wait_for(reports: Path, expected: list[str], worker: "subprocess.Popen[bytes]") -> int:
    deadline = time.monotonic() + DEADLINE
    seen: list[str] = []
    while set(expected) - set(seen):
        if time.monotonic() > deadline or worker.poll() is not None:
            print("the worker did not report", sorted(set(expected) - set(seen)), file=sys.stderr)
            return 1
        lines = reports.read_text().splitlines()
        for line in lines[len(seen) :]:
            print(" ", line, flush=True)
        seen = lines
        time.sleep(0.05)
    print("all of it ran on PostgreSQL alone", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
