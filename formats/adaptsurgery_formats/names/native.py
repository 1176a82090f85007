"""What the original repositories call the modules of diffusers' models.

A native module is a list of segments (``Rows``): rows of diffusers modules, one below the other. Most are one
whole module under another name; Flux also stacks q, k and v, and swaps the halves of one layer::

    input_blocks.1.1.proj_in        (320, 320, 1, 1)  = down_blocks.0.attentions.0.proj_in
    double_blocks.0.img_attn.qkv    (3h, h)           = to_q (h, h); to_k (h, h); to_v (h, h)
    single_blocks.0.linear1         (7h, h)           = to_q; to_k; to_v; proj_mlp (4h, h)
    final_layer.adaLN_modulation.1  (2h, h)           = norm_out.linear rows [h, 2h), then [0, h)

Sources: the LDM UNet of CompVis/latent-diffusion and Stability-AI/generative-models, and
black-forest-labs/flux; the tests hold both against the converters of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from adaptsurgery_formats.names.rows import Rows

Shapes = Mapping[str, tuple[int, ...]]


Native = dict[str, tuple[Rows, ...]]

_LDM_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_LDM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

_FLUX_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_FLUX_DOUBLE: dict[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_FLUX_SINGLE: dict[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}


def ldm_unet(modules: Shapes) -> Native:
    """The LDM names of a UNet2DConditionModel; each is one whole module."""
    blocks = dict(_ldm_blocks({_head(path) for path in modules}))
    native: Native = {}
    for path, shape in modules.items():
        head = _head(path)
        rest = path[len(head) + 1 :]
        if ".resnets." in head:
            rest = _LDM_RESNET[rest]
        name = _LDM_TOP.get(path) or ".".join(filter(None, (blocks[head], rest)))
        native[name] = (Rows(path, 0, shape[0]),)
    return native


def _head(path: str) -> str:
    """``down_blocks.0.attentions.1`` of a path under it; a sampler's whole path."""
    if "samplers." in path or "_block" not in path:
        return path
    return ".".join(path.split(".", 3 if path.startswith("mid_block") else 4)[:-1])


def _ldm_blocks(heads: set[str]) -> Iterator[tuple[str, str]]:
    """(diffusers block, LDM block): LDM numbers what diffusers nests, counting samplers too.

    input_blocks: conv_in, then each resnet, then the downsampler in a place of its own;
    output_blocks: each resnet, its attention, and in the last one of a level the upsampler.
    """
    for j in range(2):
        yield f"mid_block.resnets.{j}", f"middle_block.{2 * j}"
    yield "mid_block.attentions.0", "middle_block.1"
    at = 1
    for i in _count(heads, "down_blocks.{}.resnets.0"):
        for j in _count(heads, f"down_blocks.{i}.resnets.{{}}"):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{at}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{at}.1"
            at += 1
        sampler = f"down_blocks.{i}.downsamplers.0.conv"
        if sampler in heads:
            yield sampler, f"input_blocks.{at}.0.op"
            at += 1
    at = 0
    for i in _count(heads, "up_blocks.{}.resnets.0"):
        for j in _count(heads, f"up_blocks.{i}.resnets.{{}}"):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{at}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{at}.1"
            at += 1
        place = 2 if f"up_blocks.{i}.attentions.0" in heads else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{at - 1}.{place}.conv"


def _count(known: Iterable[str] | Shapes, template: str) -> Iterator[int]:
    """0, 1, 2, … as long as the template filled with the number is known."""
    i = 0
    while template.format(i) in known:
        yield i
        i += 1


def flux(modules: Shapes) -> Native:
    """The names of black-forest-labs/flux for a FluxTransformer2DModel."""
    native = {n: _stacked((p,), modules) for n, p in _FLUX_TOP.items() if p in modules}
    for i in _count(modules, "transformer_blocks.{}.norm1.linear"):
        for name, paths in _FLUX_DOUBLE.items():
            parts = (f"transformer_blocks.{i}.{p}" for p in paths)
            native[f"double_blocks.{i}.{name}"] = _stacked(parts, modules)
    for i in _count(modules, "single_transformer_blocks.{}.norm.linear"):
        for name, paths in _FLUX_SINGLE.items():
            parts = (f"single_transformer_blocks.{i}.{p}" for p in paths)
            native[f"single_blocks.{i}.{name}"] = _stacked(parts, modules)
    # BFL's rows are (shift; scale), diffusers' are (scale; shift).
    last, rows = "norm_out.linear", modules["norm_out.linear"][0]
    native["final_layer.adaLN_modulation.1"] = (
        Rows(last, rows // 2, rows),
        Rows(last, 0, rows // 2),
    )
    return native


def _stacked(paths: Iterable[str], modules: Shapes) -> tuple[Rows, ...]:
    return tuple(Rows(path, 0, modules[path][0]) for path in paths)


# The rule that a table's component names, and what derives its native names.
RULES: dict[str, Callable[[Shapes], Native]] = {"ldm": ldm_unet, "flux": flux}
