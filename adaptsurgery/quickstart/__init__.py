"""The main job end to end on real input, for a person's first five minutes.

- ``run``: the steps, and what is compared
- ``making``: four adapters, trained or made
- ``students``: what a model that is taught has; ``minilm``, a real one; ``tiny``, a small one that is
  trained on the spot
- ``given``: a model of the user's
"""

from adaptsurgery import submodules
from adaptsurgery.quickstart.run import quickstart

__all__ = ["quickstart"]

__getattr__ = submodules(__name__)
