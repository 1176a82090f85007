"""The README's examples, run as they stand there: what they print and return.

Those of the first screen on a cut of SDXL and a small vision transformer, the others in the folder that
the quickstart leaves. Numbers are not compared: they come of training, which differs between machines.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import adaptsurgery
from adaptsurgery.cli import run
from adaptsurgery.quickstart import quickstart
from adaptsurgery.quickstart.tiny import TinyModel

README = (Path(__file__).resolve().parent.parent / "README.md").read_text("utf-8")
Weights = dict[str, torch.Tensor]
FIRST, REST = README.split("\n## ", 1)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "try"
    assert quickstart(folder, small=True).facts["failed"] == []
    return folder


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def examples(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each ``adaptsurgery`` command of a part of the README, and the lines that stand under it."""
    for block in blocks("console", text):
        for typed in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, *shown = typed.splitlines()
            if command.startswith("adaptsurgery "):
                yield command, shown


def wording(line: str) -> str:
    """A line without its numbers, and a path without the folders before the last."""
    sized = re.sub(r"\d[\d.]* [kMG]?B\b", "# bytes", re.sub(r"/\S*/try/", "/…/try/", line))
    return re.sub(r"\d[\d.,]*(e-\d+)?", "#", sized).rstrip(" …")


def test_the_commands(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(kept)
    for command, shown in examples(REST):
        code = run(shlex.split(command)[1:])
        out, err = capsys.readouterr()
        assert code == int(any(line.startswith("error[") for line in shown)), command + err
        told = [wording(line) for line in (out + err).splitlines()]
        for line in map(wording, shown):
            row = line.startswith(("  rounded", "  lossy"))  # the worst module may be another one
            words = line.split()[0] if row else line
            assert any(words in t if row else t.startswith(words) for t in told), (command, line)
        if "…" not in shown:
            assert len(told) == len(shown) or "--quiet" in command, command


# -- The first screen ------------------------------------------------------------------------------


def test_a_file_and_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On SDXL's own names; what comes back is held against the definition, in float64."""
    monkeypatch.chdir(tmp_path)
    base, style = sdxl_files()
    for command, _ in examples(FIRST):
        assert run(shlex.split(command)[1:]) == 0, command
    again = load_file("style-kohya.safetensors")
    assert again.keys() == style.keys() and all(torch.equal(again[k], style[k]) for k in style)
    other = load_file("other.safetensors")
    merged, back = load_file("merged.safetensors"), load_file("back.safetensors")
    for key, weight in base.items():
        flat = "lora_unet_" + key.removeprefix(PREFIX).removesuffix(".weight").replace(".", "_")
        up, down = (style[f"{flat}.lora_{n}.weight"].double() for n in ("up", "down"))
        wanted = weight.double() + 0.8 * (ALPHA / RANK) * (up @ down)
        wanted += (
            0.5
            * (ALPHA / RANK)
            * (
                other[f"{flat}.lora_up.weight"].double()
                @ other[f"{flat}.lora_down.weight"].double()
            )
        )
        assert (merged[key].double() - wanted).abs().max() < 2e-3 * wanted.abs().max(), key
        assert (back[key] - weight).abs().max() < 4e-3 * weight.abs().max(), key
    assert adaptsurgery.load("extracted.safetensors")


def test_a_diffusers_pipeline_takes_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sdxl_files()
    assert run(["convert", "style.safetensors", "--to", "peft", "-o", "style/", "--quiet"]) == 0
    pipe = SimpleNamespace(unet=small_unet())
    plain = pipe.unet.get_submodule(DIFFUSERS_NAME).weight.clone()
    [line] = re.findall(r"`(peft\.PeftModel\.\S+ \S+)`", FIRST)
    eval(line, {"peft": peft, "pipe": pipe})
    layer = pipe.unet.get_submodule(DIFFUSERS_NAME)
    style = load_file("style.safetensors")
    flat = f"lora_unet_{BLOCK.replace('.', '_')}attn1_to_q"
    wanted = style[f"{flat}.lora_up.weight"].float() @ style[f"{flat}.lora_down.weight"].float()
    layer.merge()
    assert torch.allclose(layer.weight - plain, wanted * ALPHA / RANK, atol=1e-5)


def test_a_lokr_on_a_vision_transformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is merged at last says what the trained model says."""
    monkeypatch.chdir(tmp_path)
    [code] = blocks("python", FIRST)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=16, patch_size=8,
    )  # fmt: skip
    [name] = re.findall(r'ForImageClassification\.from_pretrained\("(.*)"\)', code)
    transformers.ViTForImageClassification(config).save_pretrained(name)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])
    step = "torch.optim.SGD(p for p in model.parameters() if p.requires_grad).step()"
    loop = f"{step}\nanswer = model.eval()(images).logits\n"
    code = code.replace("model.save_pretrained", loop + "model.save_pretrained")
    names: dict[str, Any] = {"images": images, "labels": labels, "torch": torch}
    exec(compile(code, "README.md", "exec"), names)
    assert torch.allclose(names["plain"](images).logits, names["answer"], atol=1e-5)
    assert type(names["plain"]) is transformers.ViTForImageClassification


RANK, ALPHA = 8, 4.0
PREFIX = "model.diffusion_model."
BLOCK = "input_blocks.4.1.transformer_blocks.1."  # which no other bundled table has
DIFFUSERS_NAME = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"


def sdxl_files() -> tuple[Weights, Weights]:
    """Four attention weights of SDXL under its own names, a fine-tune, and two kohya LoRAs of them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    names = [f"{BLOCK}attn1.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")]
    base = {f"{PREFIX}{name}.weight": random(640, 640).half() for name in names}
    save_file(base, "sdxl.safetensors")
    change = {k: 0.1 * random(640, RANK) @ random(RANK, 640) for k in base}
    save_file({k: (w + change[k]).half() for k, w in base.items()}, "tuned.safetensors")
    adapters = []
    for file in ("style.safetensors", "other.safetensors"):
        adapter: Weights = {}
        for name in names:
            flat = "lora_unet_" + name.replace(".", "_")
            adapter[f"{flat}.lora_up.weight"] = random(640, RANK).half()
            adapter[f"{flat}.lora_down.weight"] = random(RANK, 640).half()
            adapter[f"{flat}.alpha"] = torch.tensor(ALPHA).half()
        save_file(adapter, file)
        adapters.append(adapter)
    return base, adapters[0]


def small_unet() -> diffusers.UNet2DConditionModel:
    """SDXL's kind of UNet, cut to two blocks, with its second block's width."""
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 640), cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1, transformer_layers_per_block=2, attention_head_dim=(1, 10), use_linear_projection=True,
        mid_block_type=None,
    )  # fmt: skip


# -- The library -----------------------------------------------------------------------------------


def test_the_library(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kept)
    library, live, *_ = blocks("python", REST)
    names: dict[str, object] = {}
    with redirect_stdout(StringIO()) as out:
        exec(compile(library, "README.md", "exec"), names)
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", library, re.M)
    assert list(map(wording, out.getvalue().splitlines())) == list(map(wording, promised))
    model = TinyModel()
    model.load_state_dict(before := load_file("model.safetensors"))
    exec(compile(live, "README.md", "exec"), {**names, "model": model})
    after = model.state_dict()
    assert max(float((after[k] - before[k]).abs().max()) for k in before) < 1e-6
