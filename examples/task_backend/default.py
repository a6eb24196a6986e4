"""Which backend does a caller get that names none?"""

from examples.task_backend.backends import SyncTaskBackend, TaskBackend

_default: TaskBackend = SyncTaskBackend()


def get_default_task_backend() -> TaskBackend:
    return _default


def set_default_task_backend(backend: TaskBackend) -> None:
    global _default
    _default = backend
