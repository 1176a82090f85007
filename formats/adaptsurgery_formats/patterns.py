"""PEFT's patterns: which entry of rank_pattern or alpha_pattern speaks for a module, what
target_modules takes in, and a guard against regexes that would run for minutes.

``re`` backtracks, and a pattern from a stranger's adapter_config.json may be made to hang it.
Plain names, escaped names and patterns that can only do so much work are matched here; anything
that could explode runs in a child process, and all of a config's together get a few seconds.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adaptsurgery_formats.errors import LayoutError

TIMEOUT_SECONDS = 5.0
_MOST_STEPS = 1e8  # about two seconds of matching
_LONGEST = 1 << 20
_REPEAT = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|(\)?)([*+]|\{\d*,?\d*\})")


def exact_pattern(path: str) -> str:
    """A rank_pattern key that matches one module path and nothing else."""
    return "^" + re.escape(path)


_LITERAL = re.compile(r"\^?(?:[\w-]|\\[^\w]|\.)+\Z")


# Flags (verbose mode hides what is repeated), look-arounds, comments, back-references.
_UNUSUAL = re.compile(r"\(\?(?!:)|\\\d")


def _steps(pattern: str, names: Sequence[str]) -> float:
    """An upper bound of the steps that backtracking takes over all names; inf where there is none.

    Each repetition tries every length; each ``?``, and each ``|`` within a group, doubles the paths.
    """
    repeats = [m for m in _REPEAT.finditer(pattern) if m.group(2)]
    if any(m.group(1) for m in repeats) or _UNUSUAL.search(pattern):
        return math.inf
    choices = pattern.count("?") - pattern.count("(?:") + pattern.count("|") * ("(" in pattern)
    if len(repeats) > 3 or choices > 12:
        return math.inf
    return sum(float(len(n) + 1) ** len(repeats) for n in names) * len(pattern) * 2.0**choices


class _Tails:
    """Every dotted tail of every name: by its text, and by its length and number of dots."""

    def __init__(self, names: Iterable[str]) -> None:
        self.exact: dict[str, list[str]] = {}
        self.shaped: dict[tuple[int, int], list[tuple[str, str]]] = {}
        for name in names:
            pieces = name.split(".")
            for i in range(len(pieces)):
                tail = ".".join(pieces[i:])
                self.exact.setdefault(tail, []).append(name)
                shape = (len(tail), len(pieces) - i - 1)
                self.shaped.setdefault(shape, []).append((tail, name))


class Matcher:
    """Matches module names against the patterns of one config.

    ``names`` are all names that will be asked about: a pattern is run over all of them in one go.
    Raises LayoutError for a pattern that is no regex ("bad-pattern") or does not come to an end
    ("slow-pattern").
    """

    def __init__(self, names: Iterable[str], where: str) -> None:
        self.names = sorted(set(names))
        self.where = where
        self._full: dict[str, frozenset[str]] = {}
        self._steps, self._seconds = _MOST_STEPS, TIMEOUT_SECONDS  # left for all patterns together
        self._tails: _Tails | None = None

    def first_keys(self, patterns: Mapping[str, Any]) -> dict[str, str]:
        """For each name the first key, in order, with ``re.match(rf"(.*\\.)?({key})$", name)``."""
        found: dict[str, str] = {}
        for key in patterns:
            for name in self._ending(key):
                found.setdefault(name, key)
        return found

    def fullmatch(self, pattern: str, name: str) -> bool:
        if pattern not in self._full:
            self._full[pattern] = frozenset(self._run(pattern, pattern, "fullmatch"))
        return name in self._full[pattern]

    def _ending(self, key: str) -> list[str]:
        """The names that a rank_pattern key matches.

        Keys without repetition, which are nearly all, match a name's dotted tail of just their
        own length: the tail they spell, and, since their dots are wildcards, tails with fewer dots.
        """
        if not _LITERAL.match(key):
            return self._run(rf"(.*\.)?({key})$", key, "match")
        anchored, body = key.startswith("^"), key.removeprefix("^")
        spelled = re.sub(r"\\(.)", r"\1", body)
        index = self._index()
        hits = [(spelled, name) for name in index.exact.get(spelled, ())]
        if wildcards := body.count(".") - body.count("\\."):
            plain = re.compile(body)
            for dots in range(spelled.count(".") - wildcards, spelled.count(".")):
                tails = index.shaped.get((len(spelled), dots), ())
                hits += [(tail, name) for tail, name in tails if plain.fullmatch(tail)]
        return [name for tail, name in hits if tail == name or not anchored]

    def _index(self) -> _Tails:
        if self._tails is None:
            self._tails = _Tails(self.names)
        return self._tails

    def _run(self, regex: str, shown: str, how: str) -> list[str]:
        started = time.monotonic()
        try:
            if len(shown) > _LONGEST:
                raise OverflowError(f"it has {len(shown)} characters")
            compiled = re.compile(regex)
        except (re.error, RecursionError, OverflowError) as error:
            raise LayoutError(
                f"`{shown[:200]}` is not a regex: {error}",
                where=self.where,
                next="escape it, or name the module in full",
                code="bad-pattern",
            ) from None
        self._seconds -= time.monotonic() - started
        steps = _steps(shown, self.names)
        if steps > self._steps:
            return self._run_apart(regex, shown, how)
        self._steps -= steps
        match = compiled.match if how == "match" else compiled.fullmatch
        return [n for n in self.names if match(n)]

    def _run_apart(self, regex: str, shown: str, how: str) -> list[str]:
        import json
        import subprocess
        import sys

        script = (
            "import json,re,sys\n"
            "regex,how,names=json.load(sys.stdin)\n"
            "match=getattr(re.compile(regex),how)\n"
            "json.dump([n for n in names if match(n)],sys.stdout)"
        )
        job = json.dumps([regex, how, self.names])
        started = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", script],
                input=job, capture_output=True, text=True, timeout=max(0.0, self._seconds),
                check=True,
            )  # fmt: skip
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            how_long = (
                f"the config's patterns take over {TIMEOUT_SECONDS:g} s, {len(self.names)} names"
            )
            raise LayoutError(
                f"the pattern `{shown[:200]}` does not come to an end",
                where=self.where,
                seen=how_long if isinstance(error, subprocess.TimeoutExpired) else str(error),
                next="write it without nested repetitions, or list the modules' names",
                code="slow-pattern",
            ) from None
        self._seconds -= time.monotonic() - started
        found: list[str] = json.loads(done.stdout)
        return found


def is_targeted(name: str, config: Mapping[str, Any], matcher: Matcher) -> bool | None:
    """Whether PEFT would put an adapter on the module; None where only the model can tell.

    target_modules: a string is matched in full, a list by equality or as a dotted suffix;
    "all-linear" and None need the model. exclude_modules the same way. A module that a list names
    in full is taken before layers_to_transform is looked at, as PEFT does.
    """
    excluded = config.get("exclude_modules")
    if excluded and _listed(name, excluded, matcher):
        return False
    target = config.get("target_modules")
    if target is None or (isinstance(target, str) and target.lower() == "all-linear"):
        return None
    if isinstance(target, str):
        return matcher.fullmatch(target, name)
    if name in target:
        return True
    return _listed(name, target, matcher) and _in_layers(name, config)


def _listed(name: str, wanted: str | Sequence[str], matcher: Matcher) -> bool:
    if isinstance(wanted, str):
        return matcher.fullmatch(wanted, name)
    return any(name == item or name.endswith("." + item) for item in wanted)


def _in_layers(name: str, config: Mapping[str, Any]) -> bool:
    """layers_to_transform's filter: the layer index is the first number after layers_pattern."""
    indexes = config.get("layers_to_transform")
    if indexes is None or indexes == []:
        return True
    wanted = [indexes] if isinstance(indexes, int) else indexes
    patterns = config.get("layers_pattern") or []
    found = None if patterns else re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){re.escape(pattern)}\.(?P<idx>\d+)\.", name)
        if found:
            break
    return found is not None and found.group("idx").lstrip("0") in {
        str(i).lstrip("0") for i in wanted
    }
