"""The quickstart's exported model: an adapter put into the program, and ONNX where it is installed."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from adaptsurgery.jobs.quickstart import tiny
from adaptsurgery.jobs.quickstart.making import Made
from adaptsurgery.jobs.rewrite import rewrite

PROGRAM = "model.pt2"


def exported(
    model: tiny.TinyModel, made: Made, files: Path, seed: int, tell: Callable[[str], object]
) -> dict[str, float]:
    """File → how far its outputs are from the live model's, of the adapter's own effect on them.

    At another batch size than the program was exported with.
    """
    generator = torch.Generator().manual_seed(seed)
    text = tiny.pieces(tiny.unseen_code(), 3, generator)[:, :-1].contiguous()
    sizes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(model.eval(), (text[:2],), dynamic_shapes=sizes)
    torch.export.save(program, str(files / PROGRAM))
    out, onnx = f"{made.name}.pt2", f"{made.name}.onnx" if _has_onnx() else ""
    words = ["rewrite", PROGRAM, "--adapter", made.name, "-o", out]
    tell(f"$ adaptsurgery {shlex.join([*words, *(['--onnx', onnx] if onnx else [])])}")
    rewrite(
        files / PROGRAM, files / out, adapter=files / made.name, onnx=files / onnx if onnx else None
    )
    found = {out: torch.export.load(str(files / out)).module()(text).detach()}
    ran = _onnx_output(str(files / onnx), text) if onnx else None
    found |= {} if ran is None else {onnx: ran}
    with torch.no_grad():
        plain = model(text)
        with tiny.adapted(model, made.updates):
            wanted = model(text)
    effect = float((wanted - plain).abs().max())
    return {name: float((y - wanted).abs().max()) / effect for name, y in found.items()}


def _has_onnx() -> bool:
    return all(find_spec(name) is not None for name in ("onnx", "onnxscript"))


def _onnx_output(path: str, text: torch.Tensor) -> torch.Tensor | None:
    """What an ONNX runtime makes of the file, where one is installed."""
    if find_spec("onnxruntime") is None:
        return None
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: text.numpy()})[0])
