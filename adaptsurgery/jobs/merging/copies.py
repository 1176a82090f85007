"""What of a base's folder comes along with a merge: configs, tokenizers, cards; and what does not.

Links are followed where they stay in the folder, or lead into the blobs of the Hub's cache that the
folder is a part of (``snapshots/<commit>/x -> ../../blobs/<hash>``). A link to anywhere else could
carry a private file into a model that is then given away: it is refused by name, or left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adaptsurgery.checkpoint.failures import as_file_error
from adaptsurgery.checkpoint.system import not_a_file
from adaptsurgery_formats.errors import FileError

# More than any model has beside its weights: what is larger is no model's folder.
MOST_FILES, MOST_BYTES, DEEPEST = 10_000, 64 << 30, 32


@dataclass
class Beside:
    """The files below a folder, relative to it: plain ones, and links that lead out of it."""

    files: list[str] = field(default_factory=list)
    strays: dict[str, str] = field(default_factory=dict)  # name → where it leads
    closed: list[str] = field(default_factory=list)  # folders that may not be read


def look_beside(folder: Path) -> Beside:
    """Every file below a folder that is not hidden, links followed as far as they may be.

    Raises FileError ``too-many-files`` where there is no end to it.
    """
    beside = Beside()
    inside = _Inside(folder)
    root = os.path.realpath(folder)
    left = [("", root, frozenset([root]))]
    seen = 0
    while left:
        name, place, above = left.pop()
        for entry in _entries(folder / name, name, beside):
            seen += 1
            path = f"{name}/{entry.name}" if name else entry.name
            if seen > MOST_FILES or path.count("/") > DEEPEST:
                raise _too_much(folder, f"over {MOST_FILES} files, or folders {DEEPEST} deep")
            link = entry.is_symlink()
            real = os.path.realpath(entry.path) if link else os.path.join(place, entry.name)
            if link and not inside.has(real):
                beside.strays[path] = os.readlink(entry.path)
            elif not entry.is_dir():
                beside.files.append(path)
            elif real not in above:  # a link to what it lies in would have no end
                left.append((path, real, above | {real}))
    beside.files.sort()
    return beside


def _entries(folder: Path, name: str, beside: Beside) -> Sequence[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [e for e in entries if not e.name.startswith(".")]
    except PermissionError:
        beside.closed.append(name)
        return []
    except OSError as error:
        raise as_file_error(error, folder, writing=False) from error


class _Inside:
    """What links of a folder may lead to: itself, and the blobs of its repository in the Hub's cache."""

    def __init__(self, folder: Path) -> None:
        self.root = Path(os.path.realpath(folder))
        self.blobs = _blobs(self.root)

    def has(self, real: str) -> bool:
        """Whether what a link leads to is there, and may be read."""
        place = Path(real)
        known = place.is_relative_to(self.root) or (
            self.blobs is not None and place.parent == self.blobs
        )
        return known and os.path.exists(real)


def _blobs(root: Path) -> Path | None:
    """``…/models--org--name/blobs`` of a folder at or below ``…/models--org--name/snapshots/<commit>``."""
    for folder in (root, *root.parents):
        blobs = folder.parent.parent / "blobs"
        if folder.parent.name == "snapshots" and blobs.is_dir():
            return None if blobs.is_symlink() else blobs
    return None


def check_copies(folder: Path, names: Sequence[str]) -> None:
    """Everything that can be refused of the files that come along, before any work.

    Raises FileError: ``link-outside``, ``not-a-file``, ``not-readable``, ``no-such-file``,
    ``too-many-files``.
    """
    inside = _Inside(folder)
    total = 0
    for name in names:
        path = folder / name
        if not inside.has(os.path.realpath(path)):
            raise refused_links(folder, {name: os.path.realpath(path)})
        try:
            status = path.stat()
        except OSError as error:
            raise as_file_error(error, path, writing=False) from error
        if not stat.S_ISREG(status.st_mode):
            raise not_a_file(path)
        if not os.access(path, os.R_OK):
            raise FileError("it may not be read", where=str(path), code="not-readable")
        total += status.st_size
    if total > MOST_BYTES:
        raise _too_much(folder, f"{total} bytes beside the weights")


def refused_links(folder: Path, strays: Mapping[str, str]) -> FileError:
    """The error for links that may not be followed, each by name and where it leads."""
    return FileError(
        "links in the base's folder lead out of it, or nowhere, and are not copied",
        where=str(folder),
        items=[f"{name} → {strays[name]}" for name in sorted(strays)[:20]],
        seen=f"{len(strays)} links",
        next="--skip-links leaves them out; or put the files themselves in their place",
        code="link-outside",
    )


def _too_much(folder: Path, seen: str) -> FileError:
    return FileError(
        "the folder holds far more than a model",
        where=str(folder),
        seen=seen,
        next="name a folder that holds the model alone",
        code="too-many-files",
    )
