"""What each job may be asked for: every option once, with its default, its bounds and its help.

A class of options stands in the file of its kind: ``adapters``, ``checkpoints``, ``extraction``,
``programs``. A job's call has its fields as keywords, and its command has them as options
(``cli.options.of``); a test holds the three together. Plain data: nothing heavy is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

_T = TypeVar("_T")
Named = str | os.PathLike[str]
Choices = tuple[str, ...] | Callable[[], tuple[str, ...]]

# The layouts by name, spelled out so that --help need not load them; a test compares.
LAYOUTS = ("peft", "lycoris", "kohya", "diffusers", "comfyui")
TARGETS = ("peft", "lycoris", "kohya")
DTYPES = ("fp32", "bf16", "fp16")
SEEDS = (-(1 << 63), (1 << 64) - 1)  # what torch's generators take


def option(default: Any, help: str = "", flag: str = "", **more: Any) -> Any:
    """A field that is an option: ``flag`` is its name on the command line, where not the field's own.

    ``more`` are ``choices`` (a tuple, or a call that looks them up), ``least`` and ``most`` of a
    number, ``metavar``, ``shown`` (the default, in the help), and ``form``, how text becomes the
    value: "size" (5GB), "ranks" (NAME=N), "several" (the option given again and again).
    """
    return field(default=default, metadata={"help": help, "flag": flag, **more})


def collected(options: type[_T], call: Mapping[str, Any]) -> _T:
    """The options of a call, from its own keywords by name: its ``locals()``."""
    return options(**{each.name: call[each.name] for each in fields(options)})  # type: ignore[arg-type]


def carried(kind: type[_T], options: Any, **more: Any) -> _T:
    """An object of another dataclass with the options that it has fields of the same name for."""
    names = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    same = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return kind(**{**same, **more})


def default_of(options: Any, name: str) -> Any:
    """What an option is where it is not given."""
    return next(each.default for each in fields(options) if each.name == name)


def check_numbers(options: Any, *names: str) -> None:
    """Raise ValueRefused ("bad-number") where one is given and is no whole number within its bounds."""
    from adaptsurgery.jobs.values import check_whole

    bounds = {each.name: each.metadata for each in fields(options)}
    for name in names:
        if (value := getattr(options, name)) is not None:
            check_whole(name, value, bounds[name]["least"], bounds[name].get("most"))


# --- options that several jobs have ----------------------------------------------------------------


def base_option() -> Any:
    return option(
        None,
        "The model that the adapter is for, as the list of its modules: a safetensors file, a "
        "folder, a Hub name, or sd15, sd2, sdxl, flux. Needed where no bundled list has the names.",
        metavar="BASE",
    )


def to_option() -> Any:
    return option(None, "The layout to write; the first's.", choices=TARGETS)


def allow_nonfinite_option() -> Any:
    return option(False, "Write NaN and infinity that are computed; they are told.")


def overwrite_option(what: str = "Replace OUT if it is there.") -> Any:
    return option(False, what)


def dry_run_option(what: str = "Do everything but write.") -> Any:
    return option(False, what)


def hashes_option() -> Any:
    return option(True, "Leave out kohya's sshs hashes (a second reading).", "--no-hashes")


def workers_option(what: str = "") -> Any:
    return option(2, what, least=1, shown=True)


def shard_index_option(what: str = "") -> Any:
    return option(0, what, least=0, metavar="I")


def num_shards_option(end: str) -> Any:
    what = f"Cut the work into N parts; the last one done {end} OUT."
    return option(1, what, least=1, metavar="N")
