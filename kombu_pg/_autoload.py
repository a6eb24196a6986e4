"""How does kombu come to know our URLs when nobody imports us?

kombu has no entry point for transports, but it loads the group `kombu.serializers` whenever serialization is first
imported, which every Celery app and every kombu queue, producer and consumer does. So a serializer that serializes
nothing brings the aliases along. An exception here would break `import kombu.serialization` for the whole process.
"""

import logging
from typing import NoReturn

__all__ = ["ALIASES", "ARGS", "register_aliases"]

ALIASES = ("pg", "postgres", "postgresql")

_TRANSPORT = "kombu_pg.transport:Transport"
_GATE = "celery_pg.gate:Transport"


def register_aliases() -> None:
    """Make kombu resolve our URL schemes, lazily; a scheme that somebody else registered stays theirs. Never raises."""
    try:
        from kombu.transport import TRANSPORT_ALIASES  # a kombu that moved it must not break its own import

        for alias in ALIASES:
            TRANSPORT_ALIASES.setdefault(alias, _TRANSPORT)
        TRANSPORT_ALIASES.setdefault("pg-gate", _GATE)
    except Exception:
        logging.getLogger(__name__).exception("pg:// URLs are not available: kombu has no TRANSPORT_ALIASES")


def _refuse(_body: object) -> NoReturn:
    raise ValueError("kombu-pg is a transport: it has no content type of its own")


ARGS = (None, _refuse, "application/x-kombu-pg", "binary")
"""Encoder, decoder, content type and encoding: without an encoder nobody can send it, and the decoder refuses."""

register_aliases()
