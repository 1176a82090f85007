"""Adapters through export: ONNX with its tensors by name, torch.compile, AOTInductor, at other sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from graph_nets import (
    ALGORITHMS,
    Convs,
    Mlp,
    close,
    example,
    exported,
    made,
    run,
    updates_for,
    wanted,
)
from torch import nn

from adaptsurgery.algorithms import HRA
from adaptsurgery.graph.attach import attach
from adaptsurgery.graph.dropout import set_train
from adaptsurgery.graph.onnx import export_onnx
from adaptsurgery.graph.state import adapter_parameters
from adaptsurgery_formats.errors import FileError, ValueRefused


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options)


def run_onnx(
    made: ort.InferenceSession, x: torch.Tensor, swapped: dict[str, torch.Tensor] | None = None
) -> list[torch.Tensor]:
    fed = {made.get_inputs()[0].name: x.numpy()}
    fed |= {name: tensor.numpy() for name, tensor in (swapped or {}).items()}
    return [torch.from_numpy(np.asarray(y)) for y in made.run(None, fed)]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_onnx_keeps_every_tensor_by_name_and_takes_others(algorithm: str, tmp_path: Path) -> None:
    """attach → save → load → ONNX → onnxruntime at another size, then with other numbers."""
    net = Convs if algorithm in ("lokr", "loha") else Mlp
    model = made(net)
    first, second = (updates_for(model, algorithm, seed=s) for s in (0, 50))
    torch.export.save(attach(exported(model), first), tmp_path / "h.pt2")
    h = torch.export.load(tmp_path / "h.pt2")
    names = export_onnx(set_train(h), tmp_path / "h.onnx")
    assert set(names) == set(adapter_parameters(h))
    held = session(tmp_path / "h.onnx")
    assert {i.name for i in held.get_overridable_initializers()} == set(names)
    for batch in (2, 9):
        x = example(model, batch)
        close(run_onnx(held, x), wanted(model, first, x))
    other = adapter_parameters(attach(exported(model), second))
    swapped = {name: other[name].detach() for name in names}
    x = example(model, 5)
    close(run_onnx(held, x, swapped), wanted(model, second, x))
    close(run_onnx(held, x), wanted(model, first, x))


def test_onnx_refuses(tmp_path: Path) -> None:
    h = attach(exported(made(Mlp)), updates_for(made(Mlp), "lora"))
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(FileError):
        export_onnx(h, tmp_path / "taken")
    with pytest.raises(ValueRefused, match="example inputs"):
        export_onnx(h.module(), tmp_path / "new")
    assert [f.name for f in tmp_path.iterdir()] == ["taken"]
    export_onnx(h.module(), tmp_path / "new", (example(made(Mlp)),))
    assert (tmp_path / "new").stat().st_size > 0


def test_weights_beside_the_file_replace_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptsurgery.graph.onnx.EXTERNAL", 100)
    model = made(Mlp)
    updates = updates_for(model, "lora")
    h = attach(exported(model), updates)
    path = tmp_path / "h.onnx"
    (tmp_path / "h.onnx.data").write_text("mine")
    with pytest.raises(FileError, match="is there already"):
        export_onnx(h, path)
    assert (tmp_path / "h.onnx.data").read_text() == "mine" and not path.exists()
    export_onnx(h, path, overwrite=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["h.onnx", "h.onnx.data"]
    x = example(model, 3)
    close(run_onnx(session(path), x), wanted(model, updates, x))
    with pytest.raises(FileError, match="no-such-folder"):
        export_onnx(h, tmp_path / "none" / "h.onnx")


@pytest.mark.slow
def test_many_reflections_from_equal_pairs(tmp_path: Path) -> None:
    """HRA with r = 128 at PEFT's initial value, by plain products: R = I, to float32."""
    model: Any = nn.Sequential(nn.Linear(160, 8)).eval()
    half = torch.randn(160, 64)
    paired = half.repeat_interleave(2, dim=1)
    near = paired + 1e-3 * torch.randn(160, 128)
    x = torch.randn(5, 160)
    program = torch.export.export(model, (x,))
    for u, tolerance in ((paired, 3e-5), (near, 3e-5)):
        updates = {"0": HRA(u)}
        close(run(attach(program, updates), x), wanted(model, updates, x), tolerance)
    h = attach(program, {"0": HRA(near)})
    export_onnx(h, tmp_path / "h.onnx")
    close(run_onnx(session(tmp_path / "h.onnx"), x), wanted(model, {"0": HRA(near)}, x), 3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "hra"])
def test_compile_at_other_sizes(algorithm: str) -> None:
    model = made(Mlp)
    updates = updates_for(model, algorithm)
    h = attach(exported(model), updates)
    compiled = torch.compile(h.module(), backend="aot_eager", dynamic=True)
    for batch in (3, 11):
        x = example(model, batch)
        close([t.detach() for t in compiled(x)], wanted(model, updates, x))


@pytest.mark.slow
def test_aot_inductor_at_other_sizes(tmp_path: Path) -> None:
    """One small layer: the C++ compiler takes its time."""
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    sizes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (torch.randn(4, 6),), dynamic_shapes=sizes)
    updates = updates_for(model, "lora")
    h = attach(program, updates, mode="factored")
    package = torch._inductor.aoti_compile_and_package(h, package_path=str(tmp_path / "h.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for batch in (3, 11):
        x = torch.randn(batch, 6)
        close([loaded(x).detach()], wanted(model, updates, x))
