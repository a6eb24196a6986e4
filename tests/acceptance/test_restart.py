import contextlib
import shutil
import signal
import tempfile
from pathlib import Path

import psutil
import pytest
from acceptance.conftest import broker_url
from acceptance.workers import assert_works, eventually

from kombu_pg.embedded import ensure_server, leave

pytestmark = [pytest.mark.ownership, pytest.mark.timeout(120)]


class PrivateServer:
    """A server that a test may stop."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = ensure_server(str(directory))

    @property
    def postmaster(self) -> int:
        return int((self.directory / "data" / "postmaster.pid").read_text().split()[0])

    def restart(self, how: int = signal.SIGINT) -> None:
        """Stop it (SIGINT: fast, SIGQUIT: as a crash does) and start it again."""
        postmaster = psutil.Process(self.postmaster)
        postmaster.send_signal(how)
        with contextlib.suppress(psutil.TimeoutExpired):
            postmaster.wait(20)
        ensure_server(str(self.directory))


@pytest.fixture(scope="module")
def private_server():
    top = Path(tempfile.mkdtemp(prefix="celery-pg-restart-"))
    top.chmod(0o777)
    server = PrivateServer(top / "server")
    yield server
    postmaster = server.postmaster
    leave(str(server.directory))
    eventually(lambda: not psutil.pid_exists(postmaster), 30, "the server has stopped")
    shutil.rmtree(top, ignore_errors=True)


@pytest.fixture(scope="module")
def server_url(private_server):
    return private_server.url


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
def test_a_solo_worker_in_a_long_task_keeps_it_over_a_restart_and_its_late_ack_counts(
    app, store, start_worker, private_server, how
):
    broker = broker_url(store.url, reconnect_grace=1, restart_grace=3)
    first = start_worker("-P", "solo", broker=broker, task_acks_late=True, worker_prefetch_multiplier=1)
    sent = app.send_task("acceptance_app.nap", (7,)).id
    eventually(store.started, 10)
    second = start_worker("-P", "solo", broker=broker, task_acks_late=True)

    private_server.restart(how)

    eventually(store.ended, 20, "the task has ended")
    eventually(lambda: store.messages() == 0, 10, "its ack has counted")
    assert_works(app, store, first)
    assert_works(app, store, second)
    assert store.started() == [sent]


def test_a_worker_over_a_restart_keeps_what_runs_and_gives_back_what_was_reserved(
    app, store, start_worker, private_server
):
    broker = broker_url(store.url, reconnect_grace=1, restart_grace=10)
    first = start_worker("-c", "2", broker=broker, task_acks_late=True, worker_prefetch_multiplier=8)
    sent = [app.send_task("acceptance_app.nap", (2,)).id for _ in range(8)]
    eventually(lambda: len(store.started()) == 2 and store.unacked() == 8, 10)
    start_worker("-c", "8", broker=broker, task_acks_late=True)

    private_server.restart()

    eventually(lambda: store.messages() == 0, 30, "all have run and are acked")
    assert sorted(store.started()) == sorted(sent)
    assert_works(app, store, first)
