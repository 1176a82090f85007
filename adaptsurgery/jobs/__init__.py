"""Each thing that adaptsurgery does, as a pipeline from paths to a report. None imports torch
until numbers have to be computed."""

from adaptsurgery import submodules

__getattr__ = submodules(__name__)
