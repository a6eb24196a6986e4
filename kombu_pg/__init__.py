"""What may I import?

The errors, to catch them, and `libpq_url`; nothing else is needed. An installed Celery app needs no import at all. A
program that uses a bare `kombu.Connection("pg://...")` and no queue, producer or consumer of kombu says
`import kombu_pg` once.
"""

from kombu_pg import _autoload as _autoload
from kombu_pg.embedded import libpq_url
from kombu_pg.errors import (
    AlreadyFinished,
    OptionError,
    PGError,
    Rejected,
    SchemaError,
    SchemaMissing,
    SchemaOutdated,
    SchemaTooNew,
    TransactionLost,
    Unavailable,
)

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
    "__version__",
    "libpq_url",
]

__version__ = "0.1.0"
