"""What a parameter is, by its name and shape: a layer that adapters go on, or something else.

========== =======================================================================================
linear     a weight (o, i); (i, o) where transformers' Conv1D stores it turned
conv1d…3d  a weight (o, i, *k)
embedding  embed_tokens, wte, …position_embedding: (vocab, dim)
head       lm_head, score, classifier, …: what turns hidden states into answers
norm       a weight (n,)
bias       beside any of them
other      a parameter that is no module's weight or bias: cls_token, in_proj_weight, buffers
========== =======================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptsurgery_formats.names.orientation import conv1d_turned
from adaptsurgery_formats.names.rows import Parameters

# The last segment of an embedding's path; one with a bias is a Linear of such a name.
_EMBEDDING = re.compile(
    r"(^|_)(wte|wpe|shared|emb|embed|embedding|embeddings|embed_\w+|tok_embeddings)$"
)
# Output layers, as transformers, timm, llama's own and others call them.
_HEAD = re.compile(
    r"^(lm_head|embed_out|score|classifier|qa_outputs|head|heads|cls|output_projection|logits|"
    r"lm_head_\w+|proj_out_head|predictions|decoder_head)$"
)
_CONVOLUTIONS = {3: "conv1d", 4: "conv2d", 5: "conv3d"}
LAYERS = ("linear", "conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class Kind:
    """``name`` as above; ``path`` of the module; ``turned``: its weight is stored (i, o)."""

    name: str
    path: str
    turned: bool = False


def kind_of(
    name: str, shape: tuple[int, ...], parameters: Parameters, config: Mapping[str, Any]
) -> Kind:
    """What the parameter ``name`` of a component is."""
    path, _, last = name.rpartition(".")
    if last == "bias" and len(shape) == 1:
        return Kind("bias", path)
    if last != "weight" or not 1 <= len(shape) <= 5:
        return Kind("other", path)
    if len(shape) == 1:
        return Kind("norm", path)
    if len(shape) > 2:
        return Kind(_CONVOLUTIONS[len(shape)], path)
    biased = (f"{path}.bias" if path else "bias") in parameters
    if not biased and _EMBEDDING.search(_last_name(path)):
        return Kind("embedding", path, turned=True)
    if _is_head(path, shape, parameters, config):
        return Kind("head", path)
    return Kind("linear", path, conv1d_turned(name, shape, parameters, config))


def _is_head(
    path: str, shape: tuple[int, ...], parameters: Parameters, config: Mapping[str, Any]
) -> bool:
    """An output layer by its name, or a last `output` with as many rows as there are words."""
    last = _last_name(path)
    vocabulary = config.get("vocab_size")
    return bool(_HEAD.match(last)) or (last == "output" and shape[0] == vocabulary)


def _last_name(path: str) -> str:
    """The last segment that is no number: classifier.2 → classifier."""
    named = [part for part in path.split(".") if not part.isdigit()]
    return named[-1] if named else ""
