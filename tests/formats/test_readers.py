"""What the rows of the readers say is what the real loaders do: of goldens, and of awkward files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lycoris import create_lycoris_from_weights
from lycoris.kohya import create_network_from_weights
from safetensors.torch import save_file
from test_matrix import GOLDEN, cells, golden, parsed
from torch import nn

from adaptsurgery import convert, inspect
from adaptsurgery.cli import run
from adaptsurgery_formats import FORMATS, WRITABLE, AdapterFile, Tensor
from adaptsurgery_formats.names import flatten, table
from adaptsurgery_formats.readers import READERS, Verdict, readers_of
from adaptsurgery_formats.resolve import find_modules
from adaptsurgery_formats.tensors import Literal

logging.getLogger("LyCORIS").setLevel(logging.CRITICAL)
Shapes = dict[str, list[int]]
CELLS = [(name, variant) for name in FORMATS for variant in cells(name)]


class Block(nn.Module):
    """The layers that the goldens adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.fc = nn.Linear(16, 32)
        self.conv_in = nn.Conv2d(16, 32, 3)
        self.point = nn.Conv2d(32, 16, 1)
        self.norm = nn.LayerNorm(16)


def model() -> nn.Module:
    return nn.ModuleDict({"blk_0": Block()})


def weights(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Numbers for a file; the flag of an (IA)³ says the side that its factors are of."""
    held = {key: torch.full(shape, 0.5) for key, shape in shapes.items()}
    inputs = {"fc": 16, "conv_in": 16, "point": 32}
    for key in [key for key in held if key.endswith(".on_input")]:
        name = key.removesuffix(".on_input")
        layer = next(n for n in inputs if name.endswith(n))
        held[key] = torch.tensor(int(held[f"{name}.weight"].numel() == inputs[layer]))
    return held


def peft_loads(shapes: Shapes, config: dict[str, Any] | None, folder: Path) -> bool:
    """Whether PEFT loads a folder with no key missing and none left over."""
    save_file(weights(shapes), folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    try:
        adapted = peft.PeftModel.from_pretrained(model(), str(folder))
    except ValueError:
        return False
    result = adapted.load_adapter(str(folder), "again")
    return not result.unexpected_keys and not any(".again" in k for k in result.missing_keys)


def lycoris_loads(shapes: Shapes) -> str:
    """How LyCORIS loads a file: "whole", "part", "nothing"; its kohya class where the keys are so."""
    given = weights(shapes)
    try:
        if any(key.startswith("lora_") for key in shapes):
            made = create_network_from_weights(1.0, "", None, None, model(), given)
            modules = (made[0] if isinstance(made, tuple) else made).unet_loras
        else:
            modules = create_lycoris_from_weights(1.0, "", model(), given)[0].loras
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return "nothing"
    read = {
        f"{m.lora_name}.{k}": tuple(v.shape) for m in modules for k, v in m.state_dict().items()
    }
    left = {key for key, shape in shapes.items() if read.get(key) not in (tuple(shape), ())}
    return "whole" if not left else "part" if len(left) < len(shapes) else "nothing"


@pytest.mark.parametrize(("name", "variant"), CELLS)
def test_peft_loads_what_is_told(name: str, variant: str, tmp_path: Path) -> None:
    cell = cells(name)[variant]
    loads = peft_loads(cell["tensors"], cell.get("config"), tmp_path)
    assert readers_of(parsed(name, variant), [golden(name, variant)])["peft"].how == (
        "whole" if loads else "nothing"
    )


@pytest.mark.parametrize(("name", "variant"), CELLS)
def test_lycoris_loads_what_is_told(name: str, variant: str) -> None:
    verdict = readers_of(parsed(name, variant), [golden(name, variant)])["lycoris"]
    assert verdict.how == lycoris_loads(cells(name)[variant]["tensors"])


# networks/lora.py of sd-scripts at the row's commit, run over these goldens: what it loads with no
# key missing and none left over. The rest it leaves out, or raises on (the tucker core).
SD_SCRIPTS = {("kohya", "lora"): "whole"}


@pytest.mark.parametrize(("name", "variant"), CELLS)
def test_sd_scripts_loads_a_plain_lora(name: str, variant: str) -> None:
    verdict = readers_of(parsed(name, variant), [golden(name, variant)])["sd-scripts"]
    assert verdict.how == SD_SCRIPTS.get((name, variant), "nothing")


# --- awkward files, held against LyCORIS ----------------------------------------------------------

LORA: Shapes = {"fc.lora_up.weight": [32, 2], "fc.lora_down.weight": [2, 16], "fc.alpha": []}
LOHA: Shapes = {
    **{f"point.hada_w{n}_a": [2, 16] for n in "12"},
    **{f"point.hada_w{n}_b": [2, 32] for n in "12"},
}
AWKWARD: dict[str, Shapes] = {
    "no-alpha": {key: LORA[key] for key in ("fc.lora_up.weight", "fc.lora_down.weight")},
    "alpha-of-one": {**LORA, "fc.alpha": [1]},
    "dora-per-output": {**LORA, "fc.dora_scale": [32, 1]},
    "dora-per-input": {**LORA, "fc.dora_scale": [1, 16]},
    "bias-alone": {"fc.diff_b": [32]},
    "bias-beside": {**LORA, "fc.diff_b": [32]},
    "bias-alone-beside-another": {**LORA, "conv_in.diff_b": [32]},
    "weight-alone": {"fc.diff": [32, 16]},
    "norm-weight-alone": {"norm.w_norm": [16]},
    "norm-bias-alone": {"norm.b_norm": [16]},
    "core-of-a-pointwise-lora": {
        "point.lora_up.weight": [16, 2, 1, 1],
        "point.lora_down.weight": [2, 32, 1, 1],
        "point.lora_mid.weight": [2, 2, 1, 1],
        "point.alpha": [],
    },
    "core-of-a-pointwise-loha": {
        **LOHA, "point.hada_t1": [2, 2, 1, 1], "point.hada_t2": [2, 2, 1, 1], "point.alpha": [],
    },
    "flat-up-of-a-convolution": {
        "conv_in.lora_up.weight": [32, 2],
        "conv_in.lora_down.weight": [2, 16, 3, 3],
        "conv_in.alpha": [],
    },
    "flat-lora-of-a-pointwise": {
        "point.lora_up.weight": [16, 2], "point.lora_down.weight": [2, 32], "point.alpha": [],
    },
    "lokr-w2b-with-kernel": {
        "conv_in.lokr_w1": [4, 4], "conv_in.lokr_w2_a": [8, 1],
        "conv_in.lokr_w2_b": [1, 4, 3, 3], "conv_in.alpha": [],
    },
    "lokr": {
        "conv_in.lokr_w1": [4, 4], "conv_in.lokr_w2_a": [8, 1],
        "conv_in.lokr_w2_b": [1, 36], "conv_in.alpha": [],
    },
    "lokr-full-without-alpha": {"fc.lokr_w1": [4, 4], "fc.lokr_w2": [8, 4]},
    "lokr-cut-otherwise": {"fc.lokr_w1": [8, 2], "fc.lokr_w2": [4, 8], "fc.alpha": []},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's own checkpoint."""
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(dict(model().state_dict()), path)
    return path


def file_of(shapes: Shapes) -> AdapterFile:
    return AdapterFile(
        {k: Tensor("F32", tuple(s), (Literal(weights({"": s})[""].numpy().tobytes()),))
         for k, s in shapes.items()}
    )  # fmt: skip


@pytest.mark.parametrize("case", AWKWARD)
@pytest.mark.parametrize("prefix", ["lycoris_blk_0_", "lora_unet_blk_0_"])
def test_lycoris_loads_awkward_files_as_is_told(
    case: str, prefix: str, base: Path, tmp_path: Path
) -> None:
    shapes = {prefix + key: shape for key, shape in AWKWARD[case].items()}
    save_file(weights(shapes), tmp_path / "a.safetensors")
    verdict = inspect(tmp_path / "a.safetensors", base=base).readers["lycoris"]
    assert verdict["how"] == lycoris_loads(shapes), verdict["reasons"]
    assert sum(reason["modules"] for reason in verdict["reasons"]) <= verdict["modules"]


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_transformer_", "lora_prior_unet_"])
def test_lycoris_leaves_out_another_prefix(prefix: str) -> None:
    shapes = {f"{prefix}blk_0_{key}": shape for key, shape in LORA.items()}
    assert lycoris_loads(shapes) == "nothing"
    file = file_of(shapes)
    told = readers_of(FORMATS["kohya"].parse([file]), [file])
    if prefix != "lora_te_":  # there is a text encoder that it is for
        assert told["lycoris"].how == told["sd-scripts"].how == "nothing"
        assert told["lycoris"].reasons[0].fate == "drops"


# --- names and places ---------------------------------------------------------------------------


def told_of(model_name: str, modules: dict[str, tuple[int, int]]) -> dict[str, Verdict]:
    """The verdicts on a LoRA of kohya's keys for modules (o, i) of a bundled model."""
    shapes: Shapes = {}
    for name, (out, into) in modules.items():
        dims = [1, 1] if "conv_in" in name else []
        shapes |= {
            f"{name}.lora_up.weight": [out, 1, *dims],
            f"{name}.lora_down.weight": [1, into, *[3 for _ in dims]],
            f"{name}.alpha": [],
        }
    return verdicts(file_of(shapes), model_name)


def verdicts(file: AdapterFile, model_name: str) -> dict[str, Verdict]:
    names = table(model_name)
    return readers_of(find_modules(FORMATS["kohya"].parse([file]), names), [file], names)


DIFFUSERS = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
LDM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def test_sd_scripts_alone_renames_sdxl() -> None:
    """Its UNet goes by LDM's names; from diffusers' it turns the keys round, and LyCORIS does not."""
    told = told_of("sdxl", {DIFFUSERS: (640, 640)})
    assert (told["sd-scripts"].how, told["lycoris"].how) == ("whole", "nothing")
    told = told_of("sdxl", {LDM: (640, 640)})
    assert (told["sd-scripts"].how, told["lycoris"].how) == ("whole", "whole")


def test_ldm_names_are_nobodys_in_sd15() -> None:
    told = told_of("sd15", {LDM: (640, 640)})
    assert (told["sd-scripts"].how, told["lycoris"].how) == ("nothing", "nothing")
    assert told["lycoris"].reasons[0].what == "modules that its model calls otherwise"


def test_sd_scripts_leaves_out_layers_that_it_never_adapts() -> None:
    told = told_of("sd15", {DIFFUSERS: (640, 640), "lora_unet_conv_in": (320, 4)})
    assert told["lycoris"].how == "whole"
    verdict = told["sd-scripts"]
    assert (verdict.how, verdict.read, verdict.modules) == ("part", 1, 2)
    assert (verdict.reasons[0].fate, verdict.reasons[0].example) == ("drops", "unet.conv_in")


def test_the_second_text_encoder_of_flux_has_two_prefixes() -> None:
    """T5 is lora_te3 to sd-scripts, and to LyCORIS, which counts, lora_te2."""
    q = "encoder_block_0_layer_0_SelfAttention_q"
    told = told_of("flux", {f"lora_te3_{q}": (4096, 4096)})
    assert (told["sd-scripts"].how, told["lycoris"].how) == ("whole", "nothing")
    told = told_of("flux", {f"lora_te2_{q}": (4096, 4096)})
    assert (told["sd-scripts"].how, told["lycoris"].how) == ("nothing", "whole")


@pytest.mark.parametrize(
    ("model_name", "left"),
    [("sd15", 4), ("sd2", 4), ("sdxl", 6)],
)
def test_how_many_layers_sd_scripts_adapts(model_name: str, left: int) -> None:
    """Counted in its own UNets' classes: all Linear and Conv2d but these."""
    component = table(model_name).components["unet"]
    paths = component.native if component.kohya_naming == "native" else component.modules
    shapes = {p: component.shape(p, component.kohya_naming) for p in paths}
    adaptable = {p: s for p, s in shapes.items() if s is not None and len(s) > 1}
    file: Shapes = {}
    for path, shape in adaptable.items():
        name, ones = f"lora_unet_{flatten(path)}", [1] * (len(shape) - 2)
        file[f"{name}.lora_up.weight"] = [shape[0], 1, *ones]
        file[f"{name}.lora_down.weight"] = [1, *shape[1:]]
    verdict = verdicts(file_of(file), model_name)["sd-scripts"]
    assert verdict.modules - verdict.read == left


# --- what convert writes, and what inspect tells -----------------------------------------------


FAILS_AT_ITS_OWN = (
    "Kronecker factors cut otherwise than it guesses",
    "(IA)³, which it writes and makes no module of",
)


@pytest.mark.parametrize("to", WRITABLE)
@pytest.mark.parametrize(("name", "variant"), [c for c in CELLS if c[0] in WRITABLE])
def test_what_convert_writes_its_reader_reads(
    name: str, variant: str, to: str, base: Path, tmp_path: Path
) -> None:
    """Whole, but for what LyCORIS's own loader fails at by its own fault, which the report notes."""
    cell = cells(name)[variant]
    source = tmp_path / "in"
    source.mkdir()
    save_file(weights(cell["tensors"]), source / "adapter_model.safetensors")
    if "config" in cell:
        (source / "adapter_config.json").write_text(json.dumps(cell["config"]), "utf-8")
    else:
        source = source / "adapter_model.safetensors"
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    stated = inspect(source, base=base).convertible[to]
    if stated["how"] == "refused":
        return
    report = convert(source, out, to, base=base)
    own = {n: v for n, v in inspect(out, base=base).readers.items() if to in READERS[n].layouts}
    if any(verdict["how"] == "whole" for verdict in own.values()):
        return
    assert to != "peft"
    why = [reason["what"] for reason in own["lycoris"]["reasons"]]
    assert len(why) == 1 and why[0] in FAILS_AT_ITS_OWN, (own, report.notes)
    assert to == "kohya" or any(note.code == "lycoris-loader" for note in report.notes)


def test_inspect_prints_who_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "a.safetensors")
    save_file(
        weights({f"lora_unet_blk_0_{key}": s for key, s in AWKWARD["bias-beside"].items()}), path
    )
    assert run(["inspect", path]) == 0
    printed = capsys.readouterr().out
    assert "read by     PEFT: no, it takes PEFT (adapter_config.json" in printed
    assert "LyCORIS, 1 of 2 modules: leaves out a bias difference beside another" in printed
    assert "sd-scripts, 1 of 2 modules: leaves out modules with a dense difference" in printed
    assert run(["inspect", path, "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)["readers"]["lycoris"]
    assert (verdict["how"], verdict["read"], verdict["modules"]) == ("part", 1, 2)


def test_the_readme_shows_the_readers() -> None:
    text = (GOLDEN.parent / "README.md").read_text("utf-8")
    assert rows() in text, f"put this into formats/README.md:\n{rows()}"


def rows() -> str:
    lines = [
        "| reader | checked | layouts | alpha | reads otherwise than meant |",
        "|---" * 5 + "|",
    ]
    for row in READERS.values():
        only = [f"drops all but {', '.join(row.algorithms)}"] if row.algorithms else []
        limits = "; ".join([*only, *(f"{limit.fate}: {limit.what}" for limit in row.limits)]) or "–"
        layouts = ", ".join(row.layouts)
        lines.append(f"| {row.title} | {row.checked} | {layouts} | {row.alpha} | {limits} |")
    return "\n".join(lines)
