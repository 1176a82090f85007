"""What an adapted layer costs: PEFT's time over ours, ours over the bare layer, and memory.

    python tools/bench/modules.py [time|memory|growth ...] [--rounds 9] [--only loha] [--shapes 768x768]

``time``: forward and forward+backward (of the adapter and the input) of one layer at r = 8 in fp32,
by process CPU seconds at one thread, all contestants of a cell in turns, medians. "form" is the
dearest of ours over the cheapest of its forms, so 1.0 where the rule chose best. ``memory``: the
most that the layer's call holds beyond the bare layer's, by the allocations that torch reports.
``growth``: planning, matching, injecting, a second adapter and loading at growing numbers of modules.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

import adaptsurgery
from adaptsurgery.algorithms import HRAConfig, LoHaConfig, LoKrConfig, LoraConfig
from adaptsurgery.core.config import AdapterConfig, tensors_of
from adaptsurgery.core.geometry import Layer

RANK = 8
CONFIGS: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "lora": (LoraConfig, peft.LoraConfig, peft.LoraModel, {}),
    "dora": (LoraConfig, peft.LoraConfig, peft.LoraModel, {"use_dora": True}),
    "loha": (LoHaConfig, peft.LoHaConfig, peft.LoHaModel, {}),
    "lokr": (LoKrConfig, peft.LoKrConfig, peft.LoKrModel, {}),
    "hra": (HRAConfig, peft.HRAConfig, peft.HRAModel, {}),
}
SHAPES = {"768x768": (768, 768), "1024x4096": (1024, 4096), "4096x4096": (4096, 4096)}
TOKENS = (1, 77, 512, 4096)
FORMS = ("factored", "bilinear", "folded")
Call = Callable[[Tensor], Tensor]


class Adapted(nn.Module):
    """A layer with one update over it in one form: the least that a wrapper could be."""

    def __init__(self, base: nn.Module, config: AdapterConfig, form: str = "auto") -> None:
        super().__init__()
        self.layer, self.form = Layer.from_module(base), form
        weight = self.layer.canonical().detach()
        made = config.fresh(self.layer.shape, kind=self.layer.kind, weight=weight)
        self.slots = nn.ParameterDict({n: nn.Parameter(t) for n, t in tensors_of(made).items()})
        self.config, self.scale = config, getattr(made, "scale", 1.0)

    def forward(self, x: Tensor) -> Tensor:
        update = self.config.assembled(dict(self.slots), self.scale, self.layer.shape)
        return update.apply(x, self.layer, self.form)  # type: ignore[arg-type]


def contestants(base: nn.Module, algorithm: str, forms: bool) -> dict[str, nn.Module]:
    """The bare layer, ours, PEFT's, and each form of ours by itself."""
    ours, theirs, model, options = CONFIGS[algorithm]
    base.requires_grad_(False)
    wrapped, adapted = nn.Sequential(base), nn.Sequential(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(wrapped, theirs(r=RANK, target_modules=["0"], **options), "default")
    adaptsurgery.get_peft_model(adapted, ours(r=RANK, target_modules=["0"], **options))
    found: dict[str, nn.Module] = {"bare": base, "ours": adapted[0], "peft": wrapped[0]}
    if forms and algorithm != "dora":
        config = ours(r=RANK, **options)
        found |= {form: Adapted(base, config, form) for form in FORMS if form != "bilinear"}
        if algorithm == "loha" and isinstance(base, nn.Linear):
            found["bilinear"] = Adapted(base, config, "bilinear")
    return found


def forward(call: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        call(x)


def both(call: nn.Module, x: Tensor) -> None:
    y = call(x.requires_grad_())
    y.backward(torch.ones_like(y))
    x.grad = None
    for parameter in call.parameters():
        parameter.grad = None


def medians(
    held: dict[str, nn.Module], x: Tensor, work: Callable[[nn.Module, Tensor], None], rounds: int
) -> dict[str, float]:
    """Median CPU seconds of each contestant, all in turns; a slow one has fewer turns."""
    times: dict[str, list[float]] = {name: [] for name in held}
    repeats = dict.fromkeys(held, 1)
    for turn in range(rounds + 2):
        for name, call in held.items():
            if turn > 1 and times[name][0] > 1:
                continue
            start = time.process_time()
            for _ in range(repeats[name]):
                work(call, x)
            times[name].append((time.process_time() - start) / repeats[name])
            repeats[name] = max(1, min(100, int(0.02 / max(times[name][-1], 1e-5))))
    return {name: statistics.median(each[2:] or each) for name, each in times.items()}


def run_time(algorithms: list[str], shapes: list[str], rounds: int, forms: bool) -> None:
    print(
        f"{'cell':34}{'PEFT/ours fwd':>14}{'fwd+bwd':>9}{'ours/bare fwd':>15}{'fwd+bwd':>9}{'form':>12}"
    )
    for algorithm in algorithms:
        for shape in shapes:
            for x, base, name in cells(shape):
                held = contestants(base, algorithm, forms)
                cost = [medians(held, x, work, rounds) for work in (forward, both)]
                over = [c["peft"] / c["ours"] for c in cost] + [c["ours"] / c["bare"] for c in cost]
                chosen = [
                    c["ours"] / min((c[f] for f in FORMS if f in c), default=c["ours"])
                    for c in cost
                ]
                best = [
                    "/".join(
                        min((f for f in FORMS if f in c), key=c.__getitem__, default="-")[:4]
                        for c in cost
                    )
                ]
                text = "".join(f"{v:{w}.2f}" for v, w in zip(over, (14, 9, 15, 9)))
                print(
                    f"{algorithm:6}{name:28}{text}{chosen[0]:7.2f}{chosen[1]:5.2f} {best[0]}",
                    flush=True,
                )


def cells(shape: str) -> list[tuple[Tensor, nn.Module, str]]:
    torch.manual_seed(0)
    if shape == "conv":
        base: nn.Module = nn.Conv2d(320, 320, 3, padding=1)
        return [(torch.randn(1, 320, 64, 64), base, "conv 320x320x3x3 at 64x64")]
    out, into = SHAPES[shape]
    return [(torch.randn(1, t, into), nn.Linear(into, out), f"{shape} {t} tokens") for t in TOKENS]


def peak(work: Callable[[], None]) -> float:
    """The most bytes that were held at once, in MB, beyond those at the start."""
    from torch.profiler import ProfilerActivity, profile

    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 1e6


def run_memory(algorithms: list[str]) -> None:
    print(
        f"{'4096x4096, 77 tokens, MB beyond bare':38}{'ours fwd':>10}{'fwd+bwd':>9}{'PEFT fwd':>10}{'fwd+bwd':>9}"
    )
    x = torch.randn(1, 77, 4096)
    for algorithm in algorithms:
        held = contestants(nn.Linear(4096, 4096), algorithm, False)
        most = {
            name: [peak(lambda c=call, w=work: w(c, x)) for work in (forward, both)]
            for name, call in held.items()
        }
        row = [most[n][k] - most["bare"][k] for n in ("ours", "peft") for k in (0, 1)]
        print(
            f"{algorithm:38}" + "".join(f"{v:{w}.1f}" for v, w in zip(row, (10, 9, 10, 9))),
            flush=True,
        )


# --- growth ----------------------------------------------------------------------------------------


class Stack(nn.Module):
    """``count`` linear layers of the least size, named as a language model's."""

    def __init__(self, count: int) -> None:
        super().__init__()
        kinds = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.layers = nn.ModuleList(
            nn.ModuleDict({kind: nn.Linear(4, 4) for kind in kinds}) for _ in range(count // 4)
        )


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def grown(library: Any, count: int, each_its_rank: bool, folder: str) -> dict[str, float]:
    """CPU seconds of injecting, of a second adapter, of saving and of loading one more."""
    names = [name for name, m in Stack(count).named_modules() if isinstance(m, nn.Linear)]
    ranks = {name: 1 + at % 3 for at, name in enumerate(names)} if each_its_rank else {}

    def config() -> Any:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        return library.LoKrConfig(r=2, target_modules=targets, rank_pattern=ranks)

    cost = {}
    model = Stack(count)
    cost["inject"], adapted = timed(lambda: library.get_peft_model(model, config()))
    cost["second"], _ = timed(lambda: adapted.add_adapter("second", config()))
    cost["save"], _ = timed(lambda: adapted.save_pretrained(folder, selected_adapters=["default"]))
    cost["load"], _ = timed(lambda: adapted.load_adapter(folder, "third"))
    return cost


def run_growth(sizes: list[int], peft_sizes: list[int]) -> None:
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        for name, library, counts in (("ours", adaptsurgery, sizes), ("PEFT", peft, peft_sizes)):
            for each in (True, False) if library is adaptsurgery else (False,):
                said = "a rank each" if each else "one rank"
                for count in counts:
                    cost = grown(library, count, each, f"{folder}/{name}{count}{each}")
                    parts = "  ".join(
                        f"{part} {1e3 * value / count:.3f}" for part, value in cost.items()
                    )
                    print(f"{name} {count:6} modules, {said:11} ms a module: {parts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["time", "memory"], help="time, memory, growth")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", default=[*CONFIGS])
    parser.add_argument("--shapes", nargs="*", default=[*SHAPES, "conv"])
    parser.add_argument("--forms", action="store_true", help="measure each form by itself too")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1200, 2400, 4800, 9600])
    parser.add_argument("--peft-sizes", type=int, nargs="*", default=[1200, 2400])
    given = parser.parse_args()
    torch.set_num_threads(1)
    if "time" in given.parts:
        run_time(given.only, given.shapes, given.rounds, given.forms)
    if "memory" in given.parts:
        run_memory(given.only)
    if "growth" in given.parts:
        run_growth(given.sizes, given.peft_sizes)


if __name__ == "__main__":
    main()
