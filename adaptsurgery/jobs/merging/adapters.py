"""The adapters that a merge is given, parsed but not yet looked up in anything."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from adaptsurgery.adapters.loading import check_values, parse_files, read_files
from adaptsurgery.checkpoint.hub import resolve
from adaptsurgery.jobs.merging.matched import Matched
from adaptsurgery.jobs.merging.plan import AdapterInput, adapter_input
from adaptsurgery.jobs.values import read_number
from adaptsurgery_formats import AdapterState, Note
from adaptsurgery_formats.errors import InexactError, ValueRefused
from adaptsurgery_formats.state import is_rigid
from adaptsurgery_formats.traits import traits_of

Named = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]


def parse_adapter(path: Path, layout: str | None = None) -> AdapterState:
    """The state of the adapter at a local path, under the names that its files use."""
    state = parse_files(read_files(path), layout)
    check_values(state)
    return state


def read_adapters(
    named: Iterable[Named], *, inverse: bool = False
) -> list[tuple[AdapterState, AdapterInput]]:
    """Adapters by path or Hub name, each with its weight and what its files are.

    Raises ValueRefused ("no-weight") for a weight other than 1 on what does not add, InexactError
    ("no-inverse") for what cannot be taken out again.
    """
    adapters = []
    for item in named:
        name, weight = split_weight(item)
        path = resolve(name, kind="adapter")
        state = parse_adapter(path)
        _check_weight(state, weight)
        _check_kronecker(state)
        if inverse:
            _check_inverse(state)
        adapters.append((state, adapter_input(path, weight, state.layout)))
    if not adapters:
        raise ValueRefused("no adapter was named", next="BASE ADAPTER[=WEIGHT]", code="no-adapter")
    return adapters


def repeated(paths: Iterable[str | os.PathLike[str]]) -> list[Note]:
    """A note for each path that is named several times: its weights add up, which may be a slip."""
    places = Counter(os.path.realpath(path) for path in paths)
    return [
        Note("same-adapter", place, f"named {count} times: its weights add up")
        for place, count in places.items()
        if count > 1
    ]


def split_weight(item: Named) -> tuple[str, float]:
    """("style.safetensors", 0.8) of "style.safetensors=0.8", of that pair, or of a path that exists."""
    if isinstance(item, tuple):
        return os.fspath(item[0]), _number(item[1], str(item))
    name = os.fspath(item)
    head, equals, tail = name.rpartition("=")
    if not equals or os.path.lexists(name):
        return name, 1.0
    return head, _number(tail, name)


def _number(value: object, where: str) -> float:
    try:
        return read_number(str(value))
    except ValueError:
        raise ValueRefused(
            "the weight is no number",
            where=where,
            seen=str(value),
            next="ADAPTER=0.8",
            code="bad-weight",
        ) from None


def _check_weight(state: AdapterState, weight: float) -> None:
    if weight == 1.0:
        return
    whole = next((m.label for m in state.modules if is_rigid(m)), "")
    if whole:
        raise _no_weight(state, weight, f"`{whole}` does not add")


def _no_weight(state: AdapterState, weight: float, why: str) -> ValueRefused:
    return ValueRefused(
        f"weight {weight:g} has no meaning: {why}",
        where=state.where,
        next="use weight 1",
        code="no-weight",
    )


def _check_kronecker(state: AdapterState) -> None:
    for module in state.modules:
        if module.options.get("not_kronecker"):
            raise InexactError(
                f"`{module.label}`: PEFT scrambles a Conv1d LoKr with a full w2; it has no ΔW of "
                "Kronecker form",
                where=state.where,
                code="peft-conv1d-lokr",
            )


def _check_inverse(state: AdapterState) -> None:
    dora = next((m.label for m in state.modules if "magnitude" in m.tensors), "")
    if dora:
        raise _no_inverse(state, f"`{dora}` replaced a norm")
    lost = next((m.label for m in state.modules if not traits_of(m.algorithm).reversible), "")
    if lost:
        raise _no_inverse(state, f"`{lost}` has no inverse")


def _no_inverse(state: AdapterState, why: str) -> InexactError:
    return InexactError(
        f"this adapter cannot be taken out again: {why}",
        where=state.where,
        next="keep the original base",
        code="no-inverse",
    )


def check_replaced(
    read: Sequence[tuple[AdapterState, AdapterInput]], matches: Matched, *, inverse: bool
) -> None:
    """Refuse a weight or an inverse for adapters that replace parameters; raises as above.

    The table that PEFT saves under an embedding's LoRA is what is left when that is taken out.
    """
    for target, saved in list(matches.saved.items()):
        state, given = read[saved.adapter]
        if inverse and ".base_layer." in saved.name and target in matches.changes:
            del matches.saved[target]
            text = f"`{target[1]}` becomes the table that the adapter was trained on"
            matches.notes.append(Note("unmerged-table", state.where, text))
        elif inverse:
            raise _no_inverse(state, f"`{target[1]}` was replaced")
        elif given.weight != 1.0:
            raise _no_weight(state, given.weight, f"it replaces `{target[1]}` outright")
