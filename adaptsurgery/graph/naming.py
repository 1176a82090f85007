"""Which module a node in a graph belongs to: the name that named_modules() has for it.

The trace's own note (nn_module_stack) goes before the weight's name, which for a tied lm_head is the
embedding's. But a function that takes a child's weight (nn.MultiheadAttention and its out_proj) was
called in the parent: then the weight's owner is meant. Without a note only the weight's name is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch.fx import Node

from adaptsurgery.graph.walk import View, owners

# Classes that are one linear map or convolution, int8 and other variants of theirs too.
_LINEAR = re.compile(r"(?<!Bi)(Linear|Conv1D)$|Linear(8bit\w*|4bit\w*|FP4|NF4|Int8\w*)$")
_CONVOLUTION = re.compile(r"Conv[123]d$")
_STRANGE = re.compile(r"slice\(|[^\w.\-/]")  # layers.slice(None, 2, None).0, of a strict trace


class GraphNames:
    """The module paths of a program and the class of each, as far as the trace noted them."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.types: dict[str, str] = {}
        for scope in view.scopes:
            for node in scope.nodes:
                for owner in owners(node):
                    self.types.setdefault(owner.path, owner.type)

    def path(self, node: Node, weight: str) -> str:
        """The path of the module that ``node`` is the call of, with the parameter ``weight``."""
        paths = [module_of(name) for name in self._view.same(weight)]
        stack = owners(node)
        noted = stack[-1].path if stack else None
        if noted is None:
            return module_of(weight)
        if noted in paths:
            return noted
        below = [p for p in paths if not noted or p.startswith(noted + ".")]
        if below or _STRANGE.search(noted):
            return (below or paths)[0]
        return noted

    def type(self, path: str) -> str:
        return self.types.get(path, "")

    def is_layer(self, path: str, weight: str) -> bool:
        """Whether the module is a layer of its own, not a function that a larger one calls."""
        known = self.type(path)
        return is_layer_type(known) if known else weight == f"{path}.weight".lstrip(".")

    def modules(self, layers: Iterable[str]) -> list[str]:
        """Every module that was called, ``layers`` and what is above them; in the state's order."""
        order = {module_of(name): n for n, name in enumerate(reversed(self._view.tensors))}
        called = [*layers, *(path for path in self.types if not _STRANGE.search(path))]
        called.sort(key=lambda path: -order.get(path, 0))
        paths: dict[str, None] = {}
        for path in called:
            for end in [i for i, c in enumerate(path) if c == "."] + [len(path)]:
                paths[path[:end]] = None
        paths.pop("", None)
        return list(paths)


def module_of(name: str) -> str:
    """The module that a parameter belongs to; of a parametrised one the module, not its part."""
    path = name.rpartition(".")[0]
    return path.partition(".parametrizations.")[0]


def is_layer_type(name: str) -> bool:
    return bool(_LINEAR.search(name) or _CONVOLUTION.search(name))


def is_linear_type(name: str) -> bool:
    return bool(_LINEAR.search(name))
