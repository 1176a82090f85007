"""What every room raises: an error that says what, where, what was seen, and what to do next.

The code is a stable slug (``unknown-key``), so that a script can tell errors apart without
reading prose; the fields are kept beside the text for ``--json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class SurgeryError(Exception):
    """Base of all errors that adaptsurgery raises on purpose."""

    default_code = "refused"

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        seen: str = "",
        next: str = "",
        code: str = "",
        items: Iterable[str] = (),
    ) -> None:
        self.what, self.where, self.seen, self.next = what, where, seen, next
        self.code = code or self.default_code
        self.items = list(items)  # everything that the error is about, where that is several things
        super().__init__(str(self))

    def __str__(self) -> str:
        what, where, seen, next = map(printable, (self.what, self.where, self.seen, self.next))
        head = f"{where}: {what}" if where else what
        lines = [f"{head} [{self.code}]"]
        lines += [f"  - {printable(item)}" for item in self.items]
        lines += [f"  seen: {seen}"] if seen else []
        lines += [f"  next: {next}"] if next else []
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str | list[str]]:
        """The error as plain data for ``--json``."""
        return {
            "code": self.code,
            "what": self.what,
            "where": self.where,
            "seen": self.seen,
            "next": self.next,
            "items": self.items,
        }


class FileError(SurgeryError):
    """A file that is missing, truncated, malformed, or may not be written."""

    default_code = "bad-file"


class LayoutError(SurgeryError):
    """Keys that belong to no layout, to several, or that the layout cannot hold."""

    default_code = "bad-layout"


class KeyRefused(LayoutError):
    """One key that is unknown, incomplete, duplicated, or of an algorithm that is not carried."""

    default_code = "unknown-key"


class NameLookupError(SurgeryError):
    """A module name that the base model does not have, or has more than once."""

    default_code = "unknown-module"


class ShapeError(SurgeryError):
    """Tensors whose shapes do not fit each other, the config, or the base's weight."""

    default_code = "bad-shape"


class ValueRefused(SurgeryError):
    """Non-finite numbers, unsupported dtypes, scales that cannot be said."""

    default_code = "bad-value"


class InexactError(SurgeryError):
    """A conversion that cannot be exact, and for which no lossy switch was given."""

    default_code = "inexact"


def refuse_together(refused: Sequence[InexactError], count: int, where: str) -> None:
    """Raise one error for all of a file's modules that were refused; nothing if none was.

    A lone refusal is raised as it is; several are listed, under their code if they share it.
    """
    if len(refused) == 1:
        raise refused[0]
    if refused:
        codes = {error.code for error in refused}
        raise InexactError(
            f"{len(refused)} of {count} modules cannot be held",
            where=where,
            items=[f"{error.what} [{error.code}]" for error in refused],
            next=refused[0].next,
            code=codes.pop() if len(codes) == 1 else "",
        )


def printable(text: str, longest: int = 400) -> str:
    """Text from a stranger's file as a terminal may show it: no control characters, no end of it."""
    if len(text) > longest:
        text = f"{text[: longest // 2]} … {text[-longest // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A hint for an error's ``next``: the known names closest to ``name``, or an empty string."""
    from difflib import get_close_matches

    if len(name) > 300:
        return ""
    # difflib is quadratic in the length of the names; cut the field by length first.
    close = [k for k in known if abs(len(k) - len(name)) <= max(8, len(name) // 3)]
    matches = get_close_matches(name, close[:4000], n=count, cutoff=0.6)
    return "nearest: " + ", ".join(f"`{f}`" for f in matches) if matches else ""
