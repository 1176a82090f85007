"""The command in this process, or as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from adaptsurgery.cli import run


@dataclass
class Done:
    """What a command line left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command line in this process."""

    def call(*args: object) -> Done:
        capsys.readouterr()
        code = run([str(a) for a in args])
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return call


@pytest.fixture
def process() -> Callable[..., Done]:
    """Run ``python -m adaptsurgery`` as a user would, piped."""

    def call(*args: object, **env: str) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "adaptsurgery", *map(str, args)],
            capture_output=True,
            env={**os.environ, **env},
            timeout=60,
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    return call
