"""What the commands share in printing: JSON, colours on a terminal, sizes, peak memory, progress."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptsurgery.adapters.report import Report, Row

_F = TypeVar("_F", bound=Callable[..., Any])
_SHOWN = 10  # rows in the text; --json has them all
INTERRUPTED = 130


class CommandLine:
    """What the handling of errors has to know of the command line."""

    json = False


def forget_landed() -> None:
    """Begin a command line: what earlier ones in this process put in place is not its own."""
    _landed().clear()


def interrupted(left: str = "nothing was left behind") -> None:
    """Tell what an interrupted command has left: its output, where that was in place already."""
    if locks := sys.modules.get("adaptsurgery.checkpoint.locks"):  # none before a job needs it
        locks.let_go()
    if landed := list(dict.fromkeys(_landed())):
        left = "in place already: " + ", ".join(map(printable, landed))
    say(f"interrupted; {left}")


def _landed() -> list[str]:
    atomic = sys.modules.get("adaptsurgery.checkpoint.atomic")  # none before a job needs it
    landed: list[str] = getattr(atomic, "landed", [])
    return landed


def printable(text: str) -> str:
    """Text from a file or a command line without what would steer the terminal."""
    from adaptsurgery_formats import errors  # late: --help has no need of it

    return errors.printable(text)


def printable_lines(text: str) -> str:
    """``printable``, line by line."""
    return "\n".join(map(printable, text.splitlines()))


def json_option(command: _F) -> _F:
    """--json, remembered for errors too, wherever on the command line it stands."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
        ctx.ensure_object(CommandLine).json = value
        return value

    option = click.option(
        "--json",
        "as_json",
        is_flag=True,
        callback=remember,
        is_eager=True,
        help="Print one JSON object on stdout, with every module.",
    )
    return option(command)


def print_json(data: Mapping[str, Any]) -> None:
    """One JSON object; numbers that JSON does not have (an error of infinity) become strings."""
    plain = not _speaks_utf8(sys.stdout)
    try:
        text = json.dumps(data, ensure_ascii=plain, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(data), ensure_ascii=plain)
    click.echo(text.encode("utf-8", "backslashreplace"))


def _speaks_utf8(stream: Any) -> bool:
    name = str(getattr(stream, "encoding", "") or "utf-8").lower()
    return name.replace("_", "-") in ("utf-8", "utf8")


def _finite(data: Any) -> Any:
    if isinstance(data, float) and data - data != 0:
        return str(data)
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, (list, tuple)) else data


def paint(text: str, colour: str, bold: bool = False) -> str:
    """Coloured text; click strips the colour where the output is no terminal."""
    if os.environ.get("NO_COLOR"):
        return text
    return click.style(text, fg=colour, bold=bold)


def say(message: str) -> None:
    """A line on stderr, if anyone is there to read it."""
    try:
        click.echo(message, err=True)
    except OSError:
        sys.stderr = None  # so that Python's exit does not try again


def line(label: str, value: str) -> None:
    """``  rank      16`` — one fact on stdout."""
    click.echo(f"  {paint(f'{label:<11}', 'cyan')} {printable(value)}")


def note(code: str, where: str, text: str) -> None:
    """A note on stdout with its code."""
    at = f"{printable(where)}: " if where else ""
    click.echo(f"{paint(f'note[{code}]', 'yellow')}: {at}{printable(text)}")


def rows(modules: Iterable[Row]) -> None:
    """The modules whose ΔW moved, the farthest first, and at most ten of them."""
    moved = sorted((r for r in modules if r.change != "identical"), key=lambda r: -r.error)
    for row in moved[:_SHOWN]:
        detail = f"  {row.detail}" if row.detail else ""
        error = f"{row.error:.2g}"
        click.echo(f"  {row.change:<8} {error:>8}  {printable(row.module + detail)}")
    if len(moved) > _SHOWN:
        click.echo(f"  … and {len(moved) - _SHOWN} more; --json lists all")


def size(count: int) -> str:
    """A number of bytes as people say it: 512 B, 45.1 MB."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 1000:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def peak_memory() -> int:
    """This process's largest resident size in bytes; 0 where the system does not say."""
    from adaptsurgery.checkpoint import system

    return system.peak_memory()


def peak() -> list[str]:
    """``peak RSS 45.1 MB``, as a part of a summary; no part where the system does not say."""
    count = peak_memory()
    return [f"peak RSS {size(count)}"] if count else []


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of bytes on stderr, where that is a terminal; else None."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, leave=False, file=sys.stderr) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell


@contextmanager
def resumable(quiet: bool, finished: str) -> Iterator[Callable[[int, int], None] | None]:
    """``progress`` of work whose ``finished`` parts are kept where it is interrupted."""
    with progress(quiet) as tell:
        try:
            yield tell
        except KeyboardInterrupt:
            interrupted(f"finished {finished} are kept: the same command goes on from them")
            raise SystemExit(INTERRUPTED) from None


def finish(report: Report, as_json: bool, quiet: bool, show: Callable[[], object]) -> None:
    """End a command: its report as JSON, or as ``show`` prints it, or not at all."""
    if as_json:
        print_json({"ok": True, **report.as_dict(), "peak_memory": peak_memory()})
    elif not quiet:
        show()


def verdict(report: Report, *parts: str) -> None:
    """The last line of a text: what came out of it, green where something was written."""
    text = " · ".join([report.verdict, *parts, *peak()])
    click.echo(paint(text, "green" if report.outputs else "yellow"))


def written(report: Report, out: str) -> str:
    """``wrote 45.1 kB to OUT``, or what a dry run would have."""
    did = "wrote" if report.outputs else "dry run: would write"
    return f"{did} {size(report.facts['bytes'])} to {printable(out)}"
