"""Where does a server run that a test may crash, fill up or fail over from?"""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

__all__ = ["PgServer", "free_port", "give", "owner", "small_disk"]

SETTINGS = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 300
shared_buffers = 32MB
"""


def binaries() -> Path:
    """The directory of a server's programs."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    found = [shutil.which("initdb"), *(path / "initdb" for path in versions)]
    for initdb in filter(None, found):
        if Path(initdb).exists() and (Path(initdb).parent / "pg_basebackup").exists():
            return Path(initdb).parent
    raise pytest.fail.Exception("there is no initdb with pg_basebackup here: apt-get install postgresql")


def owner() -> str | None:
    """Whom the server runs as: PostgreSQL refuses root. None: as we do."""
    if os.getuid() != 0:
        return None
    return next(name for name in ("postgres", "nobody") if name in {entry.pw_name for entry in pwd.getpwall()})


def give(path: Path) -> None:
    """The server's user owns the directory."""
    if (name := owner()) is not None:
        shutil.chown(path, name)
        shutil.chown(path, group=pwd.getpwnam(name).pw_gid)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PgServer:
    """A server in a directory of its own, on a port of 127.0.0.1, where everybody is superuser."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.port = free_port()

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def create(self, *options: str) -> "PgServer":
        self._make_directory()
        self._run(
            "initdb",
            "-D",
            self.data,
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-locale",
            "--no-sync",
            *options,
        )
        self._configure()
        return self

    def create_from(self, template: Path) -> "PgServer":
        """A copy of what another `create` has made."""
        self._make_directory()
        shutil.copytree(template, self.data)
        for path in (self.data, *self.data.rglob("*")):
            give(path)
        self._configure()
        return self

    def create_standby_of(self, primary: "PgServer") -> "PgServer":
        """A copy of the primary that follows it."""
        self._make_directory()
        login = f"host=127.0.0.1 port={primary.port} user=postgres application_name=standby"
        self._run("pg_basebackup", "-D", self.data, "-d", login, "-R", "-c", "fast", "--no-sync")
        self._configure()
        return self

    def _make_directory(self) -> None:
        self.directory.mkdir(exist_ok=True)
        give(self.directory)

    def _configure(self) -> None:
        with (self.data / "postgresql.conf").open("a") as out:
            out.write(f"{SETTINGS}port = {self.port}\n")

    def start(self) -> "PgServer":
        """It runs and answers."""
        self._run("pg_ctl", "start", "-w", "-t", "60", "-D", self.data, "-l", self.directory / "log")
        return self

    def stop(self, how: str = "immediate") -> None:
        """It does not run; `immediate` is what a crash looks like."""
        self._run("pg_ctl", "stop", "-w", "-t", "60", "-m", how, "-D", self.data)

    def restart(self, how: str = "immediate") -> None:
        self._run("pg_ctl", "restart", "-w", "-t", "60", "-m", how, "-D", self.data, "-l", self.directory / "log")

    def promote(self) -> None:
        """A standby takes writes from now on."""
        self._run("pg_ctl", "promote", "-w", "-t", "60", "-D", self.data)

    @property
    def running(self) -> bool:
        return (self.data / "postmaster.pid").exists() and self._run(
            "pg_ctl", "status", "-D", self.data, check=False
        ) == 0

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        with contextlib.closing(psycopg2.connect(self.url)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []

    def _run(self, program: str, *arguments: object, check: bool = True) -> int:
        command = [binaries() / program, *map(str, arguments)]
        # Not to a pipe: the server would inherit it and keep it open.
        with (self.directory / "commands").open("a") as out:
            done = subprocess.run(
                command, user=owner(), cwd=self.directory, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        assert not check or done.returncode == 0, f"{command}:\n{(self.directory / 'commands').read_text()}"
        return done.returncode

    def close(self) -> None:
        """Nothing of it is left."""
        if self.running:
            self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def small_disk(directory: Path, megabytes: int) -> Iterator[Path]:
    """A file system of that size, in memory, which is the server's."""
    directory.mkdir(parents=True)
    give(directory.parent)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0755", "tmpfs", directory]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"only root may mount a small disk: {done.stderr.strip()}")
    give(directory)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)
