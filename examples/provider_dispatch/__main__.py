"""What does a rolling deployment look like? An old and a new worker drain one queue."""

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator

from examples.provider_dispatch.app import EVENT, GRAPHS, app, sync_every_graph
from examples.running import eventually, worker

ROUNDS = 5
APP = "examples.provider_dispatch.app"


def main() -> int:
    old = worker(APP, "-n", "old", "--concurrency", "1", PROVIDERS="")
    new = worker(APP, "-n", "new", "--concurrency", "1", PROVIDERS="crm")
    with old, new, watching() as engines:
        eventually(lambda: len(app.control.ping(timeout=1)) == 2, "both workers are ready")
        for _ in range(ROUNDS):
            sync_every_graph.delay()
        eventually(lambda: len(engines) >= ROUNDS * len(GRAPHS), "every graph is synchronised")
    counts = ", ".join(f"{count} by {engine}" for engine, count in sorted(Counter(engines).items()))
    print(f"{ROUNDS} rounds over {len(GRAPHS)} graphs: {counts}")
    return 0


@contextlib.contextmanager
def watching() -> Iterator[list[str]]:
    """The engines that the workers' events name, as they come in."""
    engines: list[str] = []
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={EVENT: lambda event: engines.append(event["engine"])})
        thread = threading.Thread(target=receiver.run)
        thread.start()
        try:
            yield engines
        finally:
            receiver.should_stop = True
            thread.join()


if __name__ == "__main__":
    sys.exit(main())
