"""An input as plain data: files, what is done with them, and around what; it goes through JSON."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Special:
    """What stands in a file's place: a "link" to a target, a "fifo", a "folder"."""

    kind: str
    target: str = ""


Content = bytes | Special
Files = Mapping[str, Content]


@dataclass(frozen=True)
class Input:
    """Files below ``in/``, a job by its name, its options, and odd surroundings.

    Texts in options that begin with "in/", "out/" or "{room}" are paths of the trial's room.
    ``surroundings`` are of ``trial.around``.
    """

    kind: str
    seed: int
    files: Files
    job: str
    options: Mapping[str, Any] = field(default_factory=dict)
    surroundings: Mapping[str, Any] = field(default_factory=dict)
    story: str = ""

    @property
    def size(self) -> int:
        return sum(len(c) for c in self.files.values() if isinstance(c, bytes))

    def lay_out(self, room: Path) -> None:
        """The files in ``room/in``, and an empty ``room/out``."""
        (room / "in").mkdir(parents=True)
        (room / "out").mkdir()
        for name, content in self.files.items():
            path = os.path.join(room, "in", name)
            with suppress(FileExistsError):  # below what is a file or a link to nothing
                os.makedirs(os.path.dirname(path), exist_ok=True)
                _put(path, content, str(room))

    def to_json(self) -> str:
        files = {name: _packed(content) for name, content in self.files.items()}
        data = {"kind": self.kind, "seed": self.seed, "job": self.job, "options": self.options,
                "surroundings": self.surroundings, "story": self.story, "files": files}  # fmt: skip
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Input:
        names = ("kind", "seed", "job", "options", "surroundings", "story")
        files = {name: _unpacked(content) for name, content in data["files"].items()}
        return cls(files=files, **{name: data[name] for name in names})


def _put(path: str, content: Content, room: str) -> None:
    if isinstance(content, bytes):
        with open(path, "wb") as file:
            file.write(content)
    elif content.kind == "link":
        os.symlink(content.target.replace("{room}", room), path)
    elif content.kind == "fifo":
        os.mkfifo(path)
    else:
        os.makedirs(path, exist_ok=True)


def _packed(content: Content) -> dict[str, str]:
    if isinstance(content, Special):
        return {content.kind: content.target}
    try:
        text = content.decode("utf-8")
        if len(text) < 2000 and text.isprintable():
            return {"text": text}
    except UnicodeDecodeError:
        pass
    return {"b85": base64.b85encode(zlib.compress(content, 9)).decode("ascii")}


def _unpacked(packed: Mapping[str, str]) -> Content:
    ((kind, value),) = packed.items()
    if kind == "text":
        return value.encode("utf-8")
    if kind == "b85":
        return zlib.decompress(base64.b85decode(value))
    return Special(kind, value)
