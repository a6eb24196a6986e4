"""What does a rolling deployment look like? An old worker, then a new one beside it, then the new one alone."""

import contextlib
import itertools
import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

from examples.provider_dispatch.app import EVENT, GRAPHS, app, sync_every_graph
from examples.running import eventually, worker

APP = "examples.provider_dispatch.app"
OLD, NEW = "old@example", "new@example"
#: The event after which nothing is watched.
END = "worker-end-of-example"

Event = dict[str, Any]


def main() -> int:
    with watching() as events, contextlib.ExitStack() as new:
        with worker(APP, "-n", OLD, "--concurrency", "1", PROVIDERS=""):
            rounds = send_until(OLD, events, 0)
            new.enter_context(worker(APP, "-n", NEW, "--concurrency", "1", PROVIDERS="crm"))
            eventually(lambda: app.control.ping([NEW], timeout=1, limit=1), "the new worker is ready")
            rounds = send_until(NEW, events, rounds)
        rounds = send_until(NEW, events, rounds)
    for event in events:
        print(f"{event['graph_id']} by {event['engine']}, task {event['uuid']} on {event['hostname']}")
    print(f"{rounds} rounds over {len(GRAPHS)} graphs")
    return 0


def send_until(name: str, events: list[Event], rounds: int) -> int:
    """One more round, and further ones until that worker has had a part in one. Returns how many there were in all."""
    for count in itertools.count(rounds + 1):
        sync_every_graph.delay()
        eventually(partial(reached, events, count * len(GRAPHS)), "every graph is synchronised")
        if name in {event["hostname"] for event in events[-len(GRAPHS) :]}:
            break
    return count


def reached(events: list[Event], number: int) -> bool:
    return len(events) >= number


@contextlib.contextmanager
def watching() -> Iterator[list[Event]]:
    """The workers' events, as they come in; all that were sent before the block ended when it has ended."""
    events: list[Event] = []
    ready = threading.Event()
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={EVENT: events.append})
        receiver.handlers[END] = lambda _: setattr(receiver, "should_stop", True)
        receiver.on_consume_ready = lambda *_, **__: ready.set()
        thread = threading.Thread(target=receiver.run)
        thread.start()
        ready.wait()
        try:
            yield events
        finally:
            with app.events.default_dispatcher() as dispatcher:
                dispatcher.send(END)
            thread.join()


if __name__ == "__main__":
    sys.exit(main())
