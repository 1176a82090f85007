"""An adapter out of a base model and a fine-tuned one.

- ``pairs``: the tensors of both, laid side by side
- ``kinds``, ``selection``: which become adapters, what goes beside them, what is left out
- ``options``, ``candidates``, ``plan``: the work as plain data, one job a layer
- ``fitting``: one layer's work
- ``run``: the jobs, into a partial output
- ``choose``: the candidate that each layer gets, and the adapter
- ``summary``, ``page``, ``plots``: what is told, and the report to look at
- ``extract``: the call that users make

Up to ``plan`` nothing imports torch.
"""

from adaptsurgery import submodules

__getattr__ = submodules(__name__)
