import sys
from collections.abc import Iterator

import pytest
from scenarios.running import TOP, database
from watching import Store

# Behind the installed packages: those are what is tested.
sys.path.append(str(TOP))

#: Kept from one test to the next, since a connection in a pool remembers which queues it has declared.
DECLARED = ["binding", "exchange", "installation", "queue"]


@pytest.fixture(scope="session")
def _store(server_url: str, worker_id: str) -> Iterator[Store]:
    with database(server_url, worker_id) as store:
        store.install()
        yield store


@pytest.fixture
def scenario_store(_store: Store) -> Iterator[Store]:
    """A database without a message; nothing is left in it of a test, or of a process that the test killed."""
    yield _store
    _store.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    tables = _store.value(
        "SELECT string_agg(format('%%I.%%I', schemaname, tablename), ', ') FROM pg_tables "
        "WHERE schemaname = 'kombu_pg' AND tablename <> ALL (%s)",
        (DECLARED,),
    )
    _store.execute(f"TRUNCATE {tables}; DROP SCHEMA public CASCADE; CREATE SCHEMA public")
