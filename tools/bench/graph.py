"""Attaching to a Llama-shaped program against exporting it again, and growth with the layers.

    python tools/bench/graph.py [--layers 32] [--small]

Every layer has seven projections: 32 layers are 224 sites. Batch and sequence are open. CPU seconds
of the process at one thread, medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from transformers import LlamaConfig, LlamaForCausalLM

from adaptsurgery.algorithms import HRAConfig, LoHaConfig, LoKrConfig, LoraConfig
from adaptsurgery.graph.attach import attach, detach

WIDTH, HEADS, HIDDEN = 32, 4, 64
CONFIGS: dict[str, type[Any]] = {
    "lora": LoraConfig,
    "loha": LoHaConfig,
    "lokr": LoKrConfig,
    "hra": HRAConfig,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def exported(layers: int) -> ExportedProgram:
    """transformers' own Llama, narrow; batch and sequence open."""
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, vocab_size=64, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    sizes = {"input_ids": {0: Dim("batch", min=2, max=64), 1: Dim("sequence", min=2, max=1024)}}
    ids = torch.randint(0, 64, (3, 5))
    return torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes=sizes)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of the process, and what came out."""
    start = time.process_time()
    out = work()
    return time.process_time() - start, out


def compare(layers: int, rounds: int) -> None:
    """One size: a table of every algorithm's attaching and detaching over exporting."""
    exporting, attaching, detaching = [], {n: [] for n in CONFIGS}, {n: [] for n in CONFIGS}
    for _ in range(rounds):
        taken, program = seconds(lambda: exported(layers))
        exporting.append(taken)
        for name, config in CONFIGS.items():
            made = config(r=4, target_modules=TARGETS)
            taken, h = seconds(lambda made=made, program=program: attach(program, made))
            attaching[name].append(taken)
            detaching[name].append(seconds(lambda h=h: detach(h))[0])
    export = statistics.median(exporting)
    print(f"{7 * layers:4} sites  export {export:6.2f} s")
    for name in CONFIGS:
        on, off = statistics.median(attaching[name]), statistics.median(detaching[name])
        print(
            f"            {name:5} attach {on:6.2f} s  {on / export:4.2f} of export"
            f"  {1000 * on / (7 * layers):5.1f} ms a site   detach {off:6.2f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a smoke run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [1, 2] if given.small else [given.layers // 4, given.layers // 2, given.layers]
    for layers in sizes:
        compare(layers, 1 if given.small else given.rounds)


if __name__ == "__main__":
    main()
