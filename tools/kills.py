"""A merge killed at random moments, and run again until it is done: what is there after each kill?

    python tools/kills.py [--kills 200] [--seed 0] [--width 512]

Four settings take turns: a sharded folder and a single file, each with a new output and over an old
one. A merge runs in a child that gets SIGKILL at a random moment of its work, up to three times in a
row, and then once undisturbed. After every kill the output is whole: not there or the old one, or
the new one if the kill came after the rename. The base has its bytes. At the end the output has the
bytes of a merge that nobody disturbed, and nothing is left beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

import adaptsurgery.algorithms
import adaptsurgery.checkpoint.stream  # noqa: F401  before the fork, not in every child
from adaptsurgery.jobs.merging.merge import merge

IN_A_ROW = 3
Tree = dict[str, str]


def tree(path: Path) -> Tree:
    """The hash of every file at or below a path; nothing where there is none."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {
        os.path.relpath(p, path.parent): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def write_base(folder: Path, width: int) -> None:
    """Three shards of a folder, and a file of one."""
    folder.mkdir()
    index: dict[str, str] = {}
    for shard in range(3):
        held = {
            f"model.layers.{n}.{part}.weight": torch.randn(width, width).bfloat16()
            for n in (2 * shard, 2 * shard + 1)
            for part in ("q_proj", "v_proj")
        }
        name = f"model-{shard + 1:05}-of-00003.safetensors"
        save_file(held, folder / name, {"format": "pt"})
        index |= dict.fromkeys(held, name)
    written = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(written))
    (folder / "config.json").write_text('{"model_type": "llama"}')


def write_adapter(file: Path, layers: int, width: int) -> None:
    held = {}
    for n in range(layers):
        stem = f"lycoris_model_layers_{n}_q_proj"
        held[f"{stem}.lora_up.weight"] = torch.randn(width, 4) * 0.1
        held[f"{stem}.lora_down.weight"] = torch.randn(4, width)
    save_file(held, file)


def in_child(work: Callable[[], object], after: float | None = None) -> float | None:
    """Run in a child; its seconds, or None if SIGKILL came ``after`` so many before it had ended."""
    started = time.monotonic()
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and after is not None:
        return None
    if status:
        raise AssertionError(f"the merge itself failed: {status}")
    return time.monotonic() - started


@dataclass
class Setting:
    """One way of merging, what has to come of it, and how long it takes undisturbed."""

    name: str
    room: Path
    base: Path
    adapter: Path
    folder: bool
    over: bool

    def __post_init__(self) -> None:
        self.out = self.room / ("out" if self.folder else "out.safetensors")
        self.room.mkdir()
        self.untouched = tree(self.base)
        self.old: Tree = {}
        if self.over:
            in_child(lambda: self.merge(3.0))
            shutil.copytree(self.room, self.room.with_suffix(".old"))
            self.old = tree(self.out)
        self.seconds = in_child(self.merge) or 0.0
        self.wanted, self.beside = tree(self.out), tree(self.room)

    def merge(self, weight: float = 1.0) -> None:
        merge(self.base, [(self.adapter, weight)], self.out, overwrite=self.over)

    def begin(self) -> None:
        """As before the merge: no output, or the old one."""
        shutil.rmtree(self.room)
        if self.over:
            shutil.copytree(self.room.with_suffix(".old"), self.room)
        else:
            self.room.mkdir()

    def state(self) -> str:
        """Which of the outputs that may be there is there; an AssertionError for any other."""
        assert tree(self.base) == self.untouched, "the base was written"
        found = tree(self.out)
        if found == self.wanted:
            return "new"
        assert found == self.old, f"{self.name}: neither the old output nor the new one"
        return "old" if found else "none"

    def sequence(self, kills: int, dice: random.Random) -> Counter[str]:
        """Up to so many kills, then an undisturbed run; what was there after each kill."""
        self.begin()
        seen: Counter[str] = Counter()
        for _ in range(kills):
            if in_child(self.merge, dice.uniform(0, self.seconds)) is not None:
                break
            seen[f"{self.name}: {self.state()}"] += 1
            if self.ended():
                break
        if not self.ended():
            in_child(self.merge)
        assert self.state() == "new", f"{self.name}: not done"
        assert tree(self.room) == self.beside, f"{self.name}: {set(tree(self.room))}"
        return seen

    def ended(self) -> bool:
        """Whether nothing is left to do: a kill may come between the last step and the exit."""
        left = any(p.name.startswith(".adaptsurgery") for p in self.room.iterdir())
        return self.state() == "new" and not left


def settings(room: Path, width: int) -> list[Setting]:
    base, both, one = room / "base", room / "both.safetensors", room / "one.safetensors"
    write_base(base, width)
    write_adapter(both, 6, width)
    write_adapter(one, 2, width)
    file = base / "model-00001-of-00003.safetensors"
    return [
        Setting("folder", room / "a", base, both, True, False),
        Setting("folder over old", room / "b", base, both, True, True),
        Setting("file", room / "c", file, one, False, False),
        Setting("file over old", room / "d", file, one, False, True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=512)
    given = parser.parse_args()
    torch.set_num_threads(1)  # a child cannot use its parent's pool
    torch.manual_seed(given.seed)
    dice, seen, turn = random.Random(given.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        ready = settings(Path(folder), given.width)
        while seen.total() < given.kills:
            left = given.kills - seen.total()
            seen += ready[turn % len(ready)].sequence(min(IN_A_ROW, left), dice)
            turn += 1
    for name, count in sorted(seen.items()):
        print(f"{count:5}  {name}")
    print(f"{seen.total()} kills in {turn} merges: every output whole, every base untouched")


if __name__ == "__main__":
    main()
