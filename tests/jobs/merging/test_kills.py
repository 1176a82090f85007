"""The short version of tools/kills.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[3] / "tools" / "kills.py"


def test_killed_merges_leave_whole_outputs_and_end_in_the_right_bytes() -> None:
    done = subprocess.run(
        [sys.executable, TOOL, "--tries", "8", "--only", "merge file"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 tries, 0 wrong" in done.stdout and "SIGTERM" in done.stdout
