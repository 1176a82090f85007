"""Every format × every algorithm and variant: a golden of a real peer, or a named refusal.

A golden parses with no key left over and is spelled again key for key, byte for byte. A new format
or a new algorithm fails here until its cells are filled (tools/goldens.py dumps goldens).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaptsurgery_formats import FORMATS, AdapterFile, AdapterState, ModuleState, Tensor
from adaptsurgery_formats.detect import detect
from adaptsurgery_formats.errors import SurgeryError
from adaptsurgery_formats.state import SLOTS
from adaptsurgery_formats.tensors import Literal, scalar

GOLDEN = Path(__file__).parents[2] / "formats" / "golden"
# Variants of each algorithm, and a test that a parsed adapter has one of it.
VARIANTS: dict[str, list[str]] = {
    "lora": ["lora", "lora-tucker", "lora-rslora", "lora-dora", "lora-embedding", "lora-bias"],
    "loha": ["loha", "loha-tucker", "loha-dora"],
    "lokr": ["lokr", "lokr-tucker", "lokr-both", "lokr-full", "lokr-dora"],
    "hra": ["hra", "hra-gs"],
    "ia3": ["ia3", "ia3-input"],
    "full": ["full"],
    "norm": ["norm"],
}
CELLS = [(name, v) for name in FORMATS for variants in VARIANTS.values() for v in variants]

# (format, variant) → (code, from whose golden it is refused). STEP: written after an exact
# rewriting that it names. FOLDED: another variant says the same. READ: no writer makes such files.
STEP, FOLDED, READ = "step", "folded", "read-only"
_LYCORIS_FAMILY = {
    "lora-rslora": (FOLDED, "lora"),
    "lora-embedding": ("no-embedding", "peft"),
    "lora-bias": ("no-lora-bias", "peft"),
    "hra": ("no-hra", "peft"),
    "hra-gs": ("no-hra", "peft"),
}
_NOT_LORA = ("loha", "lokr", "hra", "ia3", "full", "norm")
STATED: dict[tuple[str, str], tuple[str, str]] = {
    ("peft", "lora-tucker"): (STEP, "lycoris"),
    ("peft", "loha-dora"): ("no-dora", "lycoris"),
    ("peft", "lokr-dora"): ("no-dora", "lycoris"),
    ("peft", "full"): ("no-full", "lycoris"),
    ("peft", "norm"): ("no-norm", "lycoris"),
    **{(f, v): said for f in ("lycoris", "kohya") for v, said in _LYCORIS_FAMILY.items()},
    **{("comfyui", v): (READ, "") for v in ("lora-rslora", "lora-embedding", "lora-bias")},
    **{("diffusers", v): (READ, "") for v in ("lora-tucker", "lora-rslora", "lora-embedding")},
    ("diffusers", "lora-bias"): (READ, ""),
    **{("diffusers", v): ("refuses", "") for a in _NOT_LORA for v in VARIANTS[a]},
    **{("comfyui", v): ("refuses", "") for v in VARIANTS["hra"]},
    **{("comfyui", v): (READ, "") for v in VARIANTS["ia3"]},
}


def cells(name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(
        (GOLDEN / f"matrix-{name}.json").read_text("utf-8")
    )["cells"]
    return found


def golden(name: str, variant: str) -> AdapterFile:
    """The cell with numbered bytes in float32: no two tensors are the same."""
    cell = cells(name)[variant]
    tensors = {}
    for i, (key, shape) in enumerate(cell["tensors"].items()):
        number = (i + 1).to_bytes(2, "little") + b"\x00\x3f"  # a float of about a half
        count = 1
        for n in shape:
            count *= n
        tensors[key] = Tensor("F32", tuple(shape), (Literal(number * count),))
        if key.endswith(".on_input"):
            tensors[key] = scalar(float(variant == "ia3-input"), "I64")
    return AdapterFile(tensors, config=cell.get("config"), where=f"{name} {variant}")


def parsed(name: str, variant: str) -> AdapterState:
    return FORMATS[name].parse([golden(name, variant)])


def algorithm_of(variant: str) -> str:
    return next(a for a, variants in VARIANTS.items() if variant in variants)


def is_variant(module: ModuleState, variant: str) -> bool:
    t = module.tensors
    return {
        "tucker": module.tucker,
        "dora": "magnitude" in t,
        "embedding": module.kind == "embedding",
        "bias": "up_bias" in t,
        "both": "w1_a" in t,
        "full": "w1" in t and "w2" in t,
        "gs": bool(module.options.get("apply_gs")),
        "rslora": "sqrt" in module.rule,
        "input": bool(module.options.get("on_input")),
    }.get(variant.partition("-")[2], True)


def test_each_format_and_algorithm_has_its_cells() -> None:
    assert set(VARIANTS) == set(SLOTS)
    for name, variant in CELLS:
        has, stated = variant in cells(name), (name, variant) in STATED
        assert has != stated, f"{name} × {variant}: {'both' if has else 'neither'}"
    extra = {(n, v) for n in FORMATS for v in cells(n)} - set(CELLS)
    assert not extra, f"goldens that no cell asks for: {extra}"


@pytest.mark.parametrize(("name", "variant"), [c for c in CELLS if c not in STATED])
def test_a_golden_parses_whole_and_is_spelled_again(name: str, variant: str) -> None:
    file = golden(name, variant)
    assert detect(file.tensors, file.where).name == name
    state = parsed(name, variant)
    assert {m.algorithm for m in state.modules} == {algorithm_of(variant)}
    assert any(is_variant(m, variant) for m in state.modules)
    used = [k for m in state.modules for k in m.keys]
    assert sorted(used) == sorted(file.tensors)
    fmt = FORMATS[name]
    if fmt.spell is None:
        with pytest.raises(SurgeryError) as refusal:
            fmt.plan(state, None)
        assert refusal.value.code == "read-only-layout"
        return
    assert fmt.plan(state, None) == []
    (again,) = fmt.spell(state, None)
    assert {k: (t.dtype, t.shape, t.read()) for k, t in again.tensors.items()} == {
        k: (t.dtype, t.shape, t.read()) for k, t in file.tensors.items()
    }
    assert again.config == file.config


@pytest.mark.parametrize(("name", "variant"), STATED)
def test_a_refusal_is_as_stated(name: str, variant: str) -> None:
    code, source = STATED[name, variant]
    fmt = FORMATS[name]
    if code == "refuses":
        assert algorithm_of(variant) in fmt.refuses
    elif code == READ:
        assert fmt.spell is None
    elif code == STEP:
        assert fmt.plan(parsed(source, variant), None)
    elif code == FOLDED:
        assert source in cells(name)
    else:
        with pytest.raises(SurgeryError) as refusal:
            fmt.plan(parsed(source, variant), None)
        assert refusal.value.code == code


def test_the_readme_shows_the_matrix() -> None:
    """formats/README.md has a row per variant and a column per format, as the cells are."""
    text = (GOLDEN.parent / "README.md").read_text("utf-8")
    assert table() in text, f"put this into formats/README.md:\n{table()}"


def table() -> str:
    lines = ["| | " + " | ".join(FORMATS) + " |", "|---" * (len(FORMATS) + 1) + "|"]
    for variants in VARIANTS.values():
        for variant in variants:
            said = [_said(name, variant) for name in FORMATS]
            lines.append(f"| {variant} | " + " | ".join(said) + " |")
    return "\n".join(lines)


def _said(name: str, variant: str) -> str:
    if (name, variant) not in STATED:
        return "reads, writes" if FORMATS[name].spell else "reads"
    code = STATED[name, variant][0]
    shown = {STEP: "writes, rewritten", FOLDED: "in alpha", READ: "–", "refuses": "–"}
    return shown.get(code, f"`{code}`")
