"""What does a program write to a terminal?"""

import os
import pty
import select
import struct
import subprocess
import sys
from fcntl import ioctl
from termios import TIOCSWINSZ

__all__ = ["MAIN", "on_terminal"]

MAIN = "from celery_pg.commands import main; main()"


def on_terminal(code: str, url: str, *arguments: str, columns: int = 80, **environment: str) -> str:
    """What a program writes to a terminal of so many columns."""
    master, slave = pty.openpty()
    ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "CELERY_PG_URL": url, "TERM": "xterm-256color", **environment}
    environment = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(command, env=environment, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        written = b""
        while select.select([master], [], [], 60)[0]:
            try:
                written += os.read(master, 65536)
            except OSError:  # Linux's way to say end of file
                break
    os.close(master)
    assert process.returncode == 0, written
    return written.decode()
