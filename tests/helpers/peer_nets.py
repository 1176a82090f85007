"""Small models of every layer kind, and the real peers at work on them, in float64.

A file holds an adapter's values in its own dtype; the peer computes with just those values in
float64, so that two outputs can be held together far below the 1e-5 that is asked for.
"""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

logging.getLogger("LyCORIS").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module="peft")

TOLERANCE = 1e-5  # relative; the peers agree to about 1e-7 where their files hold float32


class Block(nn.Module):
    """Convolutions of every setting, 1×1 too, and linears; underscores in the names on purpose.

    Sizes are odd ones that no LoKr factor suits, or, with ``even``, such that all of them do.
    """

    def __init__(self, even: bool, conv1d: bool, groups: int, dilation: int) -> None:
        super().__init__()
        a, b, c, d, e, f = (64, 128, 64, 64, 128, 64) if even else (20, 24, 18, 15, 36, 40)
        padding = (1, 2 * dilation)
        self.conv_in = nn.Conv2d(64 if even else 12, a, 3, padding=1)
        self.mid_wide = nn.Conv2d(a, b, (3, 5), (2, 1), padding, (1, dilation), groups)
        self.point = nn.Conv2d(b, c, 1)
        self.seq = nn.Conv1d(c, d, 3, padding=1) if conv1d else None
        self.fc_in = nn.Linear(d if conv1d else c, e)
        self.fc_out = nn.Linear(e, f)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.conv_in(x))
        y = torch.tanh(self.point(torch.tanh(self.mid_wide(y)))).flatten(2)
        y = torch.tanh(self.seq(y)) if self.seq is not None else y
        out: Tensor = self.fc_out(torch.tanh(self.fc_in(y.transpose(1, 2))))
        return out


class Text(nn.Module):
    """An embedding, a transformers Conv1D (weight (in, out)) and linears."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_in = nn.Embedding(11, 12)
        self.c_attn = Conv1D(18, 12)
        self.fc = nn.Linear(18, 10)
        self.fc_again = nn.Linear(10, 16)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.flatten(1)[:, :8].abs() * 10).long() % 11
        hidden = torch.tanh(self.c_attn(self.embed_in(ids)))
        out: Tensor = self.fc_again(torch.tanh(self.fc(hidden)))
        return out


class Net(nn.Module):
    """One block under a name with an underscore: ``blk_0.fc_in``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blk_0 = block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blk_0(x)
        return out


def net(
    even: bool = False, conv1d: bool = True, groups: int = 1, dilation: int = 1, seed: int = 0
) -> Net:
    """A model in float64 whose weights a float32 file holds exactly."""
    torch.manual_seed(seed)
    return Net(Block(even, conv1d, groups, dilation)).eval().double()


def text_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(Text()).eval().double()


def inputs(model: nn.Module, seed: int = 7) -> Tensor:
    block = getattr(model, "blk_0", None)
    channels = block.conv_in.in_channels if isinstance(block, Block) else 12
    return torch.randn(2, channels, 5, 5, generator=torch.Generator().manual_seed(seed)).double()


def save_base(model: nn.Module, path: Path) -> Path:
    save_file({k: v.float().contiguous() for k, v in model.state_dict().items()}, path)
    return path


def apart(a: Tensor, b: Tensor) -> float:
    """‖a − b‖/‖b‖."""
    return float(((a - b).norm() / b.norm()).detach())


def _randomise(parameters: dict[str, nn.Parameter], dtype: torch.dtype, seed: int) -> None:
    """Non-zero random values that ``dtype`` holds; magnitudes stay positive."""
    random = torch.Generator().manual_seed(seed)
    for name, p in parameters.items():
        value = torch.randn(p.shape, generator=random) * 0.3
        if "dora_scale" in name or "magnitude" in name:
            value = p.detach().float() * (1 + value.abs())
        p.data = value.to(dtype).to(p.dtype)


# --- LyCORIS -------------------------------------------------------------------------------------


def write_lycoris(
    model: Net, path: Path, algo: str, x: Tensor, *, dtype: torch.dtype = torch.float32,
    alpha_dtype: torch.dtype = torch.float32, seed: int = 1, module_options: dict[str, Any] | None = None,
    dim: int = 4, algo_map: dict[str, dict[str, Any]] | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """A file of the real LyCORIS with random weights, and the adapted model's output.

    ``module_options`` are those that its wrapper passes on by preset alone (rs_lora);
    ``algo_map`` gives classes of layers algorithms of their own.
    """
    block = type(model.blk_0).__name__
    by_class = dict(algo_map or {})
    if module_options:
        by_class[block] = {"algo": algo, **module_options}
    preset = {"target_module": [block], "enable_conv": True, "module_algo_map": by_class}
    options = {"linear_alpha": 3, "conv_dim": dim, "conv_alpha": 2, **options}
    LycorisNetwork.apply_preset(preset)
    # the wrapper applies a preset of its own, "full", over ours: an empty one leaves ours
    network = create_lycoris(
        model, 1.0, linear_dim=dim, algo=algo, preset=_empty_preset(path), **options
    )
    try:
        network.double()
        network.apply_to()
        _randomise(dict(network.named_parameters()), dtype, seed)
        out = model(x).detach()
    finally:
        network.restore()
    save_file(
        {
            k: v.to(alpha_dtype if k.endswith(".alpha") else dtype).contiguous()
            for k, v in network.state_dict().items()
        },
        path,
    )
    return out


def _empty_preset(path: Path) -> str:
    preset = path.with_suffix(".toml")
    preset.write_text("enable_conv = true\n", "utf-8")
    return str(preset)


def lycoris_output(model: nn.Module, path: Path, x: Tensor) -> Tensor:
    """The output of a model with a file that LyCORIS's own loader has read."""
    weights = {k: v.double() for k, v in load_file(path).items()}
    network, _ = create_lycoris_from_weights(1.0, "", model, weights)
    names = {k.split(".")[0] for k in weights}
    assert {lora.lora_name for lora in network.loras} == names, "LyCORIS left modules out"
    for lora in network.loras:
        lora.double()
        lora.apply_to()
    try:
        out: Tensor = model(x).detach()
        return out
    finally:
        for lora in network.loras:
            lora.restore()


# --- PEFT ----------------------------------------------------------------------------------------


def write_peft(
    model: nn.Module, folder: Path, config: peft.PeftConfig, x: Tensor, *,
    dtype: torch.dtype = torch.float32, seed: int = 1,
) -> Tensor:  # fmt: skip
    """A folder of the real PEFT with random weights, and the adapted model's output."""
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    marks = ("lora_", "hada_", "lokr_", "hra_", "modules_to_save.")
    own = {n: p for n, p in adapted.named_parameters() if any(m in n for m in marks)}
    _randomise(own, dtype, seed)
    adapted.eval()
    out: Tensor = adapted(x).detach()
    state = {k: v.to(dtype) for k, v in get_peft_model_state_dict(adapted).items()}
    adapted.save_pretrained(folder, state_dict=None)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")
    return out


def peft_output(model: nn.Module, folder: Path, x: Tensor) -> Tensor:
    """The output of a model with a folder that PEFT has loaded, with no key missing or left over."""
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    result = adapted.load_adapter(str(folder), "again")
    assert not result.unexpected_keys, result.unexpected_keys[:4]
    assert not [k for k in result.missing_keys if ".again" in k], result.missing_keys[:4]
    keys = {k.replace(".default", "") for k in get_peft_model_state_dict(adapted)}
    assert keys == set(load_file(folder / "adapter_model.safetensors")), "PEFT has other modules"
    adapted.eval()
    out: Tensor = adapted(x).detach()
    return out


class Stack(nn.Module):
    """Layers under a list, and a root module whose name is the tail of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(12, 12), "head": nn.Linear(12, 12)}) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x.mean((2, 3)))
        for layer in self.layers:
            y = torch.tanh(layer["head"](torch.tanh(layer["fc"](y))))  # type: ignore[index]
        return y


def stack(seed: int = 0) -> Stack:
    torch.manual_seed(seed)
    return Stack().eval().double()
