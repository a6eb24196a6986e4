"""When does the embedded server stop?

When the last process that uses it is gone, however it went. Each user holds a shared lock on one file; this program,
started next to the server, waits for the exclusive one and stops the server. The kernel drops the locks of a process
that was killed, and Ctrl-C does not reach us: we are in a session of our own. Run by path, so that it needs nothing
but the standard library: `python _keeper.py USERS_FILE KEEPER_LOCK_FD PG_CTL DATA_DIRECTORY [USER]`.
"""

import fcntl
import os
import signal
import subprocess
import sys


def main(users_file: str, keeper_lock: int, pg_ctl: str, data: str, user: str | None = None) -> None:
    """Wait until nobody uses the server, then stop it."""
    if os.fork():  # the starter waits for its child; nobody waits for a grandchild
        os._exit(0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.chdir("/")
    users = os.open(users_file, os.O_RDWR)
    fcntl.flock(users, fcntl.LOCK_EX)
    command = [pg_ctl, "-D", data, "-m", "fast", "-w", "stop"]
    subprocess.run(command, user=user, stdin=subprocess.DEVNULL, capture_output=True, check=False)  # noqa: S603
    # In this order: whoever joins now waits for `users`, and must then find that there is no keeper.
    os.close(keeper_lock)
    os.close(users)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
