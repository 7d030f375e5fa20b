"A run that is killed again and again; fifty times: python tests/kills.py"

import os
import subprocess
import sys
from pathlib import Path


def test_killed_runs_end_in_the_same_bytes():
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("kills.py"), "--kills", "8", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stdout.startswith("8 kills"), done.stdout + done.stderr
