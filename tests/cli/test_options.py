"""An option is written once: a job's keywords, its options' fields and its command's agree."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any

import click
import pytest
from click.testing import CliRunner

import adaptsurgery
from adaptsurgery.cli import combine, convert, extract, merge, options, rewrite
from adaptsurgery.jobs.options import carried, check_numbers, collected, option
from adaptsurgery.jobs.options.adapters import CombineOptions, ConvertOptions, ResizeOptions
from adaptsurgery.jobs.options.checkpoints import MergeOptions, UnmergeOptions
from adaptsurgery.jobs.options.extraction import ExtractOptions
from adaptsurgery.jobs.options.programs import RewriteOptions
from adaptsurgery_formats.errors import SurgeryError

Job = tuple[Callable[..., Any], type, click.Command]
JOBS: dict[str, Job] = {
    "convert": (adaptsurgery.convert, ConvertOptions, convert.command),
    "combine": (adaptsurgery.combine, CombineOptions, combine.command),
    "resize": (adaptsurgery.resize, ResizeOptions, combine.resize_command),
    "merge": (adaptsurgery.merge, MergeOptions, merge.command),
    "unmerge": (adaptsurgery.unmerge, UnmergeOptions, merge.unmerge_command),
    "extract": (adaptsurgery.extract, ExtractOptions, extract.command),
    "rewrite": (adaptsurgery.rewrite, RewriteOptions, rewrite.command),
}
OF_THE_CALL = {"progress"}  # a function to be told, which no command line has
OF_THE_COMMAND = {"out", "to", "quiet", "as_json", "table", "help"}


@pytest.mark.parametrize("name", JOBS)
def test_the_calls_keywords_are_the_fields(name: str) -> None:
    call, kind, _ = JOBS[name]
    keywords = {
        key: parameter.default
        for key, parameter in inspect.signature(call).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key not in OF_THE_CALL
    }
    assert keywords == {each.name: each.default for each in fields(kind)}


@pytest.mark.parametrize("name", JOBS)
def test_the_commands_options_are_the_fields(name: str) -> None:
    _, kind, command = JOBS[name]
    named = {p.name: p for p in command.params if isinstance(p, click.Option)}
    own = [each for each in fields(kind) if each.metadata]
    assert named.keys() - OF_THE_COMMAND == {each.name for each in own} - OF_THE_COMMAND
    for each in own:
        assert value_of(named[each.name]) == (() if is_several(each) else each.default), each.name
        assert (named[each.name].help or "") == each.metadata["help"]


def value_of(given: click.Option) -> Any:
    """What an option that is not given comes to."""
    with click.Context(click.Command("x")) as ctx:
        value = given.get_default(ctx)
        if given.opts[0].startswith("--no-"):
            return not value
        return value if value is not None or not given.multiple else ()


def is_several(each: Field[Any]) -> bool:
    return each.metadata.get("form") in ("several", "ranks")


@dataclass
class Toy:
    """An option of every kind."""

    flag: bool = option(False, "A flag.")
    kept: bool = option(True, "A pair of flags.")
    hashes: bool = option(True, "A flag that takes away.", "--no-hashes")
    word: str = option("b", "A word.", "--as", choices=lambda: ("a", "b"), shown=True)
    text: str | None = option(None, "Any text.", metavar="TEXT")
    count: int = option(2, "A bounded number.", least=1, most=9)
    share: float | None = option(None, "Any number.")
    size: int | None = option(None, "Bytes.", form="size", least=1)
    names: tuple[str, ...] = option((), "Names.", form="several")
    ranks: dict[str, int] | None = option(None, "Ranks.", form="ranks")
    callers: str = field(default="the call's alone")


def run_toy(*args: str) -> tuple[int, dict[str, Any], str]:
    given: dict[str, Any] = {}

    @click.command()
    @options.of(Toy)
    def command(**values: Any) -> None:
        given.update(values)

    done = CliRunner().invoke(command, args)
    return done.exit_code, given, done.output


PLAIN = {
    "flag": False, "kept": True, "hashes": True, "word": "b", "text": None, "count": 2,
    "share": None, "size": None, "names": (), "ranks": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("args", "changed"),
    [
        ((), {}),
        (("--flag", "--no-kept", "--no-hashes"), {"flag": True, "kept": False, "hashes": False}),
        (("--kept", "--as", "a", "--text", "x"), {"word": "a", "text": "x"}),
        (("--count", "9", "--share", "0.5"), {"count": 9, "share": 0.5}),
        (("--size", "1.5KB"), {"size": 1500}),
        (("--size", "2GiB"), {"size": 2 << 30}),
        (("--names", "a", "--names", "b"), {"names": ("a", "b")}),
        (("--ranks", "q=4", "--ranks", "a=b=2"), {"ranks": {"q": 4, "a=b": 2}}),
    ],
)
def test_a_field_becomes_an_option(args: tuple[str, ...], changed: dict[str, Any]) -> None:
    assert run_toy(*args) == (0, PLAIN | changed, "")


@pytest.mark.parametrize(
    "args",
    [
        ("--as", "c"), ("--count", "0"), ("--count", "10"), ("--count", "x"), ("--share", "x"),
        ("--size", "0.4"), ("--size", "5XB"), ("--ranks", "q"), ("--ranks", "q=0"), ("--callers", "x"),
    ],
)  # fmt: skip
def test_what_is_no_value_is_wrong_usage(args: tuple[str, ...]) -> None:
    assert run_toy(*args)[0] == 2


def test_help_is_the_fields() -> None:
    text = run_toy("--help")[2]
    assert "--as [a|b]" in text and "[default: b]" in text
    assert "--kept / --no-kept" in text and "--no-hashes" in text and "1<=x<=9" in text


def test_options_come_from_a_calls_keywords_and_go_on_by_name() -> None:
    @dataclass
    class Part:
        count: int = 0
        word: str = ""
        more: str = ""

    def call(text: str = "t", count: int = 3, **rest: Any) -> Toy:
        given = {"text": text, "count": count, **rest}
        return collected(Toy, given | {"unknown": 1})

    toy = call(**{k: v for k, v in PLAIN.items() if k not in ("text", "count")}, callers="me")
    assert (toy.text, toy.count, toy.callers) == ("t", 3, "me")
    assert carried(Part, toy, more="m") == Part(3, "b", "m")


@pytest.mark.parametrize("wrong", [0, 10, 1.5, True, "2"])
def test_numbers_are_checked_by_the_bounds_that_the_help_shows(wrong: object) -> None:
    check_numbers(Toy(count=1, size=None), "count", "size")
    with pytest.raises(SurgeryError) as refusal:
        check_numbers(Toy(count=wrong), "count")  # type: ignore[arg-type]
    assert refusal.value.code == "bad-number"
