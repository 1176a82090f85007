"""What adapters do to a base's tensors, as plain data: the result of ``match``."""

from __future__ import annotations

from dataclasses import dataclass, field

from adaptsurgery_formats import Note

TensorName = tuple[str, str]  # component and parameter name


@dataclass(frozen=True)
class Change:
    """One module's part in one stored tensor.

    ``adapter`` and ``module`` count in the plan's adapters and in the file's modules. ``what`` is
    "weight" or "bias". Rows [first, first + rows) of the module's own canonical weight, stored
    shape ``shape``, go to rows [at, at + rows) of the tensor's canonical form, or of its
    ``index``-th slice; ``turned``: that is stored (i, o).
    """

    adapter: int
    module: int
    what: str
    shape: tuple[int, ...]
    at: int
    rows: int
    first: int = 0
    index: int | None = None
    turned: bool = False

    def meets(self, other: Change) -> bool:
        """Whether both change some of the same outputs."""
        apart = self.at + self.rows <= other.at or other.at + other.rows <= self.at
        return self.index == other.index and not apart


@dataclass(frozen=True)
class Saved:
    """A parameter that an adapter replaces outright."""

    adapter: int
    component: str
    name: str


@dataclass
class Matched:
    """What the adapters do to the base, by component and parameter name.

    ``heads``: a parameter to be written apart from the embedding that it was tied to → that one.
    ``modules`` is the count of those matched; ``unmatched`` lists the others.
    """

    changes: dict[TensorName, list[Change]] = field(default_factory=dict)
    saved: dict[TensorName, Saved] = field(default_factory=dict)
    heads: dict[TensorName, TensorName] = field(default_factory=dict)
    modules: int = 0
    unmatched: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
