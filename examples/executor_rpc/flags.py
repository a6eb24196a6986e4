"""Is `pg_queue_enabled`?

Here the source of the flag is a file; yours is a service or a table. What matters is what happens when it cannot be
asked: `broker_for` raises, and the gate sends the call where it went before there was a flag.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Flag:
    def __init__(self, path: Path) -> None:
        self._path = path

    def broker_for(
        self, task: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> str | None:
        """The broker of this one call, None for the default one; asked each time.

        Raises:
            OSError: nobody knows.
        """
        return "postgres" if self._path.read_text().strip() == "on" else None
