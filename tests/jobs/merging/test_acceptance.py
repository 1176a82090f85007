"""Every algorithm × stored dtype × kind of layer, on real models under the real PEFT and LyCORIS.

What PEFT means by an adapter is what its own modules do in float64: the forward of the wrapped
model, and the weights that its merge leaves. A merged file has to hold those numbers rounded once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers as tf
from merge_files import peft_file
from safetensors.torch import load_file, save_file
from test_models import lycoris_net

from adaptsurgery.jobs.merging.merge import merge

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = torch.arange(12)[None]
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16, dtype=torch.float64).reshape(1, 3, 16, 16)


def llama() -> torch.nn.Module:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=64, hidden_size=96, intermediate_size=160, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip


def gpt2() -> torch.nn.Module:
    config = tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    return tf.GPT2LMHeadModel(config)


def autoencoder() -> torch.nn.Module:
    """diffusers' VAE: 3×3 and 1×1 convolutions, a strided one, linears in its attention."""
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def output(model: Any, kind: str) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found = model(PIXELS).sample if kind == "conv2d" else model(TOKENS).logits
    assert isinstance(found, torch.Tensor)
    return found


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "linear": llama, "conv1d": gpt2, "conv2d": autoencoder,
}  # fmt: skip
TARGETS = {
    "linear": r".*(q_proj|v_proj|o_proj|up_proj|down_proj)",
    "conv1d": r".*(c_attn|c_proj|c_fc)",
    "conv2d": r".*(conv1|conv2|to_q|to_v|quant_conv|conv_shortcut)",
}
CONFIGS: dict[str, Callable[[str], peft.PeftConfig]] = {
    "lora": lambda t: peft.LoraConfig(r=4, lora_alpha=6, target_modules=t),
    "rslora": lambda t: peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=t),
    "dora": lambda t: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=t),
    # PEFT rounds LoHa's scale to float32, so it is one that float32 has.
    "loha": lambda t: peft.LoHaConfig(r=3, alpha=4.5, target_modules=t, use_effective_conv2d=True),
    "lokr": lambda t: peft.LoKrConfig(r=2, alpha=5, target_modules=t, decompose_factor=4),
    "hra": lambda t: peft.HRAConfig(r=4, target_modules=t),
}
# PEFT's LoHa, LoKr and HRA do not take transformers' Conv1D; see the tests by definition below.
CASES = [(kind, name) for kind in MODELS for name in CONFIGS if kind != "conv1d" or "ora" in name]


def nearest(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 to the nearest number of a dtype, ties to even, by looking at the neighbours."""
    near = exact.to(dtype)
    if dtype == torch.float32:
        return near
    bits = near.view(torch.int16)
    around = torch.stack([bits - 1, bits, bits + 1])
    apart = (around.view(dtype).double() - exact).abs().nan_to_num(float("inf"))
    ties = apart == apart.amin(0)
    even = torch.where(ties, (around & 1) + 1, torch.full_like(around, 9))
    return around.gather(0, even.argmin(0)[None])[0].view(dtype)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


# Factors of about these sizes make ΔW a tenth of W, as training does.
SIZE = {"lora": 0.025, "hada": 0.12, "lokr": 0.08, "hra": 1.0}


class Given:
    """A base stored in a dtype, an adapter by PEFT, and what PEFT makes of both in float64."""

    def __init__(self, kind: str, name: str, dtype: str, folder: Path) -> None:
        torch.manual_seed(7)
        self.kind, self.dtype = kind, DTYPES[dtype]
        self.base, self.adapter = folder / "base", folder / "adapter"
        MODELS[kind]().to(self.dtype).save_pretrained(self.base)
        wrapped = peft.get_peft_model(self.loaded(self.base), CONFIGS[name](TARGETS[kind])).double()
        for key, parameter in wrapped.named_parameters():
            if any(mark + "_" in key for mark in SIZE):
                with torch.no_grad():
                    drawn = torch.randn(parameter.shape)
                    if "magnitude" in key:
                        parameter.mul_(1 + drawn.reshape(parameter.shape).abs() / 10)
                    else:
                        parameter.copy_(drawn * next(SIZE[m] for m in SIZE if m + "_" in key))
        wrapped.save_pretrained(self.adapter)
        self.wanted = output(wrapped, kind)
        plain = copy.deepcopy(wrapped).merge_and_unload()  # type: ignore[operator]
        self.exact = {k: v.detach() for k, v in plain.state_dict().items()}

    def loaded(self, folder: Path) -> Any:
        """The model with the numbers that are stored, computing in float64."""
        return self.cls.from_pretrained(folder).double()

    @property
    def cls(self) -> Any:
        return type(MODELS[self.kind]())


def units_apart(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    ints = torch.int32 if got.dtype == torch.float32 else torch.int16
    return (got.view(ints).long() - wanted.view(ints).long()).abs()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_merged_is_peft_in_float64_rounded_once(
    kind: str, name: str, dtype: str, tmp_path: Path
) -> None:
    given = Given(kind, name, dtype, tmp_path)
    merge(given.base, given.adapter, tmp_path / "exact", compute="fp64")
    merge(given.base, given.adapter, tmp_path / "quick")
    before, exact, quick = (weights(tmp_path / n) for n in ("base", "exact", "quick"))
    off = edited = 0
    for key, stored in exact.items():
        wanted = nearest(given.exact[key], stored.dtype)
        assert stored.dtype == given.dtype and torch.equal(stored, wanted), key
        if not torch.equal(stored, before[key]):
            apart = units_apart(quick[key], stored)
            if dtype != "fp32":  # but where W' cancels: float32 knows no more of that than of W
                far = (quick[key].double() - stored.double()).abs()
                lost = far <= float(before[key].abs().max()) * 2.0**-22
                assert bool(((apart <= 1) | lost).all()), key
            off, edited = off + int((apart > 0).sum()), edited + apart.numel()
    assert edited > 10_000 and (dtype == "fp32" or off <= 1e-4 * edited)
    found = output(given.loaded(tmp_path / "exact"), kind)
    apart = float((found - given.wanted).norm() / given.wanted.norm())
    assert apart < {"fp32": 1e-6, "bf16": 2e-2, "fp16": 2e-3}[dtype]
    assert float((output(given.loaded(given.base), kind) - given.wanted).norm()) > 3 * apart


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["loha", "lokr", "hra"])
def test_what_peft_takes_for_no_conv1d_is_merged_by_definition(
    name: str, dtype: str, tmp_path: Path
) -> None:
    """GPT-2's weights are (i, o), and so is what is added to them, turned."""
    torch.manual_seed(3)
    gpt2().to(DTYPES[dtype]).save_pretrained(tmp_path / "base")
    before = weights(tmp_path / "base")
    paths = [k.removesuffix(".weight") for k in before if ".c_" in k and k.endswith(".weight")]
    slots, exact = {}, {}
    for path in paths:
        weight = before[f"{path}.weight"].double()
        i, o = weight.shape
        made = {k: torch.randn(s) * 0.3 for k, s in _slots(name, o, i).items()}
        slots |= {f"{path}.{k}": t for k, t in made.items()}
        exact[f"{path}.weight"] = _changed(name, weight.t(), {k: t.double() for k, t in made.items()}).t()  # fmt: skip
    config: dict[str, Any] = {"hra": {"r": 2}, "lokr": {"r": 3, "alpha": 5, "decompose_factor": 4}}
    adapter = peft_file(
        tmp_path / "a", name.upper(), slots, **config.get(name, {"r": 3, "alpha": 5})
    )
    merge(tmp_path / "base", adapter, tmp_path / "out", compute="fp64")
    after = weights(tmp_path / "out")
    for key, wanted in exact.items():
        assert torch.equal(after[key], nearest(wanted.contiguous(), after[key].dtype)), key
    tf.GPT2LMHeadModel.from_pretrained(tmp_path / "out")


def _slots(name: str, o: int, i: int) -> dict[str, tuple[int, ...]]:
    if name == "hra":
        return {"hra_u": (i, 2)}
    if name == "lokr":
        return {"lokr_w1": (4, 4), "lokr_w2_a": (o // 4, 3), "lokr_w2_b": (3, i // 4)}
    return {"hada_w1_a": (o, 3), "hada_w1_b": (3, i), "hada_w2_a": (o, 3), "hada_w2_b": (3, i)}


def _changed(name: str, weight: torch.Tensor, slots: dict[str, torch.Tensor]) -> torch.Tensor:
    s = list(slots.values())
    if name == "hra":
        for column in (s[0] / s[0].norm(dim=0)).t():
            weight = weight - 2 * torch.outer(weight @ column, column)
        return weight
    if name == "lokr":
        return weight + 5 / 3 * torch.kron(s[0], s[1] @ s[2])
    return weight + 5 / 3 * (s[0] @ s[1]) * (s[2] @ s[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algo", ["locon", "loha", "lokr"])
def test_alpha_other_than_rank_is_lycoris_forward_and_not_its_merge(
    algo: str, dtype: str, tmp_path: Path
) -> None:
    """LyCORIS's merge_to applies alpha/rank twice to LoHa and LoKr; its forward is right."""
    torch.manual_seed(5)
    model = autoencoder().to(DTYPES[dtype])
    model.save_pretrained(tmp_path / "base")  # type: ignore[attr-defined]
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "base").float()
    network = lycoris_net(model, {"target_name": [".*conv1", ".*conv2", ".*to_q", ".*to_v"]},
                          algo=algo, **({"factor": 2} if algo == "lokr" else {}), linear_dim=2, linear_alpha=1, conv_dim=2, conv_alpha=1)  # fmt: skip
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_file(
        {k: v.contiguous() for k, v in network.state_dict().items()}, tmp_path / "l.safetensors"
    )
    pixels = PIXELS.float()
    with torch.no_grad():
        wanted = model.eval()(pixels).sample
    network.restore()
    merge(tmp_path / "base", tmp_path / "l.safetensors", tmp_path / "out")
    merged = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out").float().eval()
    network.merge_to(1.0)
    with torch.no_grad():
        found, theirs, plain = (
            m(pixels).sample
            for m in (
                merged,
                model,
                diffusers.AutoencoderKL.from_pretrained(tmp_path / "base").float(),
            )
        )
    step = float((plain - wanted).norm())
    assert float((found - wanted).norm()) < {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}[dtype] * step
    assert (float((theirs - wanted).norm()) > 0.3 * step) == (algo != "locon")
