"""One input tried: what the tool promises, whatever it is given.

It ends in a result that is right or in a SurgeryError with a code of its own; the input's bytes stay;
nothing is left but the outputs that were named; descriptors, threads, time and memory are bounded; no
traceback and no control character reaches a person.
"""

from __future__ import annotations

import io
import os
import re
import resource
import shutil
import signal
import stat
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptsurgery import SurgeryError
from fuzzing.inputs import Input
from fuzzing.jobs import JOBS, Place, Wrong

SECONDS = 10  # of the clock, for one input
CPU = 4.0  # seconds of work, for one input
MEMORY = 96 << 20  # bytes more than before, beside MEMORY_PER_BYTE an input byte
MEMORY_PER_BYTE = 16
SECRET = b"a secret that is no part of any input: 7d1f0c52"
# Codes that nothing of this size may end in; of a command "not-equal" is an answer.
_NEVER = ("refused: internal-error", "refused: not-equal", "refused: out-of-memory")
_PACKAGES = ("adaptsurgery", "adaptsurgery_formats")


class Stream(io.TextIOWrapper):
    """What a command writes, kept."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def text(self) -> str:
        """All that was written."""
        kept: Any = self.buffer
        return str(kept.getvalue().decode("utf-8", "replace"))


class TooLong(BaseException):
    """No Exception, so that nothing on the way takes it for its own."""


@dataclass
class Outcome:
    """How it ended ("done", "refused: <code>", "usage"), and what should not have been."""

    ended: str
    faults: list[str] = field(default_factory=list)


def tried(given: Input, room: Path) -> Outcome:
    """The outcome of an input; what only a first time or a busy machine shows is asked twice."""
    outcome = _tried(given, room)
    if any(f.startswith(("slow", "memory", "descriptors", "hang")) for f in outcome.faults):
        outcome = _tried(given, room)
    return outcome


def _tried(given: Input, room: Path) -> Outcome:
    _clear(room)
    given.lay_out(room)
    (room / "secret").write_bytes(SECRET)
    before = _census(room / "in")
    _forget_peak()
    memory, handles, threads = _memory("VmRSS"), _handles(), threading.active_count()
    work = time.process_time()
    outcome, texts = _run(given, room)
    work = time.process_time() - work
    faults = outcome.faults
    if work > CPU:
        faults.append(f"slow: over {CPU:.0f} s of work")
    if _memory("VmHWM") - memory > MEMORY + MEMORY_PER_BYTE * given.size:
        faults.append("memory: far more than the input's size")
    if (
        _handles() > handles and "stdout" not in given.surroundings
    ) or threading.active_count() > threads:
        faults.append("descriptors or threads are left")
    faults += _texts(texts)
    faults += _leftovers(given, room, outcome.ended, before)
    return outcome


def _clear(room: Path) -> None:
    shutil.rmtree(room, ignore_errors=True)
    if os.path.lexists(room):  # made unreadable by a job
        shutil.rmtree(room)


def _run(given: Input, room: Path) -> tuple[Outcome, tuple[str, str]]:
    out, err = Stream(), Stream()
    outcome = Outcome("?")
    with warnings.catch_warnings(), _streams(out, err), around(given.surroundings, room):
        warnings.simplefilter("ignore", UserWarning)
        try:
            with limited(SECONDS):
                outcome.ended = JOBS[given.job](Place(room), dict(given.options)) or "done"
        except SurgeryError as error:
            outcome.ended = f"refused: {error.code}"
            outcome.faults += _said(str(error))
        except TooLong:
            outcome.ended = "hang"
            outcome.faults.append(f"hang: over {SECONDS} s")
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            outcome.ended = "fault"
            outcome.faults.append(_named(error))
    if outcome.ended in _NEVER and not (
        given.job == "command" and "verify" in given.options["args"]
    ):
        outcome.faults.append(f"{outcome.ended[9:]}: {_seen(err.text())}")
    return outcome, (out.text(), err.text())


def _said(text: str) -> list[str]:
    faults = ["control: a control character in an error"] if _controls(text) else []
    return faults + (["long: an error of over 8,000 characters"] if len(text) > 8000 else [])


def _controls(text: str) -> bool:
    return any(c not in "\n\t" and not c.isprintable() for c in text)


def _named(error: BaseException) -> str:
    """The error's type and the line of the package where it came from; of a wrong number, the text."""
    if isinstance(error, Wrong):
        return f"wrong: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if any(f"/{name}/" in f.filename for name in _PACKAGES)]
    last = (own or frames)[-1]
    text = re.sub(r"0x[0-9a-f]+|\d{3,}|/[^ ]*|'[^']*'", "…", str(error))[:100]
    return f"{type(error).__name__} in {Path(last.filename).name} {last.name}: {text}"


def _seen(text: str) -> str:
    match = re.search(r"seen: (.*)", text)
    return re.sub(r"0x[0-9a-f]+|\d{3,}|/[^ ]*|'[^']*'", "…", match[1])[:120] if match else ""


def _texts(texts: tuple[str, str]) -> list[str]:
    faults = ["control: a control character on a stream"] if any(map(_controls, texts)) else []
    trace = any(mark in text for text in texts for mark in ("Traceback", "Logging error"))
    return faults + (["traceback on a stream"] if trace else [])


@contextmanager
def _streams(out: Stream, err: Stream) -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TooLong after that many seconds of the clock."""

    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def around(surroundings: Mapping[str, Any], room: Path) -> Iterator[None]:
    """Odd surroundings: "fsize" bytes a file at most, "stderr" or "stdout" closed or full, no "cwd"."""
    before, folder = resource.getrlimit(resource.RLIMIT_FSIZE), os.getcwd()
    if "fsize" in surroundings:
        resource.setrlimit(resource.RLIMIT_FSIZE, (surroundings["fsize"], before[1]))
    os.chdir(room / "out")  # where names of no folder are
    if surroundings.get("cwd") == "gone":
        (room / "gone").mkdir()
        os.chdir(room / "gone")
        (room / "gone").rmdir()
    os.environ["FUZZ_MARK"] = str(room / "code-ran")
    full = open("/dev/full", "w", encoding="utf-8")
    for name in ("stdout", "stderr"):
        if name in surroundings:
            setattr(sys, name, {"closed": None, "full": full}[surroundings[name]])
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        os.chdir(folder)
        with suppress(OSError):
            full.close()


# -- What is left


def _census(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Every entry below a folder: its kind, and a file's bytes or a link's target."""
    seen: dict[str, tuple[Any, ...]] = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(root, name)
            seen[os.path.relpath(path, folder)] = _entry(path)
    return seen


def _entry(path: str) -> tuple[Any, ...]:
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        return "link", os.readlink(path)
    if not stat.S_ISREG(mode):
        return (stat.S_IFMT(mode),)
    with open(path, "rb") as file:
        return mode, file.read()


def _leftovers(
    given: Input, room: Path, ended: str, before: Mapping[str, tuple[Any, ...]]
) -> list[str]:
    faults = []
    if _census(room / "in") != before:
        faults.append("input: an input was changed, or something written beside it")
    names = _named_in(given)
    strange = set(os.listdir(room)) - {"in", "out", "secret", *names}
    if strange:
        faults.append(f"escaped: {sorted(strange)[0][:40]}")
    left = os.listdir(room / "out")
    told = given.surroundings.get("stdout") is None  # else it is done, and cannot be told
    if ended != "done" and left and told:
        faults.append(f"left: {_plain(left[0])} after “{ended}”")
    stems = tuple(name.split(".")[0] or name for name in names)
    if "--num-shards" in str(given.options):  # one part of several is done
        stems += (".adaptsurgery-",)
    if ended == "done" and (odd := [n for n in left if not n.startswith(stems or "?")]):
        faults.append(f"left: {_plain(odd[0])} beside the output")
    if SECRET[:20] in b"".join(_contents(room / "out")):
        faults.append("leak: a file from elsewhere is in the output")
    return faults


def _plain(name: str) -> str:
    return re.sub(r"[0-9a-f]{6,}|\d+|x{5,}", "…", name)[:40]


def _named_in(given: Input) -> list[str]:
    """The last parts of what may be an output's name: a job's, or any argument of a command."""
    texts = [given.options.get("out", "")]
    texts += [a for a in given.options.get("args", ()) if isinstance(a, str)]
    return [name for t in texts for part in (t, t.split("=")[-1]) if (name := Path(part).name)]


def _contents(folder: Path) -> Iterator[bytes]:
    for root, _, files in os.walk(folder):
        for name in files:
            path = Path(root, name)
            if path.is_file():
                yield path.read_bytes()


# -- The process


def _handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def _forget_peak() -> None:
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _memory(name: str) -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(e.split()[1]) * 1024 for e in file if e.startswith(name + ":"))
