"""Commands that write, killed, interrupted and raced at random moments: is every output whole?

    python tools/kills.py [--tries 200] [--seed 0] [--width 96] [--only COMMAND …] [--kinds KIND …]

torch is imported once; every command is ``adaptsurgery.cli.run`` in a forked child. One try is one of

    SIGKILL, SIGTERM, SIGINT   the command is killed or interrupted at a random moment, up to three
                               times in a row, and then run once undisturbed
    same, other                two processes write to one OUT, the second a random moment later: the
                               same command, or another one

each to a new output or over an old one. After every try the inputs have their bytes; an output is not
there, the old one or a new one, whole; no file stands beside the manifest of another; a command
that was interrupted says so and ends with 130, or is done; the loser of a race says output-exists.
Then the same command, run again, ends in the bytes of a run that nobody disturbed, and nothing is
left beside the output. What a try found wrong names it: --seed S --first N --tries 1 does it again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "same", "other")
IN_A_ROW = 3
LAYERS = 4
Tree = dict[str, str]


@dataclass(frozen=True)
class Command:
    """A command line up to its output, what that is, and what stands beside it."""

    name: str
    words: tuple[str, ...]
    folder: bool = False
    ending: str = ".safetensors"
    other: str = ""  # a command that may write to the same place
    beside: tuple[str, ...] = ()  # options that name further outputs, by what they are called

    def line(self, room: Path, overwrite: bool) -> list[str]:
        more = [word for option in self.beside for word in (option, str(room / BESIDE[option]))]
        return [*self.words, "-o", str(room / self.out), *more, *(["--overwrite"] * overwrite)]

    @property
    def out(self) -> str:
        return "out" if self.folder else f"out{self.ending}"


BESIDE = {"--report": "page.json", "--onnx": "out.onnx"}


# -- What is read


def write_inputs(folder: Path, width: int) -> None:
    """A base as a file and as a folder of shards, a fine-tuned one, adapters, a program."""
    torch.manual_seed(0)
    parts = ("q_proj", "v_proj")
    base = {
        f"model.layers.{n}.self_attn.{part}.weight": torch.randn(width, width)
        for n in range(LAYERS)
        for part in parts
    }
    save_file(base, folder / "base.safetensors", {"format": "pt"})
    tuned = {key: weight + 0.01 * torch.randn_like(weight) for key, weight in base.items()}
    save_file(tuned, folder / "tuned.safetensors", {"format": "pt"})
    write_shards(folder / "base", base)
    write_peft(folder / "one", width, "q_proj")
    write_peft(folder / "two", width, "v_proj")
    write_kohya(folder / "kohya.safetensors", width)
    write_program(folder)


def write_shards(folder: Path, base: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    index = {}
    for n in range(LAYERS):
        name = f"model-{n + 1:05}-of-{LAYERS:05}.safetensors"
        shard = {key: weight for key, weight in base.items() if f".{n}." in key}
        save_file(shard, folder / name, {"format": "pt"})
        index |= dict.fromkeys(shard, name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text('{"model_type": "llama"}')


def write_peft(folder: Path, width: int, part: str) -> None:
    folder.mkdir()
    tensors = {}
    for n in range(LAYERS):
        stem = f"base_model.model.model.layers.{n}.self_attn.{part}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(4, width)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(width, 4) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [part]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_kohya(file: Path, width: int) -> None:
    tensors = {}
    for n in range(LAYERS):
        stem = f"lora_unet_model_layers_{n}_self_attn_q_proj"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(4, width)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(width, 4) * 0.1
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, file)


def write_program(folder: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x).relu()

    torch.export.save(torch.export.export(Net(), (torch.zeros(2, 8),)), folder / "net.pt2")
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["a"]}
    (folder / "config.json").write_text(json.dumps(config))


def commands(folder: Path) -> list[Command]:
    def words(text: str) -> tuple[str, ...]:
        return tuple(re.sub(r"@(\S+)", lambda m: str(folder / m[1]), text).split())

    base = " --base @base.safetensors"
    peft, kohya = " --to peft" + base, " --to kohya" + base
    return [
        Command("convert file", words("convert @one" + kohya), other="combine"),
        Command("convert folder", words("convert @kohya.safetensors" + peft), True, other="resize"),
        Command("combine", words("combine @one @two" + kohya), other="merge file"),
        Command("resize", words("resize @one --rank 2" + peft), True, other="extract"),
        Command("merge file", words("merge @base.safetensors @one"), other="unmerge file"),
        Command("unmerge file", words("unmerge @base.safetensors @two"), other="convert file"),
        Command("merge folder", words("merge @base @one"), True, other="unmerge folder"),
        Command("unmerge folder", words("unmerge @base @two"), True, other="merge folder"),
        Command(
            "extract", words("extract @base.safetensors @tuned.safetensors --rank 2"), True,
            other="convert folder", beside=("--report",),
        ),
        Command(
            "rewrite", words("rewrite @net.pt2 --config @config.json --seed 0"), ending=".pt2",
            other="rewrite twice",
        ),
        Command(
            "rewrite twice", words("rewrite @net.pt2 --config @config.json --seed 1"),
            ending=".pt2", other="rewrite", beside=("--onnx",),
        ),
    ]  # fmt: skip


# -- Running


def preload() -> None:
    """All that a child would import: it costs its time once."""
    import adaptsurgery.algorithms
    import adaptsurgery.checkpoint.stream
    import adaptsurgery.cli
    import adaptsurgery.graph.onnx
    import adaptsurgery.jobs.change
    import adaptsurgery.jobs.combining.combine
    import adaptsurgery.jobs.extract.choose
    import adaptsurgery.jobs.extract.extract
    import adaptsurgery.jobs.extract.fitting
    import adaptsurgery.jobs.extract.page
    import adaptsurgery.jobs.merging.merge
    import adaptsurgery.jobs.resize
    import adaptsurgery.jobs.rewrite  # noqa: F401

    torch.set_num_threads(1)  # a child cannot use its parent's pool


class Child:
    """A command in a forked child, its output in files."""

    def __init__(self, line: Sequence[str], scratch: Path) -> None:
        self.said = scratch / f"said-{os.urandom(4).hex()}"
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self._work(line)

    def _work(self, line: Sequence[str]) -> None:
        code = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            fd = os.open(self.said, os.O_WRONLY | os.O_CREAT, 0o600)
            for stream in (1, 2):
                os.dup2(fd, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            from adaptsurgery.cli import run

            code = run(list(line))
            sys.stdout.flush()
        except KeyboardInterrupt:  # before the command line began, or after it had ended
            code = 130
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 98
        finally:
            sys.stderr.flush()
            os._exit(code)

    def end(self) -> tuple[int, str]:
        """The exit code, or minus the signal that it died of, and what it said."""
        status = os.waitpid(self.pid, 0)[1]
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        text = self.said.read_text("utf-8", "replace") if self.said.exists() else ""
        self.said.unlink(missing_ok=True)
        return code, text


def code_of(text: str) -> str:
    named = re.search(r"error\[([\w-]+)\]", text)
    return named[1] if named else ""


# -- Looking


def tree(path: Path) -> Tree:
    """The digest of every file at or below a path."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {os.path.relpath(p, path): digest(p) for p in files}


def digest(path: Path) -> str:
    """Of a file's bytes; of a program's the bytes of its records, whose times are not told."""
    if path.suffix == ".pt2" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            records = [(i.filename.partition("/")[2], i.CRC) for i in archive.infolist()]
        return repr(sorted(r for r in records if not r[0].endswith("data_id")))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seen(room: Path) -> tuple[dict[str, Tree], list[str]]:
    """Everything beside the output by its name, and what is hidden of it."""
    entries = sorted(room.iterdir())
    hidden = [p.name for p in entries if p.name.startswith(".")]
    return {p.name: tree(p) for p in entries if not p.name.startswith(".")}, hidden


@dataclass
class Trial:
    """One try: what happened, and what was wrong with it."""

    command: Command
    kind: str
    over: bool
    dice: random.Random
    wrong: list[str] = field(default_factory=list)

    def expect(self, right: bool, what: str) -> None:
        if not right:
            self.wrong.append(what)


class Bench:
    """The inputs, and what each command makes of them when nobody disturbs it."""

    def __init__(self, home: Path, width: int, only: Sequence[str] = ()) -> None:
        self.inputs, self.room, self.scratch = home / "in", home / "room", home / "scratch"
        for folder in (self.inputs, self.room, self.scratch):
            folder.mkdir()
        write_inputs(self.inputs, width)
        self.untouched = tree(self.inputs)
        self.commands = {command.name: command for command in commands(self.inputs)}
        self.made: dict[str, dict[str, Tree]] = {}
        self.seconds: dict[str, float] = {}
        chosen = [self.commands[name] for name in only or self.commands]
        for name in dict.fromkeys(each for c in chosen for each in (c.name, c.other)):
            self._measure(self.commands[name])
        self.olds = {command.name: home / f"old {command.name}" for command in chosen}
        for name, old in self.olds.items():
            self._write_old(self.commands[name], old)

    def _measure(self, command: Command) -> None:
        for _ in range(2):  # the first one warms up
            self.clear()
            started = time.monotonic()
            code, text = Child(command.line(self.room, False), self.scratch).end()
            assert code == 0, f"{command.name}: {text}"
            self.seconds[command.name] = time.monotonic() - started
        self.made[command.name], hidden = seen(self.room)
        assert not hidden, hidden

    def _write_old(self, command: Command, old: Path) -> None:
        """An output of another command, with what stands beside it."""
        old.mkdir()
        other = self.commands[command.other]
        code, text = Child(other.line(old, False), self.scratch).end()
        assert code == 0, text
        for path in list(old.iterdir()):
            if path.name not in (command.out, f"{command.out}.manifest.json"):
                path.unlink()
        for option in command.beside:
            (old / BESIDE[option]).write_text("old")

    def clear(self) -> None:
        shutil.rmtree(self.room)
        self.room.mkdir()

    def begin(self, trial: Trial) -> None:
        shutil.rmtree(self.room)
        if trial.over:
            shutil.copytree(self.olds[trial.command.name], self.room)
        else:
            self.room.mkdir()
        self.old, _ = seen(self.room)

    # -- What may be there

    def check(self, trial: Trial, *commands: Command) -> str:
        """Note what may not be there; returns whose output is there, "old" or "none"."""
        if tree(self.inputs) != self.untouched:
            raise SystemExit(f"an input was written: {trial}")
        now, _ = seen(self.room)
        states = {"old": self.old, **{c.name: self.made[c.name] for c in commands}}
        owners = {}
        for name, content in now.items():
            owners[name] = [who for who, had in states.items() if had.get(name) == content]
            trial.expect(bool(owners[name]), f"{name} is neither old nor new")
        out = trial.command.out
        record = f"{out}.manifest.json"
        if record in now:
            fits = set(owners.get(out, ())) & set(owners[record])
            trial.expect(bool(fits), f"{out} of {owners.get(out)} beside {owners[record]}'s record")
        return (owners.get(out) or ["none"])[-1]

    def finish(self, trial: Trial, state: str) -> None:
        """The same command again: done, or done already; then nothing is left to do."""
        command = trial.command
        code, text = Child(command.line(self.room, trial.over), self.scratch).end()
        ended = code == 0 or (state == command.name and code_of(text) == "output-exists")
        trial.expect(ended, f"the next run ends with {code}: {text.strip()[:300]}")
        self.whole(trial, command)

    def whole(self, trial: Trial, *commands: Command) -> None:
        """What is there is all that one of the commands makes, and nothing is left beside it."""
        now, hidden = seen(self.room)
        trial.expect(not hidden, f"left behind: {hidden}")
        wanted = [self.made[command.name] for command in commands]
        keep = {BESIDE[o] for c in self.commands.values() for o in c.beside}
        mine = {name: content for name, content in now.items() if name not in keep}
        right = [{n: t for n, t in want.items() if n not in keep} for want in wanted]
        trial.expect(mine in right, f"there is {sorted(now)}, not what it makes")
        if len(commands) == 1:
            trial.expect(now == wanted[0], "what stands beside it is not what it makes")

    # -- The kinds

    def kill(self, trial: Trial) -> str:
        number = signal.Signals[trial.kind]
        self.begin(trial)
        state = "none"
        for _ in range(trial.dice.randint(1, IN_A_ROW)):
            child = Child(trial.command.line(self.room, trial.over), self.scratch)
            time.sleep(trial.dice.uniform(0, 1.05 * self.seconds[trial.command.name]))
            os.kill(child.pid, number)
            code, text = child.end()
            state = self.check(trial, trial.command)
            self._check_end(trial, number, code, text, state)
            if state == trial.command.name:
                break
        self.finish(trial, state)
        return state if state in ("none", "old") else "new"

    def _check_end(self, trial: Trial, number: int, code: int, text: str, state: str) -> None:
        """An interrupted command has said so, and left at most finished parts."""
        if number == signal.SIGKILL:
            return
        early = code == -number  # before the command line began, which is Python's to tell
        done = code == 0 and state == trial.command.name
        trial.expect(code == 130 or early or done, f"it ends with {code}: {text.strip()[:300]}")
        swallowed = (
            "Exception ignored in" in text
        )  # Python loses what comes in a weakref's callback
        right = "Traceback" not in text or (swallowed and done)
        trial.expect(right, f"a traceback: {text.strip()[:1500]}")
        hidden = [n for n in seen(self.room)[1] if not n.endswith(".partial")]
        trial.expect(early or not hidden, f"an interrupt left {hidden}")
        lied = "nothing was left" in text and (state == trial.command.name or bool(hidden))
        trial.expect(not lied, "it says that nothing was left behind")

    def race(self, trial: Trial) -> str:
        first = trial.command
        second = first if trial.kind == "same" else self.commands[first.other]
        pair = [first, second] if trial.dice.random() < 0.5 else [second, first]
        self.begin(trial)
        children = []
        for command in pair:
            children.append(Child(command.line(self.room, trial.over), self.scratch))
            longest = max(self.seconds[first.name], self.seconds[second.name])
            time.sleep(trial.dice.choice([0, 0, trial.dice.uniform(0, longest)]))
        ends = [child.end() for child in children]
        self.check(trial, first, second)
        self.whole(trial, first, second)
        for code, text in ends:
            lost = code == 1 and code_of(text) == "output-exists" and not trial.over
            trial.expect(code == 0 or lost, f"a loser says {text.strip()[:300]}")
        trial.expect(any(code == 0 for code, _ in ends), "nobody has won")
        both = [code for code, _ in ends] == [0, 0]
        return "both done" if both else "one done, one refused"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first try")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no try after")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--only", nargs="*", default=[], help="commands by their names")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    given = parser.parse_args()
    preload()
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), given.width, given.only)
        cells = [(name, kind) for kind in given.kinds for name in given.only or bench.commands]
        numbers = range(given.first, given.first + given.tries)
        counts, failed = tried(bench, cells, numbers, given.seed, 60 * given.minutes)
    for (name, kind), states in sorted(counts.items()):
        shown = ", ".join(f"{state} {n}" for state, n in sorted(states.items()))
        print(f"{states.total():5}  {name:15} {kind:8} {shown}")
    print(f"{sum(c.total() for c in counts.values())} tries, {failed} wrong")
    raise SystemExit(failed > 0)


def tried(
    bench: Bench, cells: Sequence[tuple[str, str]], numbers: range, seed: int, seconds: float
) -> tuple[dict[tuple[str, str], Counter[str]], int]:
    """Each try's own numbers follow from the seed and its number alone."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    failed, started = 0, time.monotonic()
    for number in numbers:
        dice = random.Random(f"{seed}/{number}")
        name, kind = cells[number % len(cells)]
        trial = Trial(bench.commands[name], kind, dice.random() < 0.5, dice)
        if time.monotonic() - started > seconds:
            break
        state = bench.race(trial) if kind in ("same", "other") else bench.kill(trial)
        counts.setdefault((name, kind), Counter())[state] += 1
        if trial.wrong:
            failed += 1
            over = "over an old output" if trial.over else "to a new output"
            print(f"try {number}: {name}, {kind}, {over}: {'; '.join(trial.wrong)}", flush=True)
    return counts, failed


if __name__ == "__main__":
    main()
