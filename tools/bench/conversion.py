"""What it costs to look at an adapter file and to convert it: `python tools/bench/conversion.py`.

A kohya file of 2,000 tensors over SDXL's real module names, 200 MB of float16, on a memory file
system if there is one. Whole processes are measured, start of Python included, the jobs in turn so
that a busy machine is busy for all; each line is a median with the least and the most. Trust the
ratios, not the seconds. The [test] extra brings safetensors' and diffusers' side.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

# This process stays small, with neither numpy nor torch: Linux counts the memory of the process
# that starts another one into the peak of the new one.

MAKE = """
import random, sys
from pathlib import Path
from adaptsurgery.checkpoint.writer import write_safetensors
from adaptsurgery_formats.names import flatten, table
from adaptsurgery_formats.tensors import Literal, Tensor, scalar

out, count, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
unet = table("sdxl").components["unet"]
linears = [(n, s) for n in unet.native if len(s := unet.shape(n, "native")) == 2]
chosen = linears[: -(-count // 3)]
rank = max(1, round(size / sum(2 * (o + i) for _, (o, i) in chosen)))
noise = random.Random(0).randbytes(1 << 24)
# Numbers of at most 1.0 in size: the exponent's highest bit is cleared.
noise = noise.translate(bytes(b & 0xBF for b in range(256)))

def filled(*shape):
    need = 2 * shape[0] * shape[1]
    start = random.randrange(len(noise) // 4) * 2
    data = (noise[start:] + noise * (need // len(noise) + 1))[:need]
    return Tensor("F16", shape, (Literal(data),))

tensors = {}
for name, (o, i) in chosen:
    key = "lora_unet_" + flatten(name)
    tensors[key + ".alpha"] = scalar(rank / 2, "F16")
    tensors[key + ".lora_down.weight"] = filled(rank, i)
    tensors[key + ".lora_up.weight"] = filled(o, rank)
metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank)}
write_safetensors(out, tensors, metadata)
print(f"{len(tensors):,} tensors, rank {rank}, {out.stat().st_size / 1e6:.0f} MB")
"""
RELOAD = """
import sys
from safetensors.torch import load_file, save_file
save_file(load_file(sys.argv[1]), sys.argv[2])
"""
DIFFUSERS = """
import sys
from types import SimpleNamespace
from safetensors.torch import load_file, save_file
from diffusers.loaders import lora_conversion_utils as peer

state = peer._maybe_map_sgm_blocks_to_diffusers(
    load_file(sys.argv[1]), SimpleNamespace(layers_per_block=2)
)
state, alphas = peer._convert_non_diffusers_lora_to_diffusers(state)
save_file({k: v.contiguous() for k, v in state.items()}, sys.argv[2])
"""


@dataclass
class Job:
    """A command with what its runs took. ``{out}`` in it is removed after a run."""

    name: str
    command: list[str]
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)

    def run(self, folder: Path) -> None:
        out = folder / "out"
        command = [part.replace("{out}", str(out)) for part in self.command]
        start = time.perf_counter()
        child = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, env=_environment(folder / "compiled")
        )
        _, status, used = os.wait4(child.pid, 0)
        self.wall.append(time.perf_counter() - start)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{self.name}: exit code {child.returncode}")
        self.cpu.append(used.ru_utime + used.ru_stime)
        self.peak.append(used.ru_maxrss / 1024)
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


def _environment(compiled: Path) -> dict[str, str]:
    """One thread, so that CPU time is comparable; no network; compiled once, as pip leaves it."""
    given = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPYCACHEPREFIX": str(compiled)}
    return given | fixed


def jobs(source: Path) -> list[Job]:
    python, file = sys.executable, str(source)
    convert = [
        python,
        "-m",
        "adaptsurgery",
        "convert",
        file,
        "-o",
        "{out}",
        "--no-hashes",
        "--quiet",
        "--to",
    ]
    return [
        Job("bare python", [python, "-c", "pass"]),
        Job("cp", ["cp", file, "{out}"]),
        Job("adaptsurgery inspect", [python, "-m", "adaptsurgery", "inspect", file]),
        Job("adaptsurgery convert --to lycoris", [*convert, "lycoris"]),
        Job("adaptsurgery convert --to peft", [*convert, "peft"]),
        Job("safetensors.torch load + save", [python, "-c", RELOAD, file, "{out}"]),
        Job("diffusers' converter + save", [python, "-c", DIFFUSERS, file, "{out}"]),
    ]


def memory_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _spread(values: list[float], unit: float, digits: int) -> str:
    """median (least to most), each divided by ``unit``."""
    middle, low, high = (f(values) / unit for f in (statistics.median, min, max))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def table(done: list[Job]) -> str:
    """The jobs against cp in wall time and against bare Python in CPU time."""
    named = {job.name: job for job in done}
    cp = statistics.median(named["cp"].wall)
    bare = statistics.median(named["bare python"].cpu)
    lines = [f"{'':34}{'wall / cp':>20}{'CPU s over bare':>24}{'peak MB':>18}"]
    for job in done:
        over = [c - bare for c in job.cpu]
        lines.append(
            f"{job.name:34}{_spread(job.wall, cp, 2):>20}{_spread(over, 1, 3):>24}"
            f"{_spread(job.peak, 1, 0):>18}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a small file, two runs: does it work?"
    )
    parser.add_argument("--runs", type=int, default=7, help="of each job (default 7)")
    parser.add_argument("--only", help="jobs whose name has this in it, beside cp and bare python")
    options = parser.parse_args()
    tensors, size, runs = (
        (300, 8_000_000, 2) if options.quick else (2000, 200_000_000, options.runs)
    )
    place = memory_folder()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=place) as folder:
        source = Path(folder, "kohya.safetensors")
        said = subprocess.run(
            [sys.executable, "-c", MAKE, str(source), str(tensors), str(size)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        where = f"{place}, a memory file system" if place else "a temporary folder on disk"
        print(f"{said}, in {where}; {runs} runs of each, in turn; median (least-most)", flush=True)
        chosen = jobs(source)
        if options.only:
            chosen = [
                j for j in chosen if j.name in ("cp", "bare python") or options.only in j.name
            ]
        for number in range(runs + 1):
            for job in chosen:
                job.run(Path(folder))
                if number == 0:  # the first run fills the caches
                    for taken in (job.cpu, job.wall, job.peak):
                        taken.clear()
        print(table(chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
