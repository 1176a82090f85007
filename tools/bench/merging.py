"""What merging costs: file to file over `cp -r` and over the framework, and in memory over PEFT and LyCORIS.

    python tools/bench/merging.py files [--gigabytes 2] [--rounds 5] [--workers 2] [--folder /dev/shm]
                                        [--framework ROUNDS] [--only NAME …]
    python tools/bench/merging.py memory [--layers 24] [--rounds 3] [--threads 1] [--only NAME …]

``files`` makes a Llama-like base of about so many GB of bfloat16, random, in shards of two layers, and
a LoRA, LoHa, LoKr and HRA of rank 8 over all its linear layers and a LoRA on q and v ("lora on q, v").
Every round runs all contestants one after the other, `cp -r` of the base among them; medians are
printed, as ratios to `cp` and to the framework:

    work        ``adaptsurgery.merge`` in this process, torch imported: the work alone
    no norms    the same without the norms of the manifest
    command     `adaptsurgery merge`, with the start of Python and torch
    framework   from_pretrained + PeftModel + merge_and_unload + save_pretrained, in a process of its own,
                in the first ROUNDS rounds (its HRA takes minutes at 2 GB: --framework 1)

with wall time, CPU seconds, and the peak memory of a process that merges once. A folder in memory
(--folder) leaves the disk out; it has to hold three times the base, and the framework needs as much
memory again. What is printed at 2 GB and at 8 GB (on a disk, by hand):

    python tools/bench/merging.py files --gigabytes 2 --rounds 5 --framework 1
    python tools/bench/merging.py files --gigabytes 8 --rounds 1 --framework 1 --folder /var/tmp

A small run of all of it: files --gigabytes 0.1 --rounds 1 --framework 1. ``memory`` folds into live weights
of ``layers`` × (4 × 1024² and 2 × 1024 × 4096), each algorithm in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import adaptsurgery
from adaptsurgery.algorithms import build
from adaptsurgery.core.update import Update
from adaptsurgery.jobs.fold import fold, unfold

RANK, ALPHA = 8, 4.0
CONTESTANTS = ("lora", "loha", "lokr", "hra", "lora on q, v")
HIDDEN, WIDE, VOCAB = 2048, 5632, 32000
Cost = tuple[float, float]


def timed(work: Callable[[], object]) -> Cost:
    """Wall and CPU seconds, children's included."""
    wall, cpu = time.perf_counter(), _cpu()
    work()
    return time.perf_counter() - wall, _cpu() - cpu


def _cpu() -> float:
    ours = time.process_time()  # os.times counts in steps of 10 ms
    return ours + sum(os.times()[2:4])


def medians(costs: dict[str, list[Cost]]) -> dict[str, Cost]:
    halves = {name: zip(*found) for name, found in costs.items()}
    return {name: tuple(map(statistics.median, both)) for name, both in halves.items()}  # type: ignore[misc]


# --- file to file -----------------------------------------------------------------------------


def shapes(layer: int) -> dict[str, tuple[int, int]]:
    attention = {f"self_attn.{n}_proj": (HIDDEN, HIDDEN) for n in "qkvo"}
    mlp = {"mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN)}
    every = {**attention, **mlp, "mlp.down_proj": (HIDDEN, WIDE)}
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in every.items()}


def make_base(folder: Path, gigabytes: float) -> None:
    """Random Llama-like shards in bfloat16, of two layers each, with their config and index."""
    per_layer = sum(a * b for a, b in shapes(0).values()) * 2
    layers = max(2, round(gigabytes * 1e9 / per_layer / 2) * 2)
    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    for first in range(0, layers, 2):
        held = {k: _bf16(s) for n in (first, first + 1) for k, s in shapes(n).items()}
        for n in (first, first + 1):
            for name in ("input_layernorm", "post_attention_layernorm"):
                held[f"model.layers.{n}.{name}.weight"] = torch.ones(HIDDEN).bfloat16()
        if not first:
            held["model.embed_tokens.weight"] = _bf16((VOCAB, HIDDEN))
            held["lm_head.weight"] = _bf16((VOCAB, HIDDEN))
            held["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
        name = f"model-{first // 2 + 1:05}-of-{layers // 2:05}.safetensors"
        save_file(held, folder / name, {"format": "pt"})
        index |= dict.fromkeys(held, name)
    written = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(written))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": WIDE, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": VOCAB, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def _bf16(shape: tuple[int, ...]) -> Tensor:
    return (torch.randn(shape) * 0.02).bfloat16()


def make_adapters(base: Path, folder: Path) -> None:
    """One PEFT adapter of each kind over every linear layer, and a LoRA on q and v."""
    paths = [k for k in _weights(base) if "proj" in k]
    for name in CONTESTANTS:
        chosen = [k for k in paths if "q, v" not in name or "q_proj" in k or "v_proj" in k]
        algorithm = name[:4].strip()
        held = {
            f"base_model.model.{key.removesuffix('.weight')}.{suffix}": torch.randn(s) * 0.05
            for key in chosen
            for suffix, s in _factors(algorithm, *_shape_of(key)).items()
        }
        (folder / name).mkdir(parents=True)
        save_file(held, folder / name / "adapter_model.safetensors", {"format": "pt"})
        targets = sorted({k.split(".")[-2] for k in chosen})
        config: dict[str, Any] = {
            "peft_type": algorithm.upper(), "r": RANK, "target_modules": targets,
            "inference_mode": True, "base_model_name_or_path": str(base),
        }  # fmt: skip
        if algorithm != "hra":
            config["lora_alpha" if algorithm == "lora" else "alpha"] = ALPHA
        if algorithm == "lokr":
            config |= {"peft_type": "LOKR", "decompose_factor": 8}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))


def _factors(algorithm: str, o: int, i: int) -> dict[str, tuple[int, ...]]:
    half = {"hada_w1_a": (o, RANK), "hada_w1_b": (RANK, i)}
    return {
        "lora": {"lora_A.weight": (RANK, i), "lora_B.weight": (o, RANK)},
        "loha": {**half, "hada_w2_a": (o, RANK), "hada_w2_b": (RANK, i)},
        "lokr": {"lokr_w1": (8, 8), "lokr_w2_a": (o // 8, RANK), "lokr_w2_b": (RANK, i // 8)},
        "hra": {"hra_u": (i, RANK)},
    }[algorithm]


def _weights(base: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((base / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    return found


def _shape_of(key: str) -> tuple[int, int]:
    return shapes(int(key.split(".")[2]))[key]


def merge_here(base: Path, adapter: Path, out: Path, workers: int, norms: bool = True) -> None:
    """The work alone: torch is imported already."""
    adaptsurgery.merge(base, str(adapter), out, workers=workers, norms=norms)


def merge_command(base: Path, adapter: Path, out: Path, workers: int) -> None:
    """The whole command, with the start of Python and torch."""
    command = [sys.executable, "-m", "adaptsurgery", "merge", base, adapter, "-o", out, "-q"]
    subprocess.run([*command, "--workers", str(workers)], check=True)


def update(name: str, slots: dict[str, Tensor]) -> Update:
    if name == "hra":
        return build("hra", {"u": slots["hra_u"]})
    names = {"lora_A": "down", "lora_B": "up"}
    plain = {names.get(k, k.replace("hada_", "").replace("lokr_", "")): t for k, t in slots.items()}
    return build(name, plain, ALPHA / RANK)


def merge_framework(base: Path, adapter: Path, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def files(given: argparse.Namespace) -> None:
    room = Path(given.folder) / f"adaptsurgery-bench-{os.getpid()}"
    base, adapters, out = room / "base", room / "adapters", room / "out"
    names = given.only or CONTESTANTS
    costs: dict[str, list[Cost]] = {}
    peaks: dict[str, list[float]] = {}
    try:
        make_base(base, given.gigabytes)
        make_adapters(base, adapters)
        size = sum(f.stat().st_size for f in base.iterdir()) / 1e9
        print(
            f"{size:.2f} GB of bfloat16; {given.rounds} rounds; {given.workers} workers", flush=True
        )
        for turn in range(given.rounds):
            _note(costs, "cp -r", out, lambda: subprocess.run(["cp", "-r", base, out], check=True))
            for name in names:
                adapter = adapters / name
                for route, work in _routes(base, adapter, out, given.workers).items():
                    _note(costs, f"{name}, {route}", out, work)
                once_each = ["ours", *(["framework"] if turn < given.framework else [])]
                for route in once_each if turn < max(1, given.framework) else []:
                    _alone(costs, peaks, name, route, (base, adapter, out), given.workers)
        _print_files(medians(costs), {k: statistics.median(v) for k, v in peaks.items()})
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _routes(base: Path, adapter: Path, out: Path, workers: int) -> dict[str, Callable[[], object]]:
    return {
        "work": lambda: merge_here(base, adapter, out, workers),
        "no norms": lambda: merge_here(base, adapter, out, workers, norms=False),
        "command": lambda: merge_command(base, adapter, out, workers),
    }


def _alone(
    costs: dict[str, list[Cost]],
    peaks: dict[str, list[float]],
    name: str,
    route: str,
    paths: tuple[Path, Path, Path],
    workers: int,
) -> None:
    """A process that merges once: its peak memory, and its time where that is the framework's."""
    held: list[float] = []
    cost = timed(lambda: held.append(_peak(route, *paths, workers)))
    shown = "framework" if route == "framework" else "work"
    peaks.setdefault(f"{name}, {shown}", []).extend(held)
    if route == "framework":
        costs.setdefault(f"{name}, framework", []).append(cost)
    shutil.rmtree(paths[2])


def _print_files(found: dict[str, Cost], peaks: dict[str, float]) -> None:
    """Wall and CPU over cp's, the wall over the framework's where that ran, and peaks in MB."""
    wall, cpu = found.pop("cp -r")
    print(f"{'cp -r':26}wall {wall:7.2f} s       cpu {cpu:7.2f} s")
    for name, (w, c) in found.items():
        theirs = found.get(f"{name.rpartition(', ')[0]}, framework")
        over = f"   1/{theirs[0] / w:.1f} of the framework" if theirs and theirs[0] != w else ""
        peak = f"   peak {peaks[name]:5.0f} MB" if name in peaks else ""
        print(f"{name:26}wall {w / wall:6.2f} × cp   cpu {c / cpu:6.2f} × cp{peak}{over}")


def _note(costs: dict[str, list[Cost]], name: str, out: Path, work: Callable[[], object]) -> None:
    costs.setdefault(name, []).append(timed(work))
    shutil.rmtree(out)


def _peak(route: str, base: Path, adapter: Path, out: Path, workers: int) -> float:
    """The peak memory in MB of a process that merges once."""
    command = [sys.executable, __file__, "once", route, base, adapter, out, str(workers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def once(given: argparse.Namespace) -> None:
    base, adapter, out = Path(given.base), Path(given.adapter), Path(given.out)
    if given.route == "framework":
        merge_framework(base, adapter, out)
    else:
        merge_here(base, adapter, out, int(given.workers))
    # Not getrusage: that counts the memory of the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")))


# --- in memory --------------------------------------------------------------------------------


class Block(nn.Module):
    """4 × 1024² and 2 × 1024 × 4096."""

    def __init__(self) -> None:
        super().__init__()
        for name in "qkvo":
            setattr(self, name, nn.Linear(1024, 1024, bias=False))
        self.up, self.down = nn.Linear(1024, 4096, bias=False), nn.Linear(4096, 1024, bias=False)


class Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def memory(given: argparse.Namespace) -> None:
    """Every cell in a process of its own: what the C library keeps of freed memory, and so what a
    large temporary costs a peer, depends on what ran before."""
    print(f"{given.layers} layers; {given.threads} threads; CPU seconds over fold's own")
    for dtype in DTYPES:
        for name in given.only or CONTESTANTS[:4]:
            size = (str(given.layers), str(given.rounds), str(given.threads))
            command = [sys.executable, __file__, "cell", dtype, name, *size]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            print(f"{dtype:8}{name:8}{done.stdout.splitlines()[-1]}", flush=True)


def cell(given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads)
    print(*_in_memory(given, DTYPES[given.dtype], given.name), sep="")


def _in_memory(given: argparse.Namespace, dtype: torch.dtype, name: str) -> list[str]:
    base = Stack(given.layers).to(dtype)
    ours = copy.deepcopy(base)
    theirs, updates = _peft(base, name)
    lycoris = _lycoris(ours, name)
    costs: dict[str, list[Cost]] = {}
    for turn in range(given.rounds):
        costs.setdefault("fold", []).append(timed(lambda: fold(ours, updates)))
        unfold(ours, updates)
        if turn == 0 or name != "hra":
            costs.setdefault("PEFT", []).append(timed(theirs.merge_adapter))
            theirs.unmerge_adapter()
        if lycoris is not None:
            costs.setdefault("LyCORIS", []).append(timed(lambda: lycoris.merge_to(1.0)))
    found = medians(costs)
    own = found.pop("fold")[1]
    return [
        f"fold {own:6.3f} s",
        *(f"   {peer} {cost[1] / own:6.1f} ×" for peer, cost in found.items()),
    ]


def _peft(base: nn.Module, name: str) -> tuple[Any, dict[str, Update]]:
    import peft
    from peft.utils import get_peft_model_state_dict

    targets = ["q", "k", "v", "o", "up", "down"]
    config: Any = {
        "lora": lambda: peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=False),
        "loha": lambda: peft.LoHaConfig(r=RANK, alpha=ALPHA, target_modules=targets, init_weights=False),
        "lokr": lambda: peft.LoKrConfig(r=RANK, alpha=ALPHA, target_modules=targets, init_weights=False),
        "hra": lambda: peft.HRAConfig(r=RANK, target_modules=targets, init_weights=False),
    }[name]()  # fmt: skip
    wrapped = peft.get_peft_model(base, config)  # type: ignore[arg-type]
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in get_peft_model_state_dict(wrapped).items():
        path, _, slot = (
            key.removesuffix(".weight").removeprefix("base_model.model.").rpartition(".")
        )
        grouped.setdefault(path, {})[slot] = tensor
    return wrapped, {path: update(name, slots) for path, slots in grouped.items()}


def _lycoris(model: nn.Module, name: str) -> Any:
    if name == "hra":
        return None
    from lycoris import LycorisNetwork, create_lycoris

    algorithm = {"lora": "locon"}.get(name, name)
    LycorisNetwork.apply_preset({"target_name": [".*"]})
    return create_lycoris(copy.deepcopy(model), 1.0, RANK, ALPHA, algo=algorithm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    jobs = parser.add_subparsers(required=True)
    of_files = jobs.add_parser("files")
    of_files.add_argument("--gigabytes", type=float, default=2.0)
    of_files.add_argument("--rounds", type=int, default=5)
    of_files.add_argument("--workers", type=int, default=2)
    of_files.add_argument("--folder", default="/dev/shm")
    of_files.add_argument("--framework", type=int, default=0, metavar="ROUNDS")
    of_files.add_argument("--only", action="append", choices=CONTESTANTS)
    of_files.set_defaults(run=files)
    in_memory = jobs.add_parser("memory")
    in_memory.add_argument("--layers", type=int, default=24)
    in_memory.add_argument("--rounds", type=int, default=3)
    in_memory.add_argument("--threads", type=int, default=1)
    in_memory.set_defaults(run=memory)
    in_memory.add_argument("--only", action="append", choices=CONTESTANTS[:4])
    one_cell = jobs.add_parser("cell")
    one_cell.add_argument("dtype", choices=DTYPES)
    one_cell.add_argument("name", choices=CONTESTANTS)
    for argument in ("layers", "rounds", "threads"):
        one_cell.add_argument(argument, type=int)
    one_cell.set_defaults(run=cell)
    one = jobs.add_parser("once")
    for argument in ("route", "base", "adapter", "out", "workers"):
        one.add_argument(argument)
    one.set_defaults(run=once)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
