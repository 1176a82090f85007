"""Tiny random models of the families that adapters are made for, exported once a session.

``MODELS`` has name → Entry: the model, example inputs, sizes that are left open, and inputs of other
sizes. Weights are random and large enough that an adapter's change shows in the output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram


@dataclass
class Entry:
    """A model with what it takes; ``inputs`` and ``other`` are keyword arguments."""

    model: nn.Module
    inputs: dict[str, Any]
    sizes: dict[str, Any]
    other: dict[str, Any]


class Outputs(nn.Module):
    """A transformers or diffusers model with the first tensor that it gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **given: Any) -> Tensor:
        return first(self.model(**given))


def first(given: Any) -> Tensor:
    """The first tensor of an output of any shape."""
    if isinstance(given, Tensor):
        return given
    values = list(given.values()) if isinstance(given, dict) else list(given)
    return first(values[0])


def ids(*shape: int, vocab: int = 50) -> Tensor:
    return torch.randint(1, vocab, shape, generator=torch.Generator().manual_seed(3))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


_SEQUENCE = {0: Dim.AUTO, 1: Dim.AUTO}
_TEXT: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1,
                         "num_attention_heads": 2, "intermediate_size": 24,
                         "max_position_embeddings": 32}  # fmt: skip


def text(model: nn.Module, **more: Any) -> Entry:
    """A model of token ids."""
    return Entry(
        model,
        {"input_ids": ids(2, 6), **more},
        {"input_ids": _SEQUENCE, **dict.fromkeys(more, _SEQUENCE)},
        {"input_ids": ids(3, 9), **{name: ids(3, 5) for name in more}},
    )


def vit() -> Entry:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4, num_labels=5,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    return Entry(
        model, {"pixel_values": noise(2, 3, 8, 8)}, {"pixel_values": {0: Dim.AUTO}},
        {"pixel_values": noise(3, 3, 8, 8)},
    )  # fmt: skip


def bert() -> Entry:
    from transformers import BertConfig, BertForSequenceClassification

    return text(BertForSequenceClassification(BertConfig(**_TEXT)))


def gpt2() -> Entry:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, use_cache=False,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    return text(GPT2LMHeadModel(config))


def llama(tied: bool = False) -> Entry:
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = {"num_hidden_layers": 1 if tied else 2}
    config = LlamaConfig(
        **{**_TEXT, **layers}, num_key_value_heads=1, tie_word_embeddings=tied, use_cache=False
    )
    return text(LlamaForCausalLM(config))


def t5() -> Entry:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, use_cache=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    return text(T5ForConditionalGeneration(config), decoder_input_ids=ids(2, 4))


def clip() -> Entry:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(**_TEXT, projection_dim=12, eos_token_id=49, bos_token_id=0)
    return text(CLIPTextModelWithProjection(config))


def phi3() -> Entry:
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        **_TEXT, num_key_value_heads=1, pad_token_id=0, use_cache=False, tie_word_embeddings=False
    )
    return text(Phi3ForCausalLM(config))


def albert() -> Entry:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(**{**_TEXT, "num_hidden_layers": 2}, embedding_size=8)
    return text(AlbertModel(config))


def mixtral() -> Entry:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **_TEXT, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, use_cache=False
    )
    return text(MixtralForCausalLM(config))


def wav2vec2() -> Entry:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_stride=(3, 2), conv_kernel=(4, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
    )  # fmt: skip
    return Entry(
        Wav2Vec2Model(config), {"input_values": noise(2, 60)}, {"input_values": {0: Dim.AUTO}},
        {"input_values": noise(3, 60)},
    )  # fmt: skip


def _latents(**more: Tensor) -> Entry:
    inputs = {"sample": noise(2, 4, 8, 8), "timestep": torch.tensor(3), **more}
    wide = {k: torch.cat([v, v[:1]]) if v.dim() else v for k, v in inputs.items()}
    sizes = {k: {0: Dim.AUTO} if v.dim() else None for k, v in inputs.items()}
    return Entry(nn.Identity(), inputs, sizes, wide)


def sd15() -> Entry:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=4,
    )  # fmt: skip
    entry = _latents(encoder_hidden_states=noise(2, 5, 12))
    entry.model = model
    return entry


class SDXL(nn.Module):
    """An SDXL UNet with its added conditions as plain arguments."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D",), attention_head_dim=2,
            up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=12,
            use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=4, projection_class_embeddings_input_dim=32,
        )  # fmt: skip

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor,
        text_embeds: Tensor, time_ids: Tensor,
    ) -> Tensor:  # fmt: skip
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return first(
            self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added,
                      return_dict=False)
        )  # fmt: skip


def sdxl() -> Entry:
    entry = _latents(
        encoder_hidden_states=noise(2, 5, 12), text_embeds=noise(2, 8), time_ids=noise(2, 6)
    )
    entry.model = SDXL()
    return entry


def flux() -> Entry:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    inputs = {
        "hidden_states": noise(2, 6, 4), "encoder_hidden_states": noise(2, 5, 12),
        "pooled_projections": noise(2, 10), "timestep": torch.tensor([1.0, 2.0]),
        "img_ids": noise(6, 3), "txt_ids": noise(5, 3),
    }  # fmt: skip
    open_ = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    sizes: dict[str, Any] = {k: {0: Dim.AUTO} if k in open_ else None for k in inputs}
    other = {k: torch.cat([v, v[:1]]) if k in open_ else v for k, v in inputs.items()}
    return Entry(model, inputs, sizes, other)


def sd3() -> Entry:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
        pooled_projection_dim=10, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    inputs = {
        "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 12),
        "pooled_projections": noise(2, 10), "timestep": torch.tensor([1.0, 2.0]),
    }  # fmt: skip
    other = {k: torch.cat([v, v[:1]]) for k, v in inputs.items()}
    return Entry(model, inputs, {k: {0: Dim.AUTO} for k in inputs}, other)


def vae() -> Entry:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    return Entry(
        model, {"sample": noise(2, 3, 8, 8)}, {"sample": {0: Dim.AUTO}},
        {"sample": noise(3, 3, 8, 8)},
    )  # fmt: skip


class Bottleneck(nn.Module):
    """timm's: 1×1, grouped and dilated 3×3, 1×1, around a shortcut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride, padding=2, dilation=2, groups=2, bias=False)
        self.bn2, self.conv3 = nn.BatchNorm2d(8), nn.Conv2d(8, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(
            nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Bottleneck(8, 16, 1), Bottleneck(16, 16, 2))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer1(F.relu(self.bn1(self.conv1(x))))
        return self.fc(y.mean((2, 3)))


def resnet() -> Entry:
    size = {"x": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}}
    return Entry(ResNet(), {"x": noise(2, 3, 12, 12)}, size, {"x": noise(3, 3, 16, 16)})


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def encoder() -> Entry:
    return Entry(
        Encoder(), {"x": noise(2, 5, 16)}, {"x": {0: Dim.AUTO}}, {"x": noise(3, 5, 16)}
    )  # fmt: skip


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attn(x, x, x, need_weights=False)[0])


def attention() -> Entry:
    return Entry(
        Attention(), {"x": noise(2, 5, 16)}, {"x": {0: Dim.AUTO}}, {"x": noise(3, 5, 16)}
    )  # fmt: skip


MODELS: dict[str, Callable[[], Entry]] = {
    "vit": vit, "bert": bert, "gpt2": gpt2, "llama": llama,
    "llama-tied": lambda: llama(tied=True), "t5": t5, "clip": clip, "phi3": phi3,
    "albert": albert, "mixtral": mixtral, "wav2vec2": wav2vec2, "sd15": sd15, "sdxl": sdxl,
    "flux": flux, "sd3": sd3, "vae": vae, "resnet": resnet, "encoder": encoder,
    "attention": attention,
}  # fmt: skip


@functools.cache
def entry(name: str) -> Entry:
    """A model of the zoo in eval mode; its weights are seeded. Shared: do not change it."""
    torch.manual_seed(0)
    found = MODELS[name]()
    found.model = found.model.eval().requires_grad_(False)
    for parameter in found.model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return found


@functools.cache
def program(name: str) -> ExportedProgram:
    """The model exported with its sizes left open. Shared: do not change it."""
    found = entry(name)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return torch.export.export(
                found.model, (), found.inputs, dynamic_shapes=found.sizes
            )  # fmt: skip
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
