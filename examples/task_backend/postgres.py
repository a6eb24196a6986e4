"""How does a task outlive the process that submitted it?

`submit` stores a message, in the caller's transaction where there is one. Every process that has an executor and has
called `initialize` is a worker: it claims messages and runs them, and acknowledges each when it is done. A process that
dies gives its messages back.
"""

import asyncio
import contextlib
import json
import logging
import threading
import time
from concurrent.futures import Future
from typing import Any

import kombu
import kombu.pools
from kombu.exceptions import OperationalError

from celery_pg import publish_in
from examples.task_backend.backends import Executor, Task, TaskBackend
from kombu_pg.message import Message

logger = logging.getLogger(__name__)

QUEUE = kombu.Queue("task_backend", durable=True)


class PostgresBrokerTaskBackend(TaskBackend):
    def __init__(self, url: str, shutdown_timeout_seconds: float = 30.0, concurrency: int = 10) -> None:
        super().__init__()
        self._url = url
        self._timeout = shutdown_timeout_seconds
        self._concurrency = concurrency
        self._broker = kombu.Connection(url)
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None
        self._inflight: dict[Future[bool], Message] = {}

    @property
    def inflight_count(self) -> int:
        return len(self._inflight)

    def set_executor(self, executor: Executor) -> None:
        super().set_executor(executor)
        if self.initialized:
            self._start()

    async def initialize(self) -> None:
        await super().initialize()
        if self.executor is not None:
            self._start()
            await asyncio.to_thread(self._ready.wait)

    async def shutdown(self) -> None:
        """What runs may end, within the bound; the rest goes back to the queue, for another process."""
        await super().shutdown()
        if self._thread is not None:
            self._stopping.set()
            await asyncio.to_thread(self._thread.join)
            self._thread = None
            self._stopping.clear()
            self._ready.clear()
        self._broker.close()

    # Submitting

    async def _submit(self, task: Task, connection: Any) -> None:
        if connection is None:
            await asyncio.to_thread(self._publish, task)
        else:
            with publish_in(connection, self._broker):
                self._publish(task)

    def _publish(self, task: Task) -> None:
        with kombu.pools.producers[self._broker].acquire(block=True) as producer:
            producer.publish(json.dumps(task), routing_key=QUEUE.name, declare=[QUEUE], retry=True)

    # Working

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, args=(asyncio.get_running_loop(),), daemon=True)
        self._thread.start()

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._stopping.is_set():
            try:
                with kombu.Connection(self._url) as connection:
                    self._consume(connection, loop)
            except (OperationalError, *kombu.Connection(self._url).connection_errors) as exc:
                logger.warning("connection lost, connecting again: %s", exc)
                self._inflight.clear()
                self._stopping.wait(0.5)

    def _consume(self, connection: kombu.Connection, loop: asyncio.AbstractEventLoop) -> None:
        consumer = connection.Consumer([QUEUE], on_message=lambda message: self._run(message, loop))
        consumer.qos(prefetch_count=self._concurrency)
        with consumer:
            self._ready.set()
            while not self._stopping.is_set():
                self._drain(connection)
        deadline = time.monotonic() + self._timeout
        while self._inflight and time.monotonic() < deadline:
            self._drain(connection)
        if self._inflight:
            logger.warning("%s tasks were still running after %g s: they go back", len(self._inflight), self._timeout)
        for running in list(self._inflight):
            running.cancel()
        self._inflight.clear()

    def _drain(self, connection: kombu.Connection) -> None:
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=0.05)
        for running in [running for running in self._inflight if running.done()]:
            message = self._inflight.pop(running)
            if running.result():
                message.ack()
            else:
                message.dead_letter("the executor raised: see the log")

    def _run(self, message: Message, loop: asyncio.AbstractEventLoop) -> None:
        self._inflight[asyncio.run_coroutine_threadsafe(self.execute(json.loads(message.body)), loop)] = message
