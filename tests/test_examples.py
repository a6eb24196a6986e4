"""Do the examples run as their READMEs say?"""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_quickstart_runs_three_workflows_on_a_private_server(tmp_path):
    broker = f"pg+embedded://{tmp_path}/postgres"

    ran = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart" / "run.py"],
        env={**os.environ, "QUICKSTART_DIRECTORY": str(tmp_path), "QUICKSTART_BROKER": broker},
        stdout=subprocess.PIPE,
        timeout=100,
        text=True,
    )

    assert ran.returncode == 0, ran.stdout
    assert "2 + 2: 4" in ran.stdout
    assert ran.stdout.rstrip().endswith("all of it ran on PostgreSQL alone")
