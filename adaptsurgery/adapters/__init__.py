"""A file becomes named modules and updates, and the way back."""

from adaptsurgery import submodules

__getattr__ = submodules(__name__)
