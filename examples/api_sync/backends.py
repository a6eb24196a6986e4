"""What is an integration backend, and what does it say of itself?"""

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from typing_extensions import deprecated

logger = logging.getLogger(__name__)

Entity = Mapping[str, Any]


@dataclass(frozen=True)
class Metadata:
    name: str
    app_name: str
    app_version: str


class IngestCallback(Protocol):
    def __call__(self, *, entities: Iterable[Entity] | None = None, error: Exception | None = None) -> None:
        """Ship the entities, or record the error: exactly one of the two."""


class Backend:
    """An integration. A subclass says what it is by `describe`, without an instance."""

    def __init__(self, *, ingest_callback: IngestCallback | None = None, **_: Any) -> None:
        self.ingest_callback = ingest_callback

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if _is_old(cls):
            warnings.warn(f"{cls.__name__} has setup(), but no describe()", DeprecationWarning, stacklevel=2)

    @classmethod
    def describe(cls) -> Metadata:
        raise NotImplementedError(f"{cls.__name__} does not say what it is: give it describe()")

    @deprecated("say it by the classmethod describe()")
    def setup(self) -> Metadata:
        """What `describe` says, for whoever still asks an instance."""
        return self.describe()

    def run(self, policy: str, **_: Any) -> Iterable[Entity]:
        """The entities of the policy; may be a generator."""
        raise NotImplementedError


def metadata_of(backend: type[Backend]) -> Metadata:
    """What the backend says of itself; an old one is asked through a throwaway instance."""
    return backend().setup() if _is_old(backend) else backend.describe()


def tell_operator(backend: type[Backend]) -> None:
    """One line, where the backend is an old one."""
    if _is_old(backend):
        logger.warning("backend %s still describes itself by setup(): ask its author for describe()", backend.__name__)


def _is_old(backend: type[Backend]) -> bool:
    return backend.setup is not Backend.setup and backend.describe.__func__ is Backend.describe.__func__
