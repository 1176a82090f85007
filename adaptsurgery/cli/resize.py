"""``adaptsurgery resize``; written beside ``combine``."""

from adaptsurgery.cli.combine import resize_command as command

__all__ = ["command"]
