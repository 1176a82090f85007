"""A table that is embedding and output head in one, of which an adapter may mean only one.

The file has ``model.embed_tokens.weight`` and no ``lm_head.weight``. In the model that an adapter
was trained on each of the two has its own change, so the merged file keeps one table only where
both changes are the same; otherwise it has two, and its config says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptsurgery.checkpoint.base import Base, Located
from adaptsurgery.jobs.merging.configs import FLAG, is_text_of, may_tie, nested
from adaptsurgery.jobs.merging.matched import Change, Matched, TensorName
from adaptsurgery_formats import AdapterState, ModuleState, Note
from adaptsurgery_formats.errors import LayoutError
from adaptsurgery_formats.names.heads import (
    EMBEDDINGS,
    HEAD,
    head_of,
    is_shared,
    tied_embedding,
    users_of_shared,
)
from adaptsurgery_formats.reading import texts, typed
from adaptsurgery_formats.tensors import DTYPE_BYTES, Tensor, same_bytes

# Classes whose head is called lm_head; others (Whisper's proj_out) are not untied by themselves.
_WITH_HEAD = ("ForCausalLM", "LMHeadModel")


def settle_ties(base: Base, adapters: list[AdapterState], matches: Matched) -> set[str]:
    """Merge a tied table once, or have a head written apart; gives the components untied."""
    untied = set()
    for component, parameters in base.parameters.items():
        config = base.configs.get(component, {})
        for embedding in tied_embedding(parameters):
            table, head = (component, embedding), (component, f"{head_of(embedding)}.weight")
            if head not in matches.heads and not _touched(matches, table):
                continue
            if head not in matches.heads and not _is_tied(config):
                if any_tied(config) or not config:
                    text = (
                        f"`{embedding}` changes, and what is tied to it with it, as in PEFT's merge"
                    )
                    if not config:
                        text += "; without a config nothing tells whether an output head is"
                    matches.notes.append(Note("tied-table", base.where, text))
                continue
            if _alike(adapters, matches, table, head):
                _drop(matches, head)
                text = f"`{embedding}` is the output head too: both are changed alike, merged once"
                matches.notes.append(Note("tied-merged-once", base.where, text))
            elif _grown_alone(base, adapters, matches, table, head):
                text = f"`{embedding}` grows, and the output head that is tied to it with it"
                matches.notes.append(Note("tied-replaced-once", base.where, text))
            else:
                matches.heads[head] = table
                untied.add(component)
                matches.notes.append(
                    Note("untied", base.where, _said(embedding, head[1], bool(config)))
                )
        if _head_apart(base, matches, component):
            untied.add(component)
        _settle_shared(base, matches, component)
    return untied


def _said(embedding: str, head: str, has_config: bool) -> str:
    text = (
        f"`{head}` was tied to `{embedding}`, and the adapters change the two differently: "
        "written apart"
    )
    if has_config:
        return f"{text}, {FLAG} set to false in config.json"
    return f"{text}; load it with {FLAG}=False"


def _is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config without a stored head has a head at all, and does not deny the tie."""
    named = (texts(config, "architectures") or [""])[0]
    composite = named.endswith("ForConditionalGeneration") and is_text_of(config)
    return (named.endswith(_WITH_HEAD) or composite) and may_tie(config)


def any_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config says in so many words that the head is the embedding."""
    return any(typed(c, FLAG, bool) for c in nested(config))


def _head_apart(base: Base, matches: Matched, component: str) -> bool:
    """Whether a head that is stored, though the config ties it, becomes another than the table.

    A loader that trusts the config would drop the head.
    """
    config, parameters = base.configs.get(component, {}), base.parameters[component]
    head = (component, f"{HEAD}.weight")
    tables = [n for n in parameters if n.endswith(EMBEDDINGS)]
    if head[1] not in parameters or not any_tied(config) or len(tables) != 1:
        return False
    if not _touched(matches, head) or not _copies(parameters, tables[0], head[1]):
        return False
    text = f"`{head[1]}` is stored beside `{tables[0]}` and changes: {FLAG} set to false in config.json"
    matches.notes.append(Note("untied", base.where, text))
    return True


def _settle_shared(base: Base, matches: Matched, component: str) -> None:
    """T5's one table: a file's copies of it change as it does; a change of a copy alone is refused."""
    parameters = base.parameters[component]
    for name in [n for n in parameters if is_shared(n)]:
        shared, tied = (component, name), may_tie(base.configs.get(component, {}))
        for user in users_of_shared(name):
            is_head = user == f"{HEAD}.weight"
            if user in parameters and (tied or not is_head) and _copies(parameters, name, user):
                _follow(base, matches, shared, (component, user))
        if _touched(matches, shared):
            text = f"`{name}` changes for all that use it: encoder, decoder, and a tied output head"
            matches.notes.append(Note("tied-table", base.where, text))


def _follow(base: Base, matches: Matched, shared: TensorName, user: TensorName) -> None:
    if _touched(matches, user):
        raise LayoutError(
            f"`{user[1]}` is a copy of `{shared[1]}`, which the model reads in its place",
            where=base.where,
            next=f"an adapter of `{shared[1]}`",
            code="shared-table",
        )
    for kind in (matches.changes, matches.saved):
        if shared in kind:
            kind[user] = kind[shared]  # type: ignore[assignment]


def _copies(parameters: Mapping[str, Located], first: str, second: str) -> bool:
    a, b = parameters[first], parameters[second]
    if a.tensor is None or b.tensor is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return same_bytes(a.tensor, b.tensor)


def _touched(matches: Matched, target: TensorName) -> bool:
    return target in matches.changes or target in matches.saved


def _drop(matches: Matched, head: TensorName) -> None:
    matches.heads.pop(head, None)
    matches.changes.pop(head, None)
    matches.saved.pop(head, None)


def _alike(
    adapters: list[AdapterState], matches: Matched, table: TensorName, head: TensorName
) -> bool:
    """Whether both are replaced by the same numbers and changed by the same deltas."""
    if not (_touched(matches, table) and _touched(matches, head)):
        return False
    replaced = [matches.saved.get(t) for t in (table, head)]
    if (replaced[0] is None) != (replaced[1] is None):
        return False
    if replaced[0] and replaced[1]:
        a, b = (adapters[s.adapter].saved[s.component][s.name] for s in replaced if s)
        if a.shape != b.shape or not same_bytes(a, b):
            return False
    first, second = matches.changes.get(table, []), matches.changes.get(head, [])
    return len(first) == len(second) and all(
        _same_change(adapters, a, b) for a, b in zip(first, second)
    )


def _same_change(adapters: list[AdapterState], a: Change, b: Change) -> bool:
    if a.adapter != b.adapter:
        return False
    modules = adapters[a.adapter].modules
    return _same_delta(modules[a.module], modules[b.module])


def _same_delta(embedding: ModuleState, head: ModuleState) -> bool:
    """Whether an embedding's LoRA (dim, r)·(r, vocab) is a head's (vocab, r)·(r, dim), turned."""
    if embedding.algorithm != head.algorithm or embedding.scale != head.scale:
        return False
    if embedding.algorithm == "full":
        return same_bytes(embedding.tensors["diff"], head.tensors["diff"])
    if embedding.algorithm != "lora" or {*embedding.tensors, *head.tensors} != {"up", "down"}:
        return False
    e, h = embedding.tensors, head.tensors
    return _is_transpose(e["down"], h["up"]) and _is_transpose(e["up"], h["down"])


def _is_transpose(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape[::-1]:
        return False
    left, right = _numbers(a), _numbers(b)
    rows, columns = a.shape
    return all(left[i * columns : (i + 1) * columns] == right[i::rows] for i in range(rows))


def _numbers(tensor: Tensor) -> memoryview[int]:
    """A tensor's elements as whole numbers of their size: enough to tell whether they are equal."""
    data = memoryview(tensor.read())
    size = DTYPE_BYTES[tensor.dtype]
    if size == 8:
        return data.cast("Q")
    return data.cast("I") if size == 4 else data.cast("H") if size == 2 else data.cast("B")


def _grown_alone(
    base: Base, adapters: list[AdapterState], matches: Matched, table: TensorName, head: TensorName
) -> bool:
    """Whether the table alone is replaced by one of more rows, which no old head would fit."""
    saved = matches.saved.get(table)
    if saved is None or _touched(matches, head):
        return False
    rows = adapters[saved.adapter].saved[saved.component][saved.name].shape[0]
    return rows != base.parameters[table[0]][table[1]].shape[0]
