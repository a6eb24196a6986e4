"""What does it look like? One caller, three backends; with the third, another process does the work."""

import asyncio
import logging
import sys
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from examples.running import eventually, process, store_url
from examples.task_backend import AsyncFireAndTrackBackend, PostgresBrokerTaskBackend, SyncTaskBackend, TaskBackend

TASKS = 5


async def call(backend: TaskBackend) -> None:
    """The caller: it knows the interface only."""
    await backend.initialize()
    for number in range(TASKS):
        await backend.submit({"number": number})
    await backend.shutdown()


async def executor(task: dict[str, Any]) -> None:
    await asyncio.sleep(0.05)
    print(f"ran {task['number']}", flush=True)


async def work(directory: Path) -> None:
    """A worker in a process of its own, until a file says that it is enough."""

    async def note(task: dict[str, Any]) -> None:
        (directory / f"{task['number']}-{uuid.uuid4().hex}").touch()

    backend = PostgresBrokerTaskBackend(store_url("task_backend"))
    backend.set_executor(note)
    await backend.initialize()
    while not (directory / "stop").exists():
        await asyncio.sleep(0.05)
    await backend.shutdown()


def main() -> int:
    for backend in (SyncTaskBackend(), AsyncFireAndTrackBackend()):
        backend.set_executor(executor)
        asyncio.run(call(backend))
        print(f"{type(backend).__name__}: {TASKS} tasks ran here")
    with TemporaryDirectory() as name, process("examples.task_backend", name) as worker:
        asyncio.run(call(PostgresBrokerTaskBackend(store_url("task_backend"))))
        ran = eventually(lambda: finished(Path(name)), "the other process has run them")
        (Path(name) / "stop").touch()
        worker.wait()
    print(f"PostgresBrokerTaskBackend: {len(ran)} tasks ran in another process")
    return 0


def finished(directory: Path) -> list[str]:
    ran = [path.name for path in directory.iterdir()]
    return ran if len(ran) >= TASKS else []


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    if len(sys.argv) > 1:
        asyncio.run(work(Path(sys.argv[1])))
    else:
        sys.exit(main())
