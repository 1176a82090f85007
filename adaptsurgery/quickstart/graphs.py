"""The quickstart's exported model: an adapter put into the program, and ONNX where it is installed."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from adaptsurgery.jobs.rewrite import rewrite
from adaptsurgery.quickstart.making import Made
from adaptsurgery.quickstart.students import Student, adapted

PROGRAM = "model.pt2"


def exported(
    student: Student, made: Made, files: Path, tell: Callable[[str], object]
) -> dict[str, float]:
    """File → how far its outputs are from the live model's, of the adapter's own effect on them.

    They are compared at another batch size than the program was exported with.
    """
    inputs = student.example(3)
    sizes = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    two = tuple(x[:2] for x in inputs)
    program = torch.export.export(student.module.eval(), two, dynamic_shapes=sizes)
    torch.export.save(program, str(files / PROGRAM))
    out, onnx = f"{made.name}.pt2", f"{made.name}.onnx" if _has_onnx() else ""
    words = ["rewrite", PROGRAM, "--adapter", made.name, "-o", out]
    tell(f"$ adaptsurgery {shlex.join([*words, *(['--onnx', onnx] if onnx else [])])}")
    rewrite(
        files / PROGRAM, files / out, adapter=files / made.name, onnx=files / onnx if onnx else None
    )
    got = {out: torch.export.load(str(files / out)).module()(*inputs).detach()}
    ran = _onnx_output(str(files / onnx), inputs) if onnx else None
    got |= {} if ran is None else {onnx: ran}
    with torch.no_grad():
        plain = student.module(*inputs)
        with adapted(student.module, made.updates):
            wanted = student.module(*inputs)
    effect = float((wanted - plain).abs().max())
    return {name: float((y - wanted).abs().max()) / effect for name, y in got.items()}


def _has_onnx() -> bool:
    return all(find_spec(name) is not None for name in ("onnx", "onnxscript"))


def _onnx_output(path: str, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """What an ONNX runtime makes of the file, where one is installed."""
    if find_spec("onnxruntime") is None:
        return None
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs)}
    return torch.from_numpy(session.run(None, given)[0])
