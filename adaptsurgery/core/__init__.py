"""The algebra: what a layer is, what an update does to its weight, and which form is cheaper."""

from adaptsurgery import submodules

__getattr__ = submodules(__name__)
