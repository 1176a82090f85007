"""Small models, built from configs, and the real PEFT beside ours with the same numbers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import peft
import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn

import adaptsurgery
from adaptsurgery import AdapterConfig, PeftModel, get_peft_model
from adaptsurgery.modules.files import peft_tensors, set_tensors

warnings.filterwarnings("ignore", module="peft")


class Mixed(nn.Module):
    """Every kind of layer, odd sizes, every setting of a convolution that PEFT is right about."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.seq = nn.Conv1d(6, 10, 3, padding=1)
        self.conv = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(20, 15)
        self.out = nn.Linear(15, 9, bias=False)
        self.head = nn.Linear(9, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y = torch.tanh(self.seq(self.embed(ids).transpose(1, 2)))
        y = torch.tanh(self.point(torch.tanh(self.conv(y[:, None])))).flatten(2)
        return self.head(torch.tanh(self.out(torch.tanh(self.fc(y.mean(-1).repeat(1, 5))))))


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(3))


def tiny(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of the name's architecture, built from its config, and an input for it."""
    torch.manual_seed(0)
    model, given = _TINY[name]()
    return model.eval(), given


def _llama() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": ids(2, 7)}


def _gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config), {"input_ids": ids(2, 7)}


def _vit() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, num_labels=5,
    )  # fmt: skip
    return ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def _bert() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64, hidden_size=24, intermediate_size=36, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config), {"input_ids": ids(2, 7)}


def _clip() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=64, hidden_size=24, intermediate_size=36, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, projection_dim=24,
    )  # fmt: skip
    return CLIPTextModel(config), {"input_ids": ids(2, 7)}


def _unet() -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=24,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    given = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": torch.randn(1, 3, 24),
    }
    return model, given


def _t5() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=24, d_kv=8, d_ff=36, num_layers=2, num_heads=3,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5ForConditionalGeneration(config), {
        "input_ids": ids(2, 7),
        "decoder_input_ids": ids(2, 4),
    }


_TINY = {
    "llama": _llama, "gpt2": _gpt2, "vit": _vit, "bert": _bert, "clip": _clip, "unet": _unet,
    "t5": _t5,
}  # fmt: skip
ALGORITHMS = ("lora", "loha", "lokr", "hra")
_CONFIGS = {"lora": "LoraConfig", "loha": "LoHaConfig", "lokr": "LoKrConfig", "hra": "HRAConfig"}


def configs(algorithm: str, **said: Any) -> tuple[AdapterConfig, Any]:
    """Our config and PEFT's, with the same fields; "init" and "alpha" under their own names."""
    init = said.pop("init", False)
    said["init_lora_weights" if algorithm == "lora" else "init_weights"] = init
    alpha = said.pop("alpha", None)
    if alpha is not None and algorithm != "hra":
        said["lora_alpha" if algorithm == "lora" else "alpha"] = alpha
    name = _CONFIGS[algorithm]
    ours = getattr(adaptsurgery, name)(**copy.deepcopy(said))
    return ours, getattr(peft, name)(**copy.deepcopy(said))


def both(model: nn.Module, ours: Any, theirs: Any, **options: Any) -> tuple[PeftModel, Any]:
    """The model in our hands and, a copy of it, in PEFT's, with the same adapter numbers."""
    torch.manual_seed(1)
    peer = peft.get_peft_model(copy.deepcopy(model), theirs, **options)
    mine = get_peft_model(copy.deepcopy(model), ours, **options)
    copy_numbers(mine, peer)
    return mine, peer


def copy_numbers(mine: PeftModel, peer: Any, adapter: str = "default") -> None:
    state = {k: v.clone() for k, v in get_peft_model_state_dict(peer, adapter_name=adapter).items()}
    assert once_each(state) == peft_tensors(mine.base_model, adapter).keys()
    set_tensors(mine.base_model, adapter, state)


def once_each(keys: Iterable[str]) -> set[str]:
    """The keys less those that PEFT writes again for the biases of what is saved whole."""
    return {k for k in keys if not {"modules_to_save", "original_module"} & {*k.split(".")}}


def logits(out: Any) -> Tensor:
    for name in ("logits", "last_hidden_state", "sample"):
        if hasattr(out, name):
            return getattr(out, name)
    return out
