"""Adapters into checkpoints and out again, file to file: match, plan, run.

- ``sites``: every name under which an adapter may mean a stored tensor, or rows of one
- ``align``: adapters whose names lack or have extra leading segments
- ``match``: adapters → changes of stored tensors (``matched``); ``cuts``: of fused weights
- ``tying``: a table that is embedding and output head in one, or T5's three in one
- ``quantised``: bases in fp8 and int8, and their scales
- ``configs``: what changes in config.json
- ``plan``: the work as plain data, one job an output file; ``planning``: from paths to it
- ``run``: the jobs, into a partial output that becomes the output at the end
- ``manifest``: what went in and what came of it; ``check``: a checkpoint held against that
- ``merge``: the calls that users make

Up to ``plan`` nothing imports torch.
"""

from adaptsurgery import submodules

__getattr__ = submodules(__name__)
