"""Weights before and after a full fine-tune, of two small models that are trained on the spot.

A byte language model learns the standard library's sources and then its documentation in English;
a convolutional denoiser learns a photograph and then a map of heights (both come with matplotlib).
About a minute and a half of one core; nothing is kept.

    python tools/bench/real_deltas.py --save deltas.safetensors     the differences, by layer
"""

from __future__ import annotations

import argparse
import copy
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, DEPTH, HEADS, CONTEXT = 256, 3, 4, 128
STEPS = 150  # of each training


class Pair(NamedTuple):
    name: str
    base: Tensor
    tuned: Tensor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = [
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.first(x)).chunk(3, -1)
        ]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class ByteModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, x: Tensor) -> Tensor:
        found = self.blocks(self.tokens(x) + self.places.weight[: x.shape[1]])
        logits: Tensor = self.head(self.norm(found))
        return logits


def denoiser() -> nn.Sequential:
    widths = [1, 64, 128, 128, 64, 1]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def code() -> Tensor:
    """Bytes of the standard library's modules."""
    import argparse as a
    import ast as b
    import asyncio.base_events as c
    import datetime as d
    import os as e
    import tarfile as f
    import typing as g

    return _bytes("".join(inspect.getsource(module) for module in (a, b, c, d, e, f, g)))


def prose() -> Tensor:
    """Bytes of the language's reference, as `help` shows it."""
    from pydoc_data.topics import topics

    return _bytes("\n".join(str(text) for text in topics.values()))


def photograph() -> Tensor:
    from matplotlib import cbook, image

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return _standard(torch.tensor(image.imread(file).astype("float32")).mean(-1))


def heights() -> Tensor:
    from matplotlib import cbook

    found = cbook.get_sample_data("jacksboro_fault_dem.npz")
    return _standard(torch.tensor(found["elevation"].astype("float32")))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def _standard(picture: Tensor) -> Tensor:
    return (picture - picture.mean()) / picture.std()


def next_byte(model: nn.Module, text: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - CONTEXT, (8,), generator=generator)
    lines = torch.stack([text[s : s + CONTEXT + 1] for s in starts.tolist()])
    return F.cross_entropy(model(lines[:, :-1]).flatten(0, 1), lines[:, 1:].flatten())


def noise(model: nn.Module, picture: Tensor, generator: torch.Generator) -> Tensor:
    tops = torch.randint(picture.shape[0] - 24, (8,), generator=generator).tolist()
    lefts = torch.randint(picture.shape[1] - 24, (8,), generator=generator).tolist()
    clean = torch.stack([picture[t : t + 24, s : s + 24] for t, s in zip(tops, lefts)])[:, None]
    added = 0.5 * torch.randn(clean.shape, generator=generator)
    return F.mse_loss(model(clean + added), added)


Loss = Callable[[nn.Module, Tensor, torch.Generator], Tensor]


def trained(model: nn.Module, loss: Loss, data: Tensor, rate: float, steps: int, seed: int) -> str:
    """AdamW with a warm-up and a linear fall; the first and the last loss."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    seen = []
    for step in range(steps):
        part = min((step + 1) / 20, 1 - step / steps)
        optimizer.param_groups[0]["lr"] = rate * part
        value = loss(model, data, generator)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen.append(float(value.detach()))
    return f"{seen[0]:.2f} → {sum(seen[-10:]) / len(seen[-10:]):.2f}"


def fine_tuned(seed: int, steps: int = STEPS) -> list[Pair]:
    """Every matrix and kernel of both models, before and after; says how the losses fell."""
    torch.manual_seed(seed)
    found = []
    for kind, model, loss, first, second in (
        ("text", ByteModel(), next_byte, code(), prose()),
        ("image", denoiser(), noise, photograph(), heights()),
    ):
        told = trained(model, loss, first, 1e-3, steps, seed)
        tuned = copy.deepcopy(model)
        again = trained(tuned, loss, second, 3e-4, steps, seed + 1)
        print(f"{kind}: pretrained, loss {told}; fine-tuned, loss {again}", flush=True)
        after = dict(tuned.named_parameters())
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and min(weight.shape[:2]) > 1:
                found.append(Pair(f"{kind}.{name}", weight.detach(), after[name].detach()))
    return found


if __name__ == "__main__":
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    pairs = fine_tuned(chosen.seed)
    save_file({p.name: (p.tuned - p.base).flatten(1).contiguous() for p in pairs}, chosen.save)
