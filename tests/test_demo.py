"""Does the demo show what it promises, and leave nothing behind?"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from terminal import MAIN, on_terminal

pytestmark = pytest.mark.timeout(180)

#: How the README runs it.
COMMAND = [str(Path(sys.executable).with_name("celery-pg")), "demo"]


def environment(directory: Path) -> dict[str, str]:
    """Where temporary files go to a directory, and Celery's variables name a broker that must not be used."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("CELERY_")}
    return {**given, "TMPDIR": str(directory), "CELERY_BROKER_URL": "redis://127.0.0.1:1/0", "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def demo(directory: Path) -> Iterator[subprocess.Popen]:
    with subprocess.Popen(
        COMMAND, env=environment(directory), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            yield running
        finally:
            if running.poll() is None:
                running.kill()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: the server's socket lives in it."""
    with tempfile.TemporaryDirectory(prefix="d", dir="/tmp") as name:
        yield Path(name)


def leftovers(directory: Path) -> list[object]:
    """Processes and files that the demo has left in its directory."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(directory) in part for part in process.cmdline()) or process.cwd().startswith(str(directory)):
                processes.append(process)
    return [*processes, *directory.iterdir()]


def test_the_demo_kills_a_worker_and_every_step_is_done_by_another_one(directory):
    with demo(directory) as running:
        begun = time.monotonic()
        said, complained = running.communicate(timeout=120)
        print(f"{time.monotonic() - begun:.1f} s\n{said}")

    assert (running.returncode, complained) == (0, ""), said + complained
    assert "\x1b" not in said
    steps = [
        r"1001  reserve stock +chain +done by worker 1",
        r"kill -9 \d+: worker 1 is gone in the middle of [23] steps",
        r"1001  pack \w+ +group +running on worker 2, again",
        r"1001  pack \w+ +group +done by worker 2, again",
        r"10 of 10 steps are over after \d+ s, 0 messages are left",
    ]
    places = [re.search(step, said) for step in steps]
    assert None not in places, said
    assert [place.start() for place in places] == sorted(place.start() for place in places)
    for step in (r"cancel order +link_error +done", r"send receipt +link +done", r"ask for review +eta +done"):
        assert re.search(step, said), step
    assert len(re.findall(r"pack \w+ +group +done", said)) == 3
    assert leftovers(directory) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_leaves_nothing_behind(directory, number):
    with demo(directory) as running:
        while "sent three orders" not in (line := running.stdout.readline()):
            assert line, running.stderr.read()

        running.send_signal(number)
        said, complained = running.communicate(timeout=60)

    assert (running.returncode, complained) == (130, ""), said + complained
    assert leftovers(directory) == []


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 200])
def test_on_a_terminal_the_demo_draws_within_its_width(directory, columns):
    # The drawing must leave room for its log on a terminal of 24 lines.
    written = on_terminal(MAIN, "", "demo", columns=columns, **environment(directory))

    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= columns
    assert "worker 1" in written
    assert "10 of 10 steps are over" in written
