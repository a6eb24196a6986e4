"""What can be set, and what does a URL mean?

A URL is libpq's (https://www.postgresql.org/docs/current/libpq-connect.html), with our schemes and with our own
options as further query keys. The same names may stand in `broker_transport_options`; where both speak, the URL wins.
Whatever libpq understands reaches libpq as it was written.
"""

import difflib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kombu_pg.errors import OptionError
from kombu_pg.url import SECRETS, Url, from_components, join_password, redact, split_password, unquoted

__all__ = ["OPTIONS", "Option", "Options", "from_components", "join_password", "redact", "split_password"]

logger = logging.getLogger(__name__)

_SCHEMES = frozenset({"pg", "postgres", "postgresql", "psycopg2", "embedded"})
_SCHEMA = re.compile(r"(?!pg_)[a-z_][a-z0-9_]{0,47}")
_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}

# PQconndefaults() of PostgreSQL 9.6 to 18, and `ssl`, which libpq takes in URIs only.
_LIBPQ = SECRETS | frozenset(
    "application_name authtype channel_binding client_encoding connect_timeout dbname fallback_application_name "
    "gssdelegation gssencmode gsslib host hostaddr keepalives keepalives_count keepalives_idle keepalives_interval "
    "krbsrvname load_balance_hosts max_protocol_version min_protocol_version oauth_client_id oauth_issuer oauth_scope "
    "options passfile port replication require_auth requirepeer requiressl service servicefile ssl "
    "ssl_max_protocol_version ssl_min_protocol_version sslcert sslcertmode sslcompression sslcrl sslcrldir sslkey "
    "sslkeylogfile sslmode sslnegotiation sslrootcert sslsni target_session_attrs tcp_user_timeout tty user".split()
)

# kombu merges a caller's retry policy into the very dict that it hands to the transport.
_RETRY_POLICY = frozenset(
    "callback connect_retries_timeout errback interval_max interval_start interval_step max_retries on_error "
    "on_revive retry_errors timeout".split()
)

_OTHER_TRANSPORTS = frozenset(
    "ack_emulation client_properties confirm_publish confirm_timeout fanout_patterns fanout_prefix frame_max "
    "global_keyprefix health_check_interval heartbeat is_secure login_method master_name max_connections "
    "max_retries_per_request native_delayed_delivery polling_interval predefined_queues priority_steps protocol "
    "queue_name_prefix queue_order_strategy read_timeout region retry_on_timeout sentinel_kwargs sep "
    "socket_connect_timeout socket_keepalive socket_keepalive_options socket_timeout ssl_options "
    "unacked_restore_limit visibility_timeout wait_time_seconds write_timeout".split()
)


@dataclass(frozen=True)
class Option:
    """One thing that can be set: as a query key of the URL, or in `broker_transport_options`."""

    name: str
    kind: type
    default: Any
    meaning: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """The values that are allowed, in words."""
        if self.kind is bool:
            return "true or false"
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.name == "schema":
            return 'lower-case letters, digits and "_", at most 48, not starting with a digit or "pg_"'
        if self.kind is str:
            return "a postgresql:// URL"
        number = "a whole number" if self.kind is int else "a number"
        return f"{number} of {self.unit} from {self.minimum:,} to {self.maximum:,}"

    def read(self, value: object) -> Any:
        """Return the value in this option's type; text is what a URL carries.

        Raises:
            OptionError: it is of another type, or out of range.
        """
        typed = self._from_text(value.strip()) if isinstance(value, str) else value
        if self.kind is float and type(typed) is int:
            typed = float(typed)
        if type(typed) is not self.kind or not self._allows(typed):
            raise OptionError(f'option "{self.name}" is {self._shown(value)}, not {self.expected}')
        return typed

    def _from_text(self, text: str) -> object:
        if self.kind is bool:
            return _BOOLEANS.get(text.lower())
        try:
            return self.kind(text)
        except ValueError:
            return None

    def _allows(self, value: Any) -> bool:
        if self.minimum is not None and self.maximum is not None:
            return bool(self.minimum <= value <= self.maximum)
        if self.name == "schema":
            return _SCHEMA.fullmatch(value) is not None
        return not self.choices or value in self.choices

    def _shown(self, value: object) -> str:
        return f'"{redact(value)}"' if isinstance(value, str) else redact(repr(value))


OPTIONS: tuple[Option, ...] = (
    Option("schema", str, "kombu_pg", "the PostgreSQL schema that holds every table of this broker"),
    Option(
        "listen_url",
        str,
        None,
        "where consumers keep their own sessions when the URL leads to a pooler; user, password and database default "
        "to the URL's",
    ),
    Option("auto_install", bool, True, "whether an empty database is given its tables on first use"),
    Option(
        "poll_interval",
        float,
        5.0,
        "how often an idle consumer looks without being notified; 0 = never",
        "seconds",
        0,
        3600,
    ),
    Option(
        "reconnect_grace",
        float,
        3.0,
        "how long a consumer that lost its session keeps its messages",
        "seconds",
        0,
        3600,
    ),
    Option("restart_grace", float, 30.0, "the same after a restart of the server", "seconds", 0, 86400),
    Option(
        "delivery_limit", int, 20, "returns after which a message goes to the dead letters", "returns", 1, 1_000_000
    ),
    Option(
        "dead_letter_retention",
        int,
        14 * 86400,
        "how long the table dead_letter keeps a message after its task's callers have heard of it",
        "seconds",
        1,
        10 * 365 * 86400,
    ),
    Option("max_message_size", int, 16 * 1024**2, "the largest body a publisher may send", "bytes", 1, 256 * 1024**2),
    Option(
        "heartbeat_interval", float, 5.0, "how often a consumer behind a pooler says it is alive", "seconds", 0.1, 3600
    ),
    Option("heartbeat_timeout", float, 30.0, "the silence after which it is taken for dead", "seconds", 0.2, 86400),
    Option(
        "liveness",
        str,
        "auto",
        "how a consumer proves it is alive: by its session, by heartbeat rows, or by what the connection allows",
        choices=("auto", "session", "heartbeat"),
    ),
    Option(
        "gossip", bool, False, "whether workers gossip: every event of a worker becomes a row for every other worker"
    ),
    Option(
        "result_synchronous_commit",
        bool,
        False,
        "whether a result is on disk before its task is done; without, a crash of the server may lose the last ones",
    ),
    Option(
        "connect_timeout", float, None, "how long one attempt to connect may take; 0 = for ever", "seconds", 0, 3600
    ),
)

_BY_NAME = {option.name: option for option in OPTIONS}


def _default(name: str) -> Any:
    return _BY_NAME[name].default


@dataclass(frozen=True)
class Options:
    """Everything one URL and its transport options say, checked. Equal settings are equal and hash alike.

    `dsn` and `listen_dsn` hold passwords and are left out of the repr. With `embedded` (the directory of the private
    server) the address is known only once that server runs: see `dsn_on`.
    """

    dsn: str = field(repr=False)
    schema: str = _default("schema")
    listen_dsn: str | None = field(default=None, repr=False)
    embedded: str | None = None
    auto_install: bool = _default("auto_install")
    poll_interval: float = _default("poll_interval")
    reconnect_grace: float = _default("reconnect_grace")
    restart_grace: float = _default("restart_grace")
    delivery_limit: int = _default("delivery_limit")
    dead_letter_retention: int = _default("dead_letter_retention")
    max_message_size: int = _default("max_message_size")
    heartbeat_interval: float = _default("heartbeat_interval")
    heartbeat_timeout: float = _default("heartbeat_timeout")
    liveness: str = _default("liveness")
    gossip: bool = _default("gossip")
    result_synchronous_commit: bool = _default("result_synchronous_commit")
    connect_timeout: float | None = _default("connect_timeout")

    def __post_init__(self) -> None:
        for option in OPTIONS:
            if option.name != "listen_url" and getattr(self, option.name) is not option.default:
                object.__setattr__(self, option.name, option.read(getattr(self, option.name)))
        if self.heartbeat_timeout < 2 * self.heartbeat_interval:
            raise OptionError(
                f'option "heartbeat_timeout" is {self.heartbeat_timeout:g} seconds, less than twice '
                f'"heartbeat_interval" ({self.heartbeat_interval:g} seconds): one late heartbeat would kill a consumer'
            )

    @classmethod
    def parse(
        cls,
        url: str,
        transport_options: Mapping[str, Any] | None = None,
        *,
        password: str | None = None,
        connect_timeout: float | None = None,
    ) -> "Options":
        """Return what the URL and the transport options say; the URL wins.

        `password` (plain, or what `split_password` took out) and `connect_timeout` (seconds) are used where neither
        says otherwise.

        Raises:
            OptionError: a name or a value is wrong. The message holds no password.
        """
        parts = _cut(join_password(url, password))
        values: dict[str, Any] = {} if connect_timeout is None else {"connect_timeout": connect_timeout}
        values |= _from_transport_options(transport_options or {})
        values |= _from_url(parts)

        dsn = parts.for_libpq(_LIBPQ)
        listen_url = values.pop("listen_url", None)
        listen_dsn = None if listen_url is None else str(_listen_url(listen_url).with_defaults(dsn))
        return cls(dsn=str(dsn), listen_dsn=listen_dsn, embedded=parts.embedded, **values)

    def dsn_on(self, server: str) -> str:
        """Return the libpq URI of an embedded server, which `ensure_server` gave, with this URL's libpq parameters."""
        parts = Url.cut(server)
        return str(replace(parts, query=parts.query + Url.cut(self.dsn).query))


def _cut(url: str) -> Url:
    """Return the parts with the password in one place, encoded as libpq needs it: equal settings must be one key."""
    return Url.cut(join_password(*split_password(url)))


def _from_url(parts: Url) -> dict[str, Any]:
    if not _SCHEMES.issuperset(parts.schemes):
        raise OptionError(f'unknown URL scheme "{"+".join(parts.schemes)}": use pg://, postgresql:// or pg+embedded://')
    parts.check()
    values = {}
    for key, value, _raw in parts.pairs():
        if key in _BY_NAME:
            values[key] = _BY_NAME[key].read(unquoted(value))
        elif key not in _LIBPQ:
            raise OptionError(_unknown("option", key, _BY_NAME.keys() | _LIBPQ))
    return values


def _listen_url(text: str) -> Url:
    parts = _cut(text)
    if not parts.schemes or "embedded" in parts.schemes:
        raise OptionError('option "listen_url" is not a postgresql:// URL')
    if own := _from_url(parts).keys() - _LIBPQ:
        raise OptionError(f'option "{min(own)}" stands inside "listen_url": it belongs to the broker URL itself')
    return parts.for_libpq(_LIBPQ)


def _from_transport_options(given: Mapping[str, Any]) -> dict[str, Any]:
    values = {}
    ignored = []
    for name, value in given.items():
        if name in _BY_NAME:
            if name == "listen_url" and isinstance(value, str) and split_password(value)[1]:
                raise OptionError(
                    'transport option "listen_url" holds a password, and Celery shows transport options: '
                    "leave it out (the URL's own counts there, too), or put listen_url into the URL"
                )
            if value is not None:
                values[name] = _BY_NAME[name].read(value)
        elif name in _OTHER_TRANSPORTS:
            ignored.append(name)
        elif name in _LIBPQ:
            raise OptionError(f'transport option "{name}" is a libpq parameter: put it into the URL')
        elif name not in _RETRY_POLICY:
            raise OptionError(_unknown("transport option", str(name), _BY_NAME.keys()))
    if ignored:
        logger.info("ignoring options of other transports: %s", ", ".join(sorted(ignored)))
    return values


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"the options are {', '.join(sorted(_BY_NAME))}"
    return f'unknown {what} "{name}": {hint}'
