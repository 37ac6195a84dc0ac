"""The short form of `kill_and_resume.py`; the long one is run by hand."""

import subprocess
import sys
from pathlib import Path


def test_killed_runs_end_with_the_same_bits():
    script = Path(__file__).with_name("kill_and_resume.py")
    done = subprocess.run(
        [sys.executable, script, "--kills", "3", "--steps", "60", "--longest-s", "0.3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("3 kills (")
    assert done.stdout.endswith("every run ended with the same bits\n")
