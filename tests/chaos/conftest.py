import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos.checker import Figures
from chaos.faults import Site
from chaos.servers import PgServer, give
from conftest import own_database

FIGURES: list[Figures] = []
_numbers = itertools.count(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("what was lost")
        terminalreporter.line("| fault | tasks | lost | duplicated | seconds to recover |")
        terminalreporter.line("|---|---|---|---|---|")
        for figures in FIGURES:
            terminalreporter.line(str(figures))


@pytest.fixture(scope="session")
def figures() -> list[Figures]:
    """What this run has found; it is shown at its end."""
    return FIGURES


@pytest.fixture(scope="session")
def _directory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="celery-pg-chaos-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def template(_directory: Path) -> Path:
    """The data of a server that was never started."""
    return PgServer(_directory / "template").create().data


@pytest.fixture(scope="session")
def private_server(_directory: Path, template: Path) -> Iterator[PgServer]:
    """A server that a test may crash."""
    server = PgServer(_directory / "server").create_from(template)
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def name(worker_id: str) -> str:
    return f"chaos_{os.getpid()}_{worker_id}_{next(_numbers)}"


@pytest.fixture
def ledger_url(server_url: str, worker_id: str) -> Iterator[str]:
    """An empty database on the server of the other tests, which nobody crashes."""
    with own_database(server_url, "ledger", worker_id) as url:
        yield url


@pytest.fixture
def site(private_server: PgServer, template: Path, _directory: Path, name: str) -> Iterator[Site]:
    directory = _directory / name
    directory.mkdir()
    give(directory)
    with contextlib.ExitStack() as stack:
        yield Site(private_server, template, directory, stack, name)
