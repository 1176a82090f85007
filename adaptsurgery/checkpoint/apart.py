"""What a command reads and what it writes, held apart before any work: no input is ever replaced.

What is read is read lazily, to the end, so it must stay as it is. Places are compared by what the
file system says they are, never by their spelling: links, ``..``, hard links, mounts and names in
another case all lead to the same device and inode.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from adaptsurgery.checkpoint.base import PICKLES, read_json
from adaptsurgery_formats.errors import FileError, SurgeryError
from adaptsurgery_formats.paths import check_text

AnyPath = str | os.PathLike[str]
# Of a folder that is read, an output may replace what is not read ("files"), or it may lie there
# under a new name ("folder"), or not at all ("whole").
Guard = Literal["files", "folder", "whole"]
Identity = tuple[int, int]

_CONFIGS = ("adapter_config.json", "config.json", "model_index.json")
_INDEX = re.compile(r".+\.index(\.\w+)?\.json")  # model.safetensors.index.fp16.json


def files_read(path: AnyPath) -> Iterator[Path]:
    """Every file that reading a model or an adapter at a local path may open.

    A file: with an adapter's config beside it, an index with its shards. A folder: the weights,
    indexes and configs in it and one folder down, where a pipeline has its parts.
    """
    place = Path(path)
    if place.is_dir():
        for folder in (place, *sorted(p for p in _listed(place) if p.is_dir())):
            yield from (file for file in _listed(folder) if _counts(file.name))
    elif os.path.lexists(place):
        yield place
        yield from _beside(place)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # what cannot be listed is not read either
        return []


def _counts(name: str) -> bool:
    weights = name.endswith((".safetensors", *PICKLES))
    return weights or name in _CONFIGS or _INDEX.fullmatch(name) is not None


def _beside(file: Path) -> Iterator[Path]:
    """What belongs to a single file that is named."""
    if file.stem == "adapter_model":
        yield file.parent / _CONFIGS[0]
    elif file.name.endswith(".index.json"):
        try:
            shards = read_json(file).get("weight_map")
        except SurgeryError:  # its reader says what is wrong with it
            return
        names = shards.values() if isinstance(shards, dict) else ()
        yield from (file.parent / name for name in {n for n in names if isinstance(n, str)})


def keep_apart(
    reads: Iterable[AnyPath | None],
    writes: Iterable[AnyPath | None],
    *,
    guard: Guard = "files",
    code: str = "output-is-source",
) -> None:
    """Refuse, before any work, outputs that are one another, or anything that is read.

    ``reads`` are files and folders, each with all that ``files_read`` finds there; what is not on
    this disk is passed over. An output may also not hold what is read. ``guard`` says what an output
    within a folder that is read may be. Raises FileError ``code``, and ``output-exists`` where two
    outputs are one.
    """
    outputs = [Path(path) for path in writes if path is not None]
    for out in outputs:
        check_text(out)
    _refuse_twins(outputs)
    sources = [Path(path) for path in reads if path is not None and os.path.lexists(path)]
    for out in outputs:
        for source in sources:
            if _replaces(out, source) or _lies_within(out, source, guard):
                raise overlap(out, source, code)


def overlap(out: Path, source: Path, code: str) -> FileError:
    """The error for an output that is read."""
    return FileError(
        "the output would replace the input or lie within it",
        where=str(out),
        seen=f"read from {source}",
        next="-o another path",
        code=code,
    )


def is_within(out: Path, source: Path) -> bool:
    """Whether a path is another one, or lies in it, whether or not there is anything yet."""
    check_text(out)
    here = _identity(source)
    return here is not None and here in {_identity(out), *_above([out])}


def _replaces(out: Path, source: Path) -> bool:
    """Whether writing ``out`` replaces what is read from ``source``, or a folder that holds it."""
    here = _identity(out)
    if here is None:
        return False
    files = [source, *files_read(source)]
    return here in {*map(_identity, files), *_above(files)}


def _lies_within(out: Path, source: Path, guard: Guard) -> bool:
    """Whether ``out`` lies in a folder that is read, where ``guard`` does not let it."""
    if guard == "files" or not source.is_dir():
        return False
    return is_within(out, source) and (guard == "whole" or os.path.lexists(out))


def _above(files: Iterable[Path]) -> set[Identity | None]:
    """The folders that files lie in, by the names given and by those that links lead to."""
    places = {path for f in files for path in (os.path.abspath(f), os.path.realpath(f))}
    return {_identity(folder) for folder in {p for place in places for p in Path(place).parents}}


def _identity(path: Path) -> Identity | None:
    """Device and inode of what a path leads to; None where there is nothing."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null in the name
        return None
    return stat.st_dev, stat.st_ino


def _refuse_twins(outputs: list[Path]) -> None:
    for number, out in enumerate(outputs):
        if any(_same_place(out, other) for other in outputs[:number]):
            raise FileError(
                "both outputs have one path",
                where=str(out),
                next="name another for one of them",
                code="output-exists",
            )


def _same_place(a: Path, b: Path) -> bool:
    """Whether two paths, of which there may be nothing yet, are one."""
    first, second = Path(os.path.abspath(a)), Path(os.path.abspath(b))
    folder = _identity(first.parent)
    if first != second and (folder is None or folder != _identity(second.parent)):
        return False
    if first.name == second.name:
        return True
    return _plain(first.name) == _plain(second.name) and _folds(first.parent)


def _plain(name: str) -> str:
    """A name as file systems that know no case compare it."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _folds(folder: Path) -> bool:
    """Whether a folder's file system takes names in another case for the same: tried on one in it."""
    for path in (*_listed(folder), *([folder] if folder.name else [])):
        other = path.with_name(path.name.swapcase())
        if other.name != path.name:
            here = _identity(path)
            return here is not None and here == _identity(other)
    return False
