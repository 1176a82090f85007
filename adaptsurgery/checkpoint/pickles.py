"""Torch's pickles (.bin, .pt, .ckpt), read without running what they contain."""

from __future__ import annotations

import os
import pickle
import re
from typing import Any

from adaptsurgery.checkpoint import system
from adaptsurgery.checkpoint.failures import as_file_error
from adaptsurgery_formats.errors import FileError, SurgeryError
from adaptsurgery_formats.tensors import Tensor


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a torch pickle, loaded by torch's restricted unpickler; imports torch.

    A Lightning checkpoint's ``state_dict`` is unwrapped. Raises FileError ``unsafe-pickle`` for
    anything but plain data, ``bad-file`` for a damaged file or one that holds no tensors by name.
    """
    where = os.fspath(path)
    found = _load(where)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise FileError(
            "the pickle holds no state dict",
            where=where,
            seen=type(found).__name__,
            next="save model.state_dict() instead",
        )
    return _tensors(found, where)


def _load(where: str) -> Any:
    import torch

    try:
        os.close(system.open_input(where))  # which notes it, and waits for no pipe
        try:
            return torch.load(where, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(where, map_location="cpu", weights_only=True)  # the old format
    except pickle.UnpicklingError as error:
        raise _refused(error, where) from error
    except OSError as error:
        raise as_file_error(error, where, writing=False) from error
    except SurgeryError:
        raise
    except Exception as error:  # torch raises many kinds on damaged input
        raise FileError(
            "the pickle is damaged",
            where=where,
            seen=f"{type(error).__name__}: {_line(error)}",
            next="fetch the file again",
        ) from error


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


def _tensors(found: dict[Any, Any], where: str) -> dict[str, Tensor]:
    import torch

    from adaptsurgery.checkpoint.bridge import from_torch

    alien = [
        f"`{k}` ({type(v).__name__})" for k, v in found.items() if not isinstance(v, torch.Tensor)
    ]
    alien += [f"`{k}` (a {type(k).__name__} as a name)" for k in found if not isinstance(k, str)]
    if alien or not found:
        raise FileError(
            "the pickle holds other things than tensors" if alien else "the pickle is empty",
            where=where,
            seen=", ".join(alien[:5]) + (f" and {len(alien) - 5} more" if len(alien) > 5 else ""),
            next="save a state dict: names and tensors, nothing else",
        )
    tensors: dict[str, Tensor] = {}
    for key, value in found.items():
        try:
            tensors[key] = from_torch(value, where)
        except SurgeryError as error:
            raise FileError(f"`{key}`: {error.what}", where=where, seen=error.seen) from error
    return tensors
