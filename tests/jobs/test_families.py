"""Every job finds in a base what merge finds there: job × family of models.

A family is a base of random numbers under the names that its files have, an adapter under the names
of the model that it was trained in, and where each of its modules lies. What every job gives is
merged, and held against W + s·B·A in float64, from the definition.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import adaptsurgery
from adaptsurgery_formats.errors import SurgeryError

Array = np.ndarray[Any, Any]
Shapes = dict[str, tuple[int, ...]]
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Spot:
    """Outputs [start, stop) of a stored tensor or of slice ``index`` of it; ``turned``: (i, o)."""

    name: str
    start: int = 0
    stop: int = 0
    index: int | None = None
    turned: bool = False


@dataclass(frozen=True)
class Case:
    """``places``: an adapter's path → the spots of its rows, one below the other, and (o, i)."""

    base: Shapes
    places: dict[str, tuple[list[Spot], tuple[int, int]]]
    config: dict[str, Any] = field(default_factory=dict)


def whole(name: str, out: int = 8, into: int = 6) -> tuple[list[Spot], tuple[int, int]]:
    return [Spot(f"{name}.weight")], (out, into)


def linears(*names: str, out: int = 8, into: int = 6) -> Shapes:
    return {f"{name}.weight": (out, into) for name in names}


HEADS = {
    "model_type": "phi3",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 8,
}
ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"
PHI3: Shapes = {
    "model.embed_tokens.weight": (10, 6),
    f"{ATTENTION}.qkv_proj.weight": (16, 6),
    f"{ATTENTION}.o_proj.weight": (6, 8),
    f"{MLP}.gate_up_proj.weight": (20, 6),
    f"{MLP}.down_proj.weight": (6, 10),
    "lm_head.weight": (10, 6),
}
SPLIT: Shapes = {
    **{f"{ATTENTION}.{p}_proj.weight": (n, 6) for p, n in zip("qkv", (8, 4, 4))},
    **{f"{MLP}.{p}_proj.weight": (10, 6) for p in ("gate", "up")},
    f"{MLP}.down_proj.weight": (6, 10),
}
QKV = f"{ATTENTION}.qkv_proj.weight"
GATE_UP = f"{MLP}.gate_up_proj.weight"
SPLIT_ON_FUSED = {
    f"{ATTENTION}.q_proj": ([Spot(QKV, 0, 8)], (8, 6)),
    f"{ATTENTION}.k_proj": ([Spot(QKV, 8, 12)], (4, 6)),
    f"{ATTENTION}.v_proj": ([Spot(QKV, 12, 16)], (4, 6)),
    f"{MLP}.gate_proj": ([Spot(GATE_UP, 0, 10)], (10, 6)),
    f"{MLP}.up_proj": ([Spot(GATE_UP, 10, 20)], (10, 6)),
    f"{MLP}.down_proj": whole(f"{MLP}.down_proj", 6, 10),
}
FUSED_ON_SPLIT = {
    f"{ATTENTION}.qkv_proj": (
        [Spot(f"{ATTENTION}.{p}_proj.weight", 0, n) for p, n in zip("qkv", (8, 4, 4))],
        (16, 6),
    ),
    f"{MLP}.gate_up_proj": (
        [Spot(f"{MLP}.{p}_proj.weight", 0, 10) for p in ("gate", "up")],
        (20, 6),
    ),
    f"{MLP}.down_proj": whole(f"{MLP}.down_proj", 6, 10),
}
_BARE = [f"layers.{n}.{p}" for n in (0, 1) for p in ("self_attn.q_proj", "mlp.up_proj")]
_TEXT = [f"layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"]
_VISION = "encoder.layers.0.self_attn.q_proj"
_VIT = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_EXPERTS = [(n, short, long) for n in (0, 1) for short, long in
            (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))]  # fmt: skip
MOE = "model.layers.0"
STACK = f"{MOE}.mlp.experts"


def renamed(old: list[str], new: list[str], **more: tuple[int, ...]) -> Case:
    """The modules ``old`` of a base, adapted by the names ``new``."""
    others = {name.replace("__", "."): shape for name, shape in more.items()}
    return Case(linears(*old) | others, {n: whole(o) for o, n in zip(old, new)})


CASES = {
    "phi3": Case(PHI3, SPLIT_ON_FUSED),
    "phi3 by its config": Case(PHI3, {f"{ATTENTION}.v_proj": ([Spot(QKV, 12, 16)], (4, 6))}, HEADS),
    "fused on split": Case(SPLIT, FUSED_ON_SPLIT),
    "bare adapter": renamed([f"model.{p}" for p in _BARE], _BARE),
    "bare base": renamed(_BARE, [f"model.{p}" for p in _BARE]),
    "bare phi3": Case(
        PHI3, {p.removeprefix("model."): at for p, at in SPLIT_ON_FUSED.items()}
    ),
    "bert's prefix": renamed(
        [f"bert.encoder.layer.{n}.output.dense" for n in (0, 1)],
        [f"base.encoder.layer.{n}.output.dense" for n in (0, 1)],
    ),
    "llava's files": renamed(
        [*(f"language_model.model.{p}" for p in _TEXT), f"vision_tower.vision_model.{_VISION}",
         "multi_modal_projector.linear_1"],
        [*(f"model.language_model.{p}" for p in _TEXT), f"model.vision_tower.vision_model.{_VISION}",
         "model.multi_modal_projector.linear_1"],
    ),
    "llava's tower unwrapped": renamed(
        [*(f"language_model.model.{p}" for p in _TEXT), f"vision_tower.vision_model.{_VISION}"],
        [*(f"model.language_model.{p}" for p in _TEXT), f"model.vision_tower.{_VISION}"],
    ),
    "llava's new files": renamed(
        [*(f"model.language_model.{p}" for p in _TEXT), "lm_head"],
        [*(f"language_model.model.{p}" for p in _TEXT), "language_model.lm_head"],
    ),
    "qwen2-vl's files": renamed(
        [*(f"model.{p}" for p in _TEXT), "visual.blocks.0.attn.proj"],
        [*(f"model.language_model.{p}" for p in _TEXT), "model.visual.blocks.0.attn.proj"],
    ),
    "qwen2-vl's new files": renamed(
        [*(f"model.language_model.{p}" for p in _TEXT), "model.visual.blocks.0.attn.proj"],
        [*(f"model.{p}" for p in _TEXT), "visual.blocks.0.attn.proj"],
    ),
    "mixtral's files": renamed(
        [f"{MOE}.block_sparse_moe.experts.{n}.{short}" for n, short, _ in _EXPERTS],
        [f"{MOE}.mlp.experts.{n}.{long}" for n, _, long in _EXPERTS],
    ),
    "mixtral's names": renamed(
        [f"{MOE}.mlp.experts.{n}.{long}" for n, _, long in _EXPERTS],
        [f"{MOE}.block_sparse_moe.experts.{n}.{short}" for n, short, _ in _EXPERTS],
    ),
    "stacked experts": Case(
        {f"{STACK}.gate_up_proj": (3, 20, 6), f"{STACK}.down_proj": (3, 6, 10)},
        {
            f"{STACK}.1.gate_proj": ([Spot(f"{STACK}.gate_up_proj", 0, 10, 1)], (10, 6)),
            f"{STACK}.1.up_proj": ([Spot(f"{STACK}.gate_up_proj", 10, 20, 1)], (10, 6)),
            f"{STACK}.2.down_proj": ([Spot(f"{STACK}.down_proj", 0, 6, 2)], (6, 10)),
        },
        {"model_type": "qwen3_moe"},
    ),
    "stacked experts, turned": Case(
        {f"{STACK}.gate_up_proj": (3, 6, 20), f"{STACK}.down_proj": (3, 10, 6)},
        {
            f"{STACK}.1.up_proj": ([Spot(f"{STACK}.gate_up_proj", 10, 20, 1, True)], (10, 6)),
            f"{STACK}.0.down_proj": ([Spot(f"{STACK}.down_proj", 0, 6, 0, True)], (6, 10)),
        },
        {"model_type": "llama4"},
    ),
    "vit's files": renamed(
        [f"vit.encoder.layer.{n}.{old}" for n in (0, 1) for old in _VIT],
        [f"vit.layers.{n}.{new}" for n in (0, 1) for new in _VIT.values()],
    ),
    "vit's new names": renamed(
        [f"vit.layers.{n}.{new}" for n in (0, 1) for new in _VIT.values()],
        [f"vit.encoder.layer.{n}.{old}" for n in (0, 1) for old in _VIT],
        vit__embeddings__patch_embeddings__projection__weight=(8, 3, 2, 2),
    ),
    "gpt-2's fused Conv1D": Case(
        {"transformer.h.0.attn.c_attn.weight": (6, 18), "transformer.h.0.attn.c_attn.bias": (18,),
         "transformer.h.0.mlp.c_fc.weight": (6, 24)},
        {
            f"transformer.h.0.attn.{p}_proj":
                ([Spot("transformer.h.0.attn.c_attn.weight", 6 * n, 6 * n + 6, None, True)], (6, 6))
            for n, p in enumerate("qkv")
        },
        {"model_type": "gpt2"},
    ),
    "gpt-2 without its prefix": Case(
        {"transformer.h.0.attn.c_attn.weight": (6, 18), "transformer.h.0.mlp.c_fc.weight": (6, 24)},
        {"h.0.attn.c_attn":
            ([Spot("transformer.h.0.attn.c_attn.weight", 0, 18, None, True)], (18, 6)),
         "h.0.mlp.c_fc":
            ([Spot("transformer.h.0.mlp.c_fc.weight", 0, 24, None, True)], (24, 6))},
        {"model_type": "gpt2"},
    ),
    "torch's in_proj": Case(
        {"encoder.attn.in_proj_weight": (18, 6), "encoder.attn.out_proj.weight": (6, 6)},
        {f"encoder.attn.{p}_proj": ([Spot("encoder.attn.in_proj_weight", 6 * n, 6 * n + 6)], (6, 6))
         for n, p in enumerate("qkv")},
    ),
    "openclip's blocks": renamed(
        [f"transformer.resblocks.{n}.mlp.{p}" for n in (0, 1) for p in ("c_fc", "c_proj")],
        [f"text_model.encoder.layers.{n}.mlp.{p}" for n in (0, 1) for p in ("fc1", "fc2")],
    ),
    "a tied head": Case(
        {"model.embed_tokens.weight": (12, 6), **linears("model.layers.0.mlp.up_proj")},
        {"model.layers.0.mlp.up_proj": whole("model.layers.0.mlp.up_proj")},
    ),
}  # fmt: skip


@dataclass
class Files:
    """A case written down: the base's folder, an adapter's, and the numbers of both."""

    case: Case
    base: Path
    adapter: Path
    home: Path
    stored: dict[str, Array]
    factors: dict[str, tuple[Array, Array]]

    def merged(self, strength: float = 1.0) -> dict[str, Array]:
        """What a merge has to give, by W' = W + s·B·A in float64."""
        after = {name: w.astype(np.float64) for name, w in self.stored.items()}
        for path, (spots, _) in self.case.places.items():
            up, down = (f.astype(np.float64) for f in self.factors[path])
            delta, at = strength * SCALE * up @ down, 0
            for spot in spots:
                held = after[spot.name] if spot.index is None else after[spot.name][spot.index]
                rows = (held.T if spot.turned else held)[spot.start : spot.stop or None]
                rows += delta[at : at + len(rows)]
                at += len(rows)
            assert at == len(delta)
        return after

    def check(self, adapter: Path, strength: float = 1.0) -> None:
        """Merge an adapter, and hold the outcome against ``merged``."""
        out = self.home / f"merged-{adapter.stem}"
        adaptsurgery.merge(self.base, [adapter], out)
        after = load_file(out / "model.safetensors")
        for name, wanted in self.merged(strength).items():
            np.testing.assert_allclose(after[name], wanted, rtol=1e-5, atol=1e-5, err_msg=name)


SCALE = 3 / 2  # alpha over rank


@pytest.fixture(params=CASES)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    return written(CASES[request.param], tmp_path)


def written(case: Case, home: Path, peft_type: str = "LORA") -> Files:
    draw = np.random.default_rng(len(case.base) + 7 * len(case.places))
    base, adapter = home / "base", home / "adapter"
    base.mkdir()
    adapter.mkdir()
    stored = {n: draw.normal(size=s).astype(np.float32) for n, s in case.base.items()}
    save_file(stored, base / "model.safetensors")
    if case.config:
        (base / "config.json").write_text(json.dumps(case.config))
    factors = {
        path: (draw.normal(size=(o, 2)).astype(np.float32), draw.normal(size=(2, i)).astype(np.float32))
        for path, (_, (o, i)) in case.places.items()
    }  # fmt: skip
    tensors = {}
    for path, (up, down) in factors.items():
        tensors[f"{PREFIX}{path}.lora_B.weight"] = up
        tensors[f"{PREFIX}{path}.lora_A.weight"] = down
    if peft_type == "HRA":
        tensors = {f"{PREFIX}{p}.hra_u": f[1].T.copy() for p, f in factors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": peft_type, "r": 2, "target_modules": sorted(factors)}
    config |= {"lora_alpha": 3} if peft_type == "LORA" else {"apply_GS": False}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return Files(case, base, adapter, home, stored, factors)


def test_merge_and_its_check(files: Files) -> None:
    files.check(files.adapter)
    report = adaptsurgery.verify_merge(
        files.home / "merged-adapter", files.base, [str(files.adapter)]
    )
    assert report.ok if hasattr(report, "ok") else report
    back = files.home / "back"
    adaptsurgery.unmerge(files.home / "merged-adapter", [str(files.adapter)], back)
    for name, w in load_file(back / "model.safetensors").items():
        np.testing.assert_allclose(w, files.stored[name], rtol=1e-4, atol=1e-5)


def test_inspect(files: Files) -> None:
    shown = adaptsurgery.inspect(files.adapter, base=files.base)
    assert {row["path"] for row in shown.modules} == set(files.case.places)


@pytest.mark.parametrize("to", ["kohya", "lycoris"])
def test_convert_there_and_back(files: Files, to: str) -> None:
    flat, back = files.home / f"flat-{to}.safetensors", files.home / f"back-{to}"
    adaptsurgery.convert(files.adapter, flat, to, base=files.base)
    adaptsurgery.convert(flat, back, "peft", base=files.base)
    files.check(flat)
    files.check(back)
    for other in (flat, back):
        adaptsurgery.verify(files.adapter, other, base=files.base)


def test_a_peft_folder_keeps_the_adapters_own_names(files: Files) -> None:
    out = files.home / "again"
    adaptsurgery.convert(files.adapter, out, "peft", base=files.base)
    before = load_file(files.adapter / "adapter_model.safetensors")
    after = load_file(out / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_resize(files: Files) -> None:
    out = files.home / "small"
    adaptsurgery.resize(files.adapter, out, rank=2, base=files.base)
    files.check(out)


def test_combine(files: Files) -> None:
    out = files.home / "sum"
    adaptsurgery.combine([f"{files.adapter}=0.5", f"{files.adapter}=1.5"], out, base=files.base)
    files.check(out, 2.0)


def test_combine_with_the_bases_names(files: Files) -> None:
    """An adapter and its twin by other names meet in one layer each."""
    flat = files.home / "flat.safetensors"
    adaptsurgery.convert(files.adapter, flat, "kohya", base=files.base)
    out = files.home / "sum"
    report = adaptsurgery.combine([str(files.adapter), str(flat)], out, base=files.base)
    assert len(report.rows) == len(files.case.places)
    files.check(out, 2.0)


def test_load(files: Files) -> None:
    adapter = adaptsurgery.load(files.adapter, base=files.base)
    assert len(adapter) == len(files.case.places)
    keys = {m.own or m.path: key for key in adapter for m in adapter.modules(key)}
    for path, (up, down) in files.factors.items():
        wanted = SCALE * up.astype(np.float64) @ down
        delta: Any = adapter[keys[path]]
        np.testing.assert_allclose(
            delta.scale * delta.dense(torch.float64).numpy(), wanted, rtol=1e-6
        )


def test_the_bases_own_rows_make_an_hra_a_lora(tmp_path: Path, family: str) -> None:
    """W·R − W, of the very rows of the base that a module is."""
    case = CASES[family]
    if QKV in case.base:  # an HRA is as wide as the inputs: heads alone tell the rows
        case = Case(case.base, case.places, HEADS)
    files = written(case, tmp_path, "HRA")
    lora = tmp_path / "lora"
    adaptsurgery.convert(files.adapter, lora, "peft", base=files.base, algorithm="lora")
    for number, adapter in enumerate((files.adapter, lora)):
        adaptsurgery.merge(files.base, [adapter], tmp_path / str(number))
    first, second = (load_file(tmp_path / str(n) / "model.safetensors") for n in (0, 1))
    for name, w in first.items():
        np.testing.assert_allclose(w, second[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert any((w != files.stored[name]).any() for name, w in first.items())


@pytest.fixture(params=CASES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


LIVE = [n for n in CASES if not n.startswith(("stacked", "torch's", "gpt-2"))]


def live_model(files: Files) -> torch.nn.Module:
    """The stored linears as a tree of modules."""
    root = torch.nn.Module()
    for name, weight in files.stored.items():
        *parents, last = name.removesuffix(".weight").split(".")
        at = root
        for part in parents:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        out, into, *kernel = weight.shape
        layer: Any = torch.nn.Linear(into, out, bias=False)
        if kernel:
            layer = torch.nn.Conv2d(into, out, kernel[0], bias=False)
        layer.weight.data = torch.from_numpy(weight.copy())
        at.add_module(last, layer)
    return root


def check_live(files: Files, model: torch.nn.Module) -> None:
    for name, wanted in files.merged().items():
        after = model.get_parameter(name).detach().numpy()
        np.testing.assert_allclose(after, wanted, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", LIVE)
def test_fold_into_a_live_model(tmp_path: Path, name: str) -> None:
    files = written(CASES[name], tmp_path)
    model = live_model(files)
    adaptsurgery.fold(model, files.adapter)
    check_live(files, model)
    adaptsurgery.unfold(model, files.adapter)
    for path, w in files.stored.items():
        np.testing.assert_allclose(model.get_parameter(path).detach(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["peft", "kohya"])
@pytest.mark.parametrize("name", LIVE)
def test_load_into_a_live_model(tmp_path: Path, name: str, layout: str) -> None:
    files = written(CASES[name], tmp_path)
    adapter = files.adapter
    if layout == "kohya":
        adapter = tmp_path / "flat.safetensors"
        adaptsurgery.convert(files.adapter, adapter, "kohya", base=files.base)
    adapted = adaptsurgery.PeftModel.from_pretrained(live_model(files), adapter)
    check_live(files, adapted.merge_and_unload())


def fused_and_split(home: Path) -> tuple[Files, Path]:
    """An adapter of Phi-3's q, k, v and gate, up; and the same ΔW on its fused layers, by hand."""
    files = written(Case(PHI3, SPLIT_ON_FUSED), home)
    fused = home / "fused"
    fused.mkdir()
    tensors: dict[str, Array] = {}
    for name, parts in ((QKV, "qkv"), (GATE_UP, ("gate", "up"))):
        path = name.removesuffix(".weight")
        halves = [files.factors[f"{path.rpartition('.')[0]}.{p}_proj"] for p in parts]
        up = np.zeros((sum(len(u) for u, _ in halves), 6), np.float32)
        row = 0
        for number, (u, _) in enumerate(halves):
            up[row : row + len(u), 2 * number : 2 * number + 2] = u * SCALE
            row += len(u)
        down = np.zeros((6, 6), np.float32)
        down[: 2 * len(halves)] = np.concatenate([d for _, d in halves])
        tensors[f"{PREFIX}{path}.lora_B.weight"] = up
        tensors[f"{PREFIX}{path}.lora_A.weight"] = down
    up, down = files.factors[f"{MLP}.down_proj"]
    tensors[f"{PREFIX}{MLP}.down_proj.lora_B.weight"] = np.pad(up * SCALE, ((0, 0), (0, 4)))
    tensors[f"{PREFIX}{MLP}.down_proj.lora_A.weight"] = np.pad(down, ((0, 4), (0, 0)))
    save_file(tensors, fused / "adapter_model.safetensors")
    names = ["qkv_proj", "gate_up_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": 6, "lora_alpha": 6, "target_modules": names}
    (fused / "adapter_config.json").write_text(json.dumps(config))
    return files, fused


def test_a_fused_and_a_split_adapter_are_held_together(tmp_path: Path) -> None:
    files, fused = fused_and_split(tmp_path)
    files.check(fused)
    adaptsurgery.verify(files.adapter, fused, base=files.base)
    adaptsurgery.verify(fused, files.adapter, base=files.base)
    changed = load_file(fused / "adapter_model.safetensors")
    changed[f"{PREFIX}{ATTENTION}.qkv_proj.lora_B.weight"][9] *= 1.01
    save_file(changed, fused / "adapter_model.safetensors")
    with pytest.raises(SurgeryError, match="not-equal"):
        adaptsurgery.verify(files.adapter, fused, base=files.base)


def test_a_fused_and_a_split_adapter_add_up(tmp_path: Path) -> None:
    files, fused = fused_and_split(tmp_path)
    for number, sources in enumerate(([files.adapter, fused], [fused, files.adapter])):
        out = tmp_path / f"sum{number}"
        adaptsurgery.combine([str(s) for s in sources], out, base=files.base)
        files.check(out, 2.0)


def test_a_part_of_a_fused_layer_that_cannot_be_stacked_is_refused(tmp_path: Path) -> None:
    """An HRA turns all outputs of a layer, so a live fused layer has no place for one of q alone."""
    case = Case(PHI3, {f"{ATTENTION}.q_proj": ([Spot(QKV, 0, 8)], (8, 6))}, HEADS)
    files = written(case, tmp_path, "HRA")
    with pytest.raises(SurgeryError):
        adaptsurgery.PeftModel.from_pretrained(live_model(files), files.adapter)
    with pytest.raises(SurgeryError):
        adaptsurgery.fold(live_model(files), files.adapter)


REFUSED = {
    "interleaved": (
        {"h.0.self_attention.query_key_value.weight": (18, 6)},
        {"h.0.self_attention.query": (6, 6)}, {}, "interleaved-weight",
    ),
    "codegen's order": (
        {"transformer.h.0.attn.qkv_proj.weight": (18, 6)},
        {"transformer.h.0.attn.q_proj": (6, 6)}, {"model_type": "codegen"}, "interleaved-weight",
    ),
    "gpt-oss's experts": (
        {f"{STACK}.gate_up_proj": (3, 6, 20), f"{STACK}.down_proj": (3, 10, 6)},
        {f"{STACK}.1.gate_proj": (10, 6)}, {"model_type": "gpt_oss"}, "interleaved-weight",
    ),
    "no such module": (linears("model.layers.0.a"), {"model.layers.0.b": (8, 6)}, {}, "unknown"),
    "one of several": (
        linears("model.layers.0.a", "model.layers.1.a"),
        {"layers.0.a": (8, 6), "layers.0.b": (8, 6)}, {}, "unknown",
    ),
    "two places": (linears("a.layers.0.x", "b.layers.0.x"), {"layers.0.x": (8, 6)}, {}, "ambiguous"),
    "other widths": (PHI3, {f"{ATTENTION}.q_proj": (9, 6)}, {}, "fused-cuts"),
    "other inputs": (PHI3, {f"{ATTENTION}.q_proj": (8, 5)}, {}, "shape"),
    "heads of another size": (PHI3, {f"{ATTENTION}.q_proj": (8, 6), f"{ATTENTION}.k_proj": (2, 6)},
                              {}, "fused-cuts"),
    "twice": (
        linears("model.layers.0.a"),
        {"model.layers.0.a": (8, 6), "model.language_model.layers.0.a": (8, 6)}, {}, "duplicate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_job_can_place(tmp_path: Path, name: str) -> None:
    base, modules, config, code = REFUSED[name]
    case = Case(base, {path: ([], shape) for path, shape in modules.items()}, config)
    files = written(case, tmp_path)
    out = tmp_path / "out"
    jobs: list[Any] = [
        lambda: adaptsurgery.inspect(files.adapter, base=files.base),
        lambda: adaptsurgery.convert(files.adapter, out, "peft", base=files.base),
        lambda: adaptsurgery.resize(files.adapter, out, rank=1, base=files.base),
        lambda: adaptsurgery.combine([f"{files.adapter}=2"], out, base=files.base),
        lambda: adaptsurgery.merge(files.base, [files.adapter], out),
    ]
    for number, job in enumerate(jobs):
        with pytest.raises(SurgeryError) as caught:
            job()
        if number < len(jobs) - 1 or code != "unknown":
            assert code in caught.value.code, caught.value
        assert not out.exists()


def test_two_names_of_one_weight_in_one_adapter(tmp_path: Path) -> None:
    path = f"{MOE}.mlp.experts.0.gate_proj"
    other = f"{MOE}.block_sparse_moe.experts.0.w1"
    case = Case(linears(path), {path: ([], (8, 6)), other: ([], (8, 6))})
    files = written(case, tmp_path)
    for job in (adaptsurgery.inspect, adaptsurgery.load):
        with pytest.raises(SurgeryError, match="adapted twice"):
            job(files.adapter, base=files.base)
    with pytest.raises(SurgeryError, match="adapted twice"):
        adaptsurgery.merge(files.base, [files.adapter], tmp_path / "out")


class _Block(torch.nn.Module):
    def __init__(self, files: Files) -> None:
        super().__init__()
        self.model = live_model(files).get_submodule("model")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self.model.get_submodule("layers.0")
        q, k, v = layer.self_attn.qkv_proj(x).split((8, 4, 4), -1)
        gate, up = layer.mlp.gate_up_proj(x + layer.self_attn.o_proj(q)).chunk(2, -1)
        return torch.as_tensor(layer.mlp.down_proj(gate * up) + k.sum() * v.sum())


@pytest.mark.parametrize("bare", [False, True])
def test_rewrite_an_exported_program(tmp_path: Path, bare: bool) -> None:
    places = {p.removeprefix("model." if bare else ""): at for p, at in SPLIT_ON_FUSED.items()}
    files = written(Case(PHI3, places), tmp_path)
    block, x = _Block(files).eval(), torch.randn(5, 6)
    torch.export.save(torch.export.export(block, (x,)), tmp_path / "block.pt2")
    out = tmp_path / "adapted.pt2"
    adaptsurgery.rewrite(tmp_path / "block.pt2", out, adapter=files.adapter)
    after = files.merged()
    for name, parameter in block.named_parameters():
        parameter.data = torch.from_numpy(after[name].astype(np.float32))
    wanted = block(x)
    got = torch.export.load(out).module()(x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
