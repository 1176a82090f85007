"""The command: arguments → job → exit code. A command is one file here and one line in ``app``."""

from adaptsurgery.cli.app import main, run

__all__ = ["main", "run"]
