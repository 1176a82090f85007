"""What is found in a graph: a Site is one layer, a Call is one place where it is used.

Both are plain data: nodes are named, not held, so that what was found in a program holds for a copy
of it, and for the same program saved and loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from adaptsurgery.core.geometry import Layer
from adaptsurgery_formats.errors import ValueRefused

T = TypeVar("T")

# The key of meta["custom"] under which a node that surgery put there bears its record (a string of
# JSON). Nodes that bear it are no sites.
RECORD = "adaptsurgery"
# Another key, on nodes of any kind of a graph that has adapters within no_grad or autocast: how many
# places each adapter has. torch drops the records in there when it exports the program again.
COUNTS = "adaptsurgery_places"


@dataclass(frozen=True)
class Call:
    """One use of a layer: ``output`` = layer(``input``), in one (sub)graph; all by node names.

    ``graph`` leads to it: the get_attr targets of the nested graphs, from the top, () for the top
    itself. ``nodes`` are the layer's own, in order, without the input, the weight and the bias;
    ``output`` is one of them. ``weight`` and ``bias`` are the nodes *of that graph* that give them
    (get_attr, placeholder, or what computes the weight): "" for a ``call_module``, whose module
    holds them, for a bias that there is not, and for a weight that shows nowhere as one tensor.
    ``hops`` are the names of the higher-order nodes passed on the way, one for each of ``graph``.

    A decomposed linear's input and output are those of its mm or addmm, (positions, i) and
    (positions, o); the input of a convolution that a pad of its own stands before is what was padded
    (``padding_mode`` is "zeros" there: it is another for a ``call_module`` alone).
    """

    input: str
    output: str
    nodes: tuple[str, ...]
    weight: str = ""
    bias: str = ""
    graph: tuple[str, ...] = ()
    hops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """A Linear, Conv1D (a transposed linear) or Conv1d/2d/3d of a graph.

    ``path`` is the module's, as named_modules() has it, and ``aliases`` are other paths of the same
    module; where the weight is no parameter called ``weight`` (nn.MultiheadAttention's
    in_proj_weight) the path is its owner's. ``type`` is the class that the trace noted, or "".
    ``shape`` is canonical, (o, i, *k). ``weight`` and ``bias`` are names as state_dict() has them: "" for a bias
    that there is not, and for a weight that is computed (weight_norm, int8), which cannot be
    replaced. ``names`` are paths (the first is ``path``) that were called with one weight and no
    bias, where the trace does not tell one module under several names from several modules that
    share it: an adapter is for all of them or refused. ``shares`` names who else uses the weight: other sites' paths, an embedding's.
    ``reason`` tells why no adapter can be put there; it is "" where one can.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    calls: tuple[Call, ...]
    weight: str = ""
    bias: str = ""
    transposed: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    padding_mode: str = "zeros"
    dilation: tuple[int, ...] = ()
    groups: int = 1
    aliases: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    type: str = ""
    reason: str = ""

    @property
    def adaptable(self) -> bool:
        return not self.reason

    def layer(self, weight: Tensor, bias: Tensor | None = None) -> Layer:
        """The layer around a ``weight`` as stored, which may be a tensor or a proxy of one."""
        if self.kind == "linear":
            return Layer("linear", weight, bias, transposed=self.transposed)
        return Layer(
            self.kind,
            weight,
            bias,
            stride=self.stride,
            padding=self.padding,
            padding_mode=self.padding_mode,
            dilation=self.dilation,
            groups=self.groups,
        )

    def untold(self) -> str:
        """Why an adapter for some of the ``names`` cannot be put on those alone."""
        names = ", ".join(f"`{name}`" for name in self.names)
        return f"the trace does not tell whether {names} are one module or several of one weight"


def one_each(given: Mapping[str, T], sites: Mapping[str, Site]) -> dict[str, T]:
    """The values ``given``, one for each site's ``path``; ``sites`` has a site under all its paths.

    Raises ValueRefused ("untold-modules") where a site gets two different values, or where some
    of its ``names`` are left out.
    """
    by_site: dict[str, T] = {}
    for path, value in given.items():
        site = sites[path]
        if by_site.setdefault(site.path, value) is not value or set(site.names) - set(given):
            raise ValueRefused(
                f"`{path}`: {site.untold() if site.names else 'two names of one layer are given'}",
                seen=f"an adapter for {', '.join(p for p in given if sites[p] is site)}",
                next="torch.export.export(…, strict=True) tells them apart"
                if site.names
                else f"name `{site.path}` alone",
                code="untold-modules",
            )
    return by_site
