"""The checkpoints that a job reads from end to end: opened, noted as they are, and looked at again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adaptsurgery.checkpoint import system
from adaptsurgery.checkpoint.base import PICKLES, Base, BaseFile, find_weights, read_base
from adaptsurgery.checkpoint.failures import as_file_error
from adaptsurgery.checkpoint.hub import base_headers, resolve
from adaptsurgery.checkpoint.watched import changed, note
from adaptsurgery.jobs.values import is_whole
from adaptsurgery_formats.errors import FileError, ValueRefused
from adaptsurgery_formats.paths import check_text


@dataclass(frozen=True)
class Input:
    """A file that a plan reads: what it was when the plan was made.

    An adapter's ``sha256`` is of the whole file, a base file's of its header.
    """

    path: str
    size: int
    sha256: str
    modified: int


def open_base(spec: str, *, headers: bool = False) -> Base:
    """A checkpoint, downloaded if it has to be; for a dry run its headers are enough.

    An index is taken as its folder where it is that folder's model.
    """
    if headers and not os.path.lexists(spec):
        return base_headers(spec)
    path = resolve(spec, kind="base")
    if path.name.endswith(".index.json") and path.is_file():
        if find_weights(os.listdir(path.parent)) == path.name:
            path = path.parent
    return read_base(path.absolute())  # a run from another folder is of the same plan


def refuse_pickles(base: Base) -> None:
    """Raise FileError ``pickle-base`` for what cannot be read tensor by tensor."""
    for file in base.files:
        if file.name.endswith(PICKLES):
            raise FileError(
                "a pickled checkpoint cannot be streamed",
                where=file_path(base, file),
                next="save it as safetensors first",
                code="pickle-base",
            )


def file_path(base: Base, file: BaseFile) -> str:
    return str(base.folder / file.name) if base.folder else base.where


def base_input(base: Base, file: BaseFile) -> Input:
    """A base file by the digest of its header; its size and time tell of changes below that.

    A base on the Hub of which only headers were read, for a dry run, is told by its name alone.
    """
    path = file_path(base, file)
    if not base.local:
        return Input(path, 0, "", 0)
    with system.open_file(path) as stream:
        length = stream.read(8)
        header = stream.read(int.from_bytes(length, "little"))
        stat = os.fstat(stream.fileno())
    digest = hashlib.sha256(length + header).hexdigest()
    return Input(str(Path(path).resolve()), stat.st_size, digest, stat.st_mtime_ns)


def beside_input(base: Base, name: str) -> Input:
    """A file beside the base's weights: its config, index, tokenizer, by size and time alone."""
    assert base.folder is not None
    path = base.folder / name
    if not base.local:
        return Input(str(path), 0, "", 0)
    try:
        stat = os.stat(path)
    except OSError as error:
        raise as_file_error(error, path, writing=False) from error
    note(path, stat)
    return Input(str(path.resolve()), stat.st_size, "", stat.st_mtime_ns)


def check_inputs(inputs: Iterable[Input]) -> None:
    """Every input as it was when the plan was made, by size and time; FileError ``input-changed``."""
    for given in inputs:
        check_text(given.path)
        try:
            stat = os.stat(given.path)
        except OSError as error:
            raise changed(given.path, error.strerror or str(error)) from error
        if (stat.st_size, stat.st_mtime_ns) != (given.size, given.modified):
            raise changed(given.path)


def check_part(index: int, count: int) -> tuple[int, int]:
    """(index, count) of a part of a plan; raises ValueRefused where there is no such part."""
    if not is_whole(count) or not is_whole(index, 0, count - 1):
        raise ValueRefused(
            f"there is no part {index} of {count}",
            next="--shard-index from 0 to --num-shards − 1",
            code="no-such-part",
        )
    return index, count
