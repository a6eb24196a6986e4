"""What can go wrong, and is a retry any use?

::

    PGError
     +-- Unavailable        the server or the way to it failed: the same call may succeed later
     +-- TransactionLost    ... in the middle of a transaction: nothing of it is stored, begin it anew
     +-- AlreadyFinished    somebody else has settled this message: what was done for it must not count
     +-- Rejected           this message can never be accepted: do not send it again
     +-- OptionError        a URL or an option is wrong (also a ValueError)
     +-- SchemaError        the tables do not fit this release: an operator must act
          +-- SchemaMissing
          +-- SchemaOutdated
          +-- SchemaTooNew

`Unavailable` is the only one that kombu and Celery retry. AMQP refusals (no such queue, declared with other
arguments, locked by its owner) are not here: they are amqp's own `NotFound`, `PreconditionFailed` and `ResourceLocked`.
"""

__all__ = [
    "AlreadyFinished",
    "OptionError",
    "PGError",
    "Rejected",
    "SchemaError",
    "SchemaMissing",
    "SchemaOutdated",
    "SchemaTooNew",
    "TransactionLost",
    "Unavailable",
]


class PGError(Exception):
    """Anything this package raises of its own."""


class Unavailable(PGError):
    """The server, or the way to it, failed: the same call may succeed later."""


class TransactionLost(PGError):
    """The transaction cannot be committed any more, nothing of it is stored: begin it anew.

    Not `Unavailable`, of which kombu would repeat a single publish, outside of the transaction.
    """


class AlreadyFinished(PGError):
    """The message is not in the store any more: its transaction was rolled back, for somebody else has settled it."""


class Rejected(PGError):
    """The message can never be accepted: too large, not encodable, or nobody could receive it."""


class OptionError(PGError, ValueError):
    """A URL or an option is wrong; the message names it and, where one is close, the right name."""


class SchemaError(PGError):
    """The tables do not fit this release."""


class SchemaMissing(SchemaError):
    """The tables are not there, and may not or could not be created."""


class SchemaOutdated(SchemaError):
    """The tables are older than this release needs."""


class SchemaTooNew(SchemaError):
    """The tables are newer than this release understands."""
