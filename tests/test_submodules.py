"""Each submodule is an attribute of its package, and imported when it is first touched."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "adaptsurgery.core.update",
        "adaptsurgery.jobs.convert",
        "adaptsurgery.jobs.merging",
        "adaptsurgery.jobs.merging.plan",
        "adaptsurgery.quickstart.tiny",
        "adaptsurgery.checkpoint.safetensors",
        "adaptsurgery.cli.merge",
        "adaptsurgery.algorithms.lora",
    ],
)
def test_submodules_are_attributes(name: str) -> None:
    code = (
        "import sys, types, adaptsurgery; assert 'torch' not in sys.modules; "
        f"assert isinstance({name}, types.ModuleType); "
        "assert callable(adaptsurgery.convert); assert not hasattr(adaptsurgery.core, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
