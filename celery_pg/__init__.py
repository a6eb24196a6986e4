"""What does Celery itself get from PostgreSQL?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery_pg.completion import task_transaction
    from celery_pg.transaction import publish_in

__all__ = ["publish_in", "task_transaction"]

_HOMES = {"publish_in": "celery_pg.transaction", "task_transaction": "celery_pg.completion"}


def __getattr__(name: str) -> Any:
    # On first use: Celery finds the result backend and the commands in this package, and needs nothing else of it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
