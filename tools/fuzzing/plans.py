"""A merge's plan as JSON, with some of its values edited: names that lead elsewhere, wrong kinds."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from corpus import base_file, samples

from fuzzing.damage import ODD
from fuzzing.inputs import Content, Input

_ELSEWHERE = (
    "../../x", "../x", "{room}/escaped", "{room}/escaped.safetensors", "/proc/x", "a/b", "..", ".", "",
    "{room}/in/base.safetensors", "../in/base.safetensors", "x\x00y", "x" * 300, "out", "model.safetensors",
)  # fmt: skip


@cache
def _places() -> tuple[tuple[Any, ...], ...]:
    """The paths of every value of a plan, by those of one made on the spot."""
    import json

    from adaptsurgery import plan_merge

    with TemporaryDirectory() as folder:
        for name, content in _files(samples()[0]).items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else b"")
        made = plan_merge(f"{folder}/base.safetensors", [f"{folder}/a"])
        return tuple(_paths(json.loads(made.to_json())))


def _paths(value: Any, here: tuple[Any, ...] = ()) -> Any:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield (*here, key)
        yield from _paths(inner, (*here, key))


def _files(sample: Any) -> dict[str, Content]:
    return {"base.safetensors": base_file(), **{f"a/{k}": v for k, v in sample.files.items()}}


def make(r: random.Random, seed: int) -> Input:
    """A plan of the corpus's first adapter with none to three edits."""
    edits = [_edit(r) for _ in range(r.choice((0, 1, 1, 1, 2, 3)))]
    options = {
        "base": "in/base.safetensors", "adapter": "in/a", "edits": edits,
        "out": r.choice(("out/result.safetensors", "out/result")),
    }  # fmt: skip
    story = " ".join(".".join(map(str, path)) for path, _ in edits)
    return Input("plans", seed, _files(samples()[0]), "plan", options, story=story)


def _edit(r: random.Random) -> list[Any]:
    places = _places()
    if r.random() < 0.4:
        named = [
            p
            for p in places
            if p[-1]
            in ("name", "path", "base", "key", "source", "component", "copies", "indexes", "file")
        ]
        return [list(r.choice(named)), r.choice(_ELSEWHERE)]
    return [
        list(r.choice(places)),
        r.choice((*ODD, [_ELSEWHERE[0]], {"../x": ""}, {"{room}/escaped": ""})),
    ]
