"""The group of commands, and the one place where whatever goes wrong becomes an exit code.

0 done · 1 refused or failed · 2 wrong usage · 130 interrupted. Results go to stdout, diagnostics
and progress to stderr. A command's module is imported when it is named, and its job when it runs,
so that neither torch nor numpy is paid for unless numbers are needed.
"""

from __future__ import annotations

import codecs
import gc
import importlib
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any, NoReturn

import click

from adaptsurgery import __version__
from adaptsurgery.cli.output import (
    CommandLine,
    forget_landed,
    interrupted,
    printable_lines,
    say,
)

FAILED, INTERRUPTED = 1, 130
# A command's name → where it lives; its function is called ``command``.
COMMANDS = {
    "inspect": "adaptsurgery.cli.inspect",
    "convert": "adaptsurgery.cli.convert",
    "verify": "adaptsurgery.cli.verify",
    "quickstart": "adaptsurgery.cli.quickstart",
    "merge": "adaptsurgery.cli.merge",
    "unmerge": "adaptsurgery.cli.unmerge",
    "combine": "adaptsurgery.cli.combine",
    "resize": "adaptsurgery.cli.resize",
    "extract": "adaptsurgery.cli.extract",
    "rewrite": "adaptsurgery.cli.rewrite",
}


class _Commands(click.Group):
    """A group that imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            from adaptsurgery_formats.errors import nearest

            hint = nearest(args[0], COMMANDS) or "commands: " + ", ".join(COMMANDS)
            ctx.fail(f"no command `{args[0]}`; {hint}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Commands,
    name="adaptsurgery",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="A path may also be a name on the Hugging Face Hub: org/name[@revision][:file].",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Surgery on adapters and checkpoints: LoRA, LoHa, LoKr and HRA, exactly or not at all.

    \b
    adaptsurgery inspect style.safetensors
    adaptsurgery convert style.safetensors --to peft -o style/
    adaptsurgery verify style.safetensors style/
    adaptsurgery merge model/ style.safetensors=0.8 -o merged/
    adaptsurgery extract model/ finetuned/ -o adapter/ --rank 16
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> NoReturn:
    """The entry point of the ``adaptsurgery`` script."""
    gc.set_threshold(100_000, 20, 20)  # a short process that allocates much and drops little
    code = INTERRUPTED
    with suppress(KeyboardInterrupt):  # a second one, while the first was being told
        code = run()
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python's own exit would show a traceback
    exec("")  # and die of the signal where that cut short another exec, as a dataclass is made by
    gc.freeze()  # nothing is left to collect on the way out
    sys.exit(code)


def run(args: Sequence[str] | None = None) -> int:
    """Run a command line (sys.argv's by default); returns the exit code, whatever happens."""
    _never_fail_to_print(sys.stdout, sys.stderr)
    forget_landed()
    restore = _terminate_as_interrupt()
    try:
        code = _guarded(list(args) if args is not None else None)
        return code if _flushed() else FAILED
    finally:
        restore()


def _guarded(args: list[str] | None) -> int:
    session = CommandLine()
    streams = sys.stdout, sys.stderr
    try:
        result = group.main(args, "adaptsurgery", standalone_mode=False, obj=session)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, click.Abort):
        interrupted()
        return INTERRUPTED
    except SystemExit as left:  # click's own, where nobody reads stdout any more
        sys.stdout, sys.stderr = streams  # which it has wrapped, closed ones too
        return left.code if isinstance(left.code, int) else FAILED
    except BrokenPipeError:
        return FAILED
    except click.ClickException as error:
        vars(error)["message"] = printable_lines(error.message)  # it may quote what was typed
        with suppress(OSError):
            if sys.stderr:
                error.show()
        return error.exit_code
    except Exception as error:
        from adaptsurgery.cli import failures

        return failures.report(error, session)


def _never_fail_to_print(*streams: IO[str] | None) -> None:
    """Names from files may hold what the terminal's encoding does not: escape that."""
    for stream in streams:
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure:
            plain = (getattr(stream, "encoding", "") or "").lower() in (
                "ascii",
                "us-ascii",
                "ansi_x3.4-1968",
            )
            reconfigure(encoding=_PLAIN if plain else None, errors="backslashreplace")


_PLAIN = "plain-ascii"  # by its own name: click writes UTF-8 to what says that it is ASCII


def _plain_ascii(name: str) -> codecs.CodecInfo | None:
    if name.replace("_", "-") != _PLAIN:
        return None
    ascii = codecs.lookup("ascii")
    return codecs.CodecInfo(
        ascii.encode,
        ascii.decode,
        name=_PLAIN,
        incrementalencoder=ascii.incrementalencoder,
        incrementaldecoder=ascii.incrementaldecoder,
    )


codecs.register(_plain_ascii)


def _terminate_as_interrupt() -> Any:
    """Let SIGTERM unwind as Ctrl-C does, so that no half-written output stays; undone by a call."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        return lambda: None
    return lambda: signal.signal(signal.SIGTERM, before)


def _flushed() -> bool:
    """Whether all output reached its reader; if not, Python's exit shall be silent about it."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        _silence()
        return False
    except OSError as error:
        say(f"error[system-error]: stdout cannot be written: {error.strerror}")
        _silence()
        return False
    return True


def _silence() -> None:
    """Send stdout nowhere, so that Python's exit does not try its rest again."""
    from adaptsurgery.checkpoint import system

    with suppress(OSError, ValueError):
        system.to_nowhere(sys.stdout.fileno())
