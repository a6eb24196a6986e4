import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from conftest import execute
from scenarios.running import TOP
from watching import Store

from kombu_pg.url import Url

# Behind the installed packages: those are what is tested.
sys.path.append(str(TOP))

_numbers = itertools.count(1)


@pytest.fixture
def scenario_store(server_url: str, worker_id: str) -> Iterator[Store]:
    """An empty database of the test's own: processes that were killed leave nothing to the next one."""
    name = f"scenario_{os.getpid()}_{worker_id}_{next(_numbers)}"
    execute(server_url, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
    try:
        yield Store(str(replace(Url.cut(server_url), path=f"/{name}")))
    finally:
        execute(server_url, f"DROP DATABASE {name} WITH (FORCE)")
