"""Fuzzers of every kind of input: seeded, in process, each fault kept as a small file.

``inputs`` is an input as plain data, ``jobs`` what is done with it, ``trial`` what is promised whatever
it is, ``workers`` runs many; each other file makes the inputs of one kind.
"""

import sys
from pathlib import Path

# The tests' own corpus, mutants and oracle are used, not written again.
TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [p for p in (str(TESTS), str(TESTS / "helpers")) if p not in sys.path]
