"""Which modules a config means: PEFT's matching rules, once, for live models, graphs, checkpoints.

In this order, with names relative to the wrapped model:

1. ``exclude_modules`` goes out: a string is a regex for the whole name, a list's item the name or
   its dotted end.
2. ``modules_to_save``, by whole segments, goes out with all below it.
3. ``target_modules``: the same two ways. A list's item that is the whole name is taken at once, one
   that is its end only from the layers of ``layers_to_transform``. "all-linear" is every linear
   layer but the output's; None the table below, by the model's type.
4. Rank and alpha: the first key of the pattern, in order, that the name's end matches.

Where PEFT is silent this speaks: zero matches, a regex in a list, a layer that the algorithm does
not take are errors; a pattern that matched nothing and an option without effect are notes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adaptsurgery.core.config import AdapterConfig
from adaptsurgery_formats.errors import NameLookupError, ValueRefused, nearest
from adaptsurgery_formats.names.families import default_targets
from adaptsurgery_formats.names.heads import CLASSIFIERS
from adaptsurgery_formats.patterns import Matcher, tails, wanted_layers
from adaptsurgery_formats.state import Note

ALL_LINEAR = "all-linear"
_REGEX = re.compile(r"[*+?^$|()\[\]{}\\]")

# Model type → what is adapted where target_modules says nothing, for any algorithm.
DEFAULTS = default_targets()


@dataclass(frozen=True)
class Target:
    """A module to be adapted: its path, the kind of its layer, and its own rank and alpha."""

    name: str
    kind: str
    rank: int
    alpha: float | None


@dataclass(frozen=True)
class Targets:
    """What a config means in a model, in the model's order; what it says in vain, as notes."""

    chosen: tuple[Target, ...]
    saved: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The paths of the chosen modules."""
        return tuple(target.name for target in self.chosen)


def find_targets(
    modules: Mapping[str, str],
    config: AdapterConfig,
    *,
    model_type: str | None = None,
    outputs: Collection[str] = (),
) -> Targets:
    """The modules that ``config`` adapts and saves.

    ``modules`` maps a dotted path to its layer's kind: "linear" (transformers' Conv1D too),
    "conv1d", "conv2d", "conv3d", "embedding", or "" for any other module. ``model_type`` is what
    transformers' model.config says, ``outputs`` the paths of the output embeddings.

    Raises NameLookupError where nothing is matched, ValueRefused for a matched module that the
    algorithm does not take, a regex in a list, or no targets for an unknown model type, LayoutError
    for a pattern that is no regex or does not come to an end.
    """
    names = [name for name in modules if name]
    matcher = Matcher(names, type(config).__name__)
    search = _Search(modules, names, config, matcher)
    search.target = _wanted(modules, config, model_type, outputs)
    chosen = search.chosen()
    _check_kinds(chosen, modules, config)
    ranks, alphas = (
        search.by_pattern("rank_pattern", chosen),
        search.by_pattern("alpha_pattern", chosen),
    )
    alpha = config.common_alpha
    targets = tuple(
        Target(name, modules[name], ranks.get(name, config.r), alphas.get(name, alpha))
        for name in chosen
    )
    return Targets(targets, tuple(search.saved), (*search.notes, *_idle(targets, config)))


class _Search:
    """Matches one config with one model's names, and notes what it says in vain."""

    def __init__(
        self, modules: Mapping[str, str], names: list[str], config: AdapterConfig, matcher: Matcher
    ) -> None:
        self.modules, self.names, self.config, self.matcher = modules, names, config, matcher
        self.notes: list[Note] = []
        self.target: str | frozenset[str] = frozenset()
        self.saved = self._saved()
        self._saved_set = frozenset(self.saved)
        self.layers = wanted_layers(config.layers_to_transform)

    def chosen(self) -> list[str]:
        """The targets' names, in the model's order."""
        targets = self.config.target_modules
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            matched = {name: name for name in self.target}  # names in full, and never their ends
        else:
            matched = self.matcher.listed(self.target)
        kept = dict(matched)
        for name in self._excluded(matched):
            kept.pop(name, None)
        kept = {name: item for name, item in kept.items() if not self._below_saved(name)}
        kept = self._in_layers(kept)
        if not kept:
            raise self._nothing(matched)
        self._note_targets(matched)
        return [name for name in self.names if name in kept]

    def by_pattern(self, option: str, chosen: list[str]) -> dict[str, Any]:
        """The values that rank_pattern or alpha_pattern has for the chosen names."""
        pattern: Mapping[str, Any] = getattr(self.config, option, None) or {}
        if not pattern:
            return {}
        keys = Matcher(chosen, self.matcher.where).first_keys(pattern)
        used = set(keys.values())
        for key in pattern:
            if key not in used:
                self._vain(f"{option}.{key}", "it is the first match of no target")
        return {name: pattern[key] for name, key in keys.items()}

    def _saved(self) -> list[str]:
        """modules_to_save, the outermost of nested ones."""
        wanted = self.config.modules_to_save or []
        hits = self.matcher.listed(wanted) if wanted else {}
        used = set(hits.values())
        for item in wanted:
            if item not in used:
                self._vain(f"modules_to_save.{item}", f"no module is called so{self._near(item)}")
        above = set(hits)
        return [n for n in self.names if n in hits and not above.intersection(_parents(n))]

    def _below_saved(self, name: str) -> bool:
        return not self._saved_set.isdisjoint((name, *_parents(name)))

    def _excluded(self, matched: Mapping[str, str]) -> list[str]:
        excluded = self.config.exclude_modules
        if not excluded:
            return []
        hits = self.matcher.listed(excluded)
        out = [name for name in matched if name in hits]
        used = {hits[name] for name in out}
        items = [excluded] if isinstance(excluded, str) else sorted(excluded)
        for item in items:
            if item not in used:
                self._vain(f"exclude_modules.{item}", "it excludes no target")
        return out

    def _in_layers(self, kept: dict[str, str]) -> dict[str, str]:
        """The names in layers_to_transform, where it is set, and those that are listed in full."""
        if not self.layers or isinstance(self.target, str):
            return kept
        numbers = self.matcher.layers(self.config.layers_pattern)
        inside = {n: i for n, i in kept.items() if numbers.get(n, ("-",))[0] in self.layers}
        whole = {n: i for n, i in kept.items() if i == n and n not in inside}
        self._note_layers({numbers[n] for n in inside}, whole)
        return {n: i for n, i in kept.items() if n in inside or n in whole}

    def _note_layers(self, used: set[tuple[str, str]], whole: Collection[str]) -> None:
        digits, patterns = {d for d, _ in used}, {p for _, p in used}
        for text, number in self.layers.items():
            if text not in digits:
                self._vain(f"layers_to_transform.{number}", "no target is in that layer")
        layers_pattern = self.config.layers_pattern or []
        for pattern in [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern:
            if pattern not in patterns:
                self._vain(f"layers_pattern.{pattern}", "no target is below it")
        for name in sorted(whole):
            self._vain(f"target_modules.{name}", "listed in full, so in whatever layer it is")

    def _note_targets(self, matched: Mapping[str, str]) -> None:
        if isinstance(self.target, str) or not isinstance(self.config.target_modules, set):
            return
        used = set(matched.values())
        for item in sorted(self.target - used):
            # Of items that end in each other the longest is told, and both are right.
            if any(item in tails(other) for other in used):
                continue
            if _REGEX.search(item):
                raise _regex_in_a_list(item, self.matcher.where)
            self._vain(f"target_modules.{item}", f"no module is called so{self._near(item)}")

    def _nothing(self, matched: Mapping[str, str]) -> NameLookupError | ValueRefused:
        """The error for zero matches: what was asked for, and what would be near."""
        targets = self.config.target_modules
        items = [targets] if isinstance(targets, str) else sorted(targets or ())
        regexes = [item for item in items if _REGEX.search(item)]
        if regexes and not isinstance(targets, str):
            return _regex_in_a_list(regexes[0], self.matcher.where)
        hint = next((h for h in map(self._near, items) if h), "").removeprefix("; ")
        if isinstance(targets, str) and not regexes:
            hint = f"a string is a regex for whole names; [{targets!r}] takes names that end so"
        if matched:
            hint = "exclude_modules, modules_to_save or layers_to_transform leave none of them"
        count = f"{len(matched)} of {len(self.names)} modules are named by target_modules"
        return NameLookupError(
            "no module is targeted",
            where=self.matcher.where,
            seen=f"{count} {targets!r}"[:300],
            next=hint or "see the model's names by model.named_modules()",
            code="no-targets",
        )

    def _near(self, item: str) -> str:
        depth = item.count(".") + 1
        ends = {".".join(name.split(".")[-depth:]): None for name in self.names}
        hint = nearest(item, ends)
        return f"; {hint}" if hint else ""

    def _vain(self, where: str, text: str) -> None:
        self.notes.append(Note("without-effect", where, text))


def _wanted(
    modules: Mapping[str, str],
    config: AdapterConfig,
    model_type: str | None,
    outputs: Collection[str],
) -> str | frozenset[str]:
    """target_modules as a regex or as names, with "all-linear" and the defaults looked up."""
    targets = config.target_modules
    if targets is None:
        default = DEFAULTS.get(model_type or "")
        if default is None:
            raise ValueRefused(
                "target_modules says nothing, and there is no default for the model",
                where=type(config).__name__,
                seen=f"model_type {model_type!r}",
                next="name the modules, or use 'all-linear'",
                code="no-targets",
            )
        return default if isinstance(default, str) else frozenset(default)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        kept_out = set(outputs)
        if not kept_out and config.task_type == "SEQ_CLS" and model_type is not None:
            kept_out = set([head for head in CLASSIFIERS if head in modules][:1])
        return frozenset(n for n, kind in modules.items() if kind == "linear" and n not in kept_out)
    return targets if isinstance(targets, str) else frozenset(targets)


def _check_kinds(chosen: list[str], modules: Mapping[str, str], config: AdapterConfig) -> None:
    wrong = [name for name in chosen if modules[name] not in config.kinds]
    if wrong:
        raise ValueRefused(
            f"{len(wrong)} of {len(chosen)} targets are layers that {config.algorithm} does not take",
            where=type(config).__name__,
            seen=", ".join(f"`{n}` ({modules[n] or 'no single layer'})" for n in wrong[:4]),
            next=f"it takes {', '.join(sorted(config.kinds))}: exclude them, or name targets by more",
            code="unsupported-layer",
        )


def _idle(targets: tuple[Target, ...], config: AdapterConfig) -> Iterator[Note]:
    """Options that change nothing for the layers that were found."""
    kinds = {target.kind for target in targets}
    if getattr(config, "use_effective_conv2d", False) and not any("conv" in k for k in kinds):
        yield Note("without-effect", "use_effective_conv2d", "no target is a convolution")
    if getattr(config, "lora_dropout", 0) and kinds == {"embedding"}:
        yield Note("without-effect", "lora_dropout", "an embedding's indices have no dropout")


def _regex_in_a_list(item: str, where: str) -> ValueRefused:
    return ValueRefused(
        f"`{item}` in a list of target_modules is a name, and matches nothing",
        where=where,
        next="a regex goes in a string: target_modules=" + repr(item),
        code="regex-in-list",
    )


def _parents(name: str) -> Iterator[str]:
    at = name.rfind(".")
    while at > 0:
        yield name[:at]
        at = name.rfind(".", 0, at)
