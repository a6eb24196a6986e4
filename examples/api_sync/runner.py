"""How is a policy's backend made and run?"""

from collections.abc import Callable, Mapping
from typing import Any

from examples.api_sync.backends import Backend, Metadata, metadata_of, tell_operator
from examples.api_sync.runs import Runs


class Runner:
    def __init__(
        self, backends: Mapping[str, type[Backend]], runs: Runs, client_for: Callable[[Metadata], Any]
    ) -> None:
        """`backends`: by policy. `client_for` makes what a backend talks to its service with."""
        self._backends = backends
        self._runs = runs
        self._client_for = client_for
        for backend in backends.values():
            tell_operator(backend)

    def run(self, policy: str, source: str, **kwargs: Any) -> int:
        """One run of the policy, from its metadata to its end; returns the run's id.

        Raises:
            KeyError: there is no such policy.
            IngestError: the run has failed.
        """
        kind = self._backends[policy]
        client = self._client_for(metadata_of(kind))
        backend = kind(ingest_callback=self._runs.callback(policy), client=client)
        return self._runs.ingest(policy, source, lambda: backend.run(policy, **kwargs))
