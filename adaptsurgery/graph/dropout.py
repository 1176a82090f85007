"""Training and evaluation of a graph: the third argument of aten.dropout is all there is to turn.

An exported module refuses train() and eval(), since what a model does in training was traced away.
What stays are its dropouts (and those of adapters), which are turned here one by one.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from adaptsurgery.graph.walk import is_ours
from adaptsurgery.graph.workspace import Workspace

G = TypeVar("G", ExportedProgram, GraphModule)
DROPOUTS = (
    torch.ops.aten.dropout.default,
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.alpha_dropout.default,
)


def set_train(g: G, train: bool = True, *, base: bool = True) -> G:
    """``g`` with its dropouts on or off: the adapters', and unless ``base`` is False the model's.

    Nothing else of a model's training mode is in a graph: a batch norm stays as it was traced.
    The parameters are the same objects as in ``g``, so an optimiser may be made before or after.
    """
    work = Workspace(g)
    set_dropouts(work, train, base=base)
    if base and isinstance(g, GraphModule):
        for module in work.top.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.train(train)
    result: G = work.finish()  # type: ignore[assignment]
    return result


def set_dropouts(work: Workspace, train: bool, *, base: bool) -> None:
    """Turn the copy's dropouts."""
    for _, module in work.modules():
        for node in module.graph.nodes:
            if _is_dropout(node) and (base or is_ours(node)):
                node.args = (*node.args[:2], train)


def is_training(work: Workspace) -> bool:
    """Whether any dropout of an adapter is on."""
    return any(
        bool(node.args[2])
        for _, module in work.modules()
        for node in module.graph.nodes
        if _is_dropout(node) and is_ours(node)
    )


def _is_dropout(node: Node) -> bool:
    return node.op == "call_function" and node.target in DROPOUTS
