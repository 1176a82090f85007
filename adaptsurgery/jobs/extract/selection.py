"""Which weights become adapters, what goes beside them as it is, and what is left out, and why.

By default every Linear and convolution is adapted, and embeddings, heads, norms and biases are
carried dense as far as the target can hold them:

=============  ==============================================  ====================================
               PEFT                                            LyCORIS, kohya
=============  ==============================================  ====================================
layer's bias   the parameter itself (bias "all")               diff_b
norm           modules_to_save                                 w_norm, b_norm
embedding      modules_to_save, grown ones too                 diff, where the shape is the same
head           modules_to_save, new ones too                   diff, where the shape is the same
other          –                                               –
=============  ==============================================  ====================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from adaptsurgery.checkpoint.base import Base
from adaptsurgery.jobs.extract.pairs import Pair, Paired
from adaptsurgery.jobs.extract.recipe import ExtractRecipe
from adaptsurgery.jobs.options.extraction import AUTO, extractable
from adaptsurgery_formats import FORMATS, ModuleState, Note
from adaptsurgery_formats.errors import InexactError, NameLookupError, nearest
from adaptsurgery_formats.names.heads import HEAD
from adaptsurgery_formats.names.kinds import LAYERS, Kind, kind_of
from adaptsurgery_formats.patterns import Matcher
from adaptsurgery_formats.reading import texts, typed
from adaptsurgery_formats.tensors import FLOAT_DTYPES

WEIGHTS = (*LAYERS, "embedding", "head")


@dataclass(frozen=True)
class Chosen:
    """A weight that becomes an adapter's module: its canonical shape, and who can hold one."""

    pair: Pair
    path: str
    kind: str
    turned: bool
    algorithms: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.pair.component}.{self.path}" if self.pair.component else self.path

    @property
    def shape(self) -> tuple[int, ...]:
        """(o, i, *k)."""
        return self.pair.base.shape[::-1] if self.turned else self.pair.base.shape

    @property
    def sides(self) -> int:
        """o + i·∏k: the numbers of a LoRA of rank 1."""
        total = 1
        for size in self.shape[1:]:
            total *= size
        return self.shape[0] + total


@dataclass(frozen=True)
class Dense:
    """A parameter that is no adapted weight: carried as it is, or left out for a ``reason``.

    ``slot`` is what a dense difference of it is called ("diff", "diff_b", "w_norm", "b_norm"),
    "saved" where the target keeps the fine-tuned parameter itself, or "" where it is left out.
    """

    pair: Pair
    path: str
    kind: str
    slot: str
    reason: str = ""


@dataclass
class Selection:
    chosen: list[Chosen] = field(default_factory=list)
    dense: list[Dense] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def select(base: Base, tuned: Base, paired: Paired, options: ExtractRecipe) -> Selection:
    """What becomes of every pair.

    Raises NameLookupError ("no-match") for a pattern that matches nothing, and InexactError
    ("nothing-held") where the target can hold an adapter of none of the layers.
    """
    selection = Selection()
    for config in tuned.configs.values():
        texts(config, "architectures")  # which tell at the end whether a head is tied
    kinds = [(pair, _kind(pair, base, tuned)) for pair in (*paired.pairs, *paired.only_tuned)]
    tied = set(_tied(kinds, tuned))
    if tied:
        text = "the output head is the embedding: taken once"
        selection.notes.append(Note("tied", ", ".join(sorted(p.label for p in tied)), text))
    kinds = [(pair, kind) for pair, kind in kinds if pair not in tied]
    picked = _Picked(kinds, options, tuned.where)
    selection.notes += picked.notes
    for pair, kind in kinds:
        if picked.takes(pair, kind):
            algorithms = tuple(a for a in _wanted(options) if not unheld(options.to, a, kind, pair))
            selection.chosen.append(Chosen(pair, kind.path, kind.name, kind.turned, algorithms))
    _leave_out_unheld(selection, options, tuned)
    _place_dense(selection, kinds, picked, options)
    _note_shapes(selection, tuned)
    return selection


def _kind(pair: Pair, base: Base, tuned: Base) -> Kind:
    """What a pair is, by the base; by the fine-tuned model where only that has it."""
    model, side = (tuned, pair.tuned) if pair.new else (base, pair.base)
    component = (
        pair.component if pair.component in model.parameters else next(iter(model.parameters))
    )
    config = model.configs.get(component, {})
    return kind_of(pair.name, side.shape, model.parameters[component], config)


def _wanted(options: ExtractRecipe) -> tuple[str, ...]:
    return extractable() if options.algorithm == AUTO else (options.algorithm,)


def _tied(kinds: Sequence[tuple[Pair, Kind]], tuned: Base) -> Iterator[Pair]:
    """Heads that are their embedding, where the fine-tuned model's config says so."""
    for pair, kind in kinds:
        component = pair.component if pair.component in tuned.configs else ""
        flag = typed(tuned.configs.get(component, {}), "tie_word_embeddings", bool)
        if kind.name == "head" and flag and pair.name.endswith(f"{HEAD}.weight"):
            shapes = {
                p.tuned.shape
                for p, k in kinds
                if k.name == "embedding" and p.component == pair.component
            }
            if pair.tuned.shape in shapes:
                yield pair


# -- Patterns --------------------------------------------------------------------------------------


class _Picked:
    """The include and exclude patterns at work: PEFT's rules for target_modules.

    A name is matched where it is equal or a dotted suffix; a pattern with a regex's signs is
    matched in full.
    """

    def __init__(
        self, kinds: Sequence[tuple[Pair, Kind]], options: ExtractRecipe, where: str
    ) -> None:
        self.options = options
        self.paths = sorted({k.path for p, k in kinds if k.name in WEIGHTS and not p.new})
        self.matcher = Matcher(self.paths, where)
        self.notes: list[Note] = []
        self.included = self._matching(options.include, "--include", where)
        self.excluded = self._matching(options.exclude, "--exclude", where)

    def _matching(self, patterns: Iterable[str], option: str, where: str) -> set[str]:
        matches: set[str] = set()
        for pattern in patterns:
            signs = any(c in pattern for c in r"*+?()[]{}|\^$")
            hits = set(self.matcher.listed(pattern if signs else [pattern]))
            if not hits:
                raise NameLookupError(
                    f"{option} {pattern} matches no layer",
                    where=where,
                    next=nearest(
                        pattern, {p.rpartition(".")[2] for p in self.paths} | {*self.paths}
                    )
                    or "a module's name, the end of one, or a regex of the whole",
                    code="no-match",
                )
            matches |= hits
        return matches

    def takes(self, pair: Pair, kind: Kind) -> bool:
        """Whether an adapter of this weight is asked for."""
        if kind.name not in WEIGHTS or pair.new or kind.path in self.excluded:
            return False
        return kind.path in self.included if self.options.include else kind.name in LAYERS

    def keeps(self, kind: Kind) -> str:
        """Why what is no adapter is not to be carried beside them; "" where it is."""
        if not self.options.dense:
            return "--no-dense"
        if kind.path in self.excluded:
            return "excluded"
        if self.options.include and kind.path not in self.included:
            return "not included"
        return ""


# -- What a target can hold ------------------------------------------------------------------------


def unheld(to: str, algorithm: str, kind: Kind, pair: Pair) -> str:
    """Why a target's layout has no such module, or an empty string."""
    module = ModuleState(
        kind.path,
        algorithm,
        {},
        kind="embedding" if kind.name == "embedding" else "",
        options={"fan_in_fan_out": True} if kind.turned and kind.name != "embedding" else {},
    )
    refusal = FORMATS[to].holds(module, pair.base.shape)
    return "" if refusal is None else refusal.what


def _leave_out_unheld(selection: Selection, options: ExtractRecipe, tuned: Base) -> None:
    """Move the layers that no algorithm asked for can take to what is left out."""
    none = [c for c in selection.chosen if not c.algorithms]
    selection.chosen = [c for c in selection.chosen if c.algorithms]
    reasons = {
        c.label: unheld(options.to, _wanted(options)[-1], Kind(c.kind, c.path, c.turned), c.pair)
        for c in none
    }
    selection.dense += [Dense(c.pair, c.path, c.kind, "", reasons[c.label]) for c in none]
    if not selection.chosen:
        raise InexactError(
            f"no layer can become a {options.algorithm} in {options.to}",
            where=tuned.where,
            items=[f"`{label}`: {why}" for label, why in list(reasons.items())[:8]],
            next="another --algorithm, or --include other layers",
            code="nothing-held",
        )


# -- What goes beside ------------------------------------------------------------------------------


def _place_dense(
    selection: Selection,
    kinds: Sequence[tuple[Pair, Kind]],
    picked: _Picked,
    options: ExtractRecipe,
) -> None:
    taken = {c.pair for c in selection.chosen} | {d.pair for d in selection.dense}
    homes = {
        (pair.component, kind.path): kind.name
        for pair, kind in kinds
        if kind.name != "bias" and pair.name.rpartition(".")[2] == "weight"
    }
    adapted = {(c.pair.component, c.path) for c in selection.chosen}
    for pair, kind in kinds:
        if pair in taken:
            continue
        home = homes.get((pair.component, kind.path), "")
        reason = picked.keeps(kind) or _no_place(
            pair, kind, home, (pair.component, kind.path) in adapted, options
        )
        slot = "" if reason else _slot(kind, home, options)
        selection.dense.append(Dense(pair, kind.path, kind.name, slot, reason))


def _no_place(pair: Pair, kind: Kind, home: str, adapted: bool, options: ExtractRecipe) -> str:
    """Why a target cannot keep a parameter that is no adapted weight, or an empty string.

    ``home`` is the kind of the weight that it lies beside, "" where it lies beside none.
    """
    if kind.name in LAYERS:
        return "new" if pair.new else "not adapted"
    if not {pair.base.dtype, pair.tuned.dtype} <= {*FLOAT_DTYPES}:
        return "not a floating-point parameter"
    if kind.name == "bias" and home in LAYERS and not adapted:
        return "its layer is not adapted"
    if not home:
        return "no module's weight or bias"
    if options.to == "peft":
        return "" if kind.name != "other" or home == "norm" else "no module's weight or bias"
    if pair.base.shape != pair.tuned.shape:
        return f"a difference needs one shape, and {options.to} has nothing else for it"
    return "" if kind.name != "other" else "no module's weight or bias"


def _slot(kind: Kind, home: str, options: ExtractRecipe) -> str:
    if options.to == "peft":
        return "saved"
    if kind.name == "bias":
        return "b_norm" if home == "norm" else "diff_b"
    return "w_norm" if kind.name == "norm" else "diff"


def _note_shapes(selection: Selection, tuned: Base) -> None:
    """Grown vocabularies, new heads, and other shapes among what is not adapted."""
    for one in selection.dense:
        before, now = one.pair.base.shape, one.pair.tuned.shape
        if one.kind in ("bias", "other") or one.pair.new or before == now:
            continue
        grown = one.kind in ("embedding", "head") and before[1:] == now[1:]
        became = (
            "resize the base first, as PEFT needs it" if one.slot else f"left out: {one.reason}"
        )
        text = f"`{one.pair.label}` has {before[0]} rows in the base and {now[0]} here; {became}"
        if not grown:
            text = (
                f"`{one.pair.label}` is {list(before)} in the base and {list(now)} here; {became}"
            )
        code = "grown-vocabulary" if grown else "another-shape"
        selection.notes.append(Note(code, tuned.where, text))
    new = [d for d in selection.dense if d.pair.new]
    if new:
        kept = sum(bool(d.slot) for d in new)
        names = ", ".join(d.pair.label for d in new[:5])
        more = f" and {len(new) - 5} more" if len(new) > 5 else ""
        text = f"not in the base, {kept} of {len(new)} kept whole: {names}{more}"
        selection.notes.append(Note("only-in-tuned", tuned.where, text))
