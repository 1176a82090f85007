"""What the extraction of LoHa and LoKr reaches: `python tools/bench/extraction_products.py loha lokr`.

Deltas are drawn afresh from ``--seed``: true products with and without noise, normal and sparse
numbers, and those of ``--real FILE`` (safetensors: deltas (o, i) by name), as
`tools/bench/real_deltas.py --save FILE` makes them. One thread; the
seconds are the process's CPU time: trust the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from adaptsurgery.algorithms import loha, lokr
from adaptsurgery.nearest.goal import Fit, Goal
from adaptsurgery.nearest.kronecker import leading_vector, rearranged
from adaptsurgery_formats.lokr_cuts import peft_factorization

RATES = (1e-2, 3e-2, 1e-1)  # AdamW's, on a D of mean square 1
STEPS = 1000


T = TypeVar("T")


def seconds(work: Callable[..., T], *given: object) -> tuple[T, float]:
    """What ``work(*given)`` returns, and its CPU seconds."""
    start = time.process_time()
    done = work(*given)
    return done, time.process_time() - start


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def errors(delta: Tensor) -> list[float]:
    """Of the best LoRA of every rank, from 0."""
    squares = torch.linalg.svdvals(delta.double()).square()
    tails = squares.flip(0).cumsum(0).flip(0) / squares.sum()
    return [*tails.sqrt().tolist(), 0.0]


def fitted(module: object, delta: Tensor, goal: Goal, **own: object) -> tuple[Fit, float]:
    return seconds(lambda: module.fit(torch.zeros_like(delta), delta, goal, **own))  # type: ignore[attr-defined]


# --- LoHa ----------------------------------------------------------------------------------------


def true_loha(generator: torch.Generator, n: int, rank: int, noise: float = 0.0) -> Tensor:
    halves = [drawn(generator, n, rank) @ drawn(generator, rank, n) for _ in range(2)]
    delta, other = halves[0] * halves[1], drawn(generator, n, n)
    return delta + noise * delta.norm() / other.norm() * other


def recovery(generator: torch.Generator, quick: bool) -> None:
    print("\ntrue LoHa: found again (error < 1e-5, or at most the noise)")
    cases = [
        (2, 512, 20, 0.0),
        (3, 512, 20, 0.0),
        (4, 512, 40, 0.0),
        (8, 512, 10, 0.0),
        (8, 1024, 4, 0.0),
    ]
    cases += [(rank, 512, 10, noise) for rank in (4, 8) for noise in (0.1, 0.3)]
    for rank, n, count, noise in cases:
        most = noise / (1 + noise**2) ** 0.5 if noise else 1e-5
        runs = [
            fitted(loha, true_loha(generator, n, rank, noise), Goal(rank=rank), seed=s)
            for s in range(2 if quick else count)
        ]
        good = sum(fit.error <= most for fit, _ in runs)
        worst = max(fit.error for fit, _ in runs)
        times = [spent for _, spent in runs]
        print(
            f"  r {rank} at {n}², noise {noise:.0%}: {good}/{len(runs)}, worst error {worst:.1e}, "
            f"median {statistics.median(times):.2f} s, most {max(times):.2f} s"
        )


def drawn_deltas(generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    yield "normal 512²", drawn(generator, 512, 512)
    yield "normal 1024²", drawn(generator, 1024, 1024)
    kept = torch.rand(1024, 1024, generator=generator) < 0.01
    yield "sparse 1024²", drawn(generator, 1024, 1024) * kept


def against_lora(deltas: Mapping[str, Tensor], quick: bool) -> None:
    print("\nLoHa(r) between LoRA(r) and LoRA(2r), which has as many parameters")
    for name, delta in deltas.items():
        best = errors(delta)
        for rank in (4,) if quick else (4, 8, 16):
            fit, spent = fitted(loha, delta, Goal(rank=rank))
            one, two = best[rank], best[2 * rank]
            closed = (one - fit.error) / (one - two)
            print(
                f"  {name} r {rank}: LoRA(r) {one:.4f}, LoHa {fit.error:.4f}, LoRA(2r) {two:.4f}: "
                f"{closed:.0%} of the gap, {spent:.2f} s"
            )


def by_adamw(delta: Tensor, rank: int, rate: float, steps: int) -> float:
    """The relative error of the four factors after ``steps`` of AdamW on ‖D − D̂‖²/mn."""
    generator = torch.Generator().manual_seed(0)
    scaled = delta / delta.square().mean().sqrt()
    spread = rank**-0.25  # D̂ begins at D's own mean square
    sides = [drawn(generator, 2, size, rank) * spread for size in delta.shape]
    sides = [side.requires_grad_() for side in sides]
    optimiser = torch.optim.AdamW(sides, lr=rate, weight_decay=0.0)
    left = torch.tensor(1.0)
    for _ in range(steps):
        optimiser.zero_grad()
        left = (scaled - (sides[0] @ sides[1].mT).prod(0)).square().mean()
        left.backward()
        optimiser.step()
    return float(left.detach()) ** 0.5


def against_adamw(deltas: Mapping[str, Tensor], rank: int, quick: bool) -> None:
    steps = 20 if quick else STEPS
    print(f"\nagainst AdamW on the four factors, {steps} steps, the best rate of {RATES}, r {rank}")
    for name, delta in deltas.items():
        fit, ours = fitted(loha, delta, Goal(rank=rank))
        runs = [seconds(by_adamw, delta, rank, rate, steps) for rate in RATES]
        error, spent = min(runs)
        print(
            f"  {name}: {fit.error:.4f} in {ours:.2f} s, AdamW {error:.4f} in {spent:.2f} s "
            f"({spent / ours:.0f}× for one rate)"
        )


def loha_part(seed: int, real: Mapping[str, Tensor], quick: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    recovery(generator, quick)
    deltas = {**dict(drawn_deltas(generator)), **real}
    against_lora(deltas, quick)
    chosen = {"a true LoHa with 10 % noise, 1024²": true_loha(generator, 1024, 8, 0.1)}
    chosen |= {name: deltas[name] for name in ("normal 1024²", "sparse 1024²", *list(real)[:2])}
    against_adamw(chosen, 8, quick)


# --- LoKr ----------------------------------------------------------------------------------------


def cut_of(delta: Tensor, factor: int) -> tuple[int, int]:
    """(a, c) at a factor."""
    (a, _), (c, _) = (peft_factorization(n, factor) for n in delta.shape)
    return a, c


def true_lokr(
    generator: torch.Generator, n: int, factor: int, rank: int, noise: float = 0.0
) -> Tensor:
    a, b = peft_factorization(n, factor)
    inner = drawn(generator, b, rank) @ drawn(generator, rank, b)
    delta, other = torch.kron(drawn(generator, a, a), inner), drawn(generator, n, n)
    return delta + noise * delta.norm() / other.norm() * other


def exact_lokr(generator: torch.Generator) -> None:
    print("\ntrue LoKr: found again")
    for n, factor, rank in ((512, -1, 100), (1024, -1, 100), (1024, 8, 4), (1024, 16, 8)):
        fit, spent = fitted(
            lokr, true_lokr(generator, n, factor, rank), Goal(rank=rank), factor=factor
        )
        print(f"  {n}², factor {factor}, rank {fit.rank}: error {fit.error:.1e}, {spent:.3f} s")


def leading_of(delta: Tensor, a: int, c: int) -> Tensor:
    return leading_vector(rearranged(delta, a, c))


def against_svd(deltas: Mapping[str, Tensor], quick: bool) -> None:
    print("\nwhole factors: σ1² of the best, and the time of svd(R) over all of ours")
    for name, delta in deltas.items():
        for factor in (-1,) if quick else (-1, 16, 8):
            a, c = cut_of(delta, factor)
            r = rearranged(delta, a, c)
            _, theirs = seconds(torch.linalg.svd, r, False)
            best = float(torch.linalg.svdvals(r.double())[0]) ** 2
            vector, spent = seconds(leading_of, delta, a, c)
            found = float((vector @ r.double()).square().sum())
            print(
                f"  {name}, factor {factor}, R {tuple(r.shape)}: σ1² short by {1 - found / best:.1e}, "
                f"{spent:.3f} s, svd {theirs:.3f} s ({theirs / spent:.0f}×)"
            )


def naive_energy(delta: Tensor, a: int, c: int, rank: int) -> float:
    """‖D̂‖²/‖D‖² of the nearest Kronecker product with its w2 cut by an SVD."""
    r = rearranged(delta, a, c).double()
    u, _, _ = torch.linalg.svd(r, full_matrices=False)
    second = (u[:, 0] @ r).reshape(delta.shape[0] // a, -1)
    return float(torch.linalg.svdvals(second)[:rank].square().sum() / r.square().sum())


def against_two_steps(deltas: Mapping[str, Tensor], quick: bool) -> None:
    print("\nw2 of low rank: energy over that of the nearest Kronecker product and then its SVD")
    for name, delta in deltas.items():
        for factor, rank in ((8, 4),) if quick else ((4, 8), (8, 4), (16, 4)):
            fit, spent = fitted(lokr, delta, Goal(rank=rank), factor=factor)
            energy = 1 - fit.error**2
            naive = naive_energy(delta, *cut_of(delta, factor), rank)
            print(f"  {name}, factor {factor}, rank {rank}: {energy / naive:.3f}×, {spent:.3f} s")


def lokr_part(seed: int, real: Mapping[str, Tensor], quick: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    exact_lokr(generator)
    deltas = {"normal 1024²": drawn(generator, 1024, 1024), **real}
    against_svd(deltas, quick)
    noisy = {"a true LoKr with 30 % noise": true_lokr(generator, 512, 8, 4, 0.3)}
    against_two_steps({**noisy, **deltas}, quick)


PARTS: dict[str, Callable[[int, Mapping[str, Tensor], bool], None]] = {
    "loha": loha_part,
    "lokr": lokr_part,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="both if left out")
    parser.add_argument("--real", type=Path, help="deltas by name, in one safetensors file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="a little of each, to see that it runs"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    real: dict[str, Tensor] = {}
    if given.real is not None:
        from safetensors.torch import load_file

        real = {n: t.flatten(1).float() for n, t in load_file(given.real).items() if t.dim() > 1}
    for part in given.parts or PARTS:
        PARTS[part](given.seed, real, given.quick)


if __name__ == "__main__":
    main()
