"""What have other packages put in, without being imported here?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

__all__ = ["CONTROL", "WORKERS", "plugins"]

#: Called without arguments when a connection is made in a process in which Celery's worker is loaded; again and again.
WORKERS = "kombu_pg.workers"
#: Called with the database and the message before a message is published to an exchange of remote control.
CONTROL = "kombu_pg.control"


@functools.cache
def plugins(group: str) -> tuple[Callable[..., Any], ...]:
    """What the installed distributions have registered in this group of entry points; loaded at the first call."""
    return tuple(entry.load() for entry in entry_points(group=group))
