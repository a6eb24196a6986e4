"""What stands where in a URL, and which of it is secret?

libpq's rules: userinfo ends at the "@" before the first "/", the query starts at the first "?" after it, there may be
several hosts. Only an "@" that somebody forgot to encode in a password is forgiven.
"""

import os.path
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from urllib.parse import parse_qsl, quote, unquote, urlencode

from kombu_pg.errors import OptionError

__all__ = ["SECRETS", "Url", "from_components", "has_secret_query", "join_password", "redact", "split_password"]

SECRETS = frozenset({"password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"})

_START = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?//")
_NEXT_URL = re.compile(r";(?=[A-Za-z][A-Za-z0-9+.-]*://)")
_QUERY = re.compile(r"\?[A-Za-z_][\w.%]*=")
_KEYWORD_PASSWORD = re.compile(r"(?i)(\bpassword\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&]+)")


@dataclass(frozen=True)
class Url:
    """A URL cut where libpq cuts it. Nothing is decoded, so that putting it together again changes nothing."""

    start: str
    userinfo: str | None
    hosts: str
    path: str
    query: tuple[str, ...]

    @classmethod
    def cut(cls, text: str) -> "Url":
        match = _START.match(text)
        start = match[0] if match else ""
        rest = text[len(start) :]
        at = rest.rfind("@", 0, _authority_end(rest))
        userinfo, rest = (rest[:at], rest[at + 1 :]) if at >= 0 else (None, rest)
        address, _, query = rest.partition("?")
        hosts, slash, path = address.partition("/")
        return cls(start, userinfo, hosts, slash + path, tuple(query.split("&")) if query else ())

    def __str__(self) -> str:
        userinfo = "" if self.userinfo is None else f"{self.userinfo}@"
        query = f"?{'&'.join(self.query)}" if self.query else ""
        return f"{self.start}{userinfo}{self.hosts}{self.path}{query}"

    @property
    def schemes(self) -> list[str]:
        """The scheme in lower case, cut at each "+"; empty where there is none."""
        scheme = self.start.partition(":")[0].lower()
        return scheme.split("+") if scheme and ":" in self.start else []

    @property
    def embedded(self) -> str | None:
        """The directory of the private server, where this URL asks for one.

        Raises:
            OptionError: it names a host, or no absolute directory.
        """
        if "embedded" not in self.schemes:
            return None
        directory = unquote(self.path)
        user = (self.userinfo or "").partition(":")[0]
        if self.hosts or user or not directory.strip("/"):
            raise OptionError("an embedded server has no host: write pg+embedded:///absolute/path/to/directory")
        return os.path.normpath("/" + directory.lstrip("/"))

    def pairs(self) -> Iterator[tuple[str, str, str]]:
        """Yield decoded key, value as written, and the whole as written."""
        for raw in self.query:
            key, _, value = raw.partition("=")
            yield unquote(key), value, raw

    def keys(self) -> set[str]:
        return {key for key, _value, _raw in self.pairs()}

    def check(self) -> None:
        """Raise OptionError where libpq would misread a part; says nothing that may belong to a password."""
        ports = [host.rpartition("]")[2].partition(":")[2] for host in self.hosts.split(",")]
        stray = self.userinfo is None and any(ports) and "@" in self.path
        if stray or any(port and not (port.isdecimal() and 0 < int(port) < 65536) for port in ports):
            raise OptionError("the port in the URL is not a number: percent-encode what is special in the password")
        if "%00" in str(self):
            raise OptionError('the URL contains "%00", which PostgreSQL cannot store')
        for position, raw in enumerate(self.query, 1):
            if "=" not in raw:
                raise OptionError(f'part {position} of the URL\'s query has no "=": is "&" in a value written as %26?')

    def for_libpq(self, keep: frozenset[str]) -> "Url":
        """Return what libpq is to see: its scheme and the parameters to keep."""
        query = tuple(raw for key, _value, raw in self.pairs() if key in keep)
        if self.embedded is not None:
            return Url("postgresql://", None, "", "/postgres", query)
        return replace(self, start="postgresql://", query=query)

    def with_defaults(self, other: "Url") -> "Url":
        """Return this URL with what it leaves open taken from the other: user and password together, and database."""
        own = self.keys()
        anonymous = "user" not in own and not self.userinfo
        inherited = [raw for key, _value, raw in other.pairs() if key in {"user", "password"} - own and anonymous]
        return replace(
            self,
            userinfo=other.userinfo if anonymous else self.userinfo,
            path=self.path if self.path.strip("/") or "dbname" in own else other.path,
            query=self.query + tuple(inherited),
        )


def from_components(
    hostname: str | None, port: int | None, userid: str | None, password: str | None, virtual_host: str | None
) -> str:
    """Return the URL that kombu took apart; a hostname that is still a whole URL comes back with its password.

    kombu parses the second and later URLs of a `;` list even for transports that parse their own.
    """
    host = hostname or ""
    if _START.match(host):
        return join_password(host, password)
    if not host.startswith("["):
        host = f"[{host}]" if ":" in host else quoted(host)
    address = f"{host}:{port}" if port else host
    user = f"{quoted(userid)}@" if userid else ""
    database = "" if virtual_host in (None, "", "/") else quoted(str(virtual_host))
    return join_password(f"postgresql://{user}{address}/{database}", password)


def split_password(url: str) -> tuple[str, str | None]:
    """Return the URL without any password, and the password, unquoted; `join_password` is the inverse.

    A URL with more than one secret (`sslpassword`, a `listen_url` with a password of its own) gives one text that only
    `join_password` and `Options.parse` can read.
    """
    parts = Url.cut(url)
    user, colon, password = (parts.userinfo or "").partition(":")
    secrets = {"password": unquoted(password)} if password else {}
    query = []
    for key, value, raw in parts.pairs():
        if key in SECRETS:
            secrets[key] = unquoted(value)
            continue
        bare, secret = split_password(unquoted(value)) if key == "listen_url" else ("", None)
        query.append(raw if secret is None else f"listen_url={quoted(bare)}")
        secrets |= {} if secret is None else {"listen_url": secret}
    userinfo = (user or None) if colon else parts.userinfo
    return str(replace(parts, userinfo=userinfo, query=tuple(query))), _pack(secrets)


def join_password(url: str, password: str | None) -> str:
    """Return the URL with the password that `split_password` took out; one that the URL has of its own stays."""
    if not password:
        return url
    secrets = _unpack(password)
    parts = Url.cut(url)
    keys = parts.keys()
    query = [_joined(key, raw, value, secrets) for key, value, raw in parts.pairs()]
    query += [f"{key}={quoted(secrets[key])}" for key in sorted(secrets.keys() & SECRETS - keys - {"password"})]
    user, _, own = (parts.userinfo or "").partition(":")
    userinfo = parts.userinfo
    if "password" in secrets and not own and "password" not in keys:
        userinfo = f"{user}:{quoted(secrets['password'])}"
    return str(replace(parts, userinfo=userinfo, query=tuple(query)))


def has_secret_query(url: str) -> bool:
    """Return whether a password stands in the query, where whoever hides only the usual place would show it."""
    return any(
        key in SECRETS or (key == "listen_url" and split_password(unquoted(value))[1] is not None)
        for key, value, _raw in Url.cut(url).pairs()
    )


def _joined(key: str, raw: str, value: str, secrets: dict[str, str]) -> str:
    if key != "listen_url" or key not in secrets:
        return raw
    return f"listen_url={quoted(join_password(unquoted(value), secrets[key]))}"


def _pack(secrets: dict[str, str]) -> str | None:
    """Return one text; a NUL, which no password of PostgreSQL can hold, marks the one that holds several."""
    if secrets.keys() <= {"password"} and not secrets.get("password", "").startswith("\0"):
        return secrets.get("password")
    return "\0" + urlencode(secrets, errors="surrogateescape")


def _unpack(password: str) -> dict[str, str]:
    if not password.startswith("\0"):
        return {"password": password}
    return dict(parse_qsl(password[1:], keep_blank_values=True, errors="surrogateescape"))


def redact(url: object, mask: str | None = "**") -> str:
    """Return the URL, or `;` list of URLs, with every password masked. Never raises; in doubt it masks too much."""
    mask = mask or ""
    try:
        return ";".join(_redacted(one, mask) for one in _NEXT_URL.split(str(url)))
    except RecursionError:
        return mask


def _redacted(text: str, mask: str) -> str:
    match = _START.match(text)
    start = match[0] if match else ""
    rest = text[len(start) :]
    # People forget to encode "/" and "?" in a password: look for its "@" wherever no query has begun.
    query = _QUERY.search(rest)
    at = max(rest.rfind("@", 0, _authority_end(rest)), rest.rfind("@", 0, query.start() if query else len(rest)))
    colon = rest.find(":", 0, max(at, 0))
    if colon >= 0:
        rest = rest[: colon + 1] + mask + rest[at:]
    head, question, tail = rest.partition("?")
    shown = "&".join(_redacted_pair(pair, mask) for pair in tail.split("&"))
    return _KEYWORD_PASSWORD.sub(lambda found: found[1] + mask, f"{start}{head}{question}{shown}")


def _redacted_pair(pair: str, mask: str) -> str:
    key, equals, value = pair.partition("=")
    if unquote(key).strip() in SECRETS:
        return f"{key}{equals}{mask}"
    plain = unquote(value)
    shown = redact(plain, mask) if plain else ""
    return pair if shown == plain else f"{key}{equals}{quote(shown, safe='*:/@?=,+')}"


def _authority_end(rest: str) -> int:
    return rest.find("/") if "/" in rest else len(rest)


def quoted(text: str) -> str:
    return quote(text, safe="", errors="surrogateescape")


def unquoted(text: str) -> str:
    return unquote(text, errors="surrogateescape")
