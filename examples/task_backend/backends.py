"""What does every backend promise, and how do the two do it that need no store?"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

logger = logging.getLogger(__name__)

#: Seconds that a task has for its cancellation.
CANCEL_SECONDS = 1.0

Task = dict[str, Any]
Executor = Callable[[Task], Awaitable[None]]


class TaskBackend(ABC):
    """Runs tasks with the executor that was registered. What that raises is logged, and never the submitter's."""

    def __init__(self) -> None:
        self.executor: Executor | None = None
        self.initialized = False

    def set_executor(self, executor: Executor) -> None:
        self.executor = executor

    async def initialize(self) -> None:
        self.initialized = True

    async def submit(self, task: Task, connection: Any = None) -> None:
        """The task will run, or has run. `connection`: a transaction to be part of, for backends that store."""
        if not self.initialized:
            logger.warning("task submitted before initialize(): %s", task)
        await self._submit(task, connection)

    async def shutdown(self) -> None:
        self.initialized = False

    @abstractmethod
    async def _submit(self, task: Task, connection: Any) -> None: ...

    async def execute(self, task: Task) -> bool:
        """True if the executor did not raise."""
        assert self.executor is not None
        try:
            await self.executor(task)
        except Exception:
            logger.exception("task failed: %s", task)
            return False
        return True

    def _has_executor(self, task: Task) -> bool:
        if self.executor is None:
            logger.warning("no executor is registered, task dropped: %s", task)
        return self.executor is not None


class SyncTaskBackend(TaskBackend):
    """Inline: `submit` returns when the task has run."""

    async def _submit(self, task: Task, connection: Any) -> None:
        if self._has_executor(task):
            await self.execute(task)


class AsyncFireAndTrackBackend(TaskBackend):
    """As asyncio tasks of this process: `submit` returns at once, `shutdown` waits for what runs, within its bound."""

    def __init__(self, shutdown_timeout_seconds: float = 30.0) -> None:
        super().__init__()
        self._timeout = shutdown_timeout_seconds
        self._inflight: set[asyncio.Task[bool]] = set()

    @property
    def inflight_count(self) -> int:
        return len(self._inflight)

    async def _submit(self, task: Task, connection: Any) -> None:
        if self._has_executor(task):
            running = asyncio.create_task(self.execute(task))
            self._inflight.add(running)
            running.add_done_callback(self._inflight.discard)

    async def shutdown(self) -> None:
        await super().shutdown()
        if not self._inflight:
            return
        _, left = await asyncio.wait(self._inflight, timeout=self._timeout)
        for running in left:
            running.cancel()
        if left:
            logger.warning("%s tasks were still running after %g s and are cancelled", len(left), self._timeout)
            await asyncio.wait(left, timeout=CANCEL_SECONDS)
