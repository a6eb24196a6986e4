"""What runs once a minute for every graph?

PROVIDERS names the providers of this worker: an old release has none, a new one has "crm".
"""

import os

from celery import Celery

from examples.provider_dispatch.dispatch import Dispatcher
from examples.provider_dispatch.providers import Registry, SyncContext, SyncResult
from examples.running import store_url

GRAPHS = {"graph-1": "crm", "graph-2": "crm", "graph-3": "erp", "graph-4": ""}

EVENT = "task-graph-synced"

app = Celery("provider_dispatch", broker=store_url("provider_dispatch"))
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
    beat_schedule={"every graph": {"task": "sync_every_graph", "schedule": 60.0}},
)


class Crm:
    def initialize(self, services: object) -> None:
        self.services = services

    def sync_cycle(self, context: SyncContext) -> SyncResult:
        return SyncResult(engine="crm", synced=1, failures=int(context.options.get("failures", 0)))


registry = Registry()
for provider in filter(None, os.environ.get("PROVIDERS", "").split(",")):
    registry.register(provider, Crm)


def emit(**fields: object) -> None:
    """A Celery event: whoever watches the workers sees it."""
    sync_graph.send_event(EVENT, **fields)


dispatcher = Dispatcher(registry, GRAPHS.__getitem__, services={"http": "a client"}, emit=emit)


@app.task(name="sync_every_graph")
def sync_every_graph() -> None:
    for graph_id in GRAPHS:
        sync_graph.delay(graph_id)


@app.task(name="sync_graph")
def sync_graph(graph_id: str | None = None, options: dict[str, object] | None = None) -> None:
    dispatcher.run(SyncContext(graph_id, options or {}))
