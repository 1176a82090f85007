"""kohya sd-scripts' layout, which A1111, Forge, ComfyUI and most downloads use.

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight  (r, i)
    lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha                       ()
    lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight                            (o, r)
    lora_unet_double_blocks_0_img_attn_qkv.lokr_w1                                         (a, c)

- One prefix a component, then the module's path with its dots made underscores: only a look-up in
  the base's module list undoes that. UNets of SD1 and SD2 go by diffusers' names, SDXL's by LDM's,
  Flux by the original repository's with fused qkv. Text encoders go by transformers' names.
- Scale and tensor suffixes: see ``lycoris_keys``; LyCORIS's kohya class writes its algorithms
  under the same prefixes.
- Metadata: ``ss_*`` and the two ``sshs_*`` hashes, see ``metadata``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from adaptsurgery_formats import lycoris_keys
from adaptsurgery_formats.errors import KeyRefused, LayoutError
from adaptsurgery_formats.files import (
    META_CONFIG,
    META_PREFIX,
    AdapterFile,
    Format,
    Rewriting,
    carried_config,
)
from adaptsurgery_formats.metadata import describe_network
from adaptsurgery_formats.names import Component, Names, flatten, from_modules
from adaptsurgery_formats.state import AdapterState, ModuleState
from adaptsurgery_formats.tensors import Tensor

_PREFIX = re.compile(r"(lora_unet|lora_te[123]?|lora_transformer|lora_prior_unet)_(?=[A-Za-z0-9])")


def claims(key: str) -> bool:
    return _PREFIX.match(key) is not None


def split_prefix(name: str) -> tuple[str, str]:
    """("lora_te1", "text_model_…") of a flat module name that ``claims`` accepts."""
    match = _PREFIX.match(name)
    assert match is not None
    return match.group(1), name[match.end() :]


def parse(files: Sequence[AdapterFile]) -> AdapterState:
    """One file's modules under their flat names; ``options["prefix"]`` keeps each one's prefix."""
    (file,) = files
    metadata = dict(file.metadata)
    own = metadata.pop(META_PREFIX, "")
    modules = []
    for module in lycoris_keys.parse_names(file.tensors, file.where):
        if own and module.path.startswith(own + "_"):
            modules.append(module.changed(path=module.path[len(own) + 1 :]))
            continue
        if not claims(module.path):  # where the caller chose the layout
            raise KeyRefused(f"`{module.keys[0]}` has none of kohya's prefixes", where=file.where)
        prefix, flat = split_prefix(module.path)
        options = {**module.options, "prefix": prefix}
        modules.append(module.changed(path=flat, options=options))
    config = carried_config(metadata, file.where)
    state = AdapterState("kohya", modules, metadata=metadata, config=config, where=file.where)
    state.prefix = own
    lycoris_keys.add_notes(state)
    return state


def plan(state: AdapterState, names: Names | None) -> list[Rewriting]:
    _refuse_saved(state)
    return lycoris_keys.plan_modules(state.modules, state.where)


def _refuse_saved(state: AdapterState) -> None:
    replaced = [f"{c}.{k}" if c else k for c, s in state.saved.items() for k in s]
    if replaced:
        raise LayoutError(
            f"{len(replaced)} replaced parameters (modules_to_save, biases) have no place here",
            where=state.where,
            seen=", ".join(replaced[:4]),
            next="merge the adapter into its base instead, or drop them from the source",
            code="no-modules-to-save",
        )


def spell(state: AdapterState, names: Names | None) -> list[AdapterFile]:
    """One file; every module under its component's prefix."""
    tensors: dict[str, Tensor] = {}
    keep = state.layout == "kohya"
    known = names.components if names else {}
    # a model of no table: the prefixes that the components' names stand for
    others = from_modules({name: {} for name in state.components}, state.where).components
    for module in state.modules:
        component = known.get(module.component) or others[module.component]
        prefix = state.prefix or _prefix(module, component, module.component in known)
        name = f"{prefix}_{flatten(module.written)}"
        spelled = lycoris_keys.spell_module(module, name, keep)
        for key, tensor in spelled.items():
            if key in tensors:
                raise LayoutError(
                    f"two modules flatten to `{key}`",
                    where=state.where,
                    seen=module.label,
                    next="kohya's names cannot tell them apart; use --to peft",
                    code="colliding-names",
                )
            tensors[key] = tensor
    lycoris_keys.note_loader(state)
    metadata = describe_network(state, state.metadata)
    if state.prefix:
        metadata[META_PREFIX] = state.prefix
    if state.config:
        metadata[META_CONFIG] = json.dumps(state.config, sort_keys=True)
    return [AdapterFile(tensors, metadata)]


def _prefix(module: ModuleState, component: Component, known: bool) -> str:
    """The prefix that kohya writes for a module: the source's own where the component has it."""
    own = module.options.get("prefix", "")
    if not claims(f"{own}_x"):  # ComfyUI's are no concern of kohya's
        return component.kohya_prefixes[0]
    if known and component.name and own not in component.kohya_prefixes:
        return component.kohya_prefixes[0]
    # OneTrainer's lora_transformer goes with diffusers' names alone
    native = own == "lora_transformer" and module.naming == "native"
    return component.kohya_prefixes[0] if native else own


FORMAT = Format(
    name="kohya",
    title="kohya sd-scripts (lora_unet_…, lora_te…)",
    claims=claims,
    parse=parse,
    plan=plan,
    spell=spell,
    holds=lycoris_keys.holds,
    naming=None,
    examples=("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight",),
)
