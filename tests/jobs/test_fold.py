"""Adapters folded into live models, and out again."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from unix import needs

from adaptsurgery.algorithms import HRA, DoRA, LoRA, build
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Update
from adaptsurgery.jobs.fold import fold, unfold
from adaptsurgery_formats.errors import InexactError, NameLookupError, ShapeError, ValueRefused


class Net(nn.Module):
    """A conv net with norms, one layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 4, (1, 3), groups=2, bias=False)
        self.head = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.norm(self.first(x)))
        y: torch.Tensor = self.head(x.mean((2, 3)))
        return y


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)).eval()


def lora(o: int, i: int, **more: Any) -> LoRA:
    return LoRA(torch.randn(o, 2), torch.randn(2, i), scale=0.3, **more)


CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False),
    "loha": peft.LoHaConfig(r=4, alpha=6, init_weights=False),
    "lokr": peft.LoKrConfig(r=2, alpha=6, init_weights=False, decompose_both=True),
    "hra": peft.HRAConfig(r=3, init_weights=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("algorithm", CONFIGS)
def test_a_fold_is_pefts_merge(
    algorithm: str, family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    if family == "gpt2" and algorithm != "lora":
        pytest.skip("PEFT takes no Conv1D there")
    base = (llama() if family == "llama" else gpt2()).to(dtype)
    config = copy.deepcopy(CONFIGS[algorithm])
    names = ["q_proj", "v_proj", "down_proj"] if family == "llama" else ["c_attn", "c_proj"]
    config.target_modules = set(names)
    adapted = peft.get_peft_model(copy.deepcopy(base), config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    mine = copy.deepcopy(base)
    report = fold(mine, tmp_path / "adapter")
    assert len(report.rows) == sum(n.rpartition(".")[2] in names for n, _ in base.named_modules())
    for (name, seen), wanted in zip(mine.state_dict().items(), merged.state_dict().values()):
        rounding = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(seen, wanted, rtol=rounding, atol=rounding / 4, msg=name)
    unfold(mine, tmp_path / "adapter")
    torch.testing.assert_close(
        mine.state_dict(), base.state_dict(), rtol=rounding, atol=rounding * 4
    )


def updates_of(net: Net) -> dict[str, Update]:
    return {
        "first": build(
            "lora", {"up": torch.randn(8, 2, 1, 1), "down": torch.randn(2, 3, 3, 3)}, 0.3
        ),
        "second": build("full", {"diff": torch.randn(4, 4, 1, 3), "diff_b": torch.randn(4)}, 0.5),
        "norm": build("norm", {"w_norm": torch.randn(8), "b_norm": torch.randn(8)}),
        "head": DoRA(lora(6, 4, up_bias=torch.randn(6)), torch.rand(6, 1)),
    }


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_conv_net(layout: torch.memory_format, workers: int) -> None:
    torch.manual_seed(1)
    net = Net().to(memory_format=layout)
    before, updates, x = copy.deepcopy(net), updates_of(net), torch.randn(2, 3, 6, 6)
    wanted = copy.deepcopy(before)
    for name, update in updates.items():
        old: Any = wanted.get_submodule(name)
        if name == "norm":
            old.weight.data += update.w_norm  # type: ignore[attr-defined]
            old.bias.data += update.b_norm  # type: ignore[attr-defined]
        else:
            old.weight.data = update.fold(Layer.from_module(old).canonical())
            bias = update.fold_bias(old.bias)
            old.bias = None if bias is None else nn.Parameter(bias.detach())
    report = fold(net, updates, workers=workers)
    assert [n.code for n in report.notes] == ["new-bias"]
    torch.testing.assert_close(net(x), wanted(x))
    with pytest.raises(InexactError, match="no-inverse"):
        unfold(net, updates)
    torch.testing.assert_close(net(x), wanted(x))


def test_a_list_with_weights_follows_the_law() -> None:
    net, (a, b), turn = Net(), (lora(6, 4), lora(6, 4)), HRA(torch.randn(4, 2))
    weight = net.head.weight.detach().clone()
    adapters = [({"head": a}, 0.5), {"head": turn}, ({"head": b}, -2.0)]
    fold(net, adapters)
    wanted = turn.fold(weight) + 0.5 * 0.3 * a.up @ a.down - 2.0 * 0.3 * b.up @ b.down
    torch.testing.assert_close(net.head.weight.detach(), wanted)
    unfold(net, adapters)
    torch.testing.assert_close(net.head.weight.detach(), weight)
    fold(net, {"head": a}, 2.0)
    torch.testing.assert_close(net.head.weight.detach(), weight + 2 * 0.3 * a.up @ a.down)


def test_a_tied_weight_changed_for_one_user_is_untied() -> None:
    model = llama(tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = model.lm_head.weight.detach().clone()
    report = fold(model, {"lm_head": lora(40, 16)})
    assert [n.code for n in report.notes] == ["untied"]
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(model.model.embed_tokens.weight.detach(), before)
    assert not torch.allclose(model.lm_head.weight, before)


def test_a_tied_weight_changed_alike_for_all_is_folded_once() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 6)})
    net["b"].weight = net["a"].weight
    before, update = net["a"].weight.detach().clone(), lora(6, 4)
    report = fold(net, {"a": update, "b": copy.deepcopy(update)})
    assert [n.code for n in report.notes] == ["tied"]
    assert net["a"].weight is net["b"].weight
    torch.testing.assert_close(net["a"].weight.detach(), update.fold(before))


def test_saved_parameters_replace_the_models(tmp_path: Path) -> None:
    base = llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = peft.get_peft_model(copy.deepcopy(base), config)
    adapted.base_model.model.lm_head.modules_to_save.default.weight.data += 1
    adapted.save_pretrained(tmp_path)
    before = base.lm_head.weight.detach().clone()
    fold(base, tmp_path)
    torch.testing.assert_close(base.lm_head.weight.detach(), before + 1)
    with pytest.raises(InexactError, match="no-inverse"):
        unfold(base, tmp_path)


def test_refusals_leave_the_model_as_it_was() -> None:
    net, good = Net(), lora(6, 4)
    before = copy.deepcopy(net.state_dict())
    broken = LoRA(torch.full((8, 1, 1, 1), float("nan")), torch.ones(1, 3, 3, 3))
    cases: list[tuple[dict[str, Update], float, type[Exception], str]] = [
        ({"head": good, "haed": good}, 1.0, NameLookupError, "nearest: `head`"),
        ({"head": good, "first": lora(6, 4)}, 1.0, ShapeError, "first"),
        ({"head": good, "first": HRA(torch.randn(27, 2))}, 0.5, ValueRefused, "no-weight"),
        ({"head": good, "first": broken}, 1.0, ValueRefused, "non-finite"),
        ({}, 1.0, NameLookupError, "changes nothing"),
    ]
    for updates, weight, kind, message in cases:
        with pytest.raises(kind, match=message):
            fold(net, updates, weight)
    quantised = nn.Module()
    quantised.head = nn.Linear(4, 6)
    quantised.head.weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueRefused, match="quantised-weight"):
        fold(quantised, {"head": good})
    with pytest.raises(ValueRefused, match="meta device"):
        fold(copy.deepcopy(net).to("meta"), {"head": good})
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_float16_overflow_is_refused_by_name() -> None:
    net = Net().half()
    with pytest.raises(ValueRefused, match=r"(?s)`head.weight`.*non-finite"):
        fold(net, {"head": build("full", {"diff": torch.full((6, 4), 7e4)})})


def test_peft_state_and_ours_agree_on_names() -> None:
    """The keys that the module paths above are taken from."""
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    key = next(iter(get_peft_model_state_dict(adapted)))
    assert key.startswith("base_model.model.model.layers.0.self_attn.q_proj.")


PEAK = """
import sys, torch
from torch import nn
from adaptsurgery.algorithms import build
from adaptsurgery.jobs.fold import fold
torch.set_num_threads(1)
def shapes(name, n):
    half = {"w1_a": (n, 8), "w1_b": (8, n), "w2_a": (n, 8), "w2_b": (8, n)}
    return {"lora": {"up": (n, 8), "down": (8, n)}, "loha": half, "hra": {"u": (n, 8)},
            "lokr": {"w1": (8, 8), "w2_a": (n // 8, 8), "w2_b": (8, n // 8)}}[name]
def told(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
dtype = getattr(torch, sys.argv[1])
net = nn.ModuleDict({"big": nn.Linear(4096, 4096, False, dtype=dtype), "small": nn.Linear(64, 64, False, dtype=dtype)})
for name in ("lora", "loha", "lokr", "hra"):
    big, small = ({k: torch.randn(s) * 0.01 for k, s in shapes(name, n).items()} for n in (4096, 64))
    fold(net, {"small": build(name, small)}, workers=1)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = told("VmRSS")
    fold(net, {"big": build(name, big)}, workers=1)
    print(told("VmHWM") - before)
"""


@needs("/proc/self/clear_refs")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_beyond_the_weights_is_a_few_megabytes(dtype: str) -> None:
    """Weights of 64 MB: a copy of one, or a ΔW, would be seen."""
    done = subprocess.run([sys.executable, "-c", PEAK, dtype], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(map(int, done.stdout.split())) < 16_000, done.stdout
