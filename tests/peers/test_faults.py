"""What the peers do wrong with right files, pinned: should one of these fail, a peer was mended.

ΔW is then compared from the definition in ``reference``, or by a way the peer does get right.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peer_nets as nets
import peft
import pytest
import reference
import torch
from lycoris.modules import get_module, make_module
from peft import HRAConfig, LoHaConfig, LoKrConfig, LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from adaptsurgery import SurgeryError, convert, load, verify
from adaptsurgery.algorithms import LoKr
from adaptsurgery_formats.lokr_cuts import lycoris_loads

# --- LyCORIS -------------------------------------------------------------------------------------


def by_definition(path: Path, name: str, scale: float, shape: tuple[int, ...]) -> torch.Tensor:
    """s·ΔW of one module of a LyCORIS file, element by element."""
    found = load_file(path)
    slots = {k.rpartition("_w")[2]: v for k, v in found.items() if k.startswith(name + ".lokr_w")}
    slots = {f"w{k}": v for k, v in slots.items()}
    if (core := found.get(name + ".lokr_t2")) is not None:
        slots["t2"] = core
    return scale * reference.delta("lokr", slots, shape)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "use_effective_conv2d": True, "target_modules": ["conv_in"]},
        {"r": 1, "decompose_both": True, "decompose_factor": 8, "target_modules": ["fc_in"]},
        {"r": 2, "decompose_factor": 8, "target_modules": ["mid_wide"]},
        {"r": 1, "decompose_factor": 12, "target_modules": ["fc_in"]},
    ],
    ids=["tucker-full-w1", "decompose-both", "convolution", "unsorted-cut"],
)
def test_lycoris_loader_guesses_another_cut(options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT's right files: converted, noted "lycoris-loader", equal by definition; not loaded."""
    even = options["target_modules"] != ["fc_in"]
    model = nets.net(even=even)
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    given = LoKrConfig(**options, alpha=5, init_weights=False)
    nets.write_peft(model, tmp_path / "in", given, x)
    out = tmp_path / "out.safetensors"
    report = convert(tmp_path / "in", out, "lycoris", base=base)
    name = options["target_modules"][0]
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "in"))
    layer = getattr(adapted.base_model.model.blk_0, name)
    wanted = layer.get_delta_weight("default").detach()
    mine = by_definition(out, f"lycoris_blk_0_{name}", 5 / options["r"], tuple(wanted.shape))
    assert nets.apart(mine, wanted) < nets.TOLERANCE
    plain = adapted.unload()
    told = any(n.code == "lycoris-loader" for n in report.notes)
    try:
        nets.lycoris_output(plain, out, x)
    except (AttributeError, RuntimeError):
        assert told
    else:
        assert not told


def lokr_files() -> list[tuple[dict[str, tuple[int, ...]], int, int, tuple[int, ...]]]:
    """LoKr shapes over cuts, ranks and storage: slots, o, i, kernel."""
    found = []
    for (a, b), (c, d) in itertools.product([(2, 6), (3, 4), (6, 2), (4, 8), (1, 7)], repeat=2):
        for kernel, r in itertools.product([(), (3, 3)], [1, 3]):
            w1s = [{"w1": (a, c)}, {"w1_a": (a, r), "w1_b": (r, c)}]
            size = 9 if kernel else 1
            w2s = [{"w2": (b, d, *kernel)}, {"w2_a": (b, r), "w2_b": (r, d * size)}]
            if kernel:
                w2s.append({"t2": (r, r, *kernel), "w2_a": (r, b), "w2_b": (r, d)})
            found += [(w1 | w2, a * b, c * d, kernel) for w1, w2 in itertools.product(w1s, w2s)]
    return found


def test_when_lycoris_loads_a_lokr_is_foretold() -> None:
    """``lycoris_loads`` against the real loader, over some hundreds of shapes."""
    right = 0
    for shapes, out, into, kernel in lokr_files():
        layer = nn.Conv2d(into, out, kernel) if kernel else nn.Linear(into, out)
        assert lycoris_loads(shapes, out, into) == loads(layer, shapes), (shapes, out, into)
        right += loads(layer, shapes)
    assert right > 50


def loads(layer: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the real loader makes a module with just these tensors."""
    file = {f"m.lokr_{s}": torch.rand(shape) for s, shape in shapes.items()}
    file["m.alpha"] = torch.tensor(1.0)
    try:
        with torch.no_grad():
            made = make_module(*get_module(file, "m"), "m", layer)
    except (AttributeError, RuntimeError, ValueError, TypeError, IndexError):
        return False
    kept = {k.removeprefix("lokr_"): tuple(v.shape) for k, v in made.state_dict().items()}
    return kept == {**shapes, "alpha": ()}


def test_lycoris_get_diff_weight_scales_twice() -> None:
    """So its merges are wrong wherever alpha ≠ rank; forward is right."""
    from lycoris.modules.loha import LohaModule

    layer = nn.Linear(8, 6, bias=False).double()
    module = LohaModule("m", layer, 1.0, lora_dim=2, alpha=6).double()
    nn.init.normal_(module.hada_w2_a)
    module.apply_to()
    right = module(torch.eye(8).double()).detach().t() - layer.weight.detach()
    merged = module.get_diff_weight(1.0)[0].detach()
    assert nets.apart(merged, 3 * right) < 1e-9


def test_lycoris_forgets_rs_lora_of_a_full_lokr(tmp_path: Path) -> None:
    """Trained with scale √r, saved, and read as 1: the file cannot say it, so 1 is what it means."""
    model = nets.net(conv1d=False)
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    full = {"full_matrix": True, "module_options": {"rs_lora": True}}
    trained = nets.write_lycoris(model, tmp_path / "in.safetensors", "lokr", x, **full)
    read = nets.lycoris_output(model, tmp_path / "in.safetensors", x)
    assert nets.apart(read, trained) > 0.1
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft", base=base)
    assert nets.apart(nets.peft_output(model, tmp_path / "out", x), read) < nets.TOLERANCE


def test_lycoris_loader_takes_every_dora_for_one_per_output(tmp_path: Path) -> None:
    model = nets.net()
    x = nets.inputs(model)
    per_input = {"dora_wd": True, "wd_on_output": False}
    trained = nets.write_lycoris(model, tmp_path / "in.safetensors", "lora", x, **per_input)
    try:
        read = nets.lycoris_output(model, tmp_path / "in.safetensors", x)
    except RuntimeError:
        return
    assert nets.apart(read, trained) > 0.01


# --- PEFT ----------------------------------------------------------------------------------------


def test_peft_scrambles_a_conv1d_lokr_with_a_full_w2(tmp_path: Path) -> None:
    """Its ΔW is no Kronecker product of its own factors, so no other layout can hold it."""
    model = nets.net()
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    given = LoKrConfig(r=16, alpha=16, target_modules=["seq"], init_weights=False)
    wanted = nets.write_peft(model, tmp_path / "in", given, x)
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "in"))
    layer = adapted.base_model.model.blk_0.seq
    w1, w2 = (getattr(layer, f"lokr_w{n}")["default"].detach() for n in "12")
    right = LoKr(w1=w1, w2=w2).dense()
    assert nets.apart(layer.get_delta_weight("default").detach(), right) > 0.1
    model = adapted.unload()
    for to in ("lycoris", "kohya"):
        with pytest.raises(SurgeryError) as refusal:
            convert(tmp_path / "in", tmp_path / "out.safetensors", to, base=base)
        assert refusal.value.code == "peft-conv1d-lokr"
    convert(tmp_path / "in", tmp_path / "out", "peft", base=base)
    assert nets.apart(nets.peft_output(model, tmp_path / "out", x), wanted) < nets.TOLERANCE


def test_peft_forgets_the_dilation_in_lora(tmp_path: Path) -> None:
    """Its forward fails or is wrong; merged, the same file computes what LyCORIS does."""
    model = nets.net(conv1d=False, dilation=2)
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    wanted = nets.write_lycoris(model, tmp_path / "in.safetensors", "lora", x)
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft", base=base)
    with pytest.raises(RuntimeError, match="must match the size"):
        nets.peft_output(model, tmp_path / "out", x)
    merged = peft.PeftModel.from_pretrained(model, str(tmp_path / "out")).merge_and_unload()
    assert nets.apart(merged(x).detach(), wanted) < nets.TOLERANCE


def test_peft_has_no_lora_of_a_convolution_in_groups(tmp_path: Path) -> None:
    """Its lora_A takes all inputs; a header does not show groups, so PEFT refuses, not we."""
    model = nets.net(conv1d=False, groups=4)
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    nets.write_lycoris(model, tmp_path / "in.safetensors", "lora", x)
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft", base=base)
    with pytest.raises(RuntimeError, match="size mismatch"):
        nets.peft_output(model, tmp_path / "out", x)


def test_a_lora_of_peft_on_groups_is_refused(tmp_path: Path) -> None:
    model = nets.net(conv1d=False, groups=4)
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    given = LoraConfig(r=4, target_modules=["mid_wide"], init_lora_weights=False)
    nets.write_peft(model, tmp_path / "in", given, x)
    with pytest.raises(SurgeryError) as refusal:
        convert(tmp_path / "in", tmp_path / "out.safetensors", "kohya", base=base)
    assert refusal.value.code in ("peft-grouped-conv", "bad-shape")


def test_peft_fails_on_a_core_of_rank_one_in_one_dimension() -> None:
    given = LoKrConfig(r=1, target_modules=["seq"], use_effective_conv2d=True, init_weights=False)
    model = nets.net(even=True)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        peft.get_peft_model(model, given)(nets.inputs(model))


def test_peft_has_no_loha_on_conv3d() -> None:
    model = nn.ModuleDict({"conv": nn.Conv3d(4, 4, 3)})
    with pytest.raises((TypeError, ValueError)):
        peft.get_peft_model(model, LoHaConfig(target_modules=["conv"]))


def test_peft_hra_odd_rank_is_no_identity_at_first() -> None:
    """So an odd r changes the model before any training; the file is right all the same."""
    model = nets.text_net()
    x = nets.inputs(model)
    before = model(x).detach()
    with pytest.warns(UserWarning, match="odd"):
        adapted = peft.get_peft_model(model, HRAConfig(r=3, target_modules=["fc"])).eval()
    assert nets.apart(adapted(x).detach(), before) > 1e-3


# --- Readers' rules that no peer agrees on ---------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 0.0, 1.0, 4.0, 1e10])
def test_a_full_lokr_means_scale_one_whatever_alpha_says(
    alpha: float | None, tmp_path: Path
) -> None:
    """LyCORIS's rule; trainers write alpha = r, 1, or 1e10 there."""
    tensors = {"lycoris_fc.lokr_w1": torch.rand(3, 3), "lycoris_fc.lokr_w2": torch.rand(4, 4)}
    if alpha is not None:
        tensors["lycoris_fc.alpha"] = torch.tensor(alpha)
    model = nets.stack()
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    save_file(tensors, tmp_path / "in.safetensors")
    adapter = load(tmp_path / "in.safetensors", base=base)
    assert adapter.provenance("fc")["scale"] == [1.0]
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft", base=base, algorithm="lora")
    if alpha is not None:
        wanted = nets.lycoris_output(model, tmp_path / "in.safetensors", x)
        assert nets.apart(nets.peft_output(model, tmp_path / "out", x), wanted) < nets.TOLERANCE
    verify(tmp_path / "in.safetensors", tmp_path / "out", base=base)
