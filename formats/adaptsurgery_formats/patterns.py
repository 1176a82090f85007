"""PEFT's patterns: which entry of rank_pattern or alpha_pattern speaks for a module, what
target_modules takes in, and a guard against regexes that would run for minutes.

``re`` backtracks, and a pattern from a stranger's adapter_config.json may be made to hang it, when
it is matched and when it is compiled. Plain names, escaped names and patterns that can only do so
much work are compiled and matched here; anything that could explode is so in a child process of
bounded memory, and all of a config's patterns together get a few seconds.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from adaptsurgery_formats.errors import LayoutError
from adaptsurgery_formats.late import Late

TIMEOUT_SECONDS = 5.0
_MOST_STEPS = 1e8  # about two seconds of matching
_LONGEST = 1 << 20
_LONGEST_HERE = 1 << 12  # characters of a regex that is compiled in this process
_LONGEST_NAME = 1 << 12  # of a name that a repeated group is tried on here: each turn takes memory
_MOST_MEMORY = 1 << 30  # of the child process, where the system can bound it
_REPEAT = Late(r"\\.|\[(?:\\.|[^\]\\])*\]|(\)?)([*+]|\{\d*,?\d*\})")


def exact_pattern(path: str) -> str:
    """A rank_pattern key that matches one module path and nothing else."""
    return "^" + re.escape(path)


_LITERAL = Late(r"\^?(?:[\w-]|\\[^\w]|\.)+\Z")
_PLAIN = Late(r"[\w.-]+\Z")
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."


# Flags (verbose mode hides what is repeated), look-arounds, comments, back-references.
_UNUSUAL = Late(r"\(\?(?!:)|\\\d")


# What writes a character that is not ASCII: a class of many is slow to compile.
_CODED = Late(r"\\[xuUN0-7]")
_NAMES_ALONE = Late(r"[\w|-]+")
_ESCAPE = Late(r"\\([^\w|])")


def _is_exact(pattern: str) -> bool:
    """Whether a regex is names alone, each escaped, and ``|`` between them."""
    return _NAMES_ALONE.fullmatch(_ESCAPE.sub("", pattern)) is not None


def _compiles_fast(pattern: str) -> bool:
    """Whether compiling takes milliseconds: a short regex whose classes hold ASCII alone."""
    return len(pattern) <= _LONGEST_HERE and pattern.isascii() and not _CODED.search(pattern)


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


def tails(name: str) -> Iterator[str]:
    """The name itself, and what follows each of its dots: the longest first."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


class _Tails:
    """Every dotted tail of every name: by its text, and by its length and number of dots."""

    def __init__(self, names: Iterable[str]) -> None:
        self.exact: dict[str, list[str]] = {}
        self.shaped: dict[tuple[int, int], list[tuple[str, str]]] = {}
        for name in names:
            for tail in tails(name):
                self.exact.setdefault(tail, []).append(name)
                shape = (len(tail), tail.count("."))
                self.shaped.setdefault(shape, []).append((tail, name))


class Matcher:
    """Matches module names against the patterns of one config.

    ``names`` are all names that will be asked about: a pattern is run over all of them in one go.
    Raises LayoutError for a pattern that is no regex ("bad-pattern") or does not come to an end
    ("slow-pattern").
    """

    def __init__(self, names: Iterable[str], where: str) -> None:
        self.names = sorted(set(names))
        self.longest = max(self.names, key=len, default="")
        self.where = where
        self._full: dict[str, frozenset[str]] = {}
        self._lists: dict[int, tuple[object, dict[str, str]]] = {}
        self._numbers: dict[tuple[str, ...], dict[str, tuple[str, str]]] = {}
        self._steps, self._seconds = _MOST_STEPS, TIMEOUT_SECONDS  # left for all patterns together
        self._tails: _Tails | None = None

    def first_keys(self, patterns: Mapping[str, Any]) -> dict[str, str]:
        """For each name the first key, in order, with ``re.match(rf"(.*\\.)?({key})$", name)``."""
        keys: dict[str, str] = {}
        for key in patterns:
            for name in self._ending(key):
                keys.setdefault(name, key)
        return keys

    def fullmatch(self, pattern: str, name: str) -> bool:
        if pattern not in self._full:
            self._full[pattern] = frozenset(self._run(pattern, pattern, "fullmatch"))
        return name in self._full[pattern]

    def listed(self, wanted: str | Collection[str]) -> dict[str, str]:
        """The names that ``wanted`` takes in, and by which of its items.

        A string is a regex for whole names; a list's item is the name or its dotted end, and of
        several the longest is told.
        """
        if id(wanted) not in self._lists:
            if isinstance(wanted, str):
                matches = {n: wanted for n in self.names if self.fullmatch(wanted, n)}
            else:
                items = frozenset(wanted)
                first = ((n, next((t for t in tails(n) if t in items), None)) for n in self.names)
                matches = {name: item for name, item in first if item is not None}
            self._lists[id(wanted)] = wanted, matches  # held, so that its id stays its own
        return self._lists[id(wanted)][1]

    def layers(self, patterns: str | Sequence[str] | None) -> dict[str, tuple[str, str]]:
        """The names that have a layer's number, with its digits and the pattern that found it.

        The number is the first that follows a layers_pattern, of several the first that is there;
        without a pattern the first number below two names.
        """
        each = [patterns] if patterns and isinstance(patterns, str) else patterns
        regexes = {p: rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in each or ()} or {"": _ANY_LAYER}
        if (key := tuple(regexes)) not in self._numbers:
            numbers: dict[str, tuple[str, str]] = {}
            for pattern, regex in regexes.items():
                for name, digits in self._run(regex, pattern, "match").items():
                    numbers.setdefault(name, (digits.lstrip("0"), pattern))
            self._numbers[key] = numbers
        return self._numbers[key]

    def _ending(self, key: str) -> Iterable[str]:
        """The names that a rank_pattern key matches.

        Keys without repetition, which are nearly all, match a name's dotted tail of just their
        own length: the tail they spell, and, since their dots are wildcards, tails with fewer dots.
        """
        if len(key) > _LONGEST_HERE or not _LITERAL.match(key):
            return self._run(rf"(.*\.)?({key})$", key, "match")
        anchored, body = key.startswith("^"), key.removeprefix("^")
        spelled = re.sub(r"\\(.)", r"\1", body)
        index = self._index()
        hits = [(spelled, name) for name in index.exact.get(spelled, ())]
        if wildcards := body.count(".") - body.count("\\."):
            for dots in range(spelled.count(".") - wildcards, spelled.count(".")):
                if similar := index.shaped.get((len(spelled), dots)):
                    plain = re.compile(body)
                    hits += [(tail, name) for tail, name in similar if plain.fullmatch(tail)]
        return [name for tail, name in hits if tail == name or not anchored]

    def _index(self) -> _Tails:
        if self._tails is None:
            self._tails = _Tails(self.names)
        return self._tails

    def _run(self, regex: str, shown: str, how: str) -> dict[str, str]:
        """The names that a regex matches, with what its group ``idx`` holds, where it has one."""
        if len(shown) > _LONGEST:
            raise self._no_regex(shown, f"it has {len(shown)} characters")
        if how == "fullmatch" and regex == shown and _is_exact(shown):
            spelled = {_ESCAPE.sub(r"\1", name) for name in shown.split("|")}
            return {name: "" for name in self.names if name in spelled}
        if self._seconds <= 0 or not _compiles_fast(regex) or len(self.longest) > _LONGEST_NAME:
            return self._run_apart(regex, shown, how)
        started = time.monotonic()
        try:
            compiled = re.compile(regex)
        except (re.error, RecursionError, OverflowError) as error:
            raise self._no_regex(shown, error) from None
        self._seconds -= time.monotonic() - started
        steps = 0.0 if not shown or _PLAIN.match(shown) else _steps(shown, self.names)
        if steps > self._steps:
            return self._run_apart(regex, shown, how)
        self._steps -= steps
        match = compiled.match if how == "match" else compiled.fullmatch
        hits = [(n, m) for n in self.names if (m := match(n))]
        return {n: m.groupdict().get("idx") or "" for n, m in hits}

    def _run_apart(self, regex: str, shown: str, how: str) -> dict[str, str]:
        """The same in a child process, which is stopped when the config's seconds are over."""
        import json
        import subprocess
        import sys

        job = json.dumps([regex, how, self.names, _MOST_MEMORY])
        started = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _CHILD],
                input=job,
                capture_output=True,
                text=True,
                timeout=max(0.0, self._seconds),
                check=True,
            )
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            late = isinstance(error, subprocess.TimeoutExpired)
            raise self._endless(shown, late) from None
        self._seconds -= time.monotonic() - started
        answer: dict[str, str] | str = json.loads(done.stdout)
        if isinstance(answer, str):
            raise self._no_regex(shown, answer)
        return answer

    def _no_regex(self, shown: str, reason: object) -> LayoutError:
        return LayoutError(
            f"`{shown[:200]}` is not a regex: {reason}",
            where=self.where,
            next="escape it, or name the module in full",
            code="bad-pattern",
        )

    def _endless(self, shown: str, late: bool) -> LayoutError:
        seconds = f"the config's patterns take over {TIMEOUT_SECONDS:g} s"
        return LayoutError(
            f"the pattern `{shown[:200]}` does not come to an end",
            where=self.where,
            seen=f"{seconds}, {len(self.names)} names" if late else "it takes too much memory",
            next="write it without nested repetitions, or list the modules' names",
            code="slow-pattern",
        )


_CHILD = """
import json, re, sys
regex, how, names, most = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
except (ImportError, AttributeError, OSError, ValueError):
    pass
try:
    match = getattr(re.compile(regex), how)
except (re.error, RecursionError, OverflowError) as error:
    answer = str(error)[:200]
else:
    hits = ((n, match(n)) for n in names)
    answer = {n: m.groupdict().get("idx") or "" for n, m in hits if m}
json.dump(answer, sys.stdout)
"""


def is_targeted(name: str, config: Mapping[str, Any], matcher: Matcher) -> bool | None:
    """Whether PEFT would put an adapter on the module; None where only the model can tell.

    target_modules: a string is matched in full, a list by equality or as a dotted suffix;
    "all-linear" and None need the model. exclude_modules the same way. A module that a list names
    in full is taken before layers_to_transform is looked at, as PEFT does.
    """
    excluded = config.get("exclude_modules")
    if excluded and name in matcher.listed(excluded):
        return False
    target = config.get("target_modules")
    if target is None or (isinstance(target, str) and target.lower() == "all-linear"):
        return None
    item = matcher.listed(target).get(name)
    if item is None or isinstance(target, str) or item == name:
        return item is not None
    wanted = wanted_layers(config.get("layers_to_transform"))
    if not wanted:
        return True
    numbers = matcher.layers(config.get("layers_pattern"))
    return name in numbers and numbers[name][0] in wanted


def wanted_layers(layers: int | Iterable[int] | None) -> dict[str, int]:
    """layers_to_transform's numbers by their digits without leading zeros; empty: all layers."""
    numbers = [layers] if isinstance(layers, int) else layers or ()
    return {str(n).lstrip("0"): n for n in numbers}
