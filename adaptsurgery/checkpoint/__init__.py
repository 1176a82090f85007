"""Checkpoints and adapter files: lazy in, atomic out, a header at a time.

Nothing here imports torch or numpy until a number has to be computed:

- ``safetensors``: the strict header-only reader
- ``writer``: the header as the safetensors library lays it out, and the data moved into place
- ``finite``: NaN and infinity found in raw bytes, and the rule for them
- ``watched``: what is read, and whether it is still the same
- ``atomic``: an output that is there in full or not at all
- ``base``: what ``--base`` names, as components and modules
- ``hub``: ``org/name`` turned into a local path
- ``bridge``, ``pickles``: to torch and from it
- ``programs``: what a .pt2 may hold before torch reads it, by ``archives`` (the zip), ``descriptions``
  (its JSON) and ``expressions`` (its formulas)
"""

from adaptsurgery import submodules

__getattr__ = submodules(__name__)
