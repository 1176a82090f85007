"""Graph surgery: adapters in torch.fx graphs and exported programs.

    from adaptsurgery import graph
    program = torch.export.export(model, …)
    print(graph.plan(program, config))
    program = graph.attach(program, config)      # or an adapter that adaptsurgery.load returns
    graph.export_onnx(program, "adapted.onnx")

README.md, beside this file, goes from a model to ONNX and back.
"""

from adaptsurgery.graph.attach import attach, detach, set_scale
from adaptsurgery.graph.dropout import set_train
from adaptsurgery.graph.find import find_sites
from adaptsurgery.graph.merge import merge
from adaptsurgery.graph.onnx import export_onnx
from adaptsurgery.graph.plan import Plan, plan
from adaptsurgery.graph.sites import Call, Site
from adaptsurgery.graph.state import adapter_parameters, adapter_state, adapters, load_state

__all__ = [
    "Call",
    "Plan",
    "Site",
    "adapter_parameters",
    "adapter_state",
    "adapters",
    "attach",
    "detach",
    "export_onnx",
    "find_sites",
    "load_state",
    "merge",
    "plan",
    "set_scale",
    "set_train",
]
