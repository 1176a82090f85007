"""Errors as a person reads them, and as --json gives them.

error[no-such-file]: no such file
  where: stlye.safetensors
  next: nearest: `style.safetensors`
"""

from __future__ import annotations

import os
from contextlib import suppress

from adaptsurgery.cli.output import CommandLine, paint, print_json, printable, say
from adaptsurgery_formats.errors import SurgeryError

FAILED = 1
_SHOWN = 40  # of the things that an error lists


def report(error: Exception, session: CommandLine) -> int:
    """Tell an error on stderr, and on stdout too where JSON was asked for; returns the exit code."""
    failure = error if isinstance(error, SurgeryError) else _unexpected(error)
    if session.json:
        with suppress(OSError):  # a full disk behind stdout, which may be the error itself
            print_json({"ok": False, "error": failure.as_dict()})
    say(text(failure))
    if failure is not error and os.environ.get("ADAPTSURGERY_DEBUG"):
        import traceback

        say("".join(traceback.format_exception(error)).rstrip())
    return FAILED


def text(error: SurgeryError) -> str:
    """The error in lines: code and what, then where, seen and next as far as they are known."""
    head = paint(f"error[{error.code}]", "red", bold=True)
    lines = [f"{head}: {printable(error.what)}"]
    shown = error.items if len(error.items) <= _SHOWN else error.items[: _SHOWN - 1]
    lines += [f"  - {printable(item)}" for item in shown]
    if len(shown) < len(error.items):
        lines.append(f"  … and {len(error.items) - len(shown)} more; --json lists all")
    for label in ("where", "seen", "next"):
        if value := getattr(error, label):
            lines.append(f"  {paint(label, 'cyan')}: {printable(value)}")
    return "\n".join(lines)


def _unexpected(error: Exception) -> SurgeryError:
    """An error that nobody foresaw, in the form of those that were."""
    if isinstance(error, MemoryError):
        return SurgeryError(
            "there is not enough memory",
            seen=str(error),
            next="free some, or use a machine with more",
            code="out-of-memory",
        )
    if isinstance(error, RecursionError):
        return SurgeryError(
            "the input is nested too deeply",
            next="it is damaged or made to do harm; take it from its source again",
            code="too-deep",
        )
    if isinstance(error, OSError) and error.strerror:
        return SurgeryError(
            f"the system refused: {error.strerror}",
            where=_file_of(error),
            next="check the file, its folder and the disk",
            code="system-error",
        )
    return SurgeryError(
        "this is an error in adaptsurgery, not in your input's use of it",
        seen=f"{type(error).__name__}: {error}",
        next="please report it; ADAPTSURGERY_DEBUG=1 shows the traceback",
        code="internal-error",
    )


def _file_of(error: OSError) -> str:
    names = [n for n in (error.filename, error.filename2) if n is not None]
    return " → ".join(os.fsdecode(n) if isinstance(n, bytes) else str(n) for n in names)
