"""``adaptsurgery unmerge``; see cli/merge.py."""

from adaptsurgery.cli.merge import unmerge_command as command

__all__ = ["command"]
