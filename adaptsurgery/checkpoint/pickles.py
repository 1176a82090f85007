"""Torch's pickles (.bin, .pt, .ckpt), read without running what they contain."""

from __future__ import annotations

import os
import pickle
import re
from typing import TYPE_CHECKING, Any, BinaryIO

from adaptsurgery.checkpoint.archives import Archive, BadArchive, read_archive
from adaptsurgery.checkpoint.failures import as_file_error
from adaptsurgery.checkpoint.opcodes import Overweight, weigh
from adaptsurgery.checkpoint.storages import sizes_agree
from adaptsurgery.checkpoint.system import open_file, open_input, read_at
from adaptsurgery_formats.errors import FileError, SurgeryError
from adaptsurgery_formats.tensors import Tensor

if TYPE_CHECKING:
    import torch

_PACKED, _RATIO = (
    50 << 20,
    20,
)  # bytes that a packed file may unpack to, beside a multiple of its own
_EXPANDED = 256 << 20  # bytes of a tensor that is larger than its memory
_OLD_PICKLES = 5  # of a file that is no archive: magic, protocol, system, the object, storages


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a torch pickle, loaded by torch's restricted unpickler; imports torch.

    A Lightning checkpoint's ``state_dict`` is unwrapped. A file whose records are packed (torch packs
    none, other zip tools do) is unpacked into memory, all else is mapped. Raises FileError
    ``unsafe-pickle`` for anything but plain data, ``absurd-size`` for what would unpack to far more
    than the file or build more than it holds, or is expanded far beyond it, ``bad-file`` for a damaged file or one that holds no
    tensors by name.
    """
    where = os.fspath(path)
    content = _load(where)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise FileError(
            "the pickle holds no state dict",
            where=where,
            seen=type(content).__name__,
            next="save model.state_dict() instead",
        )
    return _tensors(content, where)


def _load(where: str) -> Any:
    import torch

    try:
        archive = _archive(where)
        mapped = archive is not None and archive.stored
        read = torch.load(where, map_location="cpu", weights_only=True, mmap=mapped)
        if mapped and archive is not None and not sizes_agree(archive, where):
            read = torch.load(where, map_location="cpu", weights_only=True)  # which looks at them
        return read
    except SurgeryError:
        raise
    except pickle.UnpicklingError as error:
        raise _refused(error, where) from error
    except OSError as error:
        raise as_file_error(error, where, writing=False) from error
    except Exception as error:  # torch raises many kinds on damaged input
        raise _damaged(where, f"{type(error).__name__}: {_line(error)}") from error


def _damaged(where: str, seen: str) -> FileError:
    return FileError("the pickle is damaged", where=where, seen=seen, next="fetch the file again")


def _archive(where: str) -> Archive | None:
    """The zip archive that a file is; None for the old format, which is none.

    It may be mapped where all its records lie there as they are: torch maps packed records too, and
    takes their packed bytes for numbers.
    """
    fd = open_input(where)
    try:
        length = os.fstat(fd).st_size
        if read_at(fd, 4, 0) != b"PK\3\4":
            _check_old(where)
            return None
        archive = read_archive(lambda at, count: read_at(fd, count, at), length, longer=True)
        _check_unpacked(archive, where)
        _check_pickles(archive, where)
        return archive
    except BadArchive as error:
        raise _damaged(where, str(error)) from error
    finally:
        os.close(fd)


def _check_unpacked(archive: Archive, where: str) -> None:
    length = archive.length
    if archive.size > _PACKED + _RATIO * length:
        raise FileError(
            "the pickle says of itself that it unpacks to far more than a file of its size holds",
            where=where,
            seen=f"{length} bytes that unpack to {archive.size}",
            next="save it again by torch.save, which packs nothing",
            code="absurd-size",
        )


def _check_pickles(archive: Archive, where: str) -> None:
    """Refuse an archive's pickle that would build what has no end; torch says what else is wrong."""
    for record in archive.records:
        if record.name.rpartition("/")[2] == "data.pkl":
            _weighed(archive.bytes_of(record), where)


def _check_old(where: str) -> None:
    """The same of the pickles, one after the other, of a file that is no archive."""
    with open_file(where) as file:
        for _ in range(_OLD_PICKLES):
            _weighed(file, where)


def _weighed(pickled: bytes | BinaryIO, where: str) -> None:
    try:
        weigh(pickled)
    except Overweight as error:
        raise FileError(
            "the pickle would build far more than a file of its size holds",
            where=where,
            seen=str(error),
            next="ask for a safetensors file",
            code="absurd-size",
        ) from error
    except (ValueError, LookupError):  # no pickle: torch says so
        pass


# "Trying to load unsupported GLOBAL posix.mkdir whose module posix is blocked."
_UNSAFE = re.compile(
    r"\bGLOBAL\b|[Uu]nsupported (global|class)|Can only|REDUCE|not (allowed|supported)"
)


def _refused(error: Exception, where: str) -> FileError:
    reasons = [line for line in str(error).split("\n") if _UNSAFE.search(line)]
    if not reasons:
        return FileError(
            "the pickle is damaged, or is not torch's",
            where=where,
            seen=_line(error),
            next="fetch the file again",
        )
    return FileError(
        "the pickle would run code when loaded",
        where=where,
        seen=reasons[-1].strip()[:300],
        next="ask for a safetensors file, or convert it in a sandbox",
        code="unsafe-pickle",
    )


def _line(error: Exception) -> str:
    """The last telling line of an error: torch puts its advice before and its link after it."""
    lines = [line.strip() for line in str(error).split("\n")]
    kept = [line for line in lines if line and not line.startswith("Check the documentation")]
    return kept[-1][:300] if kept else type(error).__name__


def _tensors(state: dict[Any, Any], where: str) -> dict[str, Tensor]:
    import torch

    from adaptsurgery.checkpoint.bridge import from_torch

    alien = [
        f"`{k}` ({type(v).__name__})" for k, v in state.items() if not isinstance(v, torch.Tensor)
    ]
    alien += [f"`{k}` (a {type(k).__name__} as a name)" for k in state if not isinstance(k, str)]
    if alien or not state:
        raise FileError(
            "the pickle holds other things than tensors" if alien else "the pickle is empty",
            where=where,
            seen=", ".join(alien[:5]) + (f" and {len(alien) - 5} more" if len(alien) > 5 else ""),
            next="save a state dict: names and tensors, nothing else",
        )
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        try:
            _check_memory(value)
            tensors[key] = from_torch(value, where)
        except SurgeryError as error:
            code = "absurd-size" if error.code == "absurd-size" else "bad-file"
            raise FileError(
                f"`{key}`: {error.what}", where=where, seen=error.seen, code=code
            ) from error
    return tensors


def _check_memory(t: torch.Tensor) -> None:
    """Refuse a tensor that repeats its few numbers so often that no memory holds it."""
    if t.is_nested or t.layout != _strided() or t.device.type != "cpu":
        return  # which ``from_torch`` refuses by what it is
    needed = t.numel() * t.element_size()
    if needed > _EXPANDED and needed > t.untyped_storage().nbytes():
        raise FileError(
            "a tensor is far larger than the memory that it is a view of",
            seen=f"{list(t.shape)} of {t.untyped_storage().nbytes()} bytes",
            code="absurd-size",
        )


def _strided() -> torch.layout:
    import torch

    return torch.strided
