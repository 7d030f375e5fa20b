"Twenty thousand broken files, in a process of its own whose memory is limited."

import os
import subprocess
import sys
from pathlib import Path


def test_broken_files_are_read_right_or_refused():
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("fuzz.py")],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and "20,000 inputs, 0 findings" in done.stdout, (
        done.stdout[-5000:] + done.stderr[-2000:]
    )
