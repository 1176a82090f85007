"""What models call their layers: families as rows of data, and the rules that read them.

The stored modules of a base are known by their own names; ``weights_of`` adds every other name under
which an adapter may mean some rows of them::

    self_attn.q_proj          rows of a stored self_attn.qkv_proj      (Phi-3)
    self_attn.qkv_proj        stored q_proj, k_proj, v_proj
    mlp.experts.3.gate_proj   rows of slice 3 of experts.gate_up_proj  (E, 2·o, i)
    mlp.experts.3.gate_proj   block_sparse_moe.experts.3.w1            (Mixtral's files)
    layers.0.attention.q_proj encoder.layer.0.attention.attention.query  (ViT, transformers 5)
    model.language_model.…    language_model.model.…                   (Llava, transformers 4.52)
    text_model.encoder.…      transformer.resblocks.…                  (OpenCLIP)
    to_q                      rows of img_attn.qkv                     (the bundled tables)

A family is a row of ``FAMILIES`` where its config tells it, or of the tables of names below, which
hold for all models that have such names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adaptsurgery_formats.names.heads import (
    HEAD,
    head_of,
    is_shared,
    tied_embedding,
    users_of_shared,
)
from adaptsurgery_formats.names.rows import Parameters, Rows, StoredWeight, StoredWeights

_QKV = ("q_proj", "k_proj", "v_proj")
_Q_V, _QUERY_VALUE = ("q_proj", "v_proj"), ("query", "value")
_QUERY_KEY_VALUE = "query_key_value"


@dataclass(frozen=True)
class Family:
    """What only a model's type tells.

    ``targets`` are the layers adapted where a config says nothing: the queries and values, or what
    holds them; PEFT has the same for all its methods. ``turned_experts``: stacks are stored (E, i,
    o). ``interleaved_experts``: their gate and up rows take turns. ``conv1d``: the layers of
    transformers' Conv1D are stored (i, o). ``interleaved`` are fused layers whose q, k and v do not
    lie one below the other.
    """

    targets: tuple[str, ...] | str = ()
    turned_experts: bool = False
    interleaved_experts: bool = False
    conv1d: bool = False
    interleaved: tuple[str, ...] = ()


# model_type → its row, or the type whose row it shares.
FAMILIES: Mapping[str, Family | str] = {
    "llama": Family(targets=_Q_V),
    **dict.fromkeys(
        ("bart", "opt", "gptj", "gpt_neo", "mistral", "mixtral", "stablelm", "gemma", "gemma2",
         "gemma3_text", "qwen2", "qwen3"), "llama",
    ),
    "llama4": Family(targets=_Q_V, turned_experts=True),
    "qwen3_vl_moe": Family(turned_experts=True),
    "llama4_text": "qwen3_vl_moe",
    "qwen3_vl_moe_text": "qwen3_vl_moe",
    "gpt_oss": Family(turned_experts=True, interleaved_experts=True),
    "phi": Family(targets=(*_Q_V, "fc1", "fc2")),
    "bert": Family(targets=_QUERY_VALUE),
    **dict.fromkeys(("roberta", "xlm-roberta", "electra", "layoutlm"), "bert"),
    "deberta": Family(targets=("in_proj",)),
    "deberta-v2": Family(targets=("query_proj", "value_proj")),
    "t5": Family(targets=("q", "v")),
    "mt5": "t5",
    "blip-2": Family(targets=("q", "v", *_Q_V)),
    "falcon": Family(targets=(_QUERY_KEY_VALUE,)),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb"), "falcon"),
    "mpt": Family(targets=("Wqkv",)),
    "gpt2": Family(targets=("c_attn",), conv1d=True),
    "imagegpt": Family(conv1d=True),
    **dict.fromkeys(("openai-gpt", "decision_transformer", "clvp"), "imagegpt"),
    "gpt_bigcode": Family(targets=("c_attn",)),
    "btlm": Family(targets=("c_proj", "c_attn")),
    "codegen": Family(targets=("qkv_proj",), interleaved=("qkv_proj",)),
    "gemma4": Family(targets=r".*language_model\..*\.(q_proj|v_proj)"),
    "nemotron_h": Family(targets=(*_QKV, "o_proj")),
    "rwkv": Family(targets=("key", "value", "receptance", "output")),
    "rwkv7": Family(targets=("r_proj", "k_proj", "v_proj", "o_proj", "key", "value")),
}  # fmt: skip
_UNKNOWN = Family()


def family(model_type: str) -> Family:
    """The row of a model type, through the type whose row it shares; an empty one where none is."""
    row = FAMILIES.get(model_type, _UNKNOWN)
    return family(row) if isinstance(row, str) else row


def default_targets() -> dict[str, tuple[str, ...] | str]:
    """Model type → what is adapted where target_modules says nothing."""
    return {kind: family(kind).targets for kind in FAMILIES if family(kind).targets}


# Fused name → its parts, contiguous, in order.
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": _QKV,
    "in_proj": _QKV,
    "to_qkv": ("to_q", "to_k", "to_v"),
    "qkv": ("q", "k", "v"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
CONV1D_FUSED = "c_attn"
# Fused modules whose rows are interleaved by heads or groups, and the parts that one may ask of them.
INTERLEAVED = (_QUERY_KEY_VALUE, "wqkv", "Wqkv", "W_pack")
_PARTS = (*_QKV, "query", "key", "value", "q", "k", "v")
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_STACKED = (_GATE_UP, "gate_proj", "up_proj", _DOWN)
# Fused layers by the names beside them, where no config tells the family.
_BY_KEYS = {"codegen": re.compile(r"(^|\.)h\.\d+\.attn\.qkv_proj\.")}
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
CLIP_TEXT = "text_model"
# Mixtral's experts, as its files and as the model calls them.
_EXPERT_NAME = re.compile(r"(.*\.experts\.\d+)\.(w[123]|gate_proj|up_proj|down_proj)")
_EXPERT = {"w1": "gate_proj", "w2": _DOWN, "w3": "up_proj"}
_EXPERT |= {long: short for short, long in _EXPERT.items()}
# What transformers 5 calls modules that it stores under older names.
_VIT = (
    (".attention.attention.query", ".attention.q_proj"),
    (".attention.attention.key", ".attention.k_proj"),
    (".attention.attention.value", ".attention.v_proj"),
    (".attention.output.dense", ".attention.o_proj"),
    (".intermediate.dense", ".mlp.fc1"),
    (".output.dense", ".mlp.fc2"),
)
_VIT_OLD, _VIT_NEW = "encoder.layer.", "layers."
_PATCHES = ".patch_embeddings."
_TOWER, _WRAPPED_TOWER = "vision_tower.", "vision_tower.vision_model."
# The language model within a model of images and text, of transformers ≥ 4.52 and before.
_NEW_TEXT, _OLD_TEXT, _QWEN_TEXT = _TEXT = (
    "model.language_model.",
    "language_model.model.",
    "model.layers.",
)
_QWEN_VISION = "visual."
_OLD_HEAD = f"language_model.{HEAD}"


def weights_of(
    parameters: Parameters,
    config: Mapping[str, Any],
    known: Iterable[tuple[str, tuple[Rows, ...]]] = (),
) -> StoredWeights:
    """Every path under which an adapter may mean rows of ``parameters``, the stored modules first.

    ``known`` are the paths that a table of the model has. The first rule to name a path has it.
    """
    return _Finder(parameters, config, known).all()


def bias_name(weight: str) -> str:
    """The name of the bias beside a weight: a.weight → a.bias, in_proj_weight → in_proj_bias."""
    if weight.endswith("weight"):
        return weight.removesuffix("weight") + "bias"
    return weight + "_bias"


class _Finder:
    """The sites of one component, gathered rule by rule; the first to name a path has it."""

    def __init__(
        self,
        parameters: Parameters,
        config: Mapping[str, Any],
        known: Iterable[tuple[str, tuple[Rows, ...]]],
    ) -> None:
        self.parameters, self.known = parameters, known
        self.kind = str(config.get("model_type", ""))
        text = config.get("text_config")
        inner = text.get("model_type", "") if isinstance(text, Mapping) else ""
        self.kinds = {self.kind, str(inner)} - {""}
        self.weights: dict[str, StoredWeight] = {}

    def all(self) -> StoredWeights:
        stored = [n.removesuffix(".weight") for n in self.parameters if n.endswith(".weight")]
        for path in stored:
            self.weights[path] = StoredWeight((Rows(f"{path}.weight"),))
        rules: tuple[Callable[[], Iterator[tuple[str, StoredWeight]]], ...] = (
            self._by_table, self._cut, self._joined, self._experts, self._open_clip,
            self._tied_head, self._shared, self._other_spellings, self._older_vit, self._beside_a_language_model,
        )  # fmt: skip
        for rule in rules:
            for path, weight in list(rule()):
                self.weights.setdefault(path, weight)
        return self.weights

    def _by_table(self) -> Iterator[tuple[str, StoredWeight]]:
        for path, rows in self.known:
            if rows and all(r.name in self.parameters for r in rows):
                yield path, StoredWeight(rows)

    def _tied_head(self) -> Iterator[tuple[str, StoredWeight]]:
        for embedding in tied_embedding(self.parameters):
            head = head_of(embedding)
            yield head, StoredWeight((Rows(embedding),), tied=f"{head}.weight")

    def _shared(self) -> Iterator[tuple[str, StoredWeight]]:
        for name in [n for n in self.parameters if is_shared(n)]:
            why = (
                f"`{name}` is it too, with other tables; a change of one has no place in the model"
            )
            for user in users_of_shared(name):
                yield user.removesuffix(".weight"), StoredWeight((Rows(name),), refused=why)

    def _other_spellings(self) -> Iterator[tuple[str, StoredWeight]]:
        for path, weight in self.weights.items():
            yield from ((other, weight) for other in _other_spellings(path))

    def _older_vit(self) -> Iterator[tuple[str, StoredWeight]]:
        """ViT's layers by the names before transformers 5, where a model has the new ones."""
        if any(_PATCHES in f".{name}" for name in self.parameters):
            for path, weight in self.weights.items():
                if older := _older_vit(path):
                    yield older, weight

    def _cut(self) -> Iterator[tuple[str, StoredWeight]]:
        """Split names over fused weights."""
        for name, at in self.parameters.items():
            stem, fused = _fused_name(name)
            if len(at.shape) < 2:
                continue
            if fused in INTERLEAVED or self._interleaved(name, fused):
                for part in _PARTS:
                    why = f"`{name}` holds q, k and v interleaved by heads"
                    yield stem + part, StoredWeight((Rows(name),), refused=why)
            elif fused == _GATE_UP and len(at.shape) == 2:
                half = at.shape[0] // 2
                for number, part in enumerate(FUSED[fused]):
                    rows = Rows(name, number * half, (number + 1) * half)
                    yield stem + part, StoredWeight((rows,))
            elif fused in FUSED and len(FUSED[fused]) == 3:
                for number, part in enumerate(FUSED[fused]):
                    yield stem + part, StoredWeight((Rows(name, turned=False),), part=number)
            elif fused == CONV1D_FUSED and at.shape[1] == 3 * at.shape[0]:
                for number, part in enumerate(_QKV):
                    yield stem + part, StoredWeight((Rows(name, turned=True),), part=number)

    def _interleaved(self, name: str, fused: str) -> bool:
        """CodeGen's qkv_proj, which has Phi-3's name and another order."""
        if self.kind:
            return fused in family(self.kind).interleaved
        return any(
            fused in family(kind).interleaved and mark.search(name)
            for kind, mark in _BY_KEYS.items()
        )

    def _joined(self) -> Iterator[tuple[str, StoredWeight]]:
        """Fused names over split weights of one input."""
        for fused, parts in FUSED.items():
            ending = f".{parts[0]}"
            for path in [p for p in self.weights if f".{p}".endswith(ending)]:
                stem = path[: len(path) - len(parts[0])]
                members = [self.weights.get(stem + part) for part in parts]
                rows = tuple(p for m in members if m and m.part < 0 for p in m.rows)
                if len(rows) == len(parts) and self._alike(rows):
                    yield stem + fused, StoredWeight(rows)

    def _alike(self, rows: tuple[Rows, ...]) -> bool:
        inputs = {self.parameters[p.name].shape[1:] for p in rows}
        return all(p.whole for p in rows) and len(inputs) == 1

    def _experts(self) -> Iterator[tuple[str, StoredWeight]]:
        """Per-expert names over stacked (E, …) weights."""
        for name, at in self.parameters.items():
            bare = name.removesuffix(".weight")
            stem, _, last = bare.rpartition(".")
            if len(at.shape) == 3 and last in _STACKED and stem.endswith("experts"):
                for index in range(at.shape[0]):
                    for part, weight in self._expert(name, last, index, at.shape):
                        yield f"{stem}.{index}.{part}", weight

    def _expert(
        self, name: str, last: str, index: int, shape: tuple[int, ...]
    ) -> Iterator[tuple[str, StoredWeight]]:
        parts = FUSED.get(last, (last,))
        turned = self._turned_expert(name, last, shape)
        why = ""
        if len(parts) == 2 and self._interleaved_experts(name):
            why = f"`{name}` holds gate and up interleaved"
        elif turned is None and shape[1] == shape[2]:
            why = f"`{name}` is square, and nothing tells whether it is stored (E, i, o)"
        if why:
            yield from ((part, StoredWeight((Rows(name),), refused=why)) for part in parts)
        elif len(parts) == 1:
            yield last, StoredWeight((Rows(name, index=index, turned=turned),))
        else:
            half = shape[2 if turned else 1] // 2
            yield parts[0], StoredWeight((Rows(name, 0, half, index, bool(turned)),))
            yield parts[1], StoredWeight((Rows(name, half, 2 * half, index, bool(turned)),))

    def _turned_expert(self, name: str, last: str, shape: tuple[int, ...]) -> bool | None:
        """Whether a stack is stored (E, i, o): by the shape of its sibling, else by the config."""
        other = {_GATE_UP: _DOWN, _DOWN: _GATE_UP}.get(last)
        suffix = ".weight" if name.endswith(".weight") else ""
        stem = name.removesuffix(suffix).removesuffix(last)
        beside = self.parameters.get(f"{stem}{other}{suffix}")
        if beside is not None and len(beside.shape) == 3:
            both = (shape, beside.shape)
            (_, a, b), (_, c, d) = both if last == _GATE_UP else both[::-1]
            if (a, b) == (d, 2 * c):  # (E, h, 2I) and (E, I, h)
                return True
            if (a, b) == (2 * d, c):  # (E, 2I, h) and (E, h, I)
                return False
        return True if any(family(k).turned_experts for k in self.kinds) else None

    def _interleaved_experts(self, name: str) -> bool:
        """GPT-OSS's, which has a bias beside its stacks where no config names it."""
        if self.kinds:
            return any(family(k).interleaved_experts for k in self.kinds)
        return bias_name(name) in self.parameters

    def _beside_a_language_model(self) -> Iterator[tuple[str, StoredWeight]]:
        """The modules of Llava and its like by their names before transformers 4.52, or since.

        The files mostly keep the older names, an adapter has those of the model that it was trained in.
        """
        heads = {head for path in self.weights for head in _TEXT if path.startswith(head)}
        if _NEW_TEXT in heads:
            other = _older
        elif _OLD_TEXT in heads:
            other = _newer
        elif _QWEN_TEXT in heads and any(path.startswith(_QWEN_VISION) for path in self.weights):
            other = _newer_qwen
        else:
            return
        for path, weight in self.weights.items():
            yield from ((name, weight) for name in other(path))

    def _open_clip(self) -> Iterator[tuple[str, StoredWeight]]:
        """transformers' CLIP names over OpenCLIP's."""
        for path, weight in list(self.weights.items()):
            block = _RESBLOCK.fullmatch(path)
            if block and block[2] in _OPEN_CLIP:
                yield f"{CLIP_TEXT}.encoder.layers.{block[1]}.{_OPEN_CLIP[block[2]]}", weight
            elif path in _OPEN_CLIP:
                yield f"{CLIP_TEXT}.{_OPEN_CLIP[path]}", weight


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


def _other_spellings(path: str) -> Iterator[str]:
    """Mixtral's experts by their other names, and its blocks; ViT's layers of transformers 5; a
    vision tower with or without the `vision_model` that it was wrapped in."""
    names = [path]
    if expert := _EXPERT_NAME.fullmatch(path):
        names.append(f"{expert[1]}.{_EXPERT[expert[2]]}")
    for name in list(names):
        if ".block_sparse_moe." in name:
            names.append(name.replace(".block_sparse_moe.", ".mlp."))
        elif ".mlp.experts." in name or name.endswith(".mlp.gate"):
            names.append(name.replace(".mlp.", ".block_sparse_moe."))
    if _WRAPPED_TOWER in path:
        names.append(path.replace(_WRAPPED_TOWER, _TOWER))
    elif _TOWER in path:
        names.append(path.replace(_TOWER, _WRAPPED_TOWER))
    if _VIT_OLD in path:
        names.append(_newer_vit(path))
    yield from names[1:]


def _older_vit(path: str) -> str:
    """encoder.layer.0.attention.attention.query of layers.0.attention.q_proj; "" for any other."""
    head, separator, _ = path.partition(_VIT_NEW)
    ending = next((pair for pair in _VIT if path.endswith(pair[1])), None)
    if not separator or not ending or head.endswith("encoder."):
        return ""
    return path.replace(_VIT_NEW, _VIT_OLD, 1).removesuffix(ending[1]) + ending[0]


def _newer_vit(path: str) -> str:
    renamed = path.replace(_VIT_OLD, _VIT_NEW)
    for old, new in _VIT:
        if renamed.endswith(old):
            return renamed.removesuffix(old) + new
    return renamed
