"""``export_onnx``: a graph with adapters as an ONNX file in which every adapter tensor has its name."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from adaptsurgery.graph.dropout import set_train
from adaptsurgery.graph.strip import adapters_of
from adaptsurgery.graph.walk import Graph
from adaptsurgery_formats.errors import FileError, ValueRefused

EXTERNAL = 1 << 30  # bytes of weights beyond which they go beside the file (protobuf holds 2 GB)


def export_onnx(
    g: Graph,
    path: str | os.PathLike[str],
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    overwrite: bool = False,
) -> list[str]:
    """Write ``g`` as ONNX and return the names of the initialisers that hold adapters.

    An adapter's tensors stay initialisers of their own names in the state_dict (no optimiser runs,
    which would fold them away), and are inputs too, with those numbers for their defaults: a session
    takes others with every run, ``session.run(None, {"x": x, "a.default.lora_up": up})``, and folds
    nothing of them as it loads. Dropouts are turned off. A GraphModule is exported first, with ``args``,
    ``kwargs`` and ``dynamic_shapes`` as torch.export.export has them; a program needs none. Weights
    beyond 1 GiB go to ``path`` + ".data". The file appears whole or not at all.

    Raises FileError for a path that is taken (that of the weights too) or whose folder is not there,
    ValueRefused where a tensor lost its name.
    """
    target = Path(path)
    _check_free([target], overwrite)
    names = [name for on in adapters_of(g).values() for a in on for name in a.names]
    still = (
        set_train(g, False)
        if isinstance(g, ExportedProgram)
        else _exported(g, args, kwargs, dynamic_shapes)
    )
    program = torch.onnx.export(still, (), dynamo=True, optimize=False, verbose=False)
    assert program is not None
    lost = sorted(set(names) - set(program.model.graph.initializers))
    if lost:
        raise ValueRefused(
            f"{len(lost)} tensors of adapters are no initialisers of the ONNX graph",
            items=lost[:20],
            code="lost-initialiser",
        )
    inputs = program.model.graph.inputs
    inputs.extend(program.model.graph.initializers[name] for name in names)
    files = files_of(still, target)
    _check_free(files, overwrite)
    _write(program, target, external=len(files) > 1)
    return names


def files_of(program: ExportedProgram, path: str | os.PathLike[str]) -> list[Path]:
    """The files that a program becomes as ONNX at ``path``: one, and one of large weights."""
    target = Path(path)
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    return [target, target.with_name(f"{target.name}.data")] if size > EXTERNAL else [target]


def _check_free(files: list[Path], overwrite: bool) -> None:
    if not files[0].parent.is_dir():
        raise FileError(
            "the folder to write into does not exist", where=str(files[0]), code="no-such-folder"
        )
    for file in files:
        if file.exists() and not overwrite:
            raise FileError(
                "is there already", where=str(file), next="overwrite=True", code="output-exists"
            )


def _exported(
    g: Any, args: tuple[Any, ...] | None, kwargs: dict[str, Any] | None, dynamic_shapes: Any
) -> ExportedProgram:
    if args is None and kwargs is None:
        raise ValueRefused(
            "a GraphModule needs example inputs to be exported",
            next="args=(x, …)",
            code="no-inputs",
        )
    still = set_train(g, False)
    assert isinstance(still, nn.Module)
    return torch.export.export(still, args or (), kwargs, dynamic_shapes=dynamic_shapes)


def _write(program: Any, target: Path, external: bool) -> None:
    """Write beside the place first, then rename into it, the weights' file before the other."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        made = Path(folder) / target.name
        program.save(made, external_data=external)
        for file in sorted(Path(folder).iterdir(), key=lambda f: f == made):
            os.replace(file, target.parent / file.name)
