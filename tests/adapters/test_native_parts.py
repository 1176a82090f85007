"""Parts of one module of a native model, put together at one scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_adapters import Tensors, delta, lora, module, peft, rand

import adaptsurgery
from adaptsurgery.adapters.renaming import renamed
from adaptsurgery_formats import FORMATS, AdapterState
from adaptsurgery_formats.errors import InexactError
from adaptsurgery_formats.names import Component, Names, Rows, table

FUSED = Names(
    "",
    {
        "": Component(
            "",
            {"q": (4, 5), "k": (4, 5)},
            native={"qk": (Rows("q", 0, 4), Rows("k", 0, 4))},
            kohya_naming="native",
        )
    },
    "a test's",
)


def parts(
    algorithm: str, scales: tuple[float, float], dtype: torch.dtype = torch.float32
) -> AdapterState:
    modules = []
    for n, (path, scale) in enumerate(zip("qk", scales)):
        if algorithm == "lora":
            tensors = {"up": rand(4, 2, seed=n), "down": rand(2, 5, seed=n)}
        elif algorithm == "loha":
            tensors = {"w1_b": rand(2, 5), "w2_b": rand(2, 5, seed=1)}
            tensors |= {"w1_a": rand(4, 2, seed=n), "w2_a": rand(4, 2, seed=n + 2)}
        else:
            tensors = {"w1": rand(2, 5, seed=n), "w2": rand(2, 1)}
        held = {slot: t.to(dtype) for slot, t in tensors.items()}
        modules.append(module(algorithm, held, path=path, scale=scale))
    return AdapterState("peft", modules)


@pytest.mark.parametrize("algorithm", ["lora", "loha"])
@pytest.mark.parametrize("scales", [(1.0, 2.0), (0.1, 1 / 3), (-1.0, 0.7), (0.0, 1.0)])
def test_parts_of_different_scales_are_put_at_one(
    algorithm: str, scales: tuple[float, float]
) -> None:
    state = parts(algorithm, scales)
    (fused,) = renamed(state, FUSED, FORMATS["kohya"]).modules
    wanted = torch.cat([delta(m) for m in state.modules])
    assert torch.allclose(delta(fused), wanted, rtol=1e-6, atol=1e-6)
    slot = {"lora": "up", "loha": "w1_a"}[algorithm]
    assert [n.text for n in state.notes] == [f"fold the scale into {slot}"]


@pytest.mark.parametrize("other, dtype", [(2.0, "BF16"), (3.0, "F32")])
def test_the_parts_keep_their_dtype_where_it_is_exact(other: float, dtype: str) -> None:
    state = parts("lora", (1.0, other), torch.bfloat16)
    (fused,) = renamed(state, FUSED, FORMATS["kohya"]).modules
    assert fused.tensors["up"].dtype == dtype
    wanted = torch.cat([delta(m) for m in state.modules])
    assert torch.allclose(delta(fused), wanted, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_put_at_one_scale_has_a_remedy_that_works() -> None:
    with pytest.raises(InexactError, match="fused-scales") as refused:
        renamed(parts("lokr", (1.0, 2.0)), FUSED, FORMATS["kohya"])
    assert "--as lora" in refused.value.next


def flux_folder(folder: Path) -> Path:
    """q, k and v of a Flux attention at two scales: kohya fuses them."""
    component = table("flux").components["transformer"]
    paths = [s.name for s in next(s for s in component.native.values() if len(s) == 3)]
    tensors: Tensors = {}
    for path in paths:
        out, into = component.modules[path]
        tensors |= lora(path, out=out, into=into)
    last = paths[0].rpartition(".")[2]
    targets = [path.rpartition(".")[2] for path in paths]
    return peft(folder, tensors, alpha_pattern={last: 6}, target_modules=targets)


def test_inspect_plans_what_convert_does(tmp_path: Path) -> None:
    folder = flux_folder(tmp_path / "peft")
    told = adaptsurgery.inspect(folder)
    assert told.convertible["kohya"]["how"] == "rewritten"
    assert told.convertible["kohya"]["steps"] == ["fold the scale into up"]
    assert not told.notes
    report = adaptsurgery.convert(folder, tmp_path / "k.safetensors", "kohya")
    assert {n.text for n in report.notes if n.code == "rewritten"} == {"fold the scale into up"}
    back = adaptsurgery.convert(tmp_path / "k.safetensors", tmp_path / "back", "peft")
    assert back.max_error < 1e-6
