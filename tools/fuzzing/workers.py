"""Many inputs: blocks of them in forked processes, so that one that dies is a finding and no end."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from fuzzing.inputs import Input
from fuzzing.kinds import KINDS
from fuzzing.trial import SECONDS, Outcome, tried

BLOCK = 400  # inputs of one process
SPACE = 4 << 30  # bytes of address space beyond what a process has at its start
SILENCE = 4 * SECONDS  # after which a process is ended


@dataclass
class Tally:
    """Outcomes by name; findings by fault, the smallest input of each; the seconds it took."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    findings: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, seed: int, outcome: Outcome) -> None:
        self.outcomes[outcome.ended] += 1
        for fault in outcome.faults[:1]:
            self.faults[fault] += 1
            self.findings.setdefault(fault, seed)

    def __iadd__(self, other: Tally) -> Tally:
        self.outcomes += other.outcomes
        self.faults += other.faults
        self.findings = other.findings | self.findings
        self.seconds += other.seconds
        return self


def input_of(kind: str, seed: int) -> Input:
    """The one input of a kind and a seed."""
    return KINDS[kind](random.Random(f"{kind} {seed}"), seed)


def run(kind: str, first: int, count: int, jobs: int) -> Tally:
    """Every seed of a range tried, by several processes."""
    shares = [range(first + i, first + count, jobs) for i in range(jobs)]
    _import_all()
    input_of(kind, 0)  # what is made once is made before the fork
    start = time.monotonic()
    with get_context("fork").Pool(jobs) as pool:
        tallies = pool.starmap(_share, [(kind, share) for share in shares])
    total = Tally()
    for tally in tallies:
        total += tally
    total.seconds = time.monotonic() - start
    return total


def _import_all() -> None:
    """Everything, so that no input pays for an import."""
    import adaptsurgery

    for module in pkgutil.walk_packages(adaptsurgery.__path__, "adaptsurgery."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def _share(kind: str, seeds: range) -> Tally:
    """One worker's seeds, block by block; a block goes on behind the input that ended it."""
    tally, at = Tally(), 0
    while at < len(seeds):
        block = seeds[at : at + BLOCK]
        outcomes = _forked([partial(input_of, kind, seed) for seed in block])
        for seed, outcome in zip(block, outcomes):
            tally.add(seed, outcome)
        at += len(outcomes)
    return tally


def _forked(makers: Sequence[Callable[[], Input]]) -> list[Outcome]:
    """The outcomes of inputs in a process of their own; the last is what ended that, if anything."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        _child(makers, writer)
    os.close(writer)
    try:
        outcomes, silent = _listen(reader, len(makers))
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        shutil.rmtree(_room(pid), ignore_errors=True)
    if len(outcomes) < len(makers):
        why = "hang: no answer, killed" if silent else f"died: {_ending(status)}"
        outcomes.append(Outcome("killed", [why]))
    return outcomes


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"by signal {os.WTERMSIG(status)}"
    return f"with exit code {os.WEXITSTATUS(status)}"


def _listen(reader: int, count: int) -> tuple[list[Outcome], bool]:
    """The outcomes that a process writes, and whether it fell silent before the last."""
    outcomes: list[Outcome] = []
    rest = b""
    while len(outcomes) < count:
        ready, _, _ = select.select([reader], [], [], SILENCE)
        if not ready:
            return outcomes, True
        data = os.read(reader, 1 << 16)
        if not data:
            return outcomes, False
        *lines, rest = (rest + data).split(b"\n")
        outcomes += [Outcome(*json.loads(line)) for line in lines]
    return outcomes, False


def _room(pid: int) -> Path:
    """Where a process tries its inputs: in memory, where the system has such a place."""
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    return Path(home) / f"adaptsurgery-fuzz-{pid}"


def _child(makers: Sequence[Callable[[], Input]], writer: int) -> None:
    code = 1
    try:
        prepare()
        room = _room(os.getpid())
        for make in makers:
            outcome = one(make(), room)
            os.write(writer, (json.dumps([outcome.ended, outcome.faults]) + "\n").encode())
        code = 0
    except BaseException:  # a fault of the fuzzer's own: said, and no outcome
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


def apart(given: Input) -> Outcome:
    """One input's outcome, in a process of its own; what ends that is the fault."""
    (outcome,) = _forked([lambda: given])
    return outcome


def one(given: Input, room: Path) -> Outcome:
    """One input's outcome, in this process."""
    from adaptsurgery_formats import patterns

    patterns.TIMEOUT_SECONDS = 1.0
    return tried(given, room)


def prepare() -> None:
    """This process as an input may need it: bounded memory, no core dump, SIGINT as it is."""
    import torch

    torch.set_num_threads(1)
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    space = pages * resource.getpagesize() + SPACE
    resource.setrlimit(resource.RLIMIT_AS, (space, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# -- Smaller inputs


def shrunk(given: Input, fault: str) -> Input:
    """The input without the files, options and arguments that its first fault does not need."""
    for smaller in _smaller:
        given = smaller(given, fault)
    return given


def _shows(given: Input, fault: str) -> bool:
    return fault in apart(given).faults[:1]


def _without_files(given: Input, fault: str) -> Input:
    for name in sorted(given.files):
        less = replace(given, files={n: c for n, c in given.files.items() if n != name})
        given = less if _shows(less, fault) else given
    return given


def _without_surroundings(given: Input, fault: str) -> Input:
    less = replace(given, surroundings={})
    return less if given.surroundings and _shows(less, fault) else given


def _without_arguments(given: Input, fault: str) -> Input:
    args = list(given.options.get("args", ()))
    for at in reversed(range(1, len(args))):
        fewer = args[:at] + args[at + 1 :]
        less = replace(given, options={**given.options, "args": fewer})
        if _shows(less, fault):
            given, args = less, fewer
    return given


_smaller: tuple[Callable[[Input, str], Input], ...] = (
    _without_surroundings, _without_arguments, _without_files,
)  # fmt: skip
