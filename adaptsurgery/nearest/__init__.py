"""The nearest adapter to a difference: goals, Lanczos, Procrustes, Kronecker and Hadamard products."""

from adaptsurgery import submodules

__getattr__ = submodules(__name__)
