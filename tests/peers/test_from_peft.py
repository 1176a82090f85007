"""Files of the real PEFT → LyCORIS and kohya: LyCORIS's own loader computes what PEFT did.

And PEFT → kohya → LyCORIS → PEFT: the same tensors bit for bit, and a config that means the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peer_nets as nets
import pytest
import torch
from peft import HRAConfig, LoHaConfig, LoKrConfig, LoraConfig
from safetensors.torch import load_file, save_file

from adaptsurgery import SurgeryError, convert, verify

CONFIGS = {"lora": LoraConfig, "loha": LoHaConfig, "lokr": LoKrConfig, "hra": HRAConfig}
# A regex in full, suffixes, exclusions and layers: how PEFT's users target.
ALL = ["conv_in", "mid_wide", "point", "seq", "fc_in", "fc_out"]
FLAT = ["conv_in", "mid_wide", "point", "fc_in", "fc_out"]


@dataclass(frozen=True)
class Case:
    algo: str
    options: dict[str, Any] = field(default_factory=dict)
    net: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    exact: bool = True  # False: the scale of a full/full LoKr is folded into w1 for good
    loads: bool = True  # False: LyCORIS's loader guesses another cut, see test_faults

    def config(self) -> Any:
        given = {"target_modules": ALL, **self.options}
        if self.algo != "hra":
            given.setdefault("init_lora_weights" if self.algo == "lora" else "init_weights", False)
        return CONFIGS[self.algo](**given)

    def __str__(self) -> str:
        shown = [f"{k}={v}" for k, v in (self.options | self.net).items()]
        return "-".join([self.algo, *shown, str(self.dtype).removeprefix("torch.")])[:120]


R = {"r": 4, "lora_alpha": 6}
A = {"r": 4, "alpha": 6}
PATTERNS = {"rank_pattern": {"fc_in": 3, r".*\.seq": 2, "^blk_0\\.conv_in$": 5}}
TWO_D = {"conv1d": False}
EVEN = {"even": True}
EVEN_2D = {"even": True, "conv1d": False}

CASES = [
    Case("lora", R),
    Case("lora", R, dtype=torch.bfloat16),
    Case("lora", R | {"use_rslora": True}),
    Case("lora", R | {"use_dora": True}),
    Case("lora", R | PATTERNS | {"alpha_pattern": {"blk_0.fc_in": 7, "(seq|point)": 1}}),
    Case("lora", R | PATTERNS | {"use_rslora": True, "alpha_pattern": {"conv_in": 2}}),
    Case("lora", R | {"target_modules": r"blk_\d+\.(fc_in|conv.*)"}),
    Case("lora", R | {"target_modules": "all-linear"}),
    Case("lora", R | {"target_modules": ["fc_in", "blk_0.fc_out"], "exclude_modules": ["fc_in"]}),
    Case("loha", A),
    Case("loha", A | {"use_effective_conv2d": True}),
    Case("loha", A | PATTERNS | {"alpha_pattern": {"fc_out": 9}}, dtype=torch.float16),
    Case("lokr", A | {"target_modules": FLAT}, EVEN_2D, exact=False),
    Case("lokr", {"r": 3, "alpha": 3}, EVEN),
    Case("lokr", {"r": 3, "alpha": 5, "use_effective_conv2d": True}, EVEN, loads=False),
    Case("lokr", {"r": 3, "alpha": 5, "decompose_both": True, "decompose_factor": 8}, EVEN),
    Case("lokr", {"r": 1, "alpha": 5, "decompose_both": True, "decompose_factor": 4}, EVEN),
    Case("lokr", {"r": 2, "alpha": 5, "rank_pattern": {"fc_in": 3}, "decompose_factor": 4}, EVEN),
    Case("lokr", {"r": 64, "alpha": 64, "decompose_factor": 4}, EVEN_2D),
    Case("lokr", {"r": 64, "alpha": 64, "decompose_both": True}, EVEN_2D),
    Case("lokr", {"r": 32, "alpha": 16, "decompose_factor": 8}, EVEN_2D, exact=False),
]


@pytest.mark.parametrize("case", [c for c in CASES if c.loads], ids=str)
def test_lycoris_computes_what_peft_did(case: Case, tmp_path: Path) -> None:
    model = nets.net(**case.net)
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    source, out = tmp_path / "in", tmp_path / "out.safetensors"
    wanted = nets.write_peft(model, source, case.config(), x, dtype=case.dtype)
    assert nets.apart(model(x).detach(), wanted) > 0.02
    report = convert(source, out, "lycoris", base=base)
    assert report.max_error < 1e-6
    assert nets.apart(nets.lycoris_output(model, out, x), wanted) < nets.TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no-base"])
def test_peft_kohya_lycoris_peft(case: Case, with_base: bool, tmp_path: Path) -> None:
    model = nets.net(**case.net)
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    hops = [
        tmp_path / "in",
        tmp_path / "k.safetensors",
        tmp_path / "l.safetensors",
        tmp_path / "out",
    ]
    wanted = nets.write_peft(model, hops[0], case.config(), x, dtype=case.dtype)
    kohya_base = base if with_base or case.options.get("use_effective_conv2d") else None
    convert(hops[0], hops[1], "kohya", base=kohya_base)
    convert(hops[1], hops[2], "lycoris", base=base)
    convert(hops[2], hops[3], "peft", base=base)
    assert nets.apart(nets.peft_output(model, hops[3], x), wanted) < nets.TOLERANCE
    verify(hops[0], hops[3], base=base)
    if case.exact:
        assert tensors(hops[0]) == tensors(hops[3])
        assert config_of(hops[0]) == config_of(hops[3])


def tensors(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    found = load_file(folder / "adapter_model.safetensors")
    return {
        k: (t.dtype, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        for k, t in found.items()
    }


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    return found


# --- what LyCORIS and kohya cannot hold, and what only PEFT's layout says --------------------------

TEXT = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
HRA = {"r": 4, "target_modules": ["conv_in", "point", "fc_in", "fc_out"], "init_weights": False}


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (LoraConfig(**TEXT, target_modules=["embed_in"]), "no-embedding"),
        (LoraConfig(**TEXT, target_modules=["fc"], lora_bias=True), "no-lora-bias"),
        (
            LoraConfig(**TEXT, target_modules=["fc"], modules_to_save=["fc_again"]),
            "no-modules-to-save",
        ),
        (HRAConfig(r=4, target_modules=["fc"], init_weights=False), "no-hra"),
    ],
    ids=["embedding", "lora_bias", "modules_to_save", "hra"],
)
@pytest.mark.parametrize("to", ["lycoris", "kohya"])
def test_refused_by_name_and_kept_in_peft(config: Any, code: str, to: str, tmp_path: Path) -> None:
    model = nets.text_net()
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    wanted = nets.write_peft(model, tmp_path / "in", config, x)
    with pytest.raises(SurgeryError) as refusal:
        convert(tmp_path / "in", tmp_path / "out.safetensors", to, base=base)
    assert refusal.value.code == code
    for name, given in (("again", base), ("without", None)):
        convert(tmp_path / "in", tmp_path / name, "peft", base=given)
        assert tensors(tmp_path / "in") == tensors(tmp_path / name)
        assert config_of(tmp_path / "in") == config_of(tmp_path / name)
        assert nets.apart(nets.peft_output(model, tmp_path / name, x), wanted) < nets.TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_peft_to_peft_changes_nothing(case: Case, tmp_path: Path) -> None:
    model = nets.net(**case.net)
    nets.write_peft(model, tmp_path / "in", case.config(), nets.inputs(model), dtype=case.dtype)
    convert(tmp_path / "in", tmp_path / "out", "peft")
    assert tensors(tmp_path / "in") == tensors(tmp_path / "out")
    assert config_of(tmp_path / "in") == config_of(tmp_path / "out")


@pytest.mark.parametrize("apply_gs", [False, True], ids=["householder", "gram-schmidt"])
@pytest.mark.parametrize("to", ["lycoris", "peft"])
def test_hra_as_lora_is_exact(apply_gs: bool, to: str, tmp_path: Path) -> None:
    model = nets.net()
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    wanted = nets.write_peft(model, tmp_path / "in", HRAConfig(**HRA, apply_GS=apply_gs), x)
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    convert(tmp_path / "in", out, to, base=base, algorithm="lora")
    read = nets.peft_output if to == "peft" else nets.lycoris_output
    assert nets.apart(read(model, out, x), wanted) < nets.TOLERANCE


@pytest.mark.parametrize("case", [c for c in CASES if c.algo != "lora"], ids=str)
def test_as_lora_computes_the_same_in_lycoris(case: Case, tmp_path: Path) -> None:
    model = nets.net(**case.net)
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    wanted = nets.write_peft(model, tmp_path / "in", case.config(), x, dtype=case.dtype)
    out = tmp_path / "out.safetensors"
    convert(tmp_path / "in", out, "lycoris", base=base, algorithm="lora")
    assert nets.apart(nets.lycoris_output(model, out, x), wanted) < nets.TOLERANCE


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gpt2s_transposed_conv1d(dora: bool, tmp_path: Path) -> None:
    """Its weight is (in, out); the factors are a linear's, and PEFT turns fan_in_fan_out on."""
    model = nets.text_net()
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    given = LoraConfig(**TEXT, target_modules=["c_attn", "fc"], fan_in_fan_out=True, use_dora=dora)
    wanted = nets.write_peft(model, tmp_path / "in", given, x)
    convert(tmp_path / "in", tmp_path / "k.safetensors", "kohya", base=base)
    convert(tmp_path / "k.safetensors", tmp_path / "out", "peft", base=base)
    assert tensors(tmp_path / "in") == tensors(tmp_path / "out")
    assert config_of(tmp_path / "in") == config_of(tmp_path / "out")
    assert nets.apart(nets.peft_output(model, tmp_path / "out", x), wanted) < nets.TOLERANCE
    verify(tmp_path / "k.safetensors", tmp_path / "out", base=base)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_embeddings(dora: bool, tmp_path: Path) -> None:
    model = nets.text_net()
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    given = LoraConfig(**TEXT, target_modules=["embed_in", "fc"], use_dora=dora)
    wanted = nets.write_peft(model, tmp_path / "in", given, x)
    convert(tmp_path / "in", tmp_path / "out", "peft", base=base)
    assert tensors(tmp_path / "in") == tensors(tmp_path / "out")
    assert nets.apart(nets.peft_output(model, tmp_path / "out", x), wanted) < nets.TOLERANCE
    full = {"algorithm": "lora", "rank": 12, "allow_lossy": True}
    convert(tmp_path / "in", tmp_path / "plain", "peft", base=base, **full)
    assert nets.apart(nets.peft_output(model, tmp_path / "plain", x), wanted) < nets.TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["fc", "head"], "layers_to_transform": [1]},
        {"target_modules": ["head"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": r"layers\.[02]\.(fc|head)"},
        {"target_modules": "all-linear", "exclude_modules": r"layers\.1\..*"},
        {"target_modules": ["fc"], "rank_pattern": {"fc": 2, "layers.0.fc": 3}},
        {"target_modules": ["fc"], "rank_pattern": {"^fc": 2, r"layers\.[12]\.fc": 3}},
    ],
    ids=str,
)
def test_targets_round_trip(options: dict[str, Any], tmp_path: Path) -> None:
    model = nets.stack()
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    wanted = nets.write_peft(model, tmp_path / "in", LoraConfig(**TEXT, **options), x)
    convert(tmp_path / "in", tmp_path / "k.safetensors", "kohya", base=base)
    convert(tmp_path / "k.safetensors", tmp_path / "out", "peft", base=base)
    assert tensors(tmp_path / "in") == tensors(tmp_path / "out")
    assert config_of(tmp_path / "in") == config_of(tmp_path / "out")
    assert nets.apart(nets.peft_output(model, tmp_path / "out", x), wanted) < nets.TOLERANCE


@pytest.mark.parametrize("where", [["fc"], ["layers.1.fc"], ["fc", "layers.2.fc"]], ids=str)
def test_a_name_that_is_another_names_tail(where: list[str], tmp_path: Path) -> None:
    """A list would have PEFT adapt ``layers.0.fc`` for ``fc`` too."""
    model = nets.stack()
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    regex = "|".join(w.replace(".", r"\.") for w in where)
    ranks = {"^" + w.replace(".", r"\."): 2 for w in where[1:]}
    given = LoraConfig(**TEXT, target_modules=regex, rank_pattern=ranks)
    wanted = nets.write_peft(model, tmp_path / "in", given, x)
    convert(tmp_path / "in", tmp_path / "k.safetensors", "kohya", base=base)
    weights = load_file(tmp_path / "k.safetensors")
    save_file(weights, tmp_path / "bare.safetensors")  # without the metadata that holds the config
    convert(tmp_path / "bare.safetensors", tmp_path / "out", "peft", base=base)
    assert tensors(tmp_path / "in") == tensors(tmp_path / "out")
    assert nets.apart(nets.peft_output(model, tmp_path / "out", x), wanted) < nets.TOLERANCE
