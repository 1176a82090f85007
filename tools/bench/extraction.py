"""What an extraction reaches and costs, beside the peers' methods.

    python tools/bench/extraction.py lora loha lokr hra [--seed N] [--rounds 3] [--no-real] [--quick]

Matrices are drawn afresh from the seed, which is printed; "real" ones are full fine-tunes made on
the spot (tools/bench/real_deltas.py). One thread; all contestants one after the other in every
round, the median of the process's CPU seconds, told as ratios. "excess" is an error over that of
the whole SVD in float64. LoHa and LoKr: tools/bench/extraction_products.py.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from extraction_products import PARTS as PRODUCTS
from real_deltas import Pair, fine_tuned
from torch import Tensor

from adaptsurgery.algorithms import extract, hra, lora
from adaptsurgery.algorithms.hra import HRA
from adaptsurgery.nearest.goal import Goal

Factors = tuple[Tensor, Tensor]


# --- the peers' methods ---------------------------------------------------------------------------


def whole_svd(delta: Tensor, rank: int) -> Factors:
    """As mergekit and PEFT: an SVD of everything, of which the head is kept."""
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :rank] * s[:rank], vt[:rank]


def clamped_svd(delta: Tensor, rank: int) -> Factors:
    """As kohya's scripts: square U and V too, and whatever is above the 0.99 quantile cut off."""
    u, s, vt = torch.linalg.svd(delta)
    up, down = u[:, :rank] * s[:rank], vt[:rank]
    most = float(torch.quantile(torch.cat([up.flatten(), down.flatten()]), 0.99))
    return up.clamp(-most, most), down.clamp(-most, most)


def random_svd(delta: Tensor, rank: int) -> Factors:
    """torch.svd_lowrank with its two power iterations."""
    u, s, v = torch.svd_lowrank(delta, rank, niter=2)
    return u * s, v.t()


def ours(delta: Tensor, rank: int) -> Factors:
    """The whole fit, its measured error included."""
    return extract("lora", torch.zeros_like(delta), delta, rank=rank).factors()


METHODS: dict[str, Callable[[Tensor, int], Factors]] = {
    "whole svd": whole_svd, "kohya's": clamped_svd, "svd_lowrank": random_svd, "ours": ours,
}  # fmt: skip


# --- matrices -------------------------------------------------------------------------------------


def falling(o: int, i: int, power: float) -> Tensor:
    """Singular values k^-power between random bases."""
    rank = min(o, i)
    left, right = (torch.linalg.qr(torch.randn(n, rank)).Q for n in (o, i))
    return (left * torch.arange(1, rank + 1) ** -power) @ right.t()


def drawn(quick: bool) -> Iterator[tuple[str, Tensor, int]]:
    yield "768² flat, r 16", torch.randn(768, 768), 16
    square = falling(1280, 1280, 0.6)
    yield "1280² σ = k^-.6, r 16", square, 16
    if not quick:
        yield "1280² σ = k^-.6, r 64", square, 64
        yield "1280×5120 σ = k^-.6, r 16", falling(1280, 5120, 0.6), 16
    yield "640×5760 σ = k^-1, r 32", falling(640, 5760, 1.0), 32
    low = torch.randn(700, 12) @ torch.randn(12, 600)
    yield "rank 12 and 1e-3 of noise, r 16", low + 1e-3 * low.std() * torch.randn(700, 600), 16


def measured(delta: Tensor, factors: Factors) -> float:
    wide = delta.double()
    return float((wide - factors[0].double() @ factors[1].double()).norm() / wide.norm())


def bench_lora(pairs: list[Pair], rounds: int, quick: bool) -> None:
    print(
        f"\nLoRA: error over the optimum, and speed over the whole SVD\n{'':36}{'optimum':>9}",
        end="",
    )
    print("".join(f"{name:>20}" for name in METHODS))
    for name, delta, rank in [*drawn(quick), *real_matrices(pairs)]:
        costs: dict[str, list[float]] = {method: [] for method in METHODS}
        errors = {}
        for _ in range(rounds):
            for method, work in METHODS.items():
                start = time.process_time()
                factors = work(delta, rank)
                costs[method].append(time.process_time() - start)
                errors[method] = measured(delta, factors)
        s = torch.linalg.svdvals(delta.double())
        best = float(s[rank:].norm() / s.norm())
        whole = statistics.median(costs["whole svd"])
        cells = [
            f"{errors[m] / best - 1:>11.1e} {whole / statistics.median(costs[m]):>7.1f}×"
            for m in METHODS
        ]
        print(f"{name:36}{best:>9.4f}{''.join(cells)}", flush=True)


def real_matrices(pairs: list[Pair]) -> list[tuple[str, Tensor, int]]:
    return [(f"{p.name}, r 16", (p.tuned - p.base).flatten(1), 16) for p in chosen(pairs)]


def chosen(pairs: list[Pair]) -> list[Pair]:
    """One of each shape."""
    return list({pair.base.shape: pair for pair in pairs}.values())


def bench_tucker(pairs: list[Pair]) -> None:
    print("\nTucker LoRA of kernels: error, and the energy that it keeps over the one-shot HOSVD's")
    for pair in chosen(pairs):
        for rank in (4, 8, 16) if pair.base.dim() > 2 else ():
            cube = (pair.tuned - pair.base).double().flatten(2)
            left = torch.linalg.svd(cube.flatten(1), full_matrices=False).U[:, :rank]
            right = torch.linalg.svd(cube.transpose(0, 1).flatten(1), full_matrices=False).U[
                :, :rank
            ]
            core = torch.einsum("oik,op,iq->pqk", cube, left, right)
            shot = float(core.norm() / cube.norm()) ** 2
            found = lora.fit(pair.base, pair.tuned, Goal(rank=rank), tucker=True).error
            flat = lora.fit(pair.base, pair.tuned, Goal(rank=rank)).error
            print(
                f"{pair.name:28} r {rank:<3} one-shot {math.sqrt(1 - shot):.4f}  ours {found:.4f} "
                f"(energy {(1 - found**2) / shot:.3f}×)  flat {flat:.4f}"
            )


# --- HRA ------------------------------------------------------------------------------------------


def chains(quick: bool) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """Weights turned by a chain: a random one, and pairs that cancel but for an angle."""
    for o, i in ((256, 256), (512, 512), (1024, 1024), (320, 2880))[: 2 if quick else 4]:
        base = torch.randn(o, i) / i**0.5
        yield f"{o}×{i} random chain", base, HRA(torch.randn(i, 8)).fold(base), 8
        for angle in (1e-1, 1e-2, 1e-3):
            u = torch.randn(i, 4).repeat_interleave(2, 1) + angle * torch.randn(i, 8)
            yield f"{o}×{i} angles of {angle:g}", base, HRA(u).fold(base), 8


def bench_hra(pairs: list[Pair], quick: bool) -> None:
    print(
        "\nHRA: error, the limit of all orthogonal matrices, CPU seconds; ‖D‖/‖W‖ and what float32 storage alone leaves of D"
    )
    real = [(p.name, p.base, p.tuned, rank) for p in chosen(pairs) for rank in (8, 32)]
    for name, base, tuned, rank in [*chains(quick), *real]:
        start = time.process_time()
        found = hra.fit(base, tuned, Goal(rank=rank))
        cost = time.process_time() - start
        far = float((tuned - base).norm() / base.norm())
        limit = "–" if found.limit is None else f"{found.limit:.3g}"
        print(
            f"{name:36} r {rank:<3} error {found.error:<9.3g} limit {limit:<9} {cost:6.2f} s   "
            f"{far:.1e} {2**-24 / far / 3**0.5:.0e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=["lora", "hra", *PRODUCTS])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-real", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed {options.seed}", flush=True)
    pairs = [] if options.no_real else fine_tuned(options.seed, 20 if options.quick else 150)
    torch.manual_seed(options.seed)
    if "lora" in options.parts:
        bench_lora(pairs, options.rounds, options.quick)
        bench_tucker(pairs)
    if "hra" in options.parts:
        bench_hra(pairs, options.quick)
    real = {pair.name: (pair.tuned - pair.base).flatten(1) for pair in chosen(pairs)}
    for part in (name for name in PRODUCTS if name in options.parts):
        PRODUCTS[part](options.seed, real, options.quick)


if __name__ == "__main__":
    main()
