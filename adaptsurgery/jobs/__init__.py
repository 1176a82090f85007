"""Each thing that adaptsurgery does, as a pipeline from paths to a report. None imports torch
until numbers have to be computed."""
