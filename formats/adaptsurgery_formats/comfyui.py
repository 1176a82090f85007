"""ComfyUI's and ai-toolkit's dotted layout, read only.

    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight             (r, i)
    diffusion_model.blocks.0.self_attn.q.lokr_w1                           (a, c)
    text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_down.weight

- The original repository's module names, so that nothing needs un-flattening; tensors under
  PEFT's or LyCORIS's names.
- Scale: alpha/r, and 1 without an alpha, which is the rule in these files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adaptsurgery_formats import dotted, lycoris_keys
from adaptsurgery_formats.files import AdapterFile, Format, Unheld, no_such
from adaptsurgery_formats.state import AdapterState, ModuleState

# prefix → the component it stands for; "" where the model's table decides (unet or transformer).
_PREFIXES = {
    "diffusion_model.": "",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_2",
}


def claims(key: str) -> bool:
    return key.startswith(tuple(_PREFIXES))


def parse(files: Sequence[AdapterFile]) -> AdapterState:
    """One file's modules under dotted native names; ``options["prefix"]`` keeps the prefix."""
    (file,) = files
    tensors = dotted.shaped_magnitudes(file.tensors)
    modules = []
    three = any(key.startswith("text_encoders.clip_g.") for key in tensors)
    for module in lycoris_keys.parse_names(tensors, file.where, dotted.SUFFIXES):
        prefix = next((p for p in _PREFIXES if module.path.startswith(p)), "")
        options = {**module.options, "prefix": prefix.rstrip(".")}
        path, component = module.path.removeprefix(prefix), _PREFIXES.get(prefix, "")
        if three and ".t5xxl." in prefix:
            component = "text_encoder_3"  # SD3's; Flux has CLIP-L and T5 alone
        modules.append(
            replace(module, path=path, component=component, naming="dotted", options=options)
        )
    state = AdapterState("comfyui", modules, metadata=dict(file.metadata), where=file.where)
    lycoris_keys.add_notes(state)
    return state


def _holds(module: ModuleState, shape: tuple[int, ...] | None) -> Unheld | None:
    """ComfyUI reads what LyCORIS writes, under other names."""
    known = any(algorithm == module.algorithm for algorithm, _ in dotted.SUFFIXES.values())
    return None if known else no_such(module.algorithm, "ComfyUI has")


FORMAT = Format(
    name="comfyui",
    title="ComfyUI, ai-toolkit (diffusion_model.…)",
    claims=claims,
    parse=parse,
    plan=dotted.read_only,
    spell=None,
    holds=_holds,
    naming="native",
    examples=("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",),
)
