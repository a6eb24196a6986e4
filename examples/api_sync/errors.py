"""What can go wrong while entities are shipped, and is a retry any use?

::

    IngestError
     +-- IngestRejected      never again: the receiver does not take this
     +-- IngestUnavailable   later: the receiver cannot be reached
"""

from collections.abc import Iterator
from contextlib import contextmanager

from kombu.exceptions import OperationalError as BrokerUnavailable
from sqlalchemy.exc import OperationalError as DatabaseUnavailable

import kombu_pg


class IngestError(Exception):
    """The run has failed."""


class IngestRejected(IngestError):
    """Do not retry."""


class IngestUnavailable(IngestError):
    """The same may succeed later."""


@contextmanager
def as_ingest_errors() -> Iterator[None]:
    """Raise an IngestError, and nothing else."""
    try:
        yield
    except IngestError:
        raise
    except kombu_pg.Rejected as exc:
        raise IngestRejected(str(exc)) from exc
    except (kombu_pg.Unavailable, BrokerUnavailable, DatabaseUnavailable) as exc:
        raise IngestUnavailable(str(exc)) from exc
    except Exception as exc:
        raise IngestError(f"{type(exc).__name__}: {exc}") from exc
