"""What a job did, as plain data: for the command's text, for --json, and for the library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from adaptsurgery_formats import Note

_SHOWN = 3  # of the modules that a note is about


def some(names: Sequence[str]) -> str:
    """ "a, b, c and 7 more"."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@dataclass
class Row:
    """One module: what became of it and how far its ΔW moved, ‖Δ − Δ'‖/‖Δ‖."""

    module: str
    algorithm: str
    change: str  # "identical", "rounded", "lossy"
    error: float = 0.0
    detail: str = ""


@dataclass
class Report:
    """The outcome of a job.

    ``rows`` one per module; ``notes`` what a user should know; ``outputs`` the files written (none
    in a dry run); ``facts`` whatever else the job tells.
    """

    job: str
    verdict: str = ""
    rows: list[Row] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def max_error(self) -> float:
        return max((r.error for r in self.rows), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON's own types."""
        return {**asdict(self), "max_error": self.max_error}
