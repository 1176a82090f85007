"""The layout of LyCORIS's own wrapper (create_lycoris), for any torch model.

    lycoris_blocks_0_attn_q.lokr_w1       (a, c)
    lycoris_blocks_0_attn_q.lokr_w2_a     (b, r)
    lycoris_blocks_0_attn_q.alpha         ()

- One prefix, then the module's path with its dots made underscores; one model a file. The prefix
  can be set in training (lora_prefix): another one is found by looking the names up in the base.
- Scale and tensor suffixes: see ``lycoris_keys``.
- No metadata of its own; a user's is kept. Ours names the component, which the keys do not.
- Its own loader guesses LoKr's factor from shapes and fails on right files: see ``kronecker``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from adaptsurgery_formats import kohya, lycoris_keys
from adaptsurgery_formats.errors import LayoutError
from adaptsurgery_formats.files import (
    META_COMPONENT,
    META_CONFIG,
    META_MODEL,
    META_PREFIX,
    AdapterFile,
    Format,
    Rewriting,
    carried_component,
    carried_config,
)
from adaptsurgery_formats.lokr_cuts import lycoris_loads
from adaptsurgery_formats.metadata import HASH_KEYS, describe_network
from adaptsurgery_formats.names import Names, flatten
from adaptsurgery_formats.names.orientation import may_be_transposed
from adaptsurgery_formats.state import AdapterState, ModuleState, lokr_shapes
from adaptsurgery_formats.tensors import Tensor
from adaptsurgery_formats.traits import traits_of

PREFIX = "lycoris_"


def claims(key: str) -> bool:
    return key.startswith(PREFIX)


def parse(files: Sequence[AdapterFile]) -> AdapterState:
    """One file's modules under their flat names."""
    (file,) = files
    metadata = dict(file.metadata)
    component = carried_component(metadata, file.where)
    metadata.pop(META_COMPONENT, None)
    own = metadata.pop(META_PREFIX, "")
    model = metadata.pop(META_MODEL, "")
    config = carried_config(metadata, file.where)
    modules = [
        _bare(m.changed(component=component), own)
        for m in lycoris_keys.parse_names(file.tensors, file.where)
    ]
    state = AdapterState(
        "lycoris", modules, metadata=metadata, config=config, model=model, where=file.where
    )
    state.prefix = own
    lycoris_keys.add_notes(state)
    return state


def _bare(module: ModuleState, own: str) -> ModuleState:
    """The module under its name without the prefix; one that is not known is left to the look-up."""
    for prefix in (f"{own}_", PREFIX) if own else (PREFIX,):
        if module.path.startswith(prefix):
            return module.changed(path=module.path.removeprefix(prefix))
    return module.changed(options={**module.options, "any_prefix": True})


def plan(state: AdapterState, names: Names | None) -> list[Rewriting]:
    if len(state.components) > 1:
        raise LayoutError(
            f"lycoris_ names hold one model, not {len(state.components)}",
            where=state.where,
            seen=", ".join(state.components),
            next="--to kohya keeps them in one file under a prefix each",
            code="several-components",
        )
    return kohya.plan(state, names)


def spell(state: AdapterState, names: Names | None) -> list[AdapterFile]:
    """One file with the prefix lycoris_."""
    tensors: dict[str, Tensor] = {}
    for module in state.modules:
        name = (f"{state.prefix}_" if state.prefix else PREFIX) + flatten(module.written)
        spelled = lycoris_keys.spell_module(module, name, keep=state.layout == "lycoris")
        if spelled.keys() & tensors.keys():
            raise LayoutError(
                f"two modules flatten to `{name}`",
                where=state.where,
                next="LyCORIS's names cannot tell them apart; use --to peft",
                code="colliding-names",
            )
        tensors |= spelled
    _note_loader(state, names)
    metadata = dict(state.metadata)
    if any(k.startswith("ss_") or k in HASH_KEYS for k in metadata):
        metadata = describe_network(state, metadata)
    component = state.components[0] if state.components else ""
    extra = {META_COMPONENT: component, META_MODEL: state.model, META_PREFIX: state.prefix}
    if state.config:
        extra[META_CONFIG] = json.dumps(state.config, sort_keys=True)
    return [AdapterFile(tensors, metadata | {k: v for k, v in extra.items() if v})]


def _note_loader(state: AdapterState, names: Names | None) -> None:
    """Name the right files that LyCORIS's own loader cannot rebuild."""
    lycoris_keys.note_loader(state)
    turned = [m for m in state.modules if is_turned(m, names)]
    if turned:
        text = f"{len(turned)} modules are transformers' Conv1D, which LyCORIS's own loader refuses"
        state.note("lycoris-loader", turned[0].label, f"right by its definition, but {text}")
    for module in state.modules:
        if not (is_turned(module, names) or is_rebuilt(module, names)):
            (a, b), (c, d), _ = lokr_shapes(module)
            state.note(
                "lycoris-loader",
                module.label,
                f"right by its definition, but LyCORIS's own loader guesses other factors for "
                f"outputs {a}·{b}, inputs {c}·{d}",
            )


def is_rebuilt(module: ModuleState, names: Names | None) -> bool:
    """Whether LyCORIS's own loader cuts a module's factors as the file does; only a LoKr's can differ."""
    if module.algorithm != "lokr":
        return True
    shapes = {s: t.shape for s, t in module.tensors.items() if s != "magnitude"}
    return lycoris_loads(shapes, *_layer(module, names))


def is_turned(module: ModuleState, names: Names | None) -> bool:
    """Whether the weight is transformers' Conv1D's, (i, o), as its options or the base's shape say."""
    if module.kind == "embedding" or traits_of(module.algorithm).vector:
        return False
    if module.options.get("fan_in_fan_out"):
        return True
    if module.algorithm != "lokr" or not may_be_transposed(module):
        return False
    (a, b), (c, d), _ = lokr_shapes(module)
    return a * b != c * d and _layer(module, names) == (c * d, a * b)


def _layer(module: ModuleState, names: Names | None) -> tuple[int, int]:
    """(o, i) of the weight; where the base is not known a flat w2 counts the kernel into i."""
    component = names.components.get(module.component) if names else None
    shape = component.shape(module.path, module.naming) if component else None
    out, into, _ = lokr_shapes(module)
    if shape is None or len(shape) < 2:
        return out[0] * out[1], into[0] * into[1]
    return shape[0], shape[1]


FORMAT = Format(
    name="lycoris",
    title="LyCORIS (lycoris_…)",
    claims=claims,
    parse=parse,
    plan=plan,
    spell=spell,
    holds=lycoris_keys.holds,
    naming="diffusers",
    examples=("lycoris_blocks_0_attn_q.lokr_w1",),
)
