"""diffusers' LoRA layout, read only.

    transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight    (r, i)
    unet.down_blocks.0.attentions.0.proj_in.lora_B.weight              (o, r[, 1, 1])
    text_encoder.text_model.encoder.layers.0.mlp.fc1.lora.up.weight    (o, r), older files

- The pipeline's component, then the module's own path. LoRA and DoRA only.
- Scale: metadata ``lora_adapter_metadata`` holds a LoraConfig per component as one JSON object
  with keys ``<component>.r``, ``<component>.lora_alpha``, ``<component>.rank_pattern``, …;
  without it diffusers takes alpha = r, so the scale is 1. Some trainers add ``.alpha`` tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from adaptsurgery_formats import dotted, lycoris_keys
from adaptsurgery_formats.errors import LayoutError
from adaptsurgery_formats.files import AdapterFile, Format, Unheld, no_such
from adaptsurgery_formats.patterns import Matcher
from adaptsurgery_formats.peft_config import check_config
from adaptsurgery_formats.state import (
    ALPHA_OVER_R,
    ALPHA_OVER_SQRT_R,
    AdapterState,
    ModuleState,
)

_COMPONENT = re.compile(r"(unet|transformer|text_encoder(?:_[23])?)\.")
METADATA_KEY = "lora_adapter_metadata"


def claims(key: str) -> bool:
    return _COMPONENT.match(key) is not None and _is_tensor(key)


def _is_tensor(key: str) -> bool:
    return lycoris_keys.split_key(key, dotted.SUFFIXES) is not None


def parse(files: Sequence[AdapterFile]) -> AdapterState:
    """One file's modules by component, under diffusers' names."""
    (file,) = files
    tensors = dotted.shaped_magnitudes(file.tensors)
    modules = []
    for module in lycoris_keys.parse_names(tensors, file.where, dotted.SUFFIXES):
        match = _COMPONENT.match(module.path)
        component = match.group(1) if match else ""
        path = module.path[match.end() :] if match else module.path
        modules.append(replace(module, path=path, component=component, naming="diffusers"))
    modules = _scaled(modules, _configs(file), file.where)
    metadata = {k: v for k, v in file.metadata.items() if k != METADATA_KEY}
    state = AdapterState("diffusers", modules, metadata=metadata, where=file.where)
    lycoris_keys.add_notes(state)
    return state


def _configs(file: AdapterFile) -> dict[str, dict[str, Any]]:
    """lora_adapter_metadata's fields by component."""
    text = file.metadata.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        flat = json.loads(text)
        split = [(key.split(".", 1), value) for key, value in flat.items()]
        configs: dict[str, dict[str, Any]] = {}
        for (component, name), value in split:
            configs.setdefault(component, {})[name] = value
        for config in configs.values():
            check_config({"peft_type": "LORA", **config}, file.where)
    except (ValueError, AttributeError, RecursionError) as error:
        raise LayoutError(
            f"metadata {METADATA_KEY} is not a LoraConfig per component: {error}", where=file.where
        ) from None
    return configs


def _scaled(
    modules: Sequence[ModuleState], configs: Mapping[str, Mapping[str, Any]], where: str
) -> list[ModuleState]:
    """The modules with the alpha that the file's own LoraConfig gives them."""
    matchers = {c: Matcher([m.path for m in modules if m.component == c], where) for c in configs}
    alphas = {c: matchers[c].first_keys(configs[c].get("alpha_pattern") or {}) for c in configs}
    scaled = []
    for m in modules:
        config = configs.get(m.component)
        if config and m.alpha is None and m.algorithm == "lora" and "lora_alpha" in config:
            key = alphas[m.component].get(m.path)
            alpha = config["alpha_pattern"][key] if key is not None else config["lora_alpha"]
            rule = ALPHA_OVER_SQRT_R if config.get("use_rslora") else ALPHA_OVER_R
            m = replace(m, alpha=float(alpha), rule=rule)
        scaled.append(m)
    return scaled


def _holds(module: ModuleState, shape: tuple[int, ...] | None) -> Unheld | None:
    if module.algorithm == "lora":
        return None
    what = "diffusers' own layout holds LoRA and DoRA only"
    return replace(no_such(module.algorithm, "diffusers has"), what=what)


FORMAT = Format(
    name="diffusers",
    title="diffusers (transformer.…, unet.…, text_encoder.…)",
    claims=claims,
    parse=parse,
    plan=dotted.read_only,
    spell=None,
    holds=_holds,
    naming="diffusers",
    examples=("transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight",),
)
