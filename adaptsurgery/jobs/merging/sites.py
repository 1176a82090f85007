"""Every name under which an adapter may mean a weight of the base, and the stored rows behind it.

A *site* is a list of pieces, rows of stored tensors, that make up one module's weight one below
the other. Besides the stored modules themselves there are::

    self_attn.q_proj          rows of a stored self_attn.qkv_proj      (Phi-3)
    self_attn.qkv_proj        stored q_proj, k_proj, v_proj
    mlp.experts.3.gate_proj   rows of slice 3 of experts.gate_up_proj  (E, 2·o, i)
    mlp.experts.3.gate_proj   block_sparse_moe.experts.3.w1            (Mixtral's files)
    layers.0.attention.q_proj encoder.layer.0.attention.attention.query  (ViT, transformers 5)
    model.language_model.…    language_model.model.…                   (Llava, transformers 4.52)
    text_model.encoder.…      transformer.resblocks.…                  (OpenCLIP)
    to_q                      rows of img_attn.qkv                     (the bundled tables)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adaptsurgery.checkpoint.base import Base, Located
from adaptsurgery_formats.names import Component, names_of_base


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, stop) of a stored weight's canonical form (o, i, *k); a stop of 0 takes all.

    ``index`` picks a slice of a stacked (E, …) tensor. ``turned``: the tensor is stored (…, i, o);
    None where shapes have to tell.
    """

    name: str
    start: int = 0
    stop: int = 0
    index: int | None = None
    turned: bool | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """The pieces of one module's weight.

    ``part`` 0, 1 or 2 says that it is the q, k or v of its one piece, whose rows only the
    adapters' own shapes tell. ``refused`` says why nothing can be merged here. ``tied`` names the
    parameter that would have to be written apart: an output head that is the embedding.
    """

    pieces: tuple[Piece, ...]
    part: int = -1
    refused: str = ""
    tied: str = ""


Sites = dict[str, Site]
Parameters = Mapping[str, Located]

_QKV = ("q_proj", "k_proj", "v_proj")
# Fused name → its parts, contiguous, in order.
FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": _QKV,
    "in_proj": _QKV,
    "to_qkv": ("to_q", "to_k", "to_v"),
    "qkv": ("q", "k", "v"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Fused modules whose rows are interleaved by heads or groups.
INTERLEAVED = ("query_key_value", "wqkv", "Wqkv", "W_pack")
HEAD = "lm_head"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
# A head that is stored, by any of these names, is tied to nothing.
_HEADS = ("lm_head.weight", "embed_out.weight", "proj_out.weight")
_EXPERT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_STACKED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
# Model types whose stacked experts are stored (E, i, o).
_TURNED_EXPERTS = frozenset(
    ("gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text")
)


def sites_of(base: Base) -> dict[str, Sites]:
    """Component → path → site."""
    known = _tables(base)
    return {
        name: _Finder(parameters, base.configs.get(name, {}), known.get(name)).all()
        for name, parameters in base.parameters.items()
    }


def bias_name(weight: str) -> str:
    """The name of the bias beside a weight: a.weight → a.bias, in_proj_weight → in_proj_bias."""
    if weight.endswith("weight"):
        return weight.removesuffix("weight") + "bias"
    return weight + "_bias"


def _tables(base: Base) -> dict[str, Component]:
    """The components that a bundled table knows, the base as a whole or one by one."""
    found: dict[str, Component] = {}
    shapes = base.components
    whole = names_of_base(shapes, base.where)
    for name in shapes:
        names = whole if whole.model else names_of_base({name: shapes[name]}, base.where)
        component = names.components.get(name or next(iter(names.components)))
        if names.model and component is not None and component.stored:
            found[name] = component
    return found


def tied_embedding(parameters: Parameters) -> list[str]:
    """The embedding that an absent output head is, as a list of one name, or none."""
    if "output.weight" in parameters or any(n.endswith(_HEADS) for n in parameters):
        return []
    found = [n for n in parameters if n.endswith(EMBEDDINGS) and len(parameters[n].shape) == 2]
    return found if len(found) == 1 else []


def head_of(embedding: str) -> str:
    """The output head that may be an embedding's table: lm_head, or language_model.lm_head of
    language_model.model.embed_tokens.weight."""
    segments = embedding.split(".")
    inner = "model" if "embed_tokens" in segments else "transformer"
    stem = segments[:-3] if segments[-3:-2] == [inner] else []
    return ".".join([*stem, HEAD])


def is_shared(name: str) -> bool:
    """Whether this is the one table of an encoder and a decoder: T5's, BART's."""
    return name == "shared.weight" or name.endswith(".shared.weight")


def users_of_shared(name: str) -> tuple[str, ...]:
    """The parameters that are a shared table in the model, wherever a file leaves them out."""
    stem = name.removesuffix("shared.weight")
    return (
        f"{stem}encoder.embed_tokens.weight",
        f"{stem}decoder.embed_tokens.weight",
        f"{HEAD}.weight",
    )


class _Finder:
    """The sites of one component, gathered rule by rule; the first to name a path has it."""

    def __init__(
        self, parameters: Parameters, config: Mapping[str, Any], known: Component | None
    ) -> None:
        self.parameters, self.config, self.known = parameters, config, known
        self.kind = str(config.get("model_type", ""))
        text = config.get("text_config")
        inner = text.get("model_type", "") if isinstance(text, Mapping) else ""
        self.kinds = {self.kind, str(inner)} - {""}
        self.sites: Sites = {}

    def all(self) -> Sites:
        stored = [n.removesuffix(".weight") for n in self.parameters if n.endswith(".weight")]
        for path in stored:
            self.sites[path] = Site((Piece(f"{path}.weight"),))
        for rule in (self._by_table, self._cut, self._joined, self._experts, self._open_clip):
            for path, site in list(rule()):
                self.sites.setdefault(path, site)
        for embedding in tied_embedding(self.parameters):
            head = head_of(embedding)
            self.sites.setdefault(head, Site((Piece(embedding),), tied=f"{head}.weight"))
        for name in [n for n in self.parameters if is_shared(n)]:
            why = (
                f"`{name}` is it too, with other tables; a change of one has no place in the model"
            )
            for user in users_of_shared(name):
                path = user.removesuffix(".weight")
                self.sites.setdefault(path, Site((Piece(name),), refused=why))
        for path, site in list(self.sites.items()):
            for other in _other_spellings(path):
                self.sites.setdefault(other, site)
        for path, site in list(self._beside_a_language_model()):
            self.sites.setdefault(path, site)
        return self.sites

    def _by_table(self) -> Iterator[tuple[str, Site]]:
        if self.known is None:
            return
        for path in (*self.known.modules, *self.known.aliases, *self.known.native):
            pieces = _table_pieces(path, self.known)
            if all(p.name in self.parameters for p in pieces):
                yield path, Site(pieces)

    def _cut(self) -> Iterator[tuple[str, Site]]:
        """Split names over fused weights."""
        for name, at in self.parameters.items():
            stem, fused = _fused_name(name)
            if len(at.shape) < 2:
                continue
            if fused in INTERLEAVED or self._interleaved(name, fused):
                for part in (*_QKV, "query", "key", "value", "q", "k", "v"):
                    why = f"`{name}` holds q, k and v interleaved by heads"
                    yield stem + part, Site((Piece(name),), refused=why)
            elif fused == "gate_up_proj" and len(at.shape) == 2:
                half = at.shape[0] // 2
                yield stem + "gate_proj", Site((Piece(name, 0, half),))
                yield stem + "up_proj", Site((Piece(name, half, 2 * half),))
            elif fused in FUSED and len(FUSED[fused]) == 3:
                for number, part in enumerate(FUSED[fused]):
                    yield stem + part, Site((Piece(name, turned=False),), part=number)
            elif fused == "c_attn" and at.shape[1] == 3 * at.shape[0]:
                for number, part in enumerate(_QKV):
                    yield stem + part, Site((Piece(name, turned=True),), part=number)

    def _interleaved(self, name: str, fused: str) -> bool:
        """CodeGen's qkv_proj, which has Phi-3's name and another order."""
        if fused != "qkv_proj":
            return False
        return self.kind == "codegen" if self.kind else bool(_CODEGEN.search(name))

    def _joined(self) -> Iterator[tuple[str, Site]]:
        """Fused names over split weights of one input."""
        for fused, parts in FUSED.items():
            ending = f".{parts[0]}"
            for path in [p for p in self.sites if f".{p}".endswith(ending)]:
                stem = path[: len(path) - len(parts[0])]
                members = [self.sites.get(stem + part) for part in parts]
                pieces = tuple(p for m in members if m and m.part < 0 for p in m.pieces)
                if len(pieces) == len(parts) and self._alike(pieces):
                    yield stem + fused, Site(pieces)

    def _alike(self, pieces: tuple[Piece, ...]) -> bool:
        whole = all(p.stop == 0 and p.index is None for p in pieces)
        return whole and len({self.parameters[p.name].shape[1:] for p in pieces}) == 1

    def _experts(self) -> Iterator[tuple[str, Site]]:
        """Per-expert names over stacked (E, …) weights."""
        for name, at in self.parameters.items():
            bare = name.removesuffix(".weight")
            stem, _, last = bare.rpartition(".")
            if len(at.shape) == 3 and last in _STACKED and stem.endswith("experts"):
                for index in range(at.shape[0]):
                    for part, site in self._expert(name, last, index, at.shape):
                        yield f"{stem}.{index}.{part}", site

    def _expert(
        self, name: str, last: str, index: int, shape: tuple[int, ...]
    ) -> Iterator[tuple[str, Site]]:
        parts = FUSED.get(last, (last,))
        turned = self._turned_expert(name, last, shape)
        why = ""
        if len(parts) == 2 and self._interleaved_experts(name):
            why = f"`{name}` holds gate and up interleaved"
        elif turned is None and shape[1] == shape[2]:
            why = f"`{name}` is square, and nothing tells whether it is stored (E, i, o)"
        if why:
            yield from ((part, Site((Piece(name),), refused=why)) for part in parts)
        elif len(parts) == 1:
            yield last, Site((Piece(name, index=index, turned=turned),))
        else:
            half = shape[2 if turned else 1] // 2
            yield parts[0], Site((Piece(name, 0, half, index, bool(turned)),))
            yield parts[1], Site((Piece(name, half, 2 * half, index, bool(turned)),))

    def _turned_expert(self, name: str, last: str, shape: tuple[int, ...]) -> bool | None:
        """Whether a stack is stored (E, i, o): by the shape of its sibling, else by the config."""
        other = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}.get(last)
        suffix = ".weight" if name.endswith(".weight") else ""
        stem = name.removesuffix(suffix).removesuffix(last)
        beside = self.parameters.get(f"{stem}{other}{suffix}")
        if beside is not None and len(beside.shape) == 3:
            both = (shape, beside.shape)
            (_, a, b), (_, c, d) = both if last == "gate_up_proj" else both[::-1]
            if (a, b) == (d, 2 * c):  # (E, h, 2I) and (E, I, h)
                return True
            if (a, b) == (2 * d, c):  # (E, 2I, h) and (E, h, I)
                return False
        return True if self.kinds & _TURNED_EXPERTS else None

    def _interleaved_experts(self, name: str) -> bool:
        """GPT-OSS's, which has a bias beside its stacks where no config names it."""
        if self.kinds:
            return any(k.startswith("gpt_oss") for k in self.kinds)
        return bias_name(name) in self.parameters

    def _beside_a_language_model(self) -> Iterator[tuple[str, Site]]:
        """The modules of Llava and its like by their names before transformers 4.52, or since.

        The files mostly keep the older names, an adapter has those of the model that it was trained in.
        """
        found = {head for path in self.sites for head in _TEXT if path.startswith(head)}
        if _NEW_TEXT in found:
            other = _older
        elif _OLD_TEXT in found:
            other = _newer
        elif _QWEN_TEXT in found and any(path.startswith("visual.") for path in self.sites):
            other = _newer_qwen
        else:
            return
        for path, site in self.sites.items():
            yield from ((name, site) for name in other(path))

    def _open_clip(self) -> Iterator[tuple[str, Site]]:
        """transformers' CLIP names over OpenCLIP's."""
        for path, site in list(self.sites.items()):
            found = _RESBLOCK.fullmatch(path)
            if found and found[2] in _OPEN_CLIP:
                yield f"text_model.encoder.layers.{found[1]}.{_OPEN_CLIP[found[2]]}", site
            elif path in _OPEN_CLIP:
                yield f"text_model.{_OPEN_CLIP[path]}", site


_CODEGEN = re.compile(r"(^|\.)h\.\d+\.attn\.qkv_proj\.")
# transformer.resblocks.0.mlp.c_fc
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_OPEN_CLIP = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "token_embedding": "embeddings.token_embedding",
    "ln_final": "final_layer_norm",
}


_NEW_TEXT, _OLD_TEXT, _QWEN_TEXT = _TEXT = (
    "model.language_model.",
    "language_model.model.",
    "model.layers.",
)
_OLD_HEAD = f"language_model.{HEAD}"


def _newer(path: str) -> Iterator[str]:
    """Llava's, PaliGemma's, Mllama's: all but the head is within `model` now."""
    if path.startswith(_OLD_TEXT):
        yield _NEW_TEXT + path.removeprefix(_OLD_TEXT)
    elif path == _OLD_HEAD:
        yield HEAD
    else:
        yield f"model.{path}"


def _newer_qwen(path: str) -> Iterator[str]:
    """Qwen2-VL's, whose language model was `model` alone."""
    if path != HEAD:
        yield (
            _NEW_TEXT + path.removeprefix("model.")
            if path.startswith("model.")
            else f"model.{path}"
        )


def _older(path: str) -> Iterator[str]:
    """Both of these, backwards: they differ in the language model's."""
    if path.startswith(_NEW_TEXT):
        rest = path.removeprefix(_NEW_TEXT)
        yield from (_OLD_TEXT + rest, f"model.{rest}")
    elif path == HEAD:
        yield _OLD_HEAD
    elif path.startswith("model."):
        yield path.removeprefix("model.")


def _fused_name(name: str) -> tuple[str, str]:
    """("self_attn.", "qkv_proj") of self_attn.qkv_proj.weight; ("attn.", "in_proj") of
    attn.in_proj_weight."""
    bare = name.removesuffix(".weight").removesuffix("_weight")
    stem, dot, last = bare.rpartition(".")
    return stem + dot, last


def _table_pieces(path: str, component: Component) -> tuple[Piece, ...]:
    """The stored rows of a module that a bundled table names, in whatever naming."""
    found = component.locate(path)
    assert found is not None
    naming, canonical = found
    native = component.stored == "native"
    if native == (naming == "native"):
        name = canonical if native else component.called(canonical)
        return (Piece(f"{name}.weight"),)
    if not native:
        segments = component.native[canonical]
        return tuple(Piece(f"{component.called(s.path)}.weight", s.start, s.stop) for s in segments)
    fused = component.native_of.get(canonical, "")
    spans, at = [], 0
    for s in component.native.get(fused, ()):
        rows = s.stop - s.start
        if s.path == canonical:
            spans.append((s.start, at, at + rows))
        at += rows
    return tuple(Piece(f"{fused}.weight", start, stop) for _, start, stop in sorted(spans))


# What transformers 5 calls modules that it stores under older names.
_VIT = (
    (".attention.attention.query", ".attention.q_proj"),
    (".attention.attention.key", ".attention.k_proj"),
    (".attention.attention.value", ".attention.v_proj"),
    (".attention.output.dense", ".attention.o_proj"),
    (".intermediate.dense", ".mlp.fc1"),
    (".output.dense", ".mlp.fc2"),
)
_TOWER = "vision_tower."
_EXPERT_NAME = re.compile(r"(.*\.experts\.\d+)\.(w[123]|gate_proj|up_proj|down_proj)")


def _other_spellings(path: str) -> Iterator[str]:
    """Mixtral's experts by their other names, and its blocks; ViT's layers of transformers 5; a
    vision tower with or without the `vision_model` that it was wrapped in."""
    names = [path]
    if found := _EXPERT_NAME.fullmatch(path):
        back = {long: short for short, long in _EXPERT.items()}
        names.append(f"{found[1]}.{_EXPERT.get(found[2]) or back[found[2]]}")
    for name in list(names):
        if ".block_sparse_moe." in name:
            names.append(name.replace(".block_sparse_moe.", ".mlp."))
        elif ".mlp.experts." in name or name.endswith(".mlp.gate"):
            names.append(name.replace(".mlp.", ".block_sparse_moe."))
    if f"{_TOWER}vision_model." in path:
        names.append(path.replace(f"{_TOWER}vision_model.", _TOWER))
    elif _TOWER in path:
        names.append(path.replace(_TOWER, f"{_TOWER}vision_model."))
    if "encoder.layer." in path:
        renamed = path.replace("encoder.layer.", "layers.")
        for old, new in _VIT:
            if renamed.endswith(old):
                renamed = renamed.removesuffix(old) + new
                break
        names.append(renamed)
    yield from names[1:]
