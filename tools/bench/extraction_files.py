"""What an extraction from files holds in memory, and how its cost grows with the layers.

    python tools/bench/extraction_files.py [--width 1024] [--counts 8 16 32] [--algorithms lora lokr]

Every cell is a process of its own, with one thread and one worker: its CPU seconds and its peak
resident memory, both less what they were when the modules were loaded. "layers" is that memory in
layers of float32. Files lie in a temporary folder (TMPDIR).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 16
CELL = """
import json, sys, time, torch
import adaptsurgery.jobs.extract.fitting, adaptsurgery.jobs.extract.choose
from adaptsurgery.cli.output import peak_memory
from adaptsurgery.jobs.extract.extract import extract
base, tuned, out, algorithm, rank = sys.argv[1:]
torch.set_num_threads(1)
memory, clock = peak_memory(), time.process_time()
report = extract(base, tuned, out, algorithm=algorithm, rank=int(rank), workers=1)
told = {"memory": peak_memory() - memory, "seconds": time.process_time() - clock}
print(json.dumps(told | {"error": report.facts["error"]}))
"""


def write_pair(folder: Path, width: int, count: int) -> tuple[Path, Path]:
    """A base and a fine-tune of it, its change of falling singular values."""
    random = torch.Generator().manual_seed(count)
    paths = folder / f"base-{count}.safetensors", folder / f"tuned-{count}.safetensors"
    base = {f"l.{n}.weight": torch.randn(width, width, generator=random) for n in range(count)}
    save_file(base, paths[0])
    falling = 0.02 / torch.arange(1, width + 1).sqrt()
    for weight in base.values():
        left, right = torch.randn(2, width, width, generator=random)
        weight += (left * falling) @ right / width**0.5
    save_file(base, paths[1])
    return paths


def cell(pair: tuple[Path, Path], out: Path, algorithm: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", CELL, *map(str, pair), str(out), algorithm, str(RANK)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    told: dict[str, float] = json.loads(done.stdout)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--algorithms", nargs="+", default=["lora", "lokr"])
    options = parser.parse_args()
    layer = 4 * options.width**2
    print(f"rank {RANK}, layers of {options.width}² ({layer / 1e6:.1f} MB in float32)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in options.counts:
            pair = write_pair(folder, options.width, count)
            size = sum(path.stat().st_size for path in pair)
            for algorithm in options.algorithms:
                told = cell(pair, folder / f"{algorithm}-{count}", algorithm)
                print(
                    f"{count:4} layers, a pair of {size / 1e6:6.0f} MB  {algorithm:5} "
                    f"{told['seconds']:6.2f} s, {1e3 * told['seconds'] / count:6.1f} ms a layer   "
                    f"peak {told['memory'] / 1e6:5.0f} MB, {told['memory'] / layer:4.1f} layers   "
                    f"error {told['error']:.3f}",
                    flush=True,
                )
            for path in pair:
                path.unlink()


if __name__ == "__main__":
    main()
