"""The short version of tools/kills.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[3] / "tools" / "kills.py"


def test_killed_merges_leave_whole_outputs_and_end_in_the_right_bytes() -> None:
    done = subprocess.run(
        [sys.executable, TOOL, "--kills", "12", "--width", "384"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "12 kills" in done.stdout and done.stdout.count("over old") >= 1
