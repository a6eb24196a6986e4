"""Do the examples run as their READMEs say?"""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.parent.name for path in ROOT.glob("examples/*/README.md"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_one_command_in_a_clone_starts_the_example(name):
    (command,) = re.findall(r"```sh\n(.*?)\n```", (ROOT / "examples" / name / "README.md").read_text(), re.S)

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    # The installation itself is what tox begins with; `python -m examples.NAME` is run by the tests of each example.
    environment, install, start = command.split(" && ")
    extras = re.fullmatch(r'venv/bin/pip install "\.\[(.*)\]"', install).group(1).split(",")
    assert environment == "python3 -m venv venv"
    assert start == f"venv/bin/python -m examples.{name}"
    assert set(extras) <= {*setup["options.extras_require"]}


def test_the_quickstart_runs_three_workflows_on_a_private_server(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "examples.quickstart"],
        cwd=ROOT,
        env={**os.environ, "EXAMPLE_STORE": f"pg+embedded://{tmp_path}/postgres"},
        stdout=subprocess.PIPE,
        timeout=100,
        text=True,
    )

    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.splitlines()[-4:] == [
        "  2 + 2: 4",
        "  1 + 2 + 3: 6",
        "  a second later: 42",
        "all of it ran on PostgreSQL alone",
    ]
