"""How does a task outlive the process that submitted it?

`submit` stores a message, in the caller's transaction where there is one. Every process that has an executor and has
called `initialize` is a worker: a thread claims messages, the event loop runs them, and each is acknowledged when it is
done. A process that dies gives its messages back; one that only loses its connection keeps what it is running.
"""

import asyncio
import contextlib
import logging
import threading
import time
from concurrent.futures import Future
from typing import Any

import kombu
import kombu.pools

from celery_pg import publish_in
from examples.task_backend.backends import CANCEL_SECONDS, Executor, Task, TaskBackend

logger = logging.getLogger(__name__)

#: A task that came back so often is a dead letter. The store's own limit would drop it without a word.
MOST_RETURNS = 20
QUEUE = kombu.Queue("task_backend", durable=True, queue_arguments={"x-delivery-limit": 2 * MOST_RETURNS})
#: Seconds between two attempts to connect.
RECONNECT_SECONDS = 0.5


class PostgresBrokerTaskBackend(TaskBackend):
    def __init__(self, url: str, shutdown_timeout_seconds: float = 30.0, concurrency: int = 10) -> None:
        super().__init__()
        self._url = url
        self._timeout = shutdown_timeout_seconds
        self._concurrency = concurrency
        self._broker = kombu.Connection(url)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._inflight: dict[Future[bool], kombu.Message] = {}

    @property
    def inflight_count(self) -> int:
        return len(self._inflight)

    def set_executor(self, executor: Executor) -> None:
        super().set_executor(executor)
        self._start()

    async def initialize(self) -> None:
        """Begins to work, if there is an executor; does not wait until the server can be reached."""
        await super().initialize()
        self._loop = asyncio.get_running_loop()
        self._start()

    async def shutdown(self) -> None:
        """What runs may end, within the bound; the rest goes back to the queue, for another process."""
        await super().shutdown()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping.set()
            await asyncio.to_thread(thread.join, self._timeout + CANCEL_SECONDS)
            if thread.is_alive():
                logger.warning("the server is silent: what was running goes back when this process ends")
        self._broker.close()

    # Submitting

    async def _submit(self, task: Task, connection: Any) -> None:
        if connection is None:
            await asyncio.to_thread(self._publish, task)
        elif hasattr(connection, "run_sync"):  # an AsyncSession or AsyncConnection of SQLAlchemy
            await connection.run_sync(self._publish_in, task)
        else:
            self._publish_in(connection, task)

    def _publish_in(self, connection: Any, task: Task) -> None:
        with publish_in(connection, self._broker):
            self._publish(task)

    def _publish(self, task: Task) -> None:
        with kombu.pools.producers[self._broker].acquire(block=True) as producer:
            # kombu's JSON knows dates, decimals, UUIDs and bytes: the executor gets what the caller gave.
            producer.publish(task, routing_key=QUEUE.name, declare=[QUEUE], serializer="json", retry=True)

    # Working

    def _start(self) -> None:
        if self.initialized and self.executor is not None and self._thread is None:
            self._stopping = threading.Event()
            self._thread = threading.Thread(target=self._work, args=(self._loop, self._stopping), daemon=True)
            self._thread.start()

    def _work(self, loop: asyncio.AbstractEventLoop, stopping: threading.Event) -> None:
        while not stopping.is_set() and not loop.is_closed():
            with kombu.Connection(self._url) as connection:
                try:
                    self._consume(connection, loop, stopping)
                except connection.connection_errors as exc:
                    logger.warning("connection lost, connecting again: %s", exc)
                except Exception:
                    logger.exception("connecting again")
                else:
                    return
                connection.collect()  # lost, not closed: what is running stays this process's
            stopping.wait(RECONNECT_SECONDS)

    def _consume(
        self, connection: kombu.Connection, loop: asyncio.AbstractEventLoop, stopping: threading.Event
    ) -> None:
        """Until it is told to stop; then what runs may end."""
        consumer = kombu.Consumer(
            connection.channel(), [QUEUE], accept=["json"], on_message=lambda message: self._receive(message, loop)
        )
        consumer.qos(prefetch_count=self._concurrency)
        with consumer:
            while not stopping.is_set() and not loop.is_closed():
                self._drain(connection)
        deadline = time.monotonic() + self._timeout
        while self._inflight and time.monotonic() < deadline and not loop.is_closed():
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
            settle(running, self._inflight.pop(running))

    def _receive(self, message: kombu.Message, loop: asyncio.AbstractEventLoop) -> None:
        if message.returns >= MOST_RETURNS:
            message.dead_letter(f"it came back {message.returns} times")
            return
        try:
            task = message.decode()
        except Exception as exc:
            logger.exception("a message cannot be read")
            message.dead_letter(f"it cannot be read: {exc!r}")
        else:
            self._inflight[asyncio.run_coroutine_threadsafe(self.execute(task), loop)] = message


def settle(ran: Future[bool], message: kombu.Message) -> None:
    if ran.cancelled():  # and not by this backend: it comes back, and that is counted
        message.requeue()
    elif ran.exception() is None and ran.result():
        message.ack()
    else:
        message.dead_letter("the executor raised: see the log")
