"""What is a provider, and which ones does this worker have?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class SyncContext:
    graph_id: str | None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SyncResult:
    engine: str
    synced: int
    failures: int = 0


class SyncProvider(Protocol):
    def initialize(self, services: Mapping[str, Any]) -> None: ...

    def sync_cycle(self, context: SyncContext) -> SyncResult: ...


class Registry:
    """The providers of this worker, by id. A newer worker may have more of them."""

    def __init__(self) -> None:
        self._factories: dict[str, Callable[[], SyncProvider]] = {}

    def register(self, provider_id: str, factory: Callable[[], SyncProvider]) -> None:
        self._factories[provider_id] = factory

    def create(self, provider_id: str) -> SyncProvider | None:
        """A new provider; None if this worker has no such one. What the factory raises passes through."""
        factory = self._factories.get(provider_id)
        return None if factory is None else factory()
