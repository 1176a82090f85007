"""Adapters into checkpoints and out again, file to file: match, plan, run.

- ``sites``: every name under which an adapter may mean a stored tensor, or rows of one
- ``align``: adapters whose names lack or have extra leading segments
- ``match``: adapters → changes of stored tensors
- ``tying``: a table that is embedding and output head in one
- ``plan``: the work as plain data, one job an output file
- ``run``: the jobs, into a partial output that becomes the output at the end
- ``manifest``: what went in and what came of it, and the check against it
- ``merge``: the calls that users make

Up to ``plan`` nothing imports torch.
"""

from adaptsurgery import submodules

__getattr__ = submodules(__name__)
