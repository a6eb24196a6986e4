"""How does what a worker knows reach the browser that waits for it?

Each prompt has a queue of its own, declared before the prompt is sent: what is emitted before the browser listens waits
there, and a queue that nobody listens to goes away. The browser gets each event at least once.
"""

from collections.abc import Iterator
from typing import Any

import kombu
import kombu.pools
from kombu.utils.json import dumps

#: Seconds that a queue lives without a listener.
UNHEARD = 600.0
#: Seconds of silence after which a stream says that it is still there.
SILENCE = 15.0


class Events:
    def __init__(self, url: str) -> None:
        self._broker = kombu.Connection(url)

    def expect(self, prompt_id: str) -> None:
        """What is emitted for this prompt from now on is kept."""
        with kombu.pools.connections[self._broker].acquire(block=True) as connection:
            _queue(prompt_id)(connection.default_channel).declare()

    def emit(self, prompt_id: str, name: str, **fields: Any) -> None:
        """Tell whoever waits for this prompt."""
        with kombu.pools.producers[self._broker].acquire(block=True) as producer:
            producer.publish(
                {"name": name, **fields}, routing_key=_queue(prompt_id).name, serializer="json", retry=True
            )

    def stream(self, prompt_id: str) -> Iterator[str]:
        """The prompt's one event, as server-sent events are written. A browser that hung up before may ask again."""
        with self._broker.clone() as connection, connection.SimpleQueue(_queue(prompt_id)) as waiting:
            yield ": listening\n\n"
            while True:
                try:
                    message = waiting.get(timeout=SILENCE)
                except waiting.Empty:
                    yield ": still waiting\n\n"
                    continue
                event = message.payload
                yield f"event: {event.pop('name')}\ndata: {dumps(event)}\n\n"
                message.ack()
                return


def _queue(prompt_id: str) -> kombu.Queue:
    return kombu.Queue(f"ide_events.{prompt_id}", durable=True, expires=UNHEARD)
