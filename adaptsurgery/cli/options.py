"""A command's options, out of the fields of its job's; and those that are the command's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import Field, fields
from fractions import Fraction
from typing import Any, TypeVar

import click

from adaptsurgery.jobs.options import Choices

_F = TypeVar("_F", bound=Callable[..., Any])


def of(options: type) -> Callable[[_F], _F]:
    """The decorator that gives a command an option for every field of a job's options.

    A field that is not made by ``jobs.options.option`` is the call's alone.
    """
    made = [_option(each) for each in fields(options) if each.metadata]

    def decorate(command: _F) -> _F:
        for option in reversed(made):
            command = option(command)
        return command

    return decorate


def _option(spec: Field[Any]) -> Callable[[_F], _F]:
    """One field as a click option; its annotation tells the kind of value."""
    metadata, kind = spec.metadata, str(spec.type).removesuffix(" | None")
    given: dict[str, Any] = {"help": metadata["help"] or None, "default": spec.default}
    flag = metadata["flag"] or "--" + spec.name.replace("_", "-")
    if kind == "bool":
        negative = flag.startswith("--no-")
        if spec.default and not negative:
            flag = f"{flag}/--no-{flag[2:]}"
        elif negative:
            given |= {"is_flag": True, "default": False, "callback": _not}
        else:
            given["is_flag"] = True
    else:
        given |= {"type": _type(kind, metadata), "metavar": metadata.get("metavar")}
        given |= {
            "show_default": metadata.get("shown", False),
            **_FORMS.get(metadata.get("form", ""), {}),
        }
    return click.option(flag, spec.name, **given)


def _type(kind: str, metadata: Any) -> Any:
    """The click type of a field that is no flag."""
    if "choices" in metadata:
        return Choice(metadata["choices"])
    if kind == "int" and "least" in metadata and "form" not in metadata:
        return click.IntRange(metadata["least"], metadata.get("most"))
    return {"int": int, "float": float}.get(kind if "form" not in metadata else "", str)


class Choice(click.Choice[str]):
    """Choices that may be looked up when they are asked for, and no sooner."""

    def __init__(self, known: Choices) -> None:
        self.known, self.case_sensitive = known, True

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.known() if callable(self.known) else self.known


def _not(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    return not value


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A number of bytes: 5GB, 500MB, 2GiB; a part of a byte is dropped, and less than one refused."""
    if value is None:
        return None
    parts = re.fullmatch(
        r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(?:([KMGT])(i?))?B?", value.strip(), re.I
    )
    size = 0
    if parts:
        power = "KMGT".find(parts[2].upper()) + 1 if parts[2] else 0
        size = int(Fraction(parts[1]) * (1024 if parts[3] else 1000) ** power)
    if not size:
        raise click.BadParameter(f"{value!r} is no size; 5GB, 500MB, 2GiB", ctx, param)
    return size


def _ranks(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, int]:
    """NAME=N pairs."""
    ranks = {}
    for text in value:
        name, sign, number = text.rpartition("=")
        if not sign or not name or not number.isdecimal() or not int(number):
            raise click.BadParameter(f"{text!r} is not NAME=N", ctx, param)
        ranks[name] = int(number)
    return ranks


# How text becomes a value that is more than a word or a number.
_FORMS: dict[str, dict[str, Any]] = {
    "size": {"callback": _size},
    "ranks": {"callback": _ranks, "multiple": True, "default": ()},
    "several": {"multiple": True},
}

QUIET = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")


def out(help: str) -> Callable[[_F], _F]:
    """-o OUT."""
    return click.option("-o", "--output", "out", required=True, metavar="OUT", help=help)


OUT = out("A folder for peft, else a file.")


def check_part(index: int, count: int) -> None:
    """Refuse a part that the work does not have."""
    if index >= count:
        raise click.UsageError(f"--shard-index {index} with --num-shards {count}")
