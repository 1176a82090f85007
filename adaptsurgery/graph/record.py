"""What surgery notes on the nodes that it adds: enough to take an adapter out again, or to go on.

The note is a string of JSON in meta["custom"], the one place that torch keeps through save, load,
re-export and decompositions. ``site`` and ``call`` say whose node it is (call -1: of all calls of
the site); ``role`` which of the layer's values it stands in for, "x", "weight", "bias" or "out";
``adapters`` what is on the site, in order.

Within no_grad and autocast torch drops the notes after all, when it exports or decomposes a program
again. So every adapter's number of places is noted apart, so that lost notes are noticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from torch import Tensor
from torch.fx import Node

from adaptsurgery.algorithms import AdapterConfig, build
from adaptsurgery.core.config import tensors_of
from adaptsurgery.core.cost import ApplyForm
from adaptsurgery.core.update import Composition, Update, compose, parts_of
from adaptsurgery.graph.sites import COUNTS, RECORD
from adaptsurgery_formats.errors import LayoutError, printable
from adaptsurgery_formats.records import record

U = TypeVar("U", bound=Update)
SHARED = -1
_UNSAID: dict[str, Any] = {"site": "", "call": 0}


@dataclass(frozen=True)
class PlainUpdate:
    """One plain update: ``slots`` maps its tensors to names in the state_dict."""

    algorithm: str
    slots: dict[str, str]
    scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Attached:
    """One adapter on one site. ``dropout`` holds its config's shares, where there are any.

    ``places`` counts its sites, once for each graph that calls them: where a program shows fewer,
    notes were lost. ``strength`` multiplies the parts' scales, which stay those of attaching.
    """

    name: str
    form: ApplyForm
    shape: tuple[int, ...]
    parts: tuple[PlainUpdate, ...]
    dropout: dict[str, Any] = field(default_factory=dict)
    places: int = 0
    strength: float = 1.0

    @property
    def names(self) -> list[str]:
        """The names of all of its tensors in the state_dict."""
        return [name for part in self.parts for name in part.slots.values()]

    @property
    def config(self) -> AdapterConfig | None:
        """A config with the dropouts of the adapter's own."""
        return (
            AdapterConfig.known[self.parts[0].algorithm](**self.dropout) if self.dropout else None
        )

    def update(self, tensors: Mapping[str, Tensor]) -> Update:
        """The Update of the tensors that a state_dict holds."""
        return compose([self._built(part, tensors) for part in self.parts])

    def _built(self, part: PlainUpdate, tensors: Mapping[str, Tensor]) -> Update:
        if lost := [name for name in part.slots.values() if name not in tensors]:
            raise LayoutError(
                f"the program's note of `{self.name}` names a tensor that is not there",
                seen=printable(lost[0])[:200],
                next="rewrite the program as it was before",
                code="bad-note",
            )
        slots = {slot: tensors[name].detach() for slot, name in part.slots.items()}
        scale = part.scale * self.strength
        return build(part.algorithm, slots, scale, self.shape, **part.options)


@dataclass(frozen=True)
class Tag:
    """The note of one node."""

    site: str
    call: int
    role: str = ""
    adapters: tuple[Attached, ...] = ()
    module: str = ""  # the call_module that the node took the place of, and its node's name
    node: str = ""

    @property
    def text(self) -> str:
        """The note as JSON, as it stands on the node."""
        record = {f.name: value for f in fields(self) if (value := getattr(self, f.name))}
        if self.adapters:
            record["adapters"] = [asdict(a) for a in self.adapters]
        return json.dumps(record)


def tag_of(node: Node) -> Tag | None:
    """The note of a node, None where surgery did not make it; LayoutError "bad-note" for none of ours."""
    note: Tag | None = _noted(
        node, RECORD, lambda fields: record({**_UNSAID, **fields}, Tag, "note")
    )
    return note


def count(node: Node, counts: Mapping[str, int] | None) -> None:
    """Note on a node how many places each adapter of the graph has; None takes the note away."""
    held = {key: value for key, value in (node.meta.get("custom") or {}).items() if key != COUNTS}
    if counts is not None:
        held[COUNTS] = json.dumps(counts)
    if held:
        node.meta["custom"] = held
    else:
        node.meta.pop("custom", None)


def counts_of(node: Node) -> dict[str, int]:
    """How many places each adapter of the graph has, by a node that says it."""
    counts: dict[str, int] | None = _noted(
        node, COUNTS, lambda c: record(c, dict[str, int], "note")
    )
    return counts or {}


def _noted(node: Node, key: str, read: Callable[[dict[str, Any]], Any]) -> Any:
    """What is noted on a node under a key, as ``read`` makes it of the JSON; None where nothing is."""
    custom = node.meta.get("custom")
    text = custom.get(key) if isinstance(custom, dict) else None
    if text is None:
        return None
    try:
        return read(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise LayoutError(
            "the program holds a note of surgery that is none of ours",
            where=node.name,
            seen=printable(str(error))[:200],
            next="rewrite the program as it was before: rewrite --table shows what is on it",
            code="bad-note",
        ) from error


def described(
    update: Update, prefix: str, taken: Iterable[str]
) -> tuple[tuple[PlainUpdate, ...], dict[str, Tensor]]:
    """An update as parts whose tensors have names under ``prefix``, and the tensors by name."""
    used, tensors, parts = set(taken), {}, []
    for update_part in parts_of(update):
        plain = update_part.plain
        slots = {}
        for slot, tensor in tensors_of(update_part).items():
            name = _free(f"{prefix}.{plain.name}_{slot}", used)
            used.add(name)
            slots[slot], tensors[name] = name, tensor
        scale = getattr(plain, "scale", 1.0)
        parts.append(PlainUpdate(plain.name, slots, scale, _options(plain)))
    return tuple(parts), tensors


def _options(update: Update) -> dict[str, Any]:
    own = {f.name: getattr(update, f.name) for f in fields(update)}  # type: ignore[arg-type]
    return {
        name: value
        for name, value in own.items()
        if name not in ("scale", "weight_shape") and not isinstance(value, Tensor | None)
    }


def _free(name: str, used: set[str]) -> str:
    number, candidate = 1, name
    while candidate in used:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def mapped(update: U, change: Callable[[Tensor], Tensor]) -> U:
    """The same update with other tensors in its slots."""
    if isinstance(update, Composition):
        parts = [mapped(part, change) for part in parts_of(update)]
        return compose(parts)  # type: ignore[return-value]
    changes: dict[str, Any] = {}
    for f in fields(update):  # type: ignore[arg-type]
        value = getattr(update, f.name)
        if isinstance(value, Tensor):
            changes[f.name] = change(value)
        elif isinstance(value, Update):
            changes[f.name] = mapped(value, change)
    return replace(update, **changes)  # type: ignore[type-var]
