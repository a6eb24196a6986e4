"""What runs a task that the caller does not wait for? One interface, three ways."""

from examples.task_backend.backends import AsyncFireAndTrackBackend, SyncTaskBackend, TaskBackend
from examples.task_backend.default import get_default_task_backend, set_default_task_backend
from examples.task_backend.postgres import PostgresBrokerTaskBackend

__all__ = [
    "AsyncFireAndTrackBackend",
    "PostgresBrokerTaskBackend",
    "SyncTaskBackend",
    "TaskBackend",
    "get_default_task_backend",
    "set_default_task_backend",
]
