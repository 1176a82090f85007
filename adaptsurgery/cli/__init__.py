"""The command: arguments → job → exit code. A command is one file here and one line in ``app``."""

from adaptsurgery import submodules
from adaptsurgery.cli.app import main, run

__all__ = ["main", "run"]

__getattr__ = submodules(__name__)
