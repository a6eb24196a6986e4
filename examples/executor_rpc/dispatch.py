"""How does a call reach the executor, and what comes back?

Used by the web backend and by workers. Every call is one plain `send_task`: nothing here knows which broker carries it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.canvas import Signature
from celery.result import AsyncResult


@dataclass(frozen=True)
class Handle:
    """A call that somebody may ask for later, by the id, from any process."""

    task_id: str


class Dispatcher:
    """Every method raises where it is called when nothing was sent: ValueError for a call that makes no sense, kombu's
    EncodeError for arguments that cannot be encoded, its OperationalError when the broker cannot be reached."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def dispatch(
        self,
        task: str,
        kwargs: Mapping[str, Any],
        *,
        timeout: float,
        on_success: Signature | None = None,
        on_error: Signature | None = None,
    ) -> Any:
        """Wait for the result, so many seconds at most.

        Raises:
            TimeoutError: there is none yet; it may still come.
            Exception: what the task raised.
        """
        sent = self._send(task, kwargs, on_success, on_error, waits=True)
        # In a worker, too: the executor is another one, so that this cannot block itself.
        return sent.get(timeout=timeout, disable_sync_subtasks=False)

    def dispatch_async(self, task: str, kwargs: Mapping[str, Any]) -> Handle:
        """Send it, and go on."""
        return Handle(self._send(task, kwargs).id)

    def dispatch_with_callback(
        self,
        task: str,
        kwargs: Mapping[str, Any],
        *,
        on_success: Signature,
        on_error: Signature,
        timeout: float | None = None,
    ) -> Handle:
        """Send it, and go on; exactly one of the signatures is sent when it has ended.

        `on_success` gets the result before its own arguments, `on_error` the id of the task that failed: what it failed
        with is in `AsyncResult(task_id).result`.
        """
        return Handle(self._send(task, kwargs, on_success, on_error, waits=timeout is not None).id)

    def _send(
        self,
        task: str,
        kwargs: Mapping[str, Any],
        on_success: Signature | None = None,
        on_error: Signature | None = None,
        *,
        waits: bool = False,
    ) -> AsyncResult:
        called = [signature for signature in (on_success, on_error) if signature is not None]
        if waits and called:
            raise ValueError(f"{task}: wait for it, or give it callbacks: not both")
        if not all([task, *(signature.task for signature in called)]):
            raise ValueError("a task without a name cannot be sent")
        return self._app.send_task(task, kwargs=dict(kwargs), link=on_success, link_error=on_error)
