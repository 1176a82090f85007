"""Tables of words: embeddings, output heads, and the two that are one and the same.

model.embed_tokens.weight   without an lm_head.weight: the output head is this table
shared.weight               T5's and BART's one table of encoder and decoder
"""

from __future__ import annotations

from adaptsurgery_formats.names.rows import Parameters

HEAD = "lm_head"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
# Output heads that `all-linear` leaves out in a graph, which has no get_output_embeddings.
OUTPUTS = (HEAD, "embed_out", "output_layer")
# Heads of a model for sequence classification, which is no language model.
CLASSIFIERS = ("score", "classifier")
TASK_HEADS = CLASSIFIERS[::-1]  # in the order in which PEFT names them
ANSWER_HEADS = ("qa_outputs",)
# Tables that PEFT saves whole beside an adapter of theirs, whatever its config says.
SAVED_TABLES = ("embed_tokens", HEAD, "wte", "shared", "word_embeddings")
# A head that is stored, by any of these names, is tied to nothing.
_STORED_HEADS = ("lm_head.weight", "embed_out.weight", "proj_out.weight")


def tied_embedding(parameters: Parameters) -> list[str]:
    """The embedding that an absent output head is, as a list of one name, or none."""
    if "output.weight" in parameters or any(n.endswith(_STORED_HEADS) for n in parameters):
        return []
    tables = [n for n in parameters if n.endswith(EMBEDDINGS) and len(parameters[n].shape) == 2]
    return tables if len(tables) == 1 else []


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
