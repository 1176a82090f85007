"""Which layout a file is in: every key must belong to the same one."""

from __future__ import annotations

from collections.abc import Collection

from adaptsurgery_formats import FORMATS, Format
from adaptsurgery_formats.errors import LayoutError


def detect(keys: Collection[str], where: str, prefix: str = "") -> Format:
    """The layout that claims the keys; ``prefix`` is what the metadata say goes before flat names.

    Raises LayoutError: "empty-adapter", "mixed-layouts" where two layouts each claim some,
    "unknown-layout" where none claims any. Keys that no layout claims are left to its parser.
    """
    first: dict[str, str] = {}
    stray = ""
    for key in keys:
        owner = next((f.name for f in FORMATS.values() if f.claims(key)), None)
        if owner is None:
            stray = stray or key
        else:
            first.setdefault(owner, key)
    if len(first) > 1:
        raise LayoutError(
            f"keys of {len(first)} layouts in one file: {', '.join(first)}",
            where=where,
            seen=", ".join(f"`{k}`" for k in first.values()),
            next="split the file; a reader would use one part and drop the other",
            code="mixed-layouts",
        )
    if first:
        return FORMATS[next(iter(first))]
    if prefix and all(key.startswith(f"{prefix}_") for key in keys):
        return FORMATS["lycoris"]
    if not stray:
        raise LayoutError("there are no tensors in it", where=where, code="empty-adapter")
    raise LayoutError(
        "no known adapter layout has such keys",
        where=where,
        seen=f"`{stray}`",
        next="known: " + "; ".join(f.title for f in FORMATS.values()) + _hint(stray),
        code="unknown-layout",
    )


def _hint(key: str) -> str:
    if "_" in key.partition(".")[0]:
        return ". LyCORIS's names under another prefix: --from lycoris --base MODEL"
    if key.endswith((".weight", ".bias")) and "lora" not in key:
        return ". This looks like a model's own checkpoint, not an adapter"
    return ""
