import sys
from collections.abc import Iterator

import pytest
from scenarios.running import TOP, database
from watching import Store

# Behind the installed packages: those are what is tested.
sys.path.append(str(TOP))


@pytest.fixture
def scenario_store(server_url: str, worker_id: str) -> Iterator[Store]:
    """An empty database of the test's own: processes that were killed leave nothing to the next one."""
    with database(server_url, worker_id) as store:
        yield store
