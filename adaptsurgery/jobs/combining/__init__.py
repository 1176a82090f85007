"""The weighted sum of adapters as one adapter.

- ``terms``: what is added, layer by layer
- ``factors``, ``rotations``, ``vectors``: the sums of low-rank terms, of HRA, of norms and biases
- ``carrying``: configs and replaced parameters, which come along
- ``sums``: all of it, and how far the result is off
- ``combine``: the job, from files to a file
"""

from adaptsurgery import submodules

__getattr__ = submodules(__name__)
