"""Which engine synchronises this graph?

A provider that this worker does not have is no error: during a rolling deployment old and new workers share one queue,
and the legacy engine can do every graph. A registry or a state that cannot be asked is one: it raises, and the task
fails visibly.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from examples.provider_dispatch.providers import Registry, SyncContext, SyncResult

logger = logging.getLogger(__name__)


class Dispatcher:
    def __init__(
        self,
        registry: Registry,
        composition_of: Callable[[str], str],
        services: Mapping[str, Any] | None,
        emit: Callable[..., None],
    ) -> None:
        """`composition_of(graph_id)` is the provider's id, empty for none; `emit(**fields)` sends the event."""
        self._registry = registry
        self._composition_of = composition_of
        self._services = services
        self._emit = emit
        self._warned: set[tuple[str, str]] = set()

    def run(self, context: SyncContext) -> SyncResult:
        """Synchronise once, say so in the log and in an event.

        Raises:
            RuntimeError: there is no services container.
            Exception: whatever the registry, the state or the provider raises.
        """
        provider_id = self._composition_of(context.graph_id) if context.graph_id else ""
        provider = self._registry.create(provider_id) if provider_id else None
        if provider is not None:
            if self._services is None:  # no assert: it must hold under python -O
                raise RuntimeError(f"provider {provider_id!r} cannot be initialized: this worker has no services")
            provider.initialize(self._services)
            result = provider.sync_cycle(context)
        else:
            if provider_id:
                self._tell_missing(str(context.graph_id), provider_id)
            from examples.provider_dispatch import legacy  # only where it is needed: it is heavy

            result = legacy.sync(context)
        logger.info("graph %s: %s, %s failures", context.graph_id, result.engine, result.failures)
        self._emit(graph_id=context.graph_id, engine=result.engine, failures=result.failures)
        return result

    def _tell_missing(self, graph_id: str, provider_id: str) -> None:
        """A warning once for each pair, in each process: a minute later nobody wants to read it again."""
        level = logging.DEBUG if (graph_id, provider_id) in self._warned else logging.WARNING
        self._warned.add((graph_id, provider_id))
        logger.log(level, "graph %s: provider %s is not on this worker, the legacy engine runs", graph_id, provider_id)
