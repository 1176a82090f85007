"""A live model with the modules of a base file, and an adapter put into it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fuzzing import oracle
from fuzzing.oracle import Array, Wrong

if TYPE_CHECKING:
    from fuzzing.jobs import Options, Place

_LAYERS = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class Tree(nn.Module):
    """Modules by their paths; its forward is the sum over all linear layers of their outputs."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, seed: int) -> torch.Tensor:
        sums = [m(_given(m, seed)).double().sum() for _, m in linear_layers(self)]
        return torch.stack(sums).sum() if sums else torch.zeros(())


def linear_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that take vectors, adapted or not."""
    wide = [(n, m) for n, m in model.named_modules() if hasattr(m, "in_features")]
    return [(n, m) for n, m in wide if not any(n.startswith(f"{o}.") for o, _ in wide)]


def _given(layer: Any, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(layer.parameters()).dtype
    return torch.randn(3, layer.in_features, generator=generator).to(dtype)


def of_file(path: str) -> Tree:
    """The modules of a base file, with its weights and biases."""
    tensors = oracle.tensors_of(path)
    tree = Tree()
    for key, raw in tensors.items():
        if key.endswith(".weight") and len(raw.shape) in _LAYERS:
            bias = tensors.get(key.removesuffix("weight") + "bias")
            _place(tree, key.removesuffix(".weight"), _layer(raw, bias))
    return tree.eval()


def _layer(weight: Any, bias: Any) -> nn.Module:
    o, i, *k = weight.shape
    has = bias is not None
    layer = _LAYERS[len(weight.shape)]
    made: Any = layer(i, o, bias=has) if not k else layer(i, o, tuple(k), bias=has)
    made.weight.data = torch.from_numpy(oracle.array(weight)).to(_dtype(weight))
    if has:
        made.bias.data = torch.from_numpy(oracle.array(bias)).to(_dtype(bias))
    return made


def _dtype(raw: Any) -> torch.dtype:
    kinds = {"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}
    return kinds.get(raw.dtype, torch.float32)


def _place(tree: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(tree, parent):
            tree.add_module(parent, nn.Module())
        tree = getattr(tree, parent)
    tree.add_module(name, layer)


def weighs(model: nn.Module, wanted: Mapping[str, tuple[Array, float]]) -> None:
    """Every weight is the oracle's within one rounding."""
    with oracle.judged():
        for key, value in model.state_dict().items():
            if key in wanted:
                want, size = wanted[key]
                raw = oracle.Raw(_name(value.dtype), tuple(value.shape), _bytes(value))
                oracle.off_by_more(raw, want, size, key, 2.0**-24)  # factors may be rewritten


def _name(dtype: torch.dtype) -> str:
    names = {torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}
    return names.get(dtype, "F32")


def _bytes(value: torch.Tensor) -> bytes:
    plain = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
    return bytes(plain.contiguous().numpy().tobytes())


def attached(place: Place, options: Options) -> str | None:
    """The adapter in a live model: one forward, saved, folded in; untouched where it is refused."""
    from adaptsurgery import PeftModel, SurgeryError

    base, source = place(options["base"]), place(options["source"])
    model = of_file(base)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        adapted: Any = PeftModel.from_pretrained(model, source, adapter_name=place(options["name"]))
    except SurgeryError:
        now = model.state_dict()
        if now.keys() != before.keys() or not all(torch.equal(now[k], before[k]) for k in now):
            raise Wrong("a refused adapter changed the live model") from None
        raise
    total = adapted(1)
    if options.get("save"):
        adapted.save_pretrained(place(options["out"]))
    plain = _folded(adapted, place(options.get("out", "")))
    if options.get("check"):
        _right(plain, total, oracle.merged(base, [(source, 1.0)], 1.0))
    return None


def _folded(adapted: Any, saved: str) -> nn.Module:
    """The base with the adapter folded in; as it was where that is refused, which a save is no part of."""
    from adaptsurgery import SurgeryError

    before = {k: v.clone() for k, v in adapted.state_dict().items()}
    try:
        return adapted.merge_and_unload()  # type: ignore[no-any-return]
    except SurgeryError:
        now = adapted.state_dict()
        if now.keys() != before.keys() or not all(torch.equal(now[k], before[k]) for k in now):
            raise Wrong("a refused fold changed the live model") from None
        shutil.rmtree(saved, ignore_errors=True)
        raise


def _right(plain: nn.Module, total: torch.Tensor, wanted: Any) -> None:
    weighs(plain, wanted)
    with torch.no_grad(), oracle.judged():
        again, room = plain(1), 0.0
        for _, layer in linear_layers(plain):
            unit = oracle.UNITS[_name(layer.weight.dtype)][0]
            size = (_given(layer, 1).double().abs() @ layer.weight.double().abs().T).sum()
            room += max(256 * unit, 1e-4) * float(size)
        if not np.isfinite(float(again)):
            return  # of weights at the end of their dtype
        if not abs(float(again) - float(total)) <= max(room, 1e-30):
            raise Wrong("an adapted forward is not that of the merged weights")
