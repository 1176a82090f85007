"""What a review found in the jobs, each held down by the smallest example that showed it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adaptsurgery
from adaptsurgery.adapters.comparing import VerificationError
from adaptsurgery.adapters.lowrank import plain_lora
from adaptsurgery.adapters.renaming import renamed
from adaptsurgery.adapters.rewritings import carry_out
from adaptsurgery.adapters.updates import update_of
from adaptsurgery.checkpoint.bridge import from_torch, to_torch
from adaptsurgery_formats import FORMATS, AdapterState, ModuleState, Step
from adaptsurgery_formats.errors import InexactError
from adaptsurgery_formats.files import FOLD_SCALE, JOIN_W2
from adaptsurgery_formats.names import Component, Names, Rows, from_modules, table
from adaptsurgery_formats.state import ALPHA_OVER_R

Tensors = dict[str, torch.Tensor]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return made.to(dtype)


def write(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path)
    return path


def peft(folder: Path, tensors: Tensors, **config: object) -> Path:
    folder.mkdir()
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    named = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    write(folder / "adapter_model.safetensors", named)
    return folder


def lora(path: str, *, out: int = 6, into: int = 5, seed: int = 0) -> Tensors:
    return {
        f"{path}.lora_A.weight": rand(2, into, seed=seed),
        f"{path}.lora_B.weight": rand(out, 2, seed=seed),
    }


def module(algorithm: str, tensors: Tensors, *, path: str = "q", scale: float = 1.0) -> ModuleState:
    held = {slot: from_torch(t) for slot, t in tensors.items()}
    return ModuleState(path, algorithm, held, alpha=2 * scale, rule=ALPHA_OVER_R, rank=2)


def delta(one: ModuleState) -> torch.Tensor:
    update = update_of(one, None)
    return update.scale * update.dense(torch.float64)  # type: ignore[attr-defined]


# --as lora


def test_as_lora_keeps_the_prefix_that_a_file_was_read_under(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"blocks.0.fc.weight": torch.zeros(6, 4)})
    name = "lora_te_blocks_0_fc"
    factors = {f"{name}.lokr_w1": rand(2, 2), f"{name}.lokr_w2": rand(3, 2)}
    source = write(tmp_path / "a.safetensors", {**factors, f"{name}.alpha": torch.tensor(1.0)})
    out = tmp_path / "b.safetensors"
    adaptsurgery.convert(source, out, "kohya", base=base, algorithm="lora")
    assert {key.partition(".")[0] for key in load_file(out)} == {name}


def test_as_lora_says_what_is_stored_wider(tmp_path: Path) -> None:
    name = "lycoris_blocks_0_fc"
    slots = {"w1_a": (6, 2), "w1_b": (2, 4), "w2_a": (6, 2), "w2_b": (2, 4)}
    half = {
        f"{name}.hada_{s}": rand(*shape, seed=n, dtype=torch.bfloat16)
        for n, (s, shape) in enumerate(slots.items())
    }
    source = write(tmp_path / "a.safetensors", {**half, f"{name}.alpha": torch.tensor(1.0)})
    base = write(tmp_path / "base.safetensors", {"blocks.0.fc.weight": torch.zeros(6, 4)})
    out = tmp_path / "b.safetensors"
    report = adaptsurgery.convert(source, out, "lycoris", base=base, algorithm="lora")
    (note,) = [n for n in report.notes if n.code == "dtype"]
    assert note.text.startswith("1 modules are stored in F32: BF16")
    assert load_file(out)[f"{name}.lora_up.weight"].dtype == torch.float32


def test_the_bias_of_a_dora_keeps_its_scale(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"blocks.0.q.weight": rand(6, 5, seed=9)})
    tensors = lora("blocks.0.q") | {
        "blocks.0.q.lora_B.bias": rand(6),
        "blocks.0.q.lora_magnitude_vector": rand(6, seed=3).abs(),
    }
    said = {"lora_alpha": 8, "use_dora": True, "lora_bias": True}
    source, out = peft(tmp_path / "dora", tensors, **said), tmp_path / "lora"
    report = adaptsurgery.convert(
        source, out, "peft", base=base, algorithm="lora", rank=5, allow_lossy=True
    )
    assert report.max_error < 1e-6
    config = json.loads((out / "adapter_config.json").read_text())
    bias = load_file(out / "adapter_model.safetensors")["base_model.model.blocks.0.q.lora_B.bias"]
    assert torch.allclose(config["lora_alpha"] / config["r"] * bias, 4 * rand(6))
    without = {key: t for key, t in tensors.items() if not key.endswith("bias")}
    other = peft(tmp_path / "other", without, **{**said, "lora_bias": False})
    with pytest.raises(VerificationError):  # the bias of a DoRA is looked at
        adaptsurgery.verify(source, other, base=base)


def test_a_plain_lora_keeps_its_bias_at_scale_1() -> None:
    tensors = {"up": rand(6, 2), "down": rand(2, 5), "up_bias": rand(6)}
    plain = plain_lora(module("lora", tensors, scale=3.0), None, "f")
    assert plain.scale == 1
    assert torch.allclose(to_torch(plain.tensors["up_bias"]), 3 * rand(6))


# The steps


def kronecker(kernel: tuple[int, ...]) -> tuple[AdapterState, Names]:
    d = 2 * torch.Size(kernel).numel()
    tensors = {"w1": rand(2, 3), "w2_a": rand(4, 2), "w2_b": rand(2, d)}
    state = AdapterState("lycoris", [module("lokr", tensors)])
    return state, from_modules({"": {"q": (8, 6, *kernel)}}, "base")


@pytest.mark.parametrize("kernel", [(), (3, 3), (1, 1)])
def test_a_joined_w2_has_the_kernel_of_its_weight(kernel: tuple[int, ...]) -> None:
    state, names = kronecker(kernel)
    (joined,) = carry_out(state, [Step(state.modules[0], JOIN_W2)], names).modules
    assert joined.tensors["w2"].shape == (4, 2, *kernel)
    wanted = delta(state.modules[0])
    assert torch.allclose(delta(joined).reshape(wanted.shape), wanted, rtol=1e-6, atol=1e-6)


def test_a_w2_is_not_joined_on_a_conv1d() -> None:
    state, names = kronecker((3,))
    with pytest.raises(InexactError, match="peft-conv1d-lokr"):
        carry_out(state, [Step(state.modules[0], JOIN_W2)], names)


@pytest.mark.parametrize("scale, said", [(0.3, "fold the scale into w1 (F32)"), (0.5, FOLD_SCALE)])
def test_a_rewriting_says_the_dtype_that_it_came_to(scale: float, said: str) -> None:
    tensors = {"w1": rand(2, 3, dtype=torch.bfloat16), "w2": rand(4, 2, dtype=torch.bfloat16)}
    state = AdapterState("peft", [module("lokr", tensors, scale=scale)])
    carry_out(state, [Step(state.modules[0], FOLD_SCALE)])
    assert [note.text for note in state.notes] == [said]


# Parts of one native module


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


# verify


def test_a_module_that_adds_nothing_may_be_missing(tmp_path: Path) -> None:
    first = lora("blocks.0.q")
    zero = lora("blocks.1.q") | {"blocks.1.q.lora_B.weight": torch.zeros(6, 2)}
    more = peft(tmp_path / "more", first | zero)
    report = adaptsurgery.verify(peft(tmp_path / "few", first), more)
    assert [row.detail for row in report.rows] == ["", "adds nothing"]
    with pytest.raises(VerificationError):
        adaptsurgery.verify(tmp_path / "few", peft(tmp_path / "two", first | lora("blocks.1.q")))


def test_a_bias_adds_something(tmp_path: Path) -> None:
    first = lora("blocks.0.q") | {"blocks.0.q.lora_B.bias": torch.zeros(6)}
    second = lora("blocks.1.q") | {"blocks.1.q.lora_B.weight": torch.zeros(6, 2)}
    second["blocks.1.q.lora_B.bias"] = torch.ones(6)
    few = peft(tmp_path / "few", first, lora_bias=True)
    with pytest.raises(VerificationError):
        adaptsurgery.verify(few, peft(tmp_path / "more", first | second, lora_bias=True))


def test_one_unnamed_model_is_the_others_one_component(tmp_path: Path) -> None:
    plain = peft(tmp_path / "plain", lora("blocks.0.attn.q"))
    (tmp_path / "pipeline").mkdir()
    peft(tmp_path / "pipeline" / "transformer", lora("blocks.0.attn.q"))
    for pair in ((plain, tmp_path / "pipeline"), (tmp_path / "pipeline", plain)):
        assert adaptsurgery.verify(*pair).verdict == "1/1 modules: 1 identical"


# Submodules


@pytest.mark.parametrize(
    "name",
    [
        "adaptsurgery.core.update",
        "adaptsurgery.jobs.convert",
        "adaptsurgery.jobs.merging",
        "adaptsurgery.jobs.merging.plan",
        "adaptsurgery.quickstart.tiny",
        "adaptsurgery.checkpoint.safetensors",
        "adaptsurgery.cli.merge",
        "adaptsurgery.algorithms.lora",
    ],
)
def test_submodules_are_attributes(name: str) -> None:
    code = (
        "import sys, types, adaptsurgery; assert 'torch' not in sys.modules; "
        f"assert isinstance({name}, types.ModuleType); "
        "assert callable(adaptsurgery.convert); assert not hasattr(adaptsurgery.core, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
